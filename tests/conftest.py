"""Eight devices on one CPU, set before anything imports jax, so that no sharding test skips."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Most of a test's time is compiling; without optimizing it takes half as long.
        "--xla_backend_optimization_level=0",
        # Eight devices wait for each other on few cores, on machines that others may be using; XLA
        # takes 40 seconds of waiting for a deadlock, and aborts the process.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
).strip()


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_module():
    """The programs of all tests together would fill gigabytes, and a process has 65,530 maps."""
    yield
    import jax

    jax.clear_caches()
