"""Checkpoints that are written beside the training: one at a time, by a thread of every rank."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from exo_megatron.checkpoint.save import Save


class Saver:
    """The save that is under way, if there is one.

    What all ranks do for it they do between two steps; a thread only writes this rank's file. All
    ranks begin and end it at the same steps.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        """Take the function that is called after a save is in its place."""
        self._ended = ended
        self._save: Save | None = None
        self._thread: Thread | None = None

    @property
    def under_way(self) -> bool:
        """True from `begin` to `end`."""
        return self._save is not None

    @property
    def writing(self) -> bool:
        """True if this rank's thread has not written its file."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, save: Save) -> None:
        """Write what all ranks have begun to save."""
        self._save = save
        self._thread = Thread(target=save.write, name="save", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for the files of all ranks, and put the checkpoint in its place; nothing if no save is under way.

        Collective over the world. Raises what any rank's thread failed with.
        """
        save, self._save = self._save, None
        if save is None or self._thread is None:
            return
        self._thread.join()
        save.end()
        self._ended()
