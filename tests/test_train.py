"""The training command from outside: resume after any end, refuse what does not belong together."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

import blip2_jax
import tests.data.made as made
import tests.tiny as tiny
from blip2_jax import cli, convert, evaluate, pretrained, recipe, train
from blip2_jax.data import loader, sources, tokenizers
from blip2_jax.models.opt import OPT, OPTConfig
from blip2_jax.models.vit import ViT, ViTConfig
from blip2_jax.runtime import jobs, mesh, run_dir
from blip2_jax.runtime.checkpoint import Checkpointer
from blip2_jax.runtime.jsonl import read_jsonl
from blip2_jax.runtime.metric_writers import RunWriters
from blip2_jax.stages import stage1
from blip2_jax.training.start import start_from
from blip2_jax.weights import huggingface

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data and two towers on disk, as a user would have them."""
    root = tmp_path_factory.mktemp("world")
    made.prepare_pairs(root / "data", train=40, test=10)
    towers = {
        "vit": ViT(
            ViTConfig(16, 8, 24, 2, 2, 32, "quick_gelu", 1e-5, "qkvo", False, True),
            rngs=nnx.Rngs(0),
        ),
        "llm": OPT(OPTConfig(208, 16, 2, 2, 32, 64), rngs=nnx.Rngs(1)),
    }
    for name, tower in towers.items():
        params = nnx.to_pure_dict(nnx.state(tower))
        huggingface.save(root / name, tower.config, params)
    return root


def flags(world, stage="stage1", **changes):
    """A tiny run as a config; also as `--config.key=value` flags."""
    return tiny.config_of_files(
        world,
        stage,
        **{
            "steps": 12,
            "checkpoint.every": 4,
            "log.every": 2,
            "eval.every": 6,
            "eval.batch_size": 8,
            **changes,
        },
    )


def frozen_config(config):
    return cli.config_from_json(cli.config_to_json(config))


def run(config, workdir) -> int:
    return train.train(frozen_config(config), Path(workdir))


def result(workdir):
    """Parameters at the end, and everything that was logged."""
    _, params = pretrained.load_trained(Path(workdir))
    return jax.device_get(params), read_jsonl(Path(workdir) / "metrics.jsonl")


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
    assert a[1] == b[1]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "stage1"
    assert run(flags(world), workdir) == 0
    return workdir


