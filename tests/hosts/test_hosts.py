"""A run is the same on any number of processes, started in any way, on any order of devices.

What needs several processes is in two sets of two of them and one of four, with four devices.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import save_file

import tests.data.made as made
import tests.tiny as tiny
from blip2_jax import cli, recipe, train
from blip2_jax.models import blip2
from blip2_jax.models.opt import OPT, OPTConfig
from blip2_jax.models.vit import ViT, ViTConfig
from blip2_jax.runtime import distributed
from blip2_jax.runtime.jsonl import read_jsonl
from blip2_jax.weights import checkpoint, huggingface, lavis, tables, transfer
from configs.eval.default import task
from tests.hosts import process

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
VIT = ViTConfig(16, 8, 24, 2, 2, 32, "gelu", 1e-6, "qvo", True, False)
LLM = OPTConfig(208, 16, 2, 2, 32, 64)
WORDS = 189  # that BERT knows; the Q-Former has one more
SQUARE = {"data": 2, "fsdp": 2, "tensor": 1}  # hosts share out the rows
WIDE = {"data": 1, "fsdp": 2, "tensor": 2}  # and parameters; of four hosts, two have the same rows
STEPS = 5


def params_of(module) -> dict:
    return nnx.to_pure_dict(nnx.state(module))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, towers and a BERT on disk."""
    root = tmp_path_factory.mktemp("world")
    made.prepare_pairs(root / "data", train=40, test=10)
    huggingface.save(root / "vit", VIT, params_of(ViT(VIT, rngs=nnx.Rngs(0))))
    huggingface.save(root / "llm", LLM, params_of(OPT(LLM, rngs=nnx.Rngs(1))))
    model = blip2.make_model(recipe.model_config(config(root)), rngs=nnx.Rngs(2))
    qformer = transfer.leaves_of(params_of(model)["qformer"])
    table = tables.bert_text(2)
    taken = {path: qformer[path] for row in table.rows for path in row.ours}
    tensors = dict(transfer.tensors_of(table, taken))
    name = "embeddings.word_embeddings.weight"
    tensors[name] = tensors[name][:WORDS]
    (root / "bert").mkdir()
    save_file(tensors, root / "bert" / "model.safetensors")
    (root / "bert" / "config.json").write_text("{}")
    return root


def config(world, stage="stage1", **changes):
    """A tiny run with dropout, drawn negatives, crops and drawn captions; stage 1 is scored."""
    retrieval = task("retrieval", "tfds", "test", str(world / "data"), rerank=2, captions=1)
    retrieval.data.first = 5
    return tiny.config_of_files(
        world,
        stage,
        **{
            "steps": STEPS,
            "checkpoint.every": 2,
            "log.every": 1,
            "eval.every": STEPS,
            "eval.batch_size": 4,
            "eval.tasks_batch_size": 4,
            "evals": ConfigDict({"pairs": retrieval} if stage == "stage1" else {}),
            "init.bert": str(world / "bert") if stage == "stage1" else "",
            **{f"mesh.{axis}": size for axis, size in SQUARE.items()},
            **changes,
        },
    )


def frozen(config):
    return cli.config_from_json(cli.config_to_json(config))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """The folder of the runs on one process, by stage."""
    folder = tmp_path_factory.mktemp("alone")
    for stage in ("stage1", "stage2"):
        with process.devices(range(4)):
            assert train.train(frozen(config(world, stage)), folder / stage) == 0
    return folder


@pytest.fixture(scope="module")
def starts(world, alone):
    """Every way to start: name -> (config, workdir with a run to resume or none)."""
    (world / "models").mkdir()
    sizes = recipe.model_config(config(world))
    params = params_of(blip2.make_model(sizes, rngs=nnx.Rngs(7)))
    hub, native, original = (world / "models" / name for name in ("hub", "native", "lavis.pth"))
    huggingface.save_blip2(hub, sizes, params)
    checkpoint.save_native(native, sizes, params)
    lavis.save(original, sizes, params, with_vit=False)
    tuned = ("ln_vision", "query_tokens", "qformer", "language_projection", "vit", "llm_lora")
    none = world / "none"
    return {
        "bert": (config(world), none / "bert"),
        "resumed": (config(world), alone / "stage1"),
        "hub": (config(world, **{"init.checkpoint": str(hub)}), none / "hub"),
        "native": (config(world, **{"init.checkpoint": str(native)}), none / "native"),
        "lavis": (config(world, **{"init.checkpoint": str(original)}), none / "lavis"),
        "run": (
            config(world, "stage2", **{"init.checkpoint": str(alone / "stage1")}),
            none / "run",
        ),
        "towers": (
            config(world, "stage2", trainable=tuned, **{"model.llm.lora.rank": 2}),
            none / "towers",
        ),
    }


