"""Lines of JSON over a connection between ranks, and the socket that rank 0 listens on."""

from __future__ import annotations

import ipaddress
import json
import socket
from typing import Any

LONGEST_MESSAGE = 65536
BACKLOG = 4096


def listen(address: str) -> socket.socket:
    """Open a socket that listens on a free port: of this machine alone if the address of rank 0 is a loopback one."""
    if _is_loopback(address):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, 0), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=BACKLOG)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class Lines:
    """The messages that arrive over a connection, one JSON object a line."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> list[dict[str, Any]]:
        """Return the messages that are complete with these bytes. Raises ValueError for anything else."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_MESSAGE:
            raise ValueError("a line without an end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(each, dict) for each in messages):
            raise ValueError("not a message")
        return messages


def line_of(message: dict[str, Any]) -> bytes:
    """Return the bytes of a message."""
    return json.dumps(message).encode() + b"\n"
