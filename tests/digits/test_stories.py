"""What the small language model reads, and the batches of the embedded world's recipes."""

import hashlib
import itertools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import tests.tiny as tiny
from blip2_jax import cli, recipe
from blip2_jax.data import loader, sources, tokenizers
from blip2_jax.data.examples import make_example
from blip2_jax.digits import prepare, stories
from blip2_jax.models.opt import OPTConfig
from blip2_jax.runtime import mesh as meshes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare.write(out, 0, {"train": 20, "test": 10, "held_out": 1})
    return out


# The batches of the embedded world's recipes, on which the shipped towers and all measured results
# rest: steps 2 to 4 of training, and two batches of the test split, of 20 and 10 scenes of seed 0.
PINNED = {
    "stage1": ("a7f6bd52fbf3c5c7", "cf53284d0fbdf278"),
    "stage2": ("0bb3f36e159fccb0", "fa1ea4dc3d654eed"),
    "lm": ("47a2ba4dce76b7ab", "3345da3ae2130a48"),
    "lm_easy": ("599dcffcbf9e6c91", "5902fc2de68bfb31"),
    "vit": ("d9ff36042c1d4b85", "ef30524f90680e6b"),
}


def digest(batches):
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            array = batch[name]
            found.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("recipe", PINNED)
def test_batches_of_the_embedded_world_are_what_they_were(folder, recipe):
    config = ConfigDict(cli.load_config(f"configs/digits/{recipe}.py").as_configdict().to_dict())
    config.data.dir, config.data.batch_size = str(folder), 8
    config.eval.batch_size, config.eval.batches = 4, 2
    size = 0 if recipe.startswith("lm") else 64
    llm = OPTConfig()
    with loader.train_batches(config, size, start_step=2, llm=llm) as batches:
        trained = digest(itertools.islice(batches, 3))
    with loader.eval_batches(config, size, llm=llm) as batches:
        assert (trained, digest(batches)) == PINNED[recipe]


@pytest.mark.parametrize("stage", ["lm_easy", "vit_easy"])
def test_the_planned_batch_is_the_loaders(folder, stage):
    config = cli.load_config(f"configs/digits/{stage}.py", [f"--config.data.dir={folder}"])
    run = recipe.build(config, meshes.make_mesh(config.mesh, jax.devices()[:1]))
    record = sources.make_source(config, config.data.split)[0]
    example = make_example(config, run.image_size, train=True)(record, 0, np.random.default_rng(0))
    planned = {k: (x.shape[1:], x.dtype) for k, x in run.abstract_batch.items()}
    assert planned == {k: (x.shape, x.dtype) for k, x in example.items()}


def test_stories_weigh_answers_most():
    opt = tokenizers.load("package:digits-opt")
    story = ["a red 3", "Question: what color is the 3? Answer: red", "the 3 is red"]
    ids, mask, weights = stories.encode_stories(opt, [story], 40)
    heavy = opt.decode(ids[0][weights[0] == stories.ANSWER])
    assert heavy == " red"
    retold = opt.decode(ids[0][weights[0] == stories.RETOLD])
    assert retold == "\n</s>the 3 is red\n"  # the newline after an answer, and the retelling
    assert (weights[0] > 0).tolist() == (mask[0] > 0).tolist()


def test_stories_grow_from_easy_to_hard(folder):
    changes = {"data.source": "stories", "data.story_warmup": 0.5, "data.llm_length": 128}
    changes |= {"data.llm_tokenizer": "package:digits-opt", "data.dir": str(folder)}
    config = tiny.config("pretrain_lm", steps=100, **changes)
    source = sources.make_source(config, "train")
    commas = [sum(", " in s["story"][0] for s in map(source.__getitem__, part))
              for part in (range(0, 130), range(600, 730))]  # fmt: skip
    assert commas[0] == 0 < commas[1]  # three things are joined by a comma
    with loader.train_batches(config, 16) as batches:
        assert next(batches)["llm_ids"].shape == (8, 128)
