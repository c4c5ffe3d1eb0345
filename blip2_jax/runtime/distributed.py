"""Several hosts, the compilation cache, and signals to stop."""

import dataclasses
import json
import os
import resource
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

ENABLE = "BLIP2_DISTRIBUTED"
FOREVER_MS = 30 * 24 * 3600 * 1000  # a month
POLL = 0.1  # seconds between two questions to the coordination service
ADDRESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PREEMPTED = 42  # exit code of a run that saved itself on SIGTERM: start it again to go on


def initialize(enabled: bool = False, *, start_timeout: int = 300, peer_timeout: int = 100) -> None:
    """Joins this process with those of the other hosts; before anything else touches a device.

    Addresses are found by JAX itself on Cloud TPU, GKE and SLURM; elsewhere set
    `JAX_COORDINATOR_ADDRESS=host:port`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. It is asked for,
    by the config or by `BLIP2_DISTRIBUTED=1` in the environment, and never tried unasked: on a
    plain machine it would wait for hosts that do not exist, and on a pod a failure must not turn
    into N separate runs.

    Args:
      enabled: the config's setting; the environment can only switch it on.
      start_timeout: seconds in which all processes must have joined; else those that have, end.
      peer_timeout: seconds without a sign of life from a process, killed or stopped, after which
        JAX ends all others with a message.

    Raises:
      ValueError: the environment does not say who the hosts are.
    """
    value = os.environ.get(ENABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{ENABLE} is {value!r}; it must be 0 or 1.")
    if (enabled or value == "1") and not jax.distributed.is_initialized():
        # JAX reads the address from the environment by itself, but not these two.
        count, index = (_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        try:
            jax.distributed.initialize(
                num_processes=count,
                process_id=index,
                initialization_timeout=start_timeout,
                heartbeat_timeout_seconds=peer_timeout,
                shutdown_timeout_seconds=peer_timeout,
            )
        except (ValueError, LookupError, RuntimeError) as error:
            known = {name: os.environ[name] for name in ADDRESSES if name in os.environ}
            given = [f"{name}={value}" for name, value in known.items()] or ["none of them"]
            raise ValueError(
                f"{ENABLE}=1 or config.distributed asks for several hosts, and JAX cannot tell who "
                f"they are ({type(error).__name__}: {error}). On Cloud TPU, GKE and under srun it "
                f"finds out by itself; elsewhere set {', '.join(ADDRESSES)} "
                f"(here: {', '.join(given)}), or {ENABLE}=0 to run on this host alone."
            ) from error


def _number(name: str) -> int | None:
    """An environment variable that holds a whole number; None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.strip().isdecimal():
        raise ValueError(f"{name} is {text!r}; it must be a whole number.")
    return int(text)


def process_index() -> int:
    """Which host this is, from 0."""
    return jax.process_index()


def process_count() -> int:
    """How many hosts there are."""
    return jax.process_count()


def is_first_process() -> bool:
    """True on the one host that writes logs and reports."""
    return jax.process_index() == 0


@dataclasses.dataclass(frozen=True)
class Host:
    """A process, among those that share work which each can do alone."""

    index: int
    count: int

    @classmethod
    def this(cls) -> "Host":
        """This process, of all that JAX knows."""
        return cls(jax.process_index(), jax.process_count())


def gather(value: Any) -> list[Any]:
    """What all processes have, in their order; each must call.

    Args:
      value: anything that JSON can hold.
    """
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(text.tobytes())]
    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.pad(text, (0, int(sizes.max()) - len(text)))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(x[:n].tobytes()) for x, n in zip(texts, sizes, strict=True)]


def all_agree(yes: bool) -> bool:
    """Whether all hosts say yes; each must call."""
    if jax.process_count() == 1:
        return yes
    return bool(multihost_utils.process_allgather(np.asarray(yes)).all())


def from_first(text: str) -> str:
    """The first host's text, on all hosts; each must call."""
    if jax.process_count() == 1:
        return text
    data = text.encode()
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data))))
    padded = np.frombuffer(data[:size].ljust(size), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()


def wait_for_all(name: str) -> None:
    """Waits until all processes are here, however long they take; one that dies ends the others.

    JAX's coordination service is asked, and no device is touched: a collective, which may have to
    connect first, gives up after a time of its own (30 seconds on CPUs).

    Args:
      name: of this barrier; each is used once.
    """
    client = jax_distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(name, FOREVER_MS)


def barrier(name: str) -> None:
    """Waits until all hosts are here."""
    multihost_utils.sync_global_devices(name)


def peak_memory_gb() -> float:
    """The most host memory that this process held so far, in 10**9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def setup_compilation_cache(directory: str | None = None) -> str:
    """Keeps compiled programs on disk, so that the second start of a recipe is quick.

    Several processes on CPUs do without: a program that one of them has read and another has
    compiled may come to its collectives in another order, and both would wait for ever.

    Args:
      directory: where; None means `JAX_COMPILATION_CACHE_DIR`, or else `blip2_jax/xla` in the
        user's cache folder (`XDG_CACHE_HOME`, `~/.cache`).

    Returns:
      The folder.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
    if directory is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        default = Path(home) / "blip2_jax" / "xla"
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default)
    if "://" not in directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # Dozens of small programs are a second or two of a short command's start.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", directory)
    return directory


