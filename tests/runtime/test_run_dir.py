"""Which checkpoint a name stands for, while the run may be at work."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.runtime import checkpoint, run_dir
from blip2_jax.runtime.checkpoint import Checkpointer, CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of six steps that has saved 2 and 4."""
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        for step in (2, 4):
            state = {"params": {"a": {"kernel": jnp.full((4, 3), float(step))}, "b": jnp.ones(2)}}
            checkpointer.save(step, state, {"config": {"steps": 6}, "step": step})
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "mine")


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_workdir_stands_for_its_newest_checkpoint_and_each_has_a_name(run, monkeypatch):
    before = files(run)
    assert run_dir.find(run).step == 4
    assert run_dir.find(f"{run}/checkpoints/").step == 4
    assert run_dir.find(f"{run}/checkpoints/2/").step == 2
    monkeypatch.chdir(run)
    assert run_dir.find(".").step == 4
    assert str(run_dir.find("checkpoints/2").folder) == "checkpoints/2"  # as it was named
    os.symlink("checkpoints/2", "best")
    assert run_dir.find("best").step == 2
    (run / "best").unlink()
    monkeypatch.chdir(run / "checkpoints" / "4")
    assert run_dir.find(".").step == 4 and run_dir.find("../2").step == 2
    assert files(run).keys() == before.keys()


def test_checkpoints_are_read_by_relative_paths_too(run, monkeypatch):
    monkeypatch.chdir(run)
    assert checkpoint.read_extra("checkpoints/2")["step"] == 2
    assert "params/b" in checkpoint.saved_shapes("checkpoints/2")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"b": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=device)}
    copied = checkpoint.restore_params("checkpoints/2", abstract)
    np.testing.assert_array_equal(copied["b"], np.ones(2))


def test_a_copied_checkpoint_stands_for_itself(run, tmp_path):
    kept = shutil.copytree(run / "checkpoints" / "2", tmp_path / "best")
    original, copied = run_dir.find(run / "checkpoints" / "2"), run_dir.find(kept)
    assert (copied.step, copied.steps, copied.workdir) == (2, 6, None)
    assert copied.stamp == original.stamp != run_dir.find(run).stamp
    assert (original.name, copied.name) == ("mine@2", "best@2")


def test_what_a_run_is_saving_meanwhile_is_neither_read_nor_touched(run):
    (run / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "broken-5").mkdir()
    before = files(run)
    assert run_dir.find(run).step == 4
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"b": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)}
    params = checkpoint.restore_params(run / "checkpoints" / "4", wanted)
    np.testing.assert_array_equal(params["b"], np.ones(2))
    assert files(run) == before


def test_what_is_not_there_is_said_with_what_there_is(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are .* steps 2, 4"):
        run_dir.find(run / "checkpoints" / "3")
    shutil.rmtree(run / "checkpoints")
    assert run_dir.find(run) is None
    (run / "checkpoints").mkdir()
    run_dir.RunDir(run).lock_file.touch()
    with pytest.raises(CheckpointError, match="has saved no checkpoint yet"):
        run_dir.find(run)
    assert run_dir.find(tmp_path / "none") is None and run_dir.find("owner/name") is None
    (tmp_path / "other" / "checkpoints" / "5").mkdir(parents=True)  # of another program
    assert run_dir.find(tmp_path / "other") is None


@pytest.mark.parametrize("text", ["", "{", "\0" * 100, '{"config"'])
def test_a_damaged_document_is_named_with_the_remedy(run, text):
    (run / "checkpoints" / "4" / "extra" / "metadata").write_text(text)
    with pytest.raises(CheckpointError, match="checkpoints/4 cannot be read .*checkpoints/STEP"):
        run_dir.find(run)
    assert run_dir.find(run / "checkpoints" / "2").step == 2


def test_damaged_arrays_are_named_with_the_remedy(run):
    for file in (run / "checkpoints" / "4" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            os.truncate(file, file.stat().st_size // 2)
    wanted = {"b": jax.ShapeDtypeStruct((2,), jnp.float32)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: x.update(sharding=sharding), wanted)
    with pytest.raises(CheckpointError, match="checkpoints/4 cannot be read"):
        checkpoint.restore_params(run / "checkpoints" / "4", wanted)


@pytest.mark.parametrize("text", ["", '{"recipe": "stage1", "config"', "\0\0\0", "[]", "\xff"])
def test_a_damaged_done_json_is_no_end_and_no_error(tmp_path, capsys, text):
    (tmp_path / "done.json").write_bytes(text.encode("latin-1"))
    assert run_dir.RunDir(tmp_path).read_finished() is None
    assert "done.json is damaged" in capsys.readouterr().err
    run_dir.RunDir(tmp_path).write_finished({"recipe": "stage1"})
    assert run_dir.RunDir(tmp_path).read_finished() == {"recipe": "stage1"}
    assert json.loads((tmp_path / "done.json").read_text()) == {"recipe": "stage1"}
