"""Every published recipe builds, abstractly, with as many trained parameters as published."""

import math
import runpy
from pathlib import Path

import jax
import pytest

import tests.tiny as tiny
from blip2_jax import cli, recipe
from blip2_jax.data import language, tokenizers
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.checkpoint import Checkpointer, saved_shapes
from blip2_jax.training.overview import texts_of

# (recipe, trained parameters: LAVIS's logs and the paper's tables; None where none is published)
RECIPES = [
    ("stage1.py", 186_705_470),
    ("stage1.py:vitl-paper", 183_165_758),
    ("stage1.py:vitg-lavis", 186_705_470),
    ("stage2.py", 107_133_696),
    ("stage2.py:vitg-opt6.7b-paper", 108_314_880),
    ("stage2.py:vitg-flant5xl-paper", 106_739_968),
    ("stage2.py:vitg-flant5xxl-paper", 108_314_880),
    ("stage2.py:vitl-opt2.7b-paper", 103_593_984),
    ("stage2.py:vitl-flant5xl-lavis", 103_200_256),
    ("finetune_caption.py", 1_093_619_584),
    ("finetune_caption.py:vitg-opt6.7b", None),
    ("finetune_vqa.py", None),
    ("finetune_retrieval.py", 1_173_191_358),
    ("finetune_retrieval.py:vitl", 474_177_342),
    ("instruct.py", None),
    ("instruct.py:vitg-flant5xxl", None),
]


@pytest.mark.parametrize(
    ("stage", "changes", "remedy"),
    [
        ("stage1", {"steps": 0}, "--config.steps=1"),
        ("stage1", {"checkpoint.every": 0}, "--config.checkpoint.every=1"),
        ("stage1", {"log.every": 0}, "--config.log.every=1"),
        ("stage1", {"eval.every": -1}, "--config.eval.every=0"),
        ("stage1", {"data.batch_size": 0}, "--config.data.batch_size=1"),
        ("stage1", {"data.batch_size": 12}, "multiple of 8: --config.data.batch_size=16"),
        ("stage2", {"data.batch_size": 8, "stage.accumulate": 3}, "--config.data.batch_size=24"),
        ("stage1", {"data.text_length": 13}, "--config.data.text_length=12, or less"),
        ("stage2", {"data.llm_length": 29}, "after 4 queries.*--config.data.llm_length=28, or"),
        ("pretrain_lm", {"data.llm_length": 33}, "--config.data.llm_length=32, or less"),
        ("stage1", {"optim.warmup_steps": 20}, "--config.optim.warmup_steps=2"),
        ("stage1", {"optim.vit_layer_decay": 0.9}, "--config.optim.vit_layer_decay=1.0, or"),
        ("stage2", {"model.llm.lora.rank": 4}, "lora.rank=0, or --config.trainable=.*'llm_lora'"),
        (
            "stage2",
            {"trainable": ("qformer", "llm_lora")},
            "lora.rank=16, or .*=\"\\('qformer',\\)",
        ),
        ("stage1", {"trainable": ("qformer", "temperature")}, "Set --config.trainable to some"),
        ("stage1", {"model.qformer.num_layers": 3}, "--config.model.qformer.cross_attention_fre"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused_with_the_flag_that_mends_it(
    stage, changes, remedy
):
    if stage == "pretrain_lm":
        changes = {**changes, "trainable": ("llm",)}
    with pytest.raises(ValueError, match=rf"(?s){remedy}"):
        recipe.build(tiny.config(stage, **changes))


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])


@pytest.mark.parametrize(("name", "published"), RECIPES, ids=[name for name, _ in RECIPES])
def test_a_recipe_builds_with_the_published_number_of_parameters(name, published, mesh):
    config = cli.load_config(f"configs/{name}")
    run = recipe.build(config, mesh)
    count = sum(x.size for x in jax.tree.leaves(run.abstract_state["params"]))
    assert published is None or count == published
    assert run.abstract_frozen.keys() == {"vit", "llm"} - set(config.trainable) - (
        {"llm"} if config.stage.name == "stage1" else set()
    )
    size = config.model.vit.resolution or 224
    assert run.image_size == size


def test_tokenizers_are_held_to_the_embeddings_when_a_recipe_is_built(mesh, tmp_path):
    def build(stage, **data):
        words = [f"--config.data.{key}={value}" for key, value in data.items()]
        return recipe.build(cli.load_config(f"configs/digits/{stage}.py", words), mesh)

    newline = language.token_of(tokenizers.load("package:digits-opt"), "\n")
    assert build("stage2").llm.eos_token_ids == (newline,)
    assert build("stage2", end_of_text="</s>").llm.eos_token_ids == (2,)
    with pytest.raises(ValueError, match="'the end', is no token of this tokenizer"):
        build("stage2", end_of_text="the end")
    for stage, key, name in (
        ("stage1", "qformer_tokenizer", "Q-Former"),
        ("stage2", "llm_tokenizer", "language model"),
    ):
        grown = tokenizers.load("package:digits-opt")
        grown.add_tokens([f"<extra {i}>" for i in range(30)])
        grown.save_pretrained(tmp_path / key)
        with pytest.raises(ValueError, match=f"The {name}'s embeddings have .* rows"):
            build(stage, **{key: tmp_path / key})


def test_an_unknown_variant_says_what_there_is():
    with pytest.raises(ValueError, match=r"takes FILE.py:\{vitg,vitl\}-\{opt2.7b,"):
        cli.load_config("configs/stage2.py:vitg-gpt4-paper")


def test_the_table_of_the_paper_is_made_from_the_configs():
    root = Path(__file__).parent.parent
    rows = list(runpy.run_path(str(root / "launch" / "paper_table.py"))["rows"]())
    assert len(rows) == 2 + 6 + 3 + 3 + 2  # the rows of tables 2, 3, 4 and 5
    page = (root / "docs/evaluation.md").read_text()
    assert "\n".join(rows) in page, "paste what python launch/paper_table.py prints"


@pytest.mark.full_size
def test_a_checkpoint_of_the_full_size_holds_what_is_trained_and_no_tower(mesh, tmp_path):
    """ViT-g's stage 1: the parameters, the optimizer's two moments of each, a few counters."""
    run = recipe.build(cli.load_config("configs/stage1.py"), mesh)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, run.init_state(jax.random.key(0)), {})
    found = saved_shapes(tmp_path / "0")

    def count(part: str) -> int:
        return sum(math.prod(s) for path, (s, _) in found.items() if path.startswith(part))

    assert count("params/") == 186_705_470
    assert 2 * 186_705_470 <= count("opt_state/") < 2 * 186_705_470 + 10
    assert not [path for path in found if "vit/" in path]
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 1.02 * 3 * 4 * 186_705_470  # float32; noise does not compress


def test_a_run_shows_how_its_texts_end():
    """White space is made visible, as it may be another than was meant in a shell."""
    config = tiny.config("stage2", **{"data.end_of_text": "\\n", "data.prompt": "a\tb"})
    (line,) = texts_of(config)
    assert r"prompt 'a\tb'" in line and r"end of text '\\n'" in line
    assert texts_of(tiny.config("stage1")) == []