def work(folder: Path, count: int, jobs: dict[str, dict]) -> list[subprocess.Popen]:
    """Runs jobs in processes that work as one, and returns them when they have ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = []
    for name, job in jobs.items():
        files.append(folder / f"{name}.{count}.json")
        files[-1].write_text(json.dumps({**job, "config": cli.config_to_json(job["config"])}))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={4 // count}"),
        distributed.ENABLE: "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    command = [sys.executable, process.__file__, *map(str, files)]
    hosts = []
    for index in range(count):
        alike = {"env": environment | {"JAX_PROCESS_ID": str(index)}, "text": True, "cwd": ROOT}
        hosts.append(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **alike)
        )
    try:
        for host in hosts:
            host.errors = host.communicate(timeout=900)[1]
    finally:
        for host in hosts:
            host.kill()
    return hosts


@pytest.fixture(scope="module")
def started(starts, tmp_path_factory):
    """The folder of what two processes have started from."""
    folder = tmp_path_factory.mktemp("started")
    jobs = {}
    for name, (start, workdir) in starts.items():
        start.mesh.update(WIDE)
        out = str(folder / f"{name}.npz")
        jobs[name] = {"kind": "start", "config": start, "workdir": str(workdir), "out": out}
    hosts = work(folder, 2, jobs)
    assert [host.returncode for host in hosts] == [0] * 2, hosts[0].errors
    return folder


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """What two processes did: differ, train stage 1 on permuted devices, die in stage 2."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {}
    refused = {"kind": "refused", "config": config(world), "workdir": str(folder / "refused")}
    for name, change in (("seed", {"seed": 7}), ("data", {"data.dir": str(world / "none")})):
        odd = cli.config_to_json(config(world, **change))
        jobs[name] = {**refused, "odd": odd, "out": str(folder / name)}
    train = {"kind": "train", "config": config(world), "devices": [0, 2, 1, 3]}
    jobs["permuted"] = {**train, "workdir": str(folder / "permuted")}
    killed = {"config": config(world, "stage2"), "workdir": str(folder / "killed"), "kill": 3}
    jobs["killed"] = {**train, **killed}
    hosts = work(folder, 2, jobs)
    assert [host.returncode for host in hosts] == [-signal.SIGKILL] * 2, hosts[0].errors
    return folder


@pytest.fixture(scope="module")
def four(world, tmp_path_factory):
    """What four processes did, of which two at a time hold the same rows."""
    folder = tmp_path_factory.mktemp("four")
    wide = config(world, **{f"mesh.{axis}": size for axis, size in WIDE.items()})
    hosts = work(
        folder, 4, {"wide": {"kind": "train", "config": wide, "workdir": str(folder / "wide")}}
    )
    assert [host.returncode for host in hosts] == [0] * 4, hosts[0].errors
    return folder


def assert_same_run(workdir, whole):
    """Metrics of every step equal to 1e-5, the losses of the evaluation too."""
    read, wanted = (read_jsonl(w / "metrics.jsonl") for w in (workdir, whole))
    assert [line["step"] for line in read] == list(range(1, STEPS + 1))
    assert "eval/loss" in wanted[-1]
    for line, want in zip(read, wanted, strict=True):
        assert line == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_two_processes_on_permuted_devices_train_as_one(two, alone):
    assert_same_run(two / "permuted", alone / "stage1")
    assert "eval/pairs/text_to_image_r1" in read_jsonl(two / "permuted" / "metrics.jsonl")[-1]


def test_two_processes_that_were_killed_go_on_as_one(two, alone, world, capsys):
    assert len(read_jsonl(two / "killed" / "metrics.jsonl")) == 3
    with process.devices(range(4)):
        assert train.train(frozen(config(world, "stage2")), two / "killed") == 0
    assert "Resuming at step 2 of 5" in capsys.readouterr().out
    assert_same_run(two / "killed", alone / "stage2")


def test_processes_that_differ_are_refused_by_all(two):
    for index in range(2):
        message = (two / f"seed.{index}").read_text()
        assert "config.seed: 0 elsewhere, 7 here" in message and "Process 1 (" in message


def test_a_process_that_cannot_start_ends_all(two, world):
    own, other = ((two / f"data.{index}").read_text() for index in (1, 0))
    assert own.startswith(f"No prepared data in {world / 'none'}")
    assert "Process 1 (" in other and own.splitlines()[0] in other


def test_four_processes_that_share_rows_train_as_one(four, alone):
    assert_same_run(four / "wide", alone / "stage1")


KINDS = ("bert", "resumed", "hub", "native", "lavis", "run", "towers")


@pytest.mark.parametrize("kind", KINDS)
def test_every_start_is_the_same_on_a_mesh_of_one_process_and_of_two(kind, starts, started):
    assert starts.keys() == set(KINDS)
    config, workdir = starts[kind]
    config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
    want = process.start(frozen(config), str(workdir))
    read = np.load(started / f"{kind}.npz")
    assert set(read) == set(want)
    for path, array in want.items():
        np.testing.assert_allclose(read[path], array, rtol=1e-6, atol=1e-7, err_msg=path)