class Stopped(Exception):
    """This process was told to stop, and has left its work where the same command goes on."""


class Preemption:
    """Handles SIGTERM, which spot machines, GKE and SLURM send some seconds before the end.

    The loop asks `should_stop()` after each step and between the batches of an evaluation, and
    leaves with a checkpoint saved. On several hosts all must stop at the same call, or the
    others would wait in a collective: there, JAX's own preemption service receives the signal
    and agrees on a step, and this object leaves the signal to it.
    """

    def __init__(self) -> None:
        self.requested = False
        self._asked = 0
        self._distributed = jax.distributed.is_initialized()
        self._previous = None
        if not self._distributed:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def should_stop(self) -> bool:
        """True once the run must save and leave; the same on every host.

        All hosts ask equally often, at the same places.
        """
        self._asked += 1
        if self._distributed and not self.requested:
            self.requested = multihost_utils.reached_preemption_sync_point(self._asked)
        return self.requested

    def check(self) -> None:
        """Asks `should_stop`; raises Stopped if so."""
        if self.should_stop():
            raise Stopped

    def close(self) -> None:
        """Restores the previous handler of the signal."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True


class StopSignal:
    """Handles SIGTERM for processes that share work which each does alone, at its own pace.

    Whichever receives it, all stop at their next `check`. Where they must exchange something they
    `meet` first, so that none waits for one that has stopped. (`Preemption` is for processes that
    do everything in step.) The processes learn of each other through JAX's coordination service,
    which needs no device and can be asked without waiting.
    """

    _number = 0  # of the object, the same on all hosts

    def __init__(self) -> None:
        StopSignal._number += 1
        self.requested = self._told = False
        self._meetings = 0
        self._prefix = f"blip2_jax/stop/{StopSignal._number}"
        # No public name leads to the service's table of keys and values.
        self._client = jax_distributed.global_state.client if jax.process_count() > 1 else None
        self._previous: Any = None

    def __enter__(self) -> "StopSignal":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # elsewhere Python allows no handler
            # On several hosts in place of JAX's own, which waits for all to do the same steps.
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def check(self) -> None:
        """Raises Stopped if this process was told to stop, or another one."""
        self._share()
        if self.requested:
            if jax.process_index() == 0:
                self._decide(self._meetings + 1, "stop")  # others may wait there
            raise Stopped

    def meet(self) -> None:
        """Waits for all processes, which must all come here.

        Raises:
          Stopped: one of them was told to stop before; on all of them, or on none.
        """
        if self._client is None:
            return
        self._meetings += 1
        meeting = f"{self._prefix}/{self._meetings}"
        self._client.key_value_set(f"{meeting}/here/{jax.process_index()}", "yes")
        if jax.process_index() == 0:  # one decides, so that all do the same
            while not (all_here := len(self._values(f"{meeting}/here")) == jax.process_count()):
                if self.requested:
                    break
                time.sleep(POLL)
                self._share()
            self._decide(self._meetings, "go on" if all_here else "stop")
        while not (decided := self._values(f"{meeting}/decided")):
            time.sleep(POLL)
            self._share()
        if decided != ["go on"]:
            self.requested = True
            raise Stopped

    def _decide(self, meeting: int, verdict: str) -> None:
        if self._client is not None:
            name = f"{self._prefix}/{meeting}/decided/0"
            self._client.key_value_set(name, verdict, allow_overwrite=True)

    def _share(self) -> None:
        """Tells the others of a request to stop, and learns of theirs."""
        if self._client is None:
            return
        if self.requested and not self._told:
            self._told = True
            self._client.key_value_set(f"{self._prefix}/told/{jax.process_index()}", "yes")
        elif not self.requested:
            self.requested = bool(self._values(f"{self._prefix}/told"))

    def _values(self, folder: str) -> list[str]:
        """The values of the service's keys in a folder."""
        if self._client is None:
            return []
        return [value for _, value in self._client.key_value_dir_get(folder)]

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
