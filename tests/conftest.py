"""Eight devices on one CPU, set before anything imports jax, so that no sharding test skips."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time is compiling: the machine code is not optimized, and is made by the emitters
# that XLA had before those of fusions. Each halves that time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
).strip()
