"""Long processes, several at a time, that survive the process which started them.

A job is a folder and a command that can be started again: it goes on where it was, and says by
code 42 that it was told to stop before its end.
"""

import collections
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, TextIO, TypeVar

from tqdm import tqdm

from blip2_jax.runtime.distributed import PREEMPTED
from blip2_jax.runtime.progress import Progress

LOG_FILE = "log.txt"
_TICK = 0.1  # seconds between two looks at the processes


class Busy(RuntimeError):
    """Another process is at work there."""


class Job(Protocol):
    """What is to be run."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def workdir(self) -> Path:
        """Its folder."""

    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""


AnyJob = TypeVar("AnyJob", bound=Job)
Command = tuple[list[str], Mapping[str, str]]  # arguments, and additions to the environment


def run_all(
    jobs: Sequence[AnyJob],
    workers: int,
    command: Callable[[AnyJob, int], Command],
    label: str = "",
) -> tuple[dict[str, int], bool]:
    """Runs all jobs that are not finished, `workers` at a time, with a progress line.

    A job that leaves with code 42 is started again; one that fails is reported and stops no
    other. On SIGTERM or Ctrl-C all are told to save themselves; on a second one they are killed.

    Args:
      jobs: by name, and each in a folder of its own, which gets their output as `log.txt`.
      workers: how many at a time.
      command: of a job on a worker (from 0): its arguments, and what to add to the environment.
      label: stands before the progress.

    Returns:
      The exit code of each job that failed (negative: killed by that signal), and whether the
      whole was told to stop.
    """
    waiting = collections.deque(job for job in jobs if not job.is_finished())
    running: dict[int, _JobProcess[AnyJob]] = {}
    failed: dict[str, int] = {}
    done, told = len(jobs) - len(waiting), 0
    progress = Progress(len(jobs), initial=done, label=label, unit="run", active=True)
    with _Stop() as stop, progress:
        while running or (waiting and not stop.count):
            for worker in range(workers):
                if worker not in running and waiting and not stop.count:
                    job = waiting.popleft()
                    running[worker] = _JobProcess(job, *command(job, worker))
            if stop.count > told:
                told = stop.count
                tqdm.write(f"Stopping {len(running)} runs ...", file=sys.stderr)
                for process in running.values():
                    process.send(signal.SIGTERM if told == 1 else signal.SIGKILL)
            ended = 0
            for worker, process in list(running.items()):
                code = process.poll(give_up=stop.count > 0)
                if code is None:
                    continue
                del running[worker]
                if code == PREEMPTED and not stop.count:
                    waiting.appendleft(process.job)
                elif code and not stop.count:
                    failed[process.job.name] = code
                    tqdm.write(f"{process.job.name} failed with code {code}.", file=sys.stderr)
                    ended += 1
                else:
                    ended += code == 0
            progress.update(ended, running=len(running), failed=len(failed))
            time.sleep(_TICK)
    return failed, stop.count > 0


@contextlib.contextmanager
def only_one(file: Path, message: str) -> Iterator[None]:
    """Lets one process at a time through.

    Raises:
      Busy: with `message`, when another one is inside.
    """
    with open(file, "a") as lock:
        if not _lock(lock):
            raise Busy(message)
        yield


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _JobProcess(Generic[AnyJob]):
    """A job that was started, in a process group of its own.

    Its processes hold a lock as long as they live. If the one that started them was killed, they
    go on without it: a later one finds the lock taken, waits, and then looks what is left to do.
    """

    def __init__(self, job: AnyJob, arguments: list[str], environment: Mapping[str, str]):
        self.job, self._arguments, self._environment = job, arguments, environment
        self._process: subprocess.Popen[bytes] | None = None
        job.workdir.mkdir(parents=True, exist_ok=True)
        self._held = open(job.workdir / "run.lock", "a")
        if not self._start():
            text = f"{job.name} goes on from an earlier start; waiting for it."
            tqdm.write(text, file=sys.stderr)

    def _start(self) -> bool:
        if not _lock(self._held):
            return False
        if not self.job.is_finished():
            with open(self.job.workdir / LOG_FILE, "a") as log:
                self._process = subprocess.Popen(
                    self._arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self._environment},
                    pass_fds=[self._held.fileno()],
                    start_new_session=True,  # Ctrl-C is ours to pass on, as SIGTERM
                )
        return True

    def poll(self, give_up: bool) -> int | None:
        """The exit code, or None while the job goes on; a job to wait for can be given up."""
        if self._process is None and not self._start():
            code = PREEMPTED if give_up else None
        else:
            code = 0 if self._process is None else self._process.poll()
        if code is not None:
            self._held.close()
        return code

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to all processes of the job."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class _Stop:
    """Counts how often we were told to stop."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "_Stop":
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, *_: object) -> None:
        self.count += 1
