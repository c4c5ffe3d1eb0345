import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip2_jax.runtime import mesh as mesh_lib
from blip2_jax.runtime import state
from blip2_jax.runtime.checkpoint import Checkpointer, CheckpointError, restore_params_into

TX = optax.adamw(1e-3)
TABLE = ((r"kernel$", ("embed", "mlp")), (r".", ()))
RULES = {"embed": "fsdp", "mlp": "tensor"}


def init_params(key):
    return {
        "a": {"kernel": jax.random.normal(key, (16, 8)), "bias": jnp.zeros(8)},
        "half": jax.random.normal(key, (4, 8), jnp.bfloat16),
    }


def placed_on(fsdp, tensor):
    mesh = mesh_lib.make_mesh({"data": -1, "fsdp": fsdp, "tensor": tensor})
    abstract = state.abstract_state(init_params, TX)
    params = mesh_lib.shardings(abstract["params"], TABLE, RULES, mesh)
    return state.with_shardings(abstract, state.state_shardings(abstract, params, TX, mesh))


@pytest.fixture(scope="module")
def abstract():
    return placed_on(fsdp=4, tensor=2)


@pytest.fixture(scope="module")
def train_state(abstract):
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    init = jax.jit(lambda key: state.init_state(init_params, TX, key), out_shardings=shardings)
    return init(jax.random.key(0))


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_fresh_process_restores_every_bit(tmp_path, abstract, train_state):
    extra = {"config": {"seed": 1}, "towers": {"vit": "0f"}, "data": {"position": [3, 4]}}
    with Checkpointer(tmp_path) as saver:
        assert saver.latest_step is None
        assert saver.save(7, train_state, extra)
    with Checkpointer(tmp_path) as reader:
        assert reader.latest_step == 7
        restored, document = reader.restore(abstract, expect={"towers": {"vit": "0f"}})
    assert document == extra
    assert_same_bits(restored, train_state)
    assert restored["params"]["a"]["kernel"].sharding == abstract["params"]["a"]["kernel"].sharding


def test_a_checkpoint_moves_to_another_mesh(tmp_path, train_state):
    other = placed_on(fsdp=2, tensor=1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, train_state, {})
        checkpointer.wait()
        restored, _ = checkpointer.restore(other)
    assert_same_bits(restored, train_state)
    kernel = restored["opt_state"][0].mu["a"]["kernel"]
    assert kernel.sharding == other["params"]["a"]["kernel"].sharding


def test_a_save_is_a_snapshot_even_if_its_buffers_are_donated(tmp_path, abstract, train_state):
    moving = jax.tree.map(lambda x: x + 0, train_state)
    expected = jax.device_get(train_state)
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, moving, {})
        for _ in range(5):
            moving = change(moving)
        jax.block_until_ready(moving)
        checkpointer.wait()
        restored, _ = checkpointer.restore(abstract)
    assert_same_bits(restored, expected)


def test_a_step_is_saved_once(tmp_path, train_state):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(1, train_state, {"first": True})
        assert not checkpointer.save(1, train_state, {"first": False})
        checkpointer.wait()
        assert checkpointer.extra() == {"first": True}


def test_old_steps_go_and_milestones_stay(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_every=4) as checkpointer:
        for step in range(1, 8):
            checkpointer.save(step, {"x": jnp.float32(step)}, {})
        checkpointer.wait()
        assert checkpointer.all_steps() == [4, 6, 7]


