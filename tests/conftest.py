"""Eight devices on one CPU, caches of a session, and where the tests' time goes.

The environment is set before anything imports jax. Programs that tests start inherit it.
"""

import atexit
import collections
import os
import shutil
import tempfile

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
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

# Caches of this session, not the user's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = tempfile.mkdtemp(prefix="blip2-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["BLIP2_CACHE"] = os.environ["XDG_CACHE_HOME"] = cache

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
