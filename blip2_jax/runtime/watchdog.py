"""Ends a process that shows no sign of life for too long.

A peer that hangs in a collective, or a disk or reader that never answers, would otherwise hold the
machines for ever. A step is a sign of life, and so is every piece of what takes long beside steps:
an archive's record that is indexed, a tensor that is loaded, a batch that is evaluated.
"""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator

_current: "Watchdog | None" = None


class Watchdog:
    """Ends this process when `alive` is not called for too long, with the stacks of all threads.

    It counts in C, on a monotonic clock, and needs no interpreter lock. A process that it ends
    sends no heartbeats any more, which ends the others. There is one in a process.

    Args:
      seconds: between two signs of life; 0: no watchdog.
    """

    def __init__(self, seconds: float):
        if seconds < 0:
            raise ValueError(f"config.faults.step_timeout is {seconds}; 0 turns it off.")
        self._seconds = seconds
        self._armed = -float("inf")

    def __enter__(self) -> "Watchdog":
        global _current
        _current = self
        self.alive()
        return self

    def __exit__(self, *exc: object) -> None:
        global _current
        _current = None
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Restarts the count."""
        now = time.monotonic()
        # Each arming starts a thread: at most a hundred in the time that is watched.
        if self._seconds and now - self._armed > self._seconds / 100:
            self._armed = now
            to = sys.__stderr__ or 2  # its descriptor, where Python has none of its own
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=to)


def alive() -> None:
    """A sign of life of this process; without a watchdog, nothing. It costs next to nothing."""
    watchdog = _current
    if watchdog is not None:
        watchdog.alive()


@contextlib.contextmanager
def waiting_for_others(every: float = 1.0) -> Iterator[None]:
    """Keeps this process alive while it waits for others, which have their own watchdogs.

    Only for a place where all processes meet and none of them waits for anything else.

    Args:
      every: seconds between two signs of life.
    """
    done = threading.Event()

    def tick() -> None:
        while not done.wait(every):
            alive()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