def test_a_finished_run_returns_at_once(whole, world, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    assert run(flags(world), whole) == 0
    assert "finished before" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(whole, world, tmp_path):
    """kill -9 of a real process: with a checkpoint half-written, in an evaluation, after a line."""
    config_file = tmp_path / "killed.json"
    config_file.write_text(cli.config_to_json(flags(world)))
    code = (
        "import sys; from pathlib import Path; from blip2_jax import cli, train;"
        "from tests import interrupted; interrupted.plant(sys.argv[3]);"
        "c = cli.config_from_json(Path(sys.argv[1]).read_text());"
        "sys.exit(train.train(c, Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(config_file), str(tmp_path / "stage1")]
    log = tmp_path / "stage1" / "metrics.jsonl"
    for event, lines in (
        ("blip2_jax.train.Checkpointer.save:1", 2),  # it begins at step 4, and ends later
        ("blip2_jax.data.loader.eval_batches:1", 2),  # at step 6
        ("blip2_jax.runtime.metric_writers.RunWriters.write:3", 5),  # at step 10
    ):
        killed = subprocess.run([*command, f"{event}:SIGKILL"], cwd=ROOT, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert len(log.read_text().splitlines()) <= lines
    assert run(flags(world), tmp_path / "stage1") == 0
    assert_same(result(tmp_path / "stage1"), result(whole))


def test_sigterm_saves_and_leaves_with_its_own_code(whole, world, tmp_path, monkeypatch):
    real = RunWriters.write

    def terminate(writer, step, *args, **kwargs):
        real(writer, step, *args, **kwargs)
        if step == 6:  # between two checkpoints
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunWriters, "write", terminate)
    assert run(flags(world), tmp_path / "stage1") == train.PREEMPTED
    with Checkpointer(tmp_path / "stage1" / "checkpoints") as checkpointer:
        assert checkpointer.latest_step == 6
    monkeypatch.setattr(RunWriters, "write", real)
    assert run(flags(world), tmp_path / "stage1") == 0
    assert_same(result(tmp_path / "stage1"), result(whole))


def test_a_finished_run_goes_on_for_more_steps(whole, world, tmp_path, capsys):
    """By the schedule of the new length, from the state it had; and that is written down."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    longer = {"steps": 14, "eval.every": 0, "checkpoint.every": 100}
    with pytest.raises(ValueError, match="config.steps: 12 saved, 10 now .it can be more"):
        run(flags(world, steps=10), workdir)
    with pytest.raises(ValueError, match="config.eval.every: 6 saved, 0 now"):
        run(flags(world, **longer), workdir)
    del longer["eval.every"]
    assert run(flags(world, **longer), workdir) == 0
    output = capsys.readouterr().out
    rate = float(recipe.build(frozen_config(flags(world, **longer))).spec.schedule(12))
    assert "config.steps was 12. The schedule is that of 14 steps from here on: the" in output
    assert f"learning rate is {rate:.3g} now" in output and rate > 0
    saved, before = run_dir.find(workdir), read_jsonl(whole / "metrics.jsonl")
    assert (saved.step, saved.steps) == (14, 14)
    done = json.loads((workdir / "done.json").read_text())
    for document in (done, saved.document):
        assert document["extensions"] == [{"step": 12, "steps": [12, 14]}]
        assert document["config"]["steps"] == 14
    lines = read_jsonl(workdir / "metrics.jsonl")
    assert lines[: len(before)] == before and [line["step"] for line in lines][-2:] == [12, 14]
    assert "eval/loss" in lines[-1]
    # What was one run with 14 steps in its config cannot be asked for with 12 any more.
    with pytest.raises(ValueError, match="config.steps: 14 saved, 12 now"):
        run(flags(world), workdir)


def test_stopped_or_failed_in_an_evaluation_a_run_has_lost_nothing(whole, world, tmp_path):
    """The step is saved first; the evaluation is made again, and the log is that of a whole run."""
    real, asked = loader.eval_batches, []
    workdir = tmp_path / "run"

    def stop(*args, **kwargs):
        asked.append(1)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # heard between the batches
        if len(asked) == 2:
            raise OSError("the disk is gone")
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "eval_batches", stop)
        assert run(flags(world), workdir) == train.PREEMPTED
        assert run_dir.find(workdir).step == 6
        assert read_jsonl(workdir / "metrics.jsonl")[-1]["step"] == 4
        with pytest.raises(OSError, match="the disk is gone"):
            run(flags(world), workdir)
        assert run(flags(world), workdir) == 0
    assert_same(result(workdir), result(whole))


def test_what_a_run_reads_may_move_but_not_change(whole, world, tmp_path, capsys):
    """Data, towers, tokenizers by their digest; of a finished run as of one that goes on."""
    moved = shutil.copytree(world, tmp_path / "moved")
    tokenizer = tmp_path / "tokenizer"
    tokenizers.load("package:digits-bert").save_pretrained(tokenizer)
    paths = {
        "data.dir": str(moved / "data"),
        "model.vit.source": str(moved / "vit"),
        "data.qformer_tokenizer": str(tokenizer),
    }
    workdir = shutil.copytree(whole, tmp_path / "run")
    assert run(flags(world, **paths), workdir) == 0
    assert "finished before" in capsys.readouterr().out
    done = json.loads((workdir / "done.json").read_text())
    assert done["config"]["data"]["dir"] == str(moved / "data")
    assert done["seconds"] == json.loads((whole / "done.json").read_text())["seconds"]

    (workdir / "done.json").unlink()  # now it would go on
    shards = sorted((moved / "data").rglob("*train.array_record*"))
    original = shards[0].read_bytes()
    shards[0].write_bytes(original[:100] + bytes([original[100] ^ 1]) + original[101:])
    with pytest.raises(ValueError, match=r"data.digest: '\w+' saved.*leads to other records"):
        run(flags(world, **paths), workdir)
    shards[0].write_bytes(original)
    document = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    two, red = sorted(word for word in vocabulary if word.isalpha() and len(word) > 2)[:2]
    vocabulary[two], vocabulary[red] = vocabulary[red], vocabulary[two]
    (tokenizer / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"tokenizers.qformer: .*config.data.NAME_tokenizer"):
        run(flags(world, **paths), workdir)
    with pytest.raises(ValueError, match=r"config.init.checkpoint: '' saved.*started from somethi"):
        run(flags(world, **{"init.checkpoint": str(moved / "vit")}), workdir)


def test_a_damaged_done_json_is_written_again(whole, world, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    os.truncate(workdir / "done.json", 100)
    assert run(flags(world), workdir) == 0
    assert "done.json is damaged" in capsys.readouterr().err
    again, before = (json.loads((p / "done.json").read_text()) for p in (workdir, whole))
    assert again["config"] == before["config"] and again["fingerprints"] == before["fingerprints"]
    assert_same(result(workdir), result(whole))


def test_stage_2_starts_from_stage_1_and_checkpoints_hold_no_tower(whole, world, tmp_path, capsys):
    config = flags(world, "stage2", **{"init.checkpoint": str(whole)})
    assert run(config, tmp_path / "stage2") == 0
    assert "fresh: language_projection" in capsys.readouterr().out
    for workdir in (whole, tmp_path / "stage2"):
        newest = max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
        arrays = json.loads((workdir / f"checkpoints/{newest}/state/_METADATA").read_text())
        keys = {
            part["key"]
            for leaf in arrays["tree_metadata"].values()
            for part in leaf["key_metadata"]
        }
        assert "qformer" in keys and not keys & {"vit", "llm"}


def test_questions_are_answered_with_a_qformer_that_reads_them(world, tmp_path):
    """Question answering as a recipe: the question goes into the Q-Former and before the answer."""
    changes = {
        "data.task": "answer",
        "data.prompt": "Question: {} Answer:",
        "model.qformer_reads_prompt": True,
        "stage.accumulate": 2,
        "mesh.fsdp": 4,
        "mesh.data": 1,
        "mesh.tensor": 2,
        "steps": 4,
        "log.every": 1,
    }
    assert run(flags(world, "stage2", **changes), tmp_path / "vqa") == 0
    params, lines = result(tmp_path / "vqa")
    assert "word_embeddings" in params["qformer"]  # the text branch is trained
    assert lines[-1]["tokens"] < 8 * 6  # of answers alone: a digit, a color, a place
    with pytest.raises(ValueError, match="needs {} in place of the question"):
        run(flags(world, "stage2", **changes | {"data.prompt": "Answer:"}), tmp_path / "other")


def test_a_run_is_loaded_onto_any_mesh(whole):
    """Its own of all devices, or the one that is asked for; the same features either way."""
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3)).astype(np.uint8)
    spread = blip2_jax.load(whole)
    halves = blip2_jax.load(whole, mesh={"data": 1, "fsdp": 4, "tensor": 2})
    assert spread.mesh.shape["fsdp"] == 8 and halves.mesh.shape["tensor"] == 2
    np.testing.assert_allclose(spread.embed_images(images), halves.embed_images(images), atol=1e-5)


def test_a_run_that_goes_on_and_each_of_its_checkpoints_is_a_model(whole, world, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    workdir = shutil.copytree(whole, tmp_path / "going_on")
    shutil.rmtree(workdir / "checkpoints" / "12")
    (workdir / "done.json").unlink()
    newest = blip2_jax.load(workdir)
    assert "going_on/checkpoints/8: step 8 of 12" in capsys.readouterr().err
    features = newest.embed_images(images)
    earlier = blip2_jax.load(whole / "checkpoints" / "8")
    np.testing.assert_array_equal(features, earlier.embed_images(images))
    assert not np.array_equal(features, blip2_jax.load(whole).embed_images(images))
    assert convert.main([str(workdir), str(tmp_path / "native"), "--to=native"]) == 0
    native = blip2_jax.load(tmp_path / "native", qformer_tokenizer="package:digits-bert")
    np.testing.assert_allclose(features, native.embed_images(images), atol=1e-5)
    # Another run starts from it; predictions belong to the checkpoint, wherever it lies.
    config = frozen_config(flags(world, **{"init.checkpoint": str(whole / "checkpoints" / "8")}))
    built, params = pretrained.load_trained(workdir)
    fingerprints = json.loads((whole / "done.json").read_text())["fingerprints"]
    started = start_from(built.init_state(jax.random.key(1)), config, fingerprints)
    jax.tree.map(np.testing.assert_array_equal, started["params"], params)
    stamps = [run_dir.stamp(p) for p in (workdir, whole / "checkpoints" / "8", whole)]
    assert stamps[0] == stamps[1] != stamps[2]


def test_a_run_whose_towers_moved_is_loaded_from_where_they_are(whole, world, tmp_path):
    config = frozen_config(flags(world))
    moved = shutil.copytree(world / "vit", tmp_path / "vit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.huggingface, "vit_config", _only(moved, recipe.huggingface.vit_config))
        with pytest.raises(FileNotFoundError):
            blip2_jax.load(whole)
        run, params = pretrained.load_run(whole, towers={"vit": str(moved)})
    assert params["vit"] and run.config.model.vit.source == str(moved) != config.model.vit.source


def _only(path, function):
    def call(source, *args, **kwargs):
        if str(source) != str(path):
            raise FileNotFoundError(source)
        return function(source, *args, **kwargs)

    return call


def test_the_towers_are_bit_identical_after_training(whole, world):
    """Read anew, they have the fingerprints that the run recorded when it began."""
    done = json.loads((whole / "done.json").read_text())
    built = recipe.build(frozen_config(flags(world)))
    assert built.load_frozen()[1] == done["fingerprints"]


def test_another_recipe_in_the_workdir_is_refused(whole, world):
    with pytest.raises(ValueError, match=r"(?s)another run.*peak_lr"):
        run(flags(world, **{"optim.peak_lr": 0.5}), whole)


def test_a_run_may_go_on_with_other_threads(whole, world, capsys):
    """How it is executed may change; what it computes may not."""
    assert run(flags(world, **{"data.threads": 1, "mesh.fsdp": 8}), whole) == 0
    assert "finished before" in capsys.readouterr().out


def test_a_tower_of_another_fingerprint_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)`vit`.*fingerprint.*the config asks for feed"):
        run(flags(world, **{"model.vit.fingerprint": "feed"}), tmp_path / "x")


def test_stage_2_on_another_encoder_than_stage_1_is_refused(whole, world, tmp_path):
    other = ViT(
        ViTConfig(16, 8, 24, 2, 2, 32, "quick_gelu", 1e-5, "qkvo", False, True), rngs=nnx.Rngs(9)
    )
    params = nnx.to_pure_dict(nnx.state(other))
    huggingface.save(tmp_path / "vit", other.config, params)
    changes = {"init.checkpoint": str(whole), "model.vit.source": str(tmp_path / "vit")}
    with pytest.raises(ValueError, match="trained on another `vit`"):
        run(flags(world, "stage2", **changes), tmp_path / "stage2")


def test_a_start_from_nothing_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        run(flags(world, "stage2", **{"init.checkpoint": str(tmp_path)}), tmp_path / "stage2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.dir={folder}/none", "blip2 train: .*none"),
        ("model.vit.source={folder}", "blip2 train: .*{folder}"),
        ("mesh.tensor=3", "blip2 train: config.mesh is .*there are 8"),
    ],
)
def test_a_mistake_in_the_config_is_one_message(change, message, tmp_path):
    """And no traceback: SystemExit has none."""
    word = f"--config.{change.format(folder=tmp_path)}"
    with pytest.raises(SystemExit, match=message.format(folder=tmp_path)):
        train.main(["--config=configs/digits/stage1.py", f"--workdir={tmp_path}/run", word])


@pytest.fixture
def bad_at_3_and_5(monkeypatch):
    """Images of two steps that make the loss and its gradient not finite."""
    real = stage1.loss_fn

    def loss_fn(params, frozen, batch, key, *, spec):
        loss, metrics = real(params, frozen, batch, key, spec=spec)
        spoilt = jnp.where((batch["image"] == 0).all(), jnp.nan, 1.0)
        return loss * spoilt, {**metrics, "loss": loss * spoilt}

    def spoil(batch, mesh, batch_size):
        spoil.step += 1
        if spoil.step in (3, 5):
            batch = {**batch, "image": np.zeros_like(batch["image"])}
        return put(batch, mesh, batch_size)

    put = mesh.global_batch
    spoil.step = 0
    monkeypatch.setattr(stage1, "loss_fn", loss_fn)
    monkeypatch.setattr(mesh, "global_batch", spoil)
    return spoil


def test_bad_steps_are_reported_with_their_records_and_bounded(
    bad_at_3_and_5, world, tmp_path, capsys
):
    changes = {"eval.every": 0, "steps": 6, "log.every": 1, "checkpoint.every": 2}
    config = flags(world, **changes, **{"faults.max_bad_steps": 1})
    with pytest.raises(FloatingPointError, match="2 steps with.*max_bad_steps=1.*saved at step 5"):
        run(config, tmp_path / "run")
    source = sources.make_source(config, "train")
    errors = capsys.readouterr().err
    for step in (3, 5):
        records = loader.record_numbers(source, config, step - 1)
        assert len(records) == 8
        assert f"Step {step}: loss or gradient not finite; left out. Its records: " in errors
        assert str(records) in errors
    counts = [line["bad_steps"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert counts == [0, 0, 1, 1, 2]
    # As it is, the same command stops at once; with a higher bound it goes on.
    with pytest.raises(FloatingPointError, match="saved at step 5"):
        run(config, tmp_path / "run")
    bad_at_3_and_5.step = 5
    assert run(flags(world, **changes, **{"faults.max_bad_steps": 2}), tmp_path / "run") == 0
    params, lines = result(tmp_path / "run")
    assert lines[-1]["bad_steps"] == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_two_runs_in_one_workdir_are_refused(world, tmp_path):
    with jobs.only_one(tmp_path / "train.lock", ""):
        with pytest.raises(jobs.Busy, match="Another run is at work"):
            run(flags(world), tmp_path)


def test_a_clock_that_jumps_changes_nothing(whole, world, tmp_path, monkeypatch):
    """The date is set back by a day in the middle: rates and seconds stay sensible."""
    looks, real = itertools.count(), time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86400 * (next(looks) > 100))
    assert run(flags(world), tmp_path / "run") == 0
    monkeypatch.undo()
    assert_same(result(tmp_path / "run"), result(whole))
    timing = read_jsonl(tmp_path / "run" / "timing.jsonl")
    assert all(line["examples_per_second"] > 0 for line in timing)
    assert 0 < json.loads((tmp_path / "run" / "done.json").read_text())["seconds"] < 600


def test_scores_during_training_are_those_of_the_evaluation_afterwards(world, tmp_path):
    """Of the parameters as they are; the frozen towers stay usable, and training the same."""
    stage, scores = "stage2", "scores=('cider', 'bleu4'), tokenizer='fallback'"
    file = tmp_path / "scores.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "from configs.eval.default import get_config as default, task\n"
        "def get_config():\n"
        "    config = default()\n"
        "    config.batch_size = 4\n"
        f"    config.tasks = ConfigDict({{'x': task('captioning', 'tfds', 'test', "
        f"'{world}/data', {scores})}})\n"
        "    return config\n"
    )
    evals = ConfigDict(cli.load_config(str(file)).tasks.to_dict())
    changes = {"evals": evals, "eval.tasks_every": 3, "eval.tasks_batch_size": 4}
    changes |= {"steps": 8, "eval.every": 0}
    config = flags(world, stage, **changes)
    assert run(config, tmp_path / "run") == 0
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    scored = {line["step"]: line for line in lines if "eval/x/cider" in line}
    assert sorted(scored) == [3, 6, 8]  # whatever log.every, which is 2
    for model, step in ((tmp_path / "run", 8), (tmp_path / "run" / "checkpoints" / "6", 6)):
        arguments = [f"--config={file}", f"--workdir={tmp_path}/scores{step}", f"--model={model}"]
        assert evaluate.main(arguments) == 0
        after = json.loads((tmp_path / f"scores{step}" / "metrics.json").read_text())
        last = {name: value for name, value in scored[step].items() if name.startswith("eval/x/")}
        names = [name.removeprefix("eval/") for name in last]
        assert names and last == {f"eval/{name}": after[name] for name in names}
        assert after["seconds/run" if step == 8 else "seconds/run@6"] > 0
    assert run(flags(world, stage, **{"steps": 8, "eval.every": 0}), tmp_path / "plain") == 0
    assert result(tmp_path / "plain")[1] == [
        {name: value for name, value in line.items() if not name.startswith("eval/x/")}
        for line in lines
        if line["step"] % 2 == 0
    ]
    with pytest.raises(ValueError, match="config.evals.x: tiny-stage1 has no head for captioning"):
        run(flags(world, "stage1", **changes), tmp_path / "wrong")
    evals.x.data.split = "none"
    with pytest.raises(ValueError, match="none"):
        run(flags(world, stage, **changes), tmp_path / "wrong")
