"""TensorBoard events, written at once by the thread that has them.

torch's and TensorBoard's writers use a thread of their own, which prints a traceback when the disk is full
and tells the training loop later or never.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

FORMAT = "brain.Event:2"


class EventsWriter:
    """A writer of a new events file in `directory`, which is made.

    TensorBoard shows none of the events of earlier files from `first_step` on. Raises OSError where a write fails.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(directory / name, "wb")  # noqa: SIM115 - kept open over the run, see close
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), step=first_step, file_version=FORMAT))
        started = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first_step, session_log=started))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()
