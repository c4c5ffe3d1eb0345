"""Prompts: `<image>` stands where the queries go, and a form survives every cut."""

import numpy as np
import pytest

from blip2_jax.data import examples, prompting, tokenizers
from blip2_jax.data.faults import RecordError
from blip2_jax.models.opt import OPTConfig
from tests import tiny
from tests.inference import published

OPT, BERT = "package:digits-opt", "package:digits-bert"
QUESTION = "what color is the small digit to the left of the large blue 7 and above the green 3"


@pytest.mark.parametrize(
    "prompt, want",
    [
        ("a photo of", "a photo of"),
        (" kept as it is ", " kept as it is "),
        ("<image>a photo of", "a photo of"),
        ("<image>\nQuestion: why? Answer:", "Question: why? Answer:"),
        (" <image> ", ""),
        (4 * "<image>" + " a photo", "a photo"),
    ],
)
def test_the_placeholder_in_front_is_where_the_queries_go(prompt, want):
    assert prompting.strip_image_token(prompt, 4) == want


@pytest.mark.parametrize(
    "prompt",
    ["a <image> photo", "a photo<image>", "<image><image> compare", "<image> a <image>"],
)
def test_the_placeholder_elsewhere_is_refused(prompt):
    with pytest.raises(ValueError, match="stand before the text: write <image> once, in front"):
        prompting.strip_image_token(prompt, 4)


@pytest.mark.parametrize(
    "prompt, form",
    [
        ("Question: how many? Answer:", ("Question: ", "how many?", " Answer:")),
        (
            "Question: is Bob there? Short answer:",
            ("Question: ", "is Bob there?", " Short answer:"),
        ),
        ("USER: a\nb: c ASSISTANT: ", ("USER: ", "a\nb: c", " ASSISTANT: ")),
        ("A short image description:", ("", "A short image", " description:")),
        ("a photo of", ("", "a photo of", "")),
        ("Answer:", ("", "Answer:", "")),
        ("", ("", "", "")),
        ("{} and {x}", ("", "{} and {x}", "")),
    ],
)
def test_cues_at_the_ends_are_the_form(prompt, form):
    assert prompting.parse(prompt) == form
    assert str(prompting.parse(prompt)) == prompt


@pytest.mark.parametrize("kind", ["opt", "t5", "bert"])
def test_the_question_gives_way_and_the_form_stays(kind):
    tokenizer = (
        published.t5_tokenizer()
        if kind == "t5"
        else tokenizers.load({"opt": OPT, "bert": BERT}[kind])
    )
    prompt = prompting.fill("Question: {} Short answer:", QUESTION)
    (whole,) = prompting.tokenize(tokenizer, [prompt])
    (form,) = prompting.tokenize(tokenizer, [prompting.fill("Question: {} Short answer:", "")])
    for room in range(len(form), len(whole) + 2):
        (row,) = prompting.tokenize(tokenizer, [prompt], room)
        assert len(row) <= room
        text = prompting.fit(tokenizer, prompt, room)
        assert text.startswith("Question: ") and text.endswith(" Short answer:")
        assert QUESTION.startswith(text.removeprefix("Question: ").removesuffix(" Short answer:"))
        assert row[:2] == whole[:2] and row[-2:] == whole[-2:]
        if room >= len(whole):
            assert row == whole
    with pytest.raises(ValueError, match="truncate is 2, and the prompt has .* without the text"):
        prompting.tokenize(tokenizer, [prompt], 2)


def test_a_free_text_loses_its_end():
    tokenizer = tokenizers.load(OPT)
    (whole,) = tokenizers.tokenize(tokenizer, ["a red 3 and a blue 7"])
    for text in ("a red 3 and a blue 7", prompting.parse("a red 3 and a blue 7")):
        (row,) = prompting.tokenize(tokenizer, [text], 4)
        assert row == whole[:4]


def answer_config(llm: str, **changes):
    config = tiny.config(
        "stage2",
        **{
            "data.llm_tokenizer": llm,
            "data.qformer_tokenizer": BERT,
            "data.task": "answer",
            "data.prompt": "Question: {} Answer:",
            "data.max_prompt_length": 24,
            "data.llm_length": 24,
            "data.text_length": 14,
            "model.qformer_reads_prompt": True,
            **changes,
        },
    )
    return config


@pytest.fixture
def record():
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    return {"image": buffer.getvalue(), "questions": [{"question": QUESTION, "answer": "red"}]}


def test_training_counts_questions_with_a_placeholder_inside(record):
    make = examples.make_example(answer_config(OPT), 16, train=False, llm=OPTConfig())
    record["questions"][0]["question"] = "<image>\nhow many?"
    example = make(record, 0, np.random.default_rng(0))
    text = tokenizers.load(OPT).decode(example["llm_ids"], skip_special_tokens=True)
    assert text.startswith("Question: how many")
    record["questions"][0]["question"] = "what is in <image> here?"
    with pytest.raises(RecordError, match="<image> inside a question"):
        make(record, 0, np.random.default_rng(0))


def test_a_recipe_with_a_placeholder_inside_its_prompt_is_refused():
    with pytest.raises(ValueError, match="write <image> once, in front"):
        config = answer_config(OPT, **{"data.prompt": "{}<image>"})
        examples.make_example(config, 16, train=False, llm=OPTConfig())
