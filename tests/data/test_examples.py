"""From records to arrays: which texts, cut where, and which images are augmented."""

import json

import numpy as np
import pytest
import transformers
from ml_collections import ConfigDict

import tests.data.made as made
import tests.tiny as tiny
from blip2_jax import cli, recipe
from blip2_jax.data import (
    batch_spec,
    examples,
    mixtures,
    reader,
    sources,
    tokenizers,
    transforms,
)
from blip2_jax.models.llama import LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.t5 import T5Config

LONG = "is the 3 red and " * 20 + "what color is the 7?"


def make_config(**changes):
    names = {
        "data.qformer_tokenizer": "package:digits-bert",
        "data.llm_tokenizer": "package:digits-opt",
        "data.clean_text": False,
        "data.prompt": "Question: {} Answer:",
        "data.task": "answer",
        "data.text_length": 7,
        "data.max_prompt_length": 9,
        "data.llm_length": 4,
        "model.qformer_reads_prompt": True,
        "model.qformer.vocab_size": 190,
        "model.llm.vocab_size": 208,
        **changes,
    }
    return tiny.config("stage2", **names)


def example_of(config, llm=OPTConfig(), **record):  # noqa: B008
    record = {"image": made.jpeg(0), "captions": ["a red 3"], **record}
    make = examples.make_example(config, 16, train=True, llm=llm)
    return make(record, 0, np.random.default_rng(0))


def test_an_instruction_that_is_too_long_loses_its_begin_and_no_answer_its_place():
    """As LAVIS's InstructBLIP, for the language model and the Q-Former alike."""
    config = make_config()
    example = example_of(config, questions=[{"question": LONG, "answers": ["red"]}])
    opt, bert = (
        tokenizers.load(config.data[name]) for name in ("llm_tokenizer", "qformer_tokenizer")
    )
    learned = example["llm_labels"] >= 0
    assert opt.decode(example["llm_ids"][learned]) == " red\n"
    asked = example["llm_ids"][(example["llm_mask"] > 0) & ~learned]
    assert opt.decode(asked) == "</s> what color is the 7? Answer:" and len(asked) == 9
    assert bert.decode(example["text_ids"]) == "[CLS] the 7? answer : [SEP]"


@pytest.mark.parametrize("task", ["answer", "caption"])
@pytest.mark.parametrize("reads_prompt", [True, False])
def test_arrays_have_the_shapes_that_the_step_is_compiled_for(task, reads_prompt):
    prompt = "Question: {} Answer:" if task == "answer" else "a picture of"
    config = make_config(
        **{
            "data.task": task,
            "model.qformer_reads_prompt": reads_prompt,
            "data.prompt": prompt,
            "data.llm_length": 6,
        }
    )
    example = example_of(config, questions=[{"question": LONG, "answers": ["red"]}])
    batch = recipe.build(config).abstract_batch
    assert {name: x.shape[1:] for name, x in batch.items()} == {
        name: np.shape(x) for name, x in example.items()
    }
    assert (example["llm_labels"] >= 0).any()


def test_a_prompt_that_the_model_has_no_positions_for_is_refused():
    config = make_config(**{"data.max_prompt_length": 64})
    message = r"68 tokens long, after 4 queries, .* for 32: --config\.data\.max_prompt_length=24,"
    with pytest.raises(ValueError, match=message):
        recipe.build(config)
    config.data.max_prompt_length = 24
    recipe.build(config)


def test_a_prompt_that_leaves_no_room_for_captions_is_refused():
    config = make_config(
        **{
            "data.task": "caption",
            "data.prompt": "a picture of",
            "model.qformer_reads_prompt": False,
        }
    )
    with pytest.raises(ValueError, match=r"prompt has 4 tokens, and config\.data\.llm_length is 4"):
        example_of(config)


@pytest.mark.parametrize("task", ["answer", "caption"])
def test_an_encoder_decoder_reads_the_prompt_and_learns_the_text(task, tmp_path):
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in set(LONG.split()))]
    transformers.T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0
    ).save_pretrained(tmp_path)
    prompt = "{}" if task == "answer" else LONG
    config = make_config(
        **{
            "data.llm_tokenizer": str(tmp_path),
            "data.task": task,
            "data.prompt": prompt,
            "model.qformer_reads_prompt": False,
        }
    )
    example = example_of(config, T5Config(), questions=[{"question": LONG, "answers": ["red"]}])
    lengths = batch_spec.llm_lengths(config, encoder_decoder=True)
    assert lengths == ({"answer": 9, "caption": 4}[task], 4)
    assert (len(example["llm_ids"]), len(example["llm_labels"])) == lengths
    read = tokenizers.load(str(tmp_path)).decode(example["llm_ids"], skip_special_tokens=True)
    # An instruction is cut on the left; the prompt of captions on the right (LAVIS `blip2_t5.py`).
    assert read == {"answer": "3 red and what color is the 7?", "caption": "is the 3"}[task]