@pytest.mark.integration
def test_a_process_killed_while_saving_leaves_the_step_before(tmp_path, abstract):
    script = f"""
        import os, signal
        import jax.numpy as jnp
        from blip2_jax.runtime.checkpoint import Checkpointer
        checkpointer = Checkpointer({str(tmp_path)!r})
        checkpointer.save(1, {{"x": jnp.arange(3.0)}}, {{"step": 1}})
        checkpointer.wait()
        checkpointer.save(2, {{"x": jnp.ones(2**24)}}, {{"step": 2}})
        while not any(name.startswith("2") for name in os.listdir({str(tmp_path)!r})):
            pass  # it is saved in the background, and begins when it can
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -signal.SIGKILL
    assert [name for name in os.listdir(tmp_path) if name.startswith("2.")], "saving had not begun"
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step == 1
        restored, extra = checkpointer.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
        assert extra == {"step": 1}
        np.testing.assert_array_equal(restored["x"], np.arange(3.0))
        assert checkpointer.save(2, {"x": jnp.zeros(3)}, {})
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2]


def test_another_model_is_refused_with_all_differences(tmp_path, train_state):
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), train_state)
    wanted["params"]["a"]["kernel"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
    wanted["params"]["new"] = jax.ShapeDtypeStruct((), jnp.int32)
    del wanted["params"]["half"]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, train_state, {})
        checkpointer.wait()
        with pytest.raises(CheckpointError, match="does not fit the model") as error:
            checkpointer.restore(wanted)
    message = str(error.value)
    assert "params/a/kernel: float32[16, 8] saved, float32[16, 9] wanted" in message
    assert "params/new: nothing saved, int32[] wanted" in message
    assert "params/half: bfloat16[4, 8] saved, nothing wanted" in message


def test_another_recipe_is_refused_and_named(tmp_path, abstract, train_state):
    with Checkpointer(tmp_path) as checkpointer:
        saved = {"recipe": "stage1", "config": {"betas": [0.9, 0.98], "seed": 1}}
        checkpointer.save(1, train_state, saved)
        checkpointer.wait()
        checkpointer.restore(abstract, expect={"config": {"betas": (0.9, 0.98), "seed": 1}})
        with pytest.raises(CheckpointError, match="holds another run") as error:
            checkpointer.restore(abstract, expect={"recipe": "stage2", "config": {"seed": 2}})
    assert "recipe: 'stage1' saved, 'stage2' now" in str(error.value)
    assert "config.seed: 1 saved, 2 now" in str(error.value)


def test_another_run_gives_what_it_has_in_common(tmp_path, train_state):
    """In the dtypes and places of the run that takes it."""
    fresh = {
        "a": {"kernel": jnp.zeros((16, 8), jnp.bfloat16), "gate": jnp.full(3, 5.0)},
        "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    }
    placed = placed_on(fsdp=2, tensor=1)["params"]["a"]["kernel"].sharding
    fresh["a"]["kernel"] = jax.device_put(fresh["a"]["kernel"], placed)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, train_state, {})
    params, taken, missing = restore_params_into(tmp_path / "1", fresh)
    with pytest.raises(CheckpointError, match=r"a/kernel: float32\[16, 8\] saved, \[4, 8\] wanted"):
        restore_params_into(tmp_path / "1", {"a": {"kernel": jnp.zeros((4, 8))}})
    with pytest.raises(CheckpointError, match=r"has none of \['b'\]"):
        restore_params_into(tmp_path / "1", {"b": jnp.zeros(())})
    assert (taken, missing) == (1, ["a/gate", "head"])
    kernel = train_state["params"]["a"]["kernel"].astype(jnp.bfloat16)
    expected = {**fresh, "a": fresh["a"] | {"kernel": kernel}}
    assert_same_bits(params, expected)
    assert params["a"]["kernel"].sharding == placed


def test_a_missing_checkpoint_says_what_there_is(tmp_path, abstract):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="There is no checkpoint in"):
            checkpointer.restore(abstract)
        checkpointer.save(3, {"x": jnp.zeros(())}, {})
        checkpointer.wait()
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 .* the steps \[3\]"):
            checkpointer.extra(5)


def truncate(folder):
    """As after a power cut: the folder has its name, the largest of its files is cut short."""
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_a_broken_newest_checkpoint_is_put_aside(tmp_path, abstract, train_state, capsys):
    with Checkpointer(tmp_path, keep_last=3) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, train_state, {"step": step})
    truncate(tmp_path / "2" / "state")
    with Checkpointer(tmp_path, keep_last=3) as checkpointer:
        restored, extra = checkpointer.restore_newest(abstract)
        assert extra == {"step": 1}
        assert_same_bits(restored, train_state)
        assert "step 2" in (told := capsys.readouterr().err) and "cannot be read" in told
        assert checkpointer.all_steps() == [1]
        assert (tmp_path / "broken-2" / "state").is_dir()
        assert checkpointer.save(2, train_state, {"step": "again"})
        checkpointer.wait()
        assert checkpointer.restore_newest(abstract)[1] == {"step": "again"}


def test_only_broken_checkpoints_are_left_as_they_are(tmp_path, abstract, train_state):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_newest(abstract) is None
        checkpointer.save(1, train_state, {})
    (tmp_path / "1" / "extra" / "metadata").write_text("{")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=r"None of the checkpoints.*steps \[1\]"):
            checkpointer.restore_newest(abstract)
    assert (tmp_path / "1").is_dir()


@pytest.mark.integration
def test_a_full_disk_leaves_the_step_before_and_says_so(tmp_path):
    """A limit on the size of files, which the second checkpoint goes over."""
    script = f"""
        import resource, signal
        import jax, jax.numpy as jnp
        from blip2_jax.runtime.checkpoint import Checkpointer, SaveError
        noise = lambda n: {{"x": jax.random.normal(jax.random.key(0), (n,))}}
        try:
            with Checkpointer({str(tmp_path)!r}, keep_last=1) as checkpointer:
                checkpointer.save(1, noise(8), {{}})
                checkpointer.wait()
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, resource.RLIM_INFINITY))
                checkpointer.save(2, noise(2**20), {{}})
                checkpointer.wait()
        except SaveError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        with Checkpointer({str(tmp_path)!r}, keep_last=1) as checkpointer:
            shape = jax.ShapeDtypeStruct((8,), jnp.float32)
            state, _ = checkpointer.restore_newest({{"x": shape}})
            assert (state["x"] == noise(8)["x"]).all()
            assert checkpointer.save(2, noise(2**20), {{}})
        print("then", Checkpointer({str(tmp_path)!r}).all_steps())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "could not be written" in ended.stdout and "File too large" in ended.stdout
    assert "whole one is of step 1" in ended.stdout and "then [2]" in ended.stdout
