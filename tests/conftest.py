"""Eight devices on one CPU, caches of a session, what tests may not do, and where their time goes.

The environment is set before anything imports jax. Programs that tests start inherit it.

Tests without a mark are unit tests: they start no process. `integration` has what does, and what
trains, decodes or differentiates whole models; `docs` the README and the reference; `full_size`
what takes minutes and gigabytes. No test writes outside its own folders and the session's cache.
"""

import atexit
import collections
import os
import shutil
import sys
import tempfile
import traceback
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

FLAGS = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # Most of a test's time is compiling; without optimizing it takes half as long.
    "--xla_backend_optimization_level=0",
    # Eight devices wait for each other on few cores, on machines that others may be using; XLA
    # takes 40 seconds of waiting for a deadlock, and aborts the process.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # jax 0.10 has the older generator of fused loops still, which compiles twice as fast.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

# Caches of this session, not the user's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = tempfile.mkdtemp(prefix="blip2-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["BLIP2_CACHE"] = os.environ["XDG_CACHE_HOME"] = cache
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(cache, "inductor")  # PyTorch's

seconds = collections.Counter()  # of tracing and compiling, in this process


def pytest_addoption(parser):
    parser.addoption(
        "--compiling",
        action="store_true",
        help="at the end: how much of each module's time was spent on tracing and compiling",
    )


def pytest_configure(config):
    if config.getoption("compiling"):
        if not hasattr(config, "workerinput"):
            config.pluginmanager.register(Costs())
        from jax import monitoring

        events = ("trace_duration", "to_mlir_module_duration", "backend_compile_duration")
        monitoring.register_event_duration_secs_listener(
            lambda event, duration, **_: (
                seconds.update(compiling=duration) if event.endswith(events) else None
            )
        )


def pytest_collection_modifyitems(config, items):
    """Several workers take the long files first, so that none is left with one at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not any(mark.name in TIERS for mark in item.parent.own_markers))


TIERS = ("integration", "docs", "full_size")

# -------------------------------------------------------------------------- what tests may not do

STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

started, written = [], []  # (what, where in the code), by this process since its last test


def watch(event, arguments):
    """Notes what starts a process, and what writes where a test has no business."""
    if event in STARTS:
        started.append((event, str(arguments[0]) if arguments else "", traceback.extract_stack()))
    elif event in CHANGES and arguments[-1] == -1:  # else the path is relative to an open folder
        # Of two names the second is the new one.
        paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
        note_write(event, paths[-1])
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITE:
        note_write(event, arguments[0])


def note_write(event, path):
    if isinstance(path, (str, bytes, os.PathLike)):  # else a file that is open already
        path = os.path.realpath(os.fsdecode(path))
        mine = path == TEMPORARY or path.startswith(ALLOWED)  # itself: of files without a name
        if not mine and "__pycache__" not in path:
            written.append((event, path, traceback.extract_stack()))


# Temporary folders (pytest's, and those of tempfile, whose names begin with tmp), this session's.
TEMPORARY = os.path.realpath(tempfile.gettempdir())
ALLOWED = (
    os.path.join(TEMPORARY, "pytest-of-"),
    os.path.join(TEMPORARY, "tmp"),
    os.path.realpath(os.environ["BLIP2_CACHE"]),
    str(Path(__file__).resolve().parent.parent / ".pytest_cache"),
    "/dev/",
    "/proc/",
)
sys.addaudithook(watch)


@pytest.fixture(autouse=True)
def only_what_a_test_may_do(request, monkeypatch):
    start = BaseProcess.start
    monkeypatch.setattr(
        BaseProcess, "start", lambda process: (watch("os.fork", [process]), start(process))[1]
    )
    started.clear(), written.clear()
    yield
    marks = {mark.name for mark in request.node.iter_markers()}
    faults = written[:]
    if not marks & set(TIERS):
        faults += started
    if faults:
        event, what, stack = faults[0]
        lines = "".join(traceback.format_list(stack[-8:-1]))
        pytest.fail(
            f"{event} of {what}: a test writes to its own folders only, and one without the mark "
            f"integration starts no process.\n{lines}"
        )


# ---------------------------------------------------------------------------- where the time goes


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Each report says what was compiled since the one before it."""
    item.user_properties[:] = [("compiling", seconds.pop("compiling", 0.0))]
    return (yield)


class Costs:
    """Seconds of each module, and how many of them were spent on compiling."""

    def __init__(self):
        self.whole, self.compiling = collections.Counter(), collections.Counter()

    def pytest_runtest_logreport(self, report):
        module = report.nodeid.partition("::")[0]
        self.whole[module] += report.duration
        self.compiling[module] += dict(report.user_properties).get("compiling", 0.0)

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("seconds a module, of which tracing and compiling")
        for module, whole in self.whole.most_common():
            terminalreporter.line(f"{whole:8.1f} {self.compiling[module]:8.1f}  {module}")
        totals = sum(self.whole.values()), sum(self.compiling.values())
        terminalreporter.line(f"{totals[0]:8.1f} {totals[1]:8.1f}  in all")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_module():
    """The programs of all tests together would fill gigabytes, and a process has 65,530 maps."""
    yield
    import jax

    jax.clear_caches()