def test_a_decoder_without_a_begin_token_in_its_tokenizer_is_still_one(tmp_path):
    """Qwen's tokenizer has none: it was taken for T5's, and texts and labels parted."""
    import tokenizers as rust

    words = {word: i for i, word in enumerate(["[UNK]", "a", "red", "blue", "<end>"])}
    model = rust.Tokenizer(rust.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = rust.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", eos_token="<end>"
    ).save_pretrained(tmp_path)
    config = make_config(
        **{
            "data.llm_tokenizer": str(tmp_path),
            "data.task": "caption",
            "data.prompt": "",
            "data.llm_length": 6,
            "model.qformer_reads_prompt": False,
        }
    )
    for bos, start in ((7, [7]), (None, [])):
        llm = LlamaConfig(bos_token_id=bos, eos_token_ids=(4, 9))
        example = example_of(config, llm, captions=["red a blue"])
        text = [*start, 2, 1, 3, 4]
        rest = 6 - len(text)
        assert example["llm_ids"].tolist() == text + [0] * rest
        assert example["llm_labels"].tolist() == text + [-100] * rest


def test_a_part_of_a_mixture_has_its_own_augmentation(monkeypatch):
    """As Visual Genome in LAVIS's pre-training, beside COCO without any."""
    asked = []

    def train_image(data, size, rng, **options):
        asked.append(options["randaugment"])
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(transforms, "train_image", train_image)
    config = make_config(**{"data.task": "caption", "data.prompt": ""})
    config.data.mixture = ConfigDict(
        {"coco": {"dir": "a"}, "vg": {"dir": "b", "randaugment": (2, 5)}}
    )
    pictures = made.Records(16 * [{"image": made.jpeg(0), "captions": ["a red 3"]}])
    source = mixtures.Mixture({"coco": pictures, "vg": pictures})
    read = reader.Reader(source, examples.make_example(config, 16, train=True, llm=OPTConfig()))
    for index in (0, 15, 16, 31):
        read(index, np.random.default_rng(0))
    assert asked == [(0, 0), (0, 0), (2, 5), (2, 5)]


def test_a_resize_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="config.data.resize is 'exect'; known: exact, fast"):
        examples.image_reader(
            make_config(**{"data.resize": "exect"}).data, 16, "bicubic", train=True
        )


def test_lavis_pretraining_reads_lavis_files_a_caption_a_record(tmp_path):
    """Its annotations as they are: COCO's with image ids, Visual Genome's without."""
    coco, vg = tmp_path / "coco", tmp_path / "vg"
    for folder in (coco / "images/train2014", coco / "annotations", vg / "annotations"):
        folder.mkdir(parents=True)
    (vg / "images/VG_100K").mkdir(parents=True)
    (coco / "images/train2014/1.jpg").write_bytes(made.jpeg(0))
    (vg / "images/VG_100K/2.jpg").write_bytes(made.jpeg(1))
    rows = [
        {"image": "train2014/1.jpg", "caption": text, "image_id": "coco_1"} for text in ("A.", "B")
    ]
    (coco / "annotations/coco_karpathy_train.json").write_text(json.dumps(rows))
    rows = [{"image": "VG_100K/2.jpg", "caption": text} for text in ("c", "d", "e")]
    (vg / "annotations/vg_caption.json").write_text(json.dumps(rows))
    config = cli.load_config(
        "configs/stage1.py:vitg-lavis",
        [
            f"--config.data.mixture.coco.dir={coco}",
            f"--config.data.mixture.vg.dir={vg}/annotations/vg_caption.json",
            f"--config.data.mixture.vg.images={vg}/images",
            "--config.data.qformer_tokenizer=package:digits-bert",
        ],
    )
    source = sources.make_source(config, "train")
    assert [source[i]["captions"] for i in range(len(source))] == [
        ["A."],
        ["B"],
        ["c"],
        ["d"],
        ["e"],
    ]
    assert [source[i]["part"] for i in range(len(source))] == ["coco"] * 2 + ["vg"] * 3
    assert source.weights == [2 / 5, 3 / 5]  # of captions: an epoch has each once
    make, rng = examples.make_example(config, 16, train=True), np.random.default_rng(0)
    images = [int(make(source[i], i, rng)["image_id"]) for i in range(len(source))]
    assert images == [0, 0, 1, 1, 1]  # captions of one image are no negatives of each other
