import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from blip2_jax.runtime import distributed, state
from blip2_jax.runtime.run_dir import RunDir


def test_one_machine_never_waits_for_others(monkeypatch):
    monkeypatch.delenv(distributed.ENABLE, raising=False)
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    assert distributed.is_first_process()
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {},
            "cannot tell who they are .*JAX_COORDINATOR_ADDRESS.*none of them.*BLIP2_DISTRIBUTED=0",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "here: JAX_COORDINATOR_ADDRESS=localhost:1"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost",
                "JAX_NUM_PROCESSES": "1",
                "JAX_PROCESS_ID": "0",
            },
            "cannot tell who they are",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_NUM_PROCESSES": "1",
                "JAX_PROCESS_ID": "7",
            },
            "cannot tell who they are",
        ),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a whole number"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'; it must be a whole number"),
        ({"SLURM_JOB_ID": "3"}, "cannot tell who they are"),
        (
            {"SLURM_JOB_ID": "3", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"},
            "cannot tell",
        ),
        (
            {
                "SLURM_JOB_ID": "3",
                "SLURM_STEP_NODELIST": "a[1-2]",
                "SLURM_NTASKS": "x",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
            },
            "cannot tell",
        ),
    ],
)
def test_hosts_that_are_asked_for_and_not_named_are_one_message(monkeypatch, environment, message):
    for name in os.environ:
        if name.startswith(("SLURM_", "JAX_COORD", "JAX_NUM_P", "JAX_PROCESS", "OMPI_")):
            monkeypatch.delenv(name)
    for name, value in {distributed.ENABLE: "1", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()
    assert not jax.distributed.is_initialized()


def test_the_environment_must_say_0_or_1(monkeypatch):
    monkeypatch.setenv(distributed.ENABLE, "yes")
    with pytest.raises(ValueError, match="BLIP2_DISTRIBUTED is 'yes'; it must be 0 or 1"):
        distributed.initialize()


def test_a_termination_signal_asks_the_loop_to_stop():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.Preemption() as preemption:
        assert not preemption.should_stop()
        preemption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.should_stop()
        assert preemption.requested
        with pytest.raises(distributed.Stopped):
            preemption.check()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def cache_setting():
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_enable_compilation_cache", before[1])


def test_the_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch, cache_setting):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert distributed.setup_compilation_cache() == str(tmp_path / "blip2_jax" / "xla")
    assert (tmp_path / "blip2_jax" / "xla").is_dir()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    assert distributed.setup_compilation_cache() == str(tmp_path / "mine")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


@pytest.mark.integration
def test_several_processes_on_cpus_compile_for_themselves(tmp_path, monkeypatch, cache_setting):
    """A cached program's collectives may come in another order than those of a compiled one."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    distributed.setup_compilation_cache(str(tmp_path))
    assert not jax.config.jax_enable_compilation_cache


def run_on_two_hosts(workdir):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("two_hosts.py")
    hosts = []
    for index in range(2):
        environment = os.environ | {
            "PYTHONPATH": str(script.parents[2]),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
            distributed.ENABLE: "1",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, str(script), str(workdir)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        hosts.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        results = [host.communicate(timeout=120) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (_, errors) in zip(hosts, results, strict=True):
        assert host.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in results]


@pytest.mark.integration
def test_two_hosts_work_as_one(tmp_path):
    first, second = run_on_two_hosts(tmp_path)
    assert (first["index"], second["index"]) == (0, 1)
    assert first["extra"] == second["extra"] == {"hosts": 2}
    alone = state.fingerprint({"x": jnp.arange(64.0).reshape(8, 8)})
    assert set(first["fingerprints"] + second["fingerprints"]) == {alone}
    assert RunDir(tmp_path).read_metrics() == [{"step": 1, "mean": 31.5}]
    # Only the first was told; both leave after the same step.
    assert first["told_to_stop"] and second["told_to_stop"]
    assert first["stopped_at"] == second["stopped_at"]
    # Where each works at its own pace, one that is told stops both, also one that waits.
    assert first["alone"] == {"met": 1, "stopped": True, "rounds": 3}
    assert second["alone"] == {"met": 1, "stopped": True, "rounds": 0}
