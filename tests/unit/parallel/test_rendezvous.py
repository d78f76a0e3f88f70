"""A rank that finds no rank 0, or no address or port for it, says so in its time."""

from __future__ import annotations

import socket
import time

import pytest

from exo_megatron.errors import TopologyError, WorldError
from exo_megatron.parallel.launch import Launch
from exo_megatron.parallel.rendezvous import meet


def test_a_host_without_an_address_is_wrong_input() -> None:
    begun = time.monotonic()
    for rank in (0, 1):
        with pytest.raises(
            TopologyError, match=r"MASTER_ADDR: the host 'no\.such\.host\.invalid' of rank 0"
        ) as refusal:
            meet(Launch("torchrun", rank, 2, rank, "no.such.host.invalid", 29999), 1.0)
        assert refusal.value.exit_code == 2
    assert time.monotonic() - begun < 20


def test_no_rank_0_and_a_port_that_is_taken_are_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(WorldError, match=f"no world at 127.0.0.1:{port}: rank 0 cannot be reached") as refusal:
            meet(Launch("torchrun", 1, 2, 1, "127.0.0.1", port), 1.0)
        assert refusal.value.exit_code == 1
        taken.listen()
        with pytest.raises(WorldError, match=f"no world at 127.0.0.1:{port}: the store of the ranks fails"):
            meet(Launch("torchrun", 0, 2, 0, "127.0.0.1", port), 1.0)
