"""The `Blip2` object: equal to transformers end to end, and the same whatever the batch."""

import copy
import io
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import blip2_jax
from blip2_jax.data import tokenizers
from blip2_jax.data.transforms import ImageError
from blip2_jax.inference import images
from blip2_jax.inference.options import Decoding
from tests.inference import published

pytestmark = pytest.mark.integration

PROMPTS = ["a red", "", "Question: what color is the 3? Answer:", "the 7"]
EXACT = {"max_new_tokens": 9, "min_new_tokens": 0}


def pictures(n: int = 4) -> list[Image.Image]:
    """Images of several sizes."""
    rng = np.random.default_rng(0)
    sizes = [(30, 40), (28, 28), (51, 17), (90, 64)]
    return [
        Image.fromarray(rng.integers(0, 256, (*sizes[i % 4], 3)).astype(np.uint8)) for i in range(n)
    ]


@pytest.fixture(scope="module", params=["opt", "t5"])
def both(request, tmp_path_factory):
    """(transformers' model, its folder, ours)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = published.generation_folder(folder, request.param)
    return theirs, folder, blip2_jax.load(folder)


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    published.generation_folder(folder, "opt")
    return folder, blip2_jax.load(folder)


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    theirs = published.retrieval_folder(folder)
    return theirs, folder, blip2_jax.load(folder)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_equal_those_of_transformers(both, beams):
    """Processor, image encoder, Q-Former, projection, language model and search, in one batch."""
    theirs, folder, ours = both
    processor = transformers.Blip2Processor.from_pretrained(folder)
    processor.tokenizer.padding_side = "right" if ours.family == "t5" else "left"
    inputs = processor(images=pictures(), text=PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        ids = theirs.generate(
            **inputs, num_beams=beams, do_sample=False, max_new_tokens=EXACT["max_new_tokens"]
        )
    if ours.family == "opt":
        ids = ids[:, inputs["input_ids"].shape[1] :]
    want = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    got = ours.generate(pictures(), PROMPTS, num_beams=beams, **EXACT)
    assert got == want
    assert len(set(got)) > 1  # the weights are large enough for images and prompts to matter


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(opt, retrieval, tmp_path):
    """Before weights are read; it gave NaN."""
    for folder, count, name, tokenizer in (
        (opt[0], 256, "language model", opt[1].llm_tokenizer),
        (retrieval[1], 190, "Q-Former", retrieval[2].qformer_tokenizer),
    ):
        shutil.copytree(folder, tmp_path / name)
        grown = copy.deepcopy(tokenizer)
        grown.add_tokens([f"<extra {i}>" for i in range(count)])
        grown.save_pretrained(tmp_path / name)
        with pytest.raises(
            ValueError, match=rf"The {name}'s embeddings have {count} rows, .*resize"
        ):
            blip2_jax.load(tmp_path / name)


@pytest.mark.parametrize("beams", [1, 3])
def test_instructblip_reads_the_prompt_twice(beams, tmp_path):
    """With the Q-Former and with the language model; equal to transformers, prompts unequal."""
    theirs = published.instruct_folder(tmp_path)
    ours = blip2_jax.load(tmp_path)
    assert ours.family == "instruct"
    prompt_tokens = ours.llm_tokenizer(
        PROMPTS, padding=True, padding_side="left", return_tensors="pt"
    )
    asked = ours.qformer_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    head = torch.full((4, 5), theirs.config.image_token_index)
    with torch.no_grad():
        ids = theirs.generate(
            pixel_values=BlipImages()(images=pictures(), return_tensors="pt")["pixel_values"],
            qformer_input_ids=asked["input_ids"],
            qformer_attention_mask=asked["attention_mask"],
            input_ids=torch.cat([head, prompt_tokens["input_ids"]], dim=1),
            attention_mask=torch.cat(
                [torch.ones_like(head), prompt_tokens["attention_mask"]], dim=1
            ),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=EXACT["max_new_tokens"],
        )[:, 5 + prompt_tokens["input_ids"].shape[1] :]
    want = ours.llm_tokenizer.batch_decode(ids, skip_special_tokens=True)
    options = {**EXACT, "num_beams": beams, "repetition_penalty": 1.0}
    got = ours.generate(pictures(), PROMPTS, **options)
    assert got == [text.strip() for text in want] and len(set(got)) > 1
    alone = [
        ours.generate([p], [t], **options)[0] for p, t in zip(pictures(), PROMPTS, strict=True)
    ]
    assert alone == got


def test_a_row_alone_equals_the_row_in_any_batch(both):
    _, folder, ours = both
    options = {"num_beams": 3, **EXACT}
    together = ours.generate(pictures(), PROMPTS, **options)
    alone = [
        ours.generate([p], [t], **options)[0] for p, t in zip(pictures(), PROMPTS, strict=True)
    ]
    assert alone == together
    turned = ours.generate(pictures()[::-1], PROMPTS[::-1], **options)
    assert turned[::-1] == together
    by_two = blip2_jax.load(folder, batch_size=2)
    assert by_two.generate(pictures(), PROMPTS, **options) == together


def test_samples_do_not_depend_on_the_batch_but_on_the_seed(opt):
    folder, ours = opt
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 9, **EXACT}
    together = ours.generate(pictures(), PROMPTS, seed=1, **options)
    assert [len(texts) for texts in together] == [3] * 4
    assert len({text for texts in together for text in texts}) > 4
    assert (
        blip2_jax.load(folder, batch_size=1).generate(pictures(), PROMPTS, seed=1, **options)
        == together
    )
    assert ours.generate(pictures(), PROMPTS, seed=2, **options) != together
    certain = ours.generate(pictures(), PROMPTS, do_sample=True, top_k=1, **EXACT)
    assert certain == ours.generate(pictures(), PROMPTS, num_beams=1, **EXACT)


def test_eight_devices_generate_the_same(both):
    """Parameters sharded over fsdp and tensor, batches over data and fsdp."""
    _, folder, ours = both
    spread = blip2_jax.load(folder, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    kernel = spread.params["vit"]["layers"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4
    for beams in (1, 3):
        got = spread.generate(pictures(3), PROMPTS[:3], num_beams=beams, **EXACT)
        assert got == ours.generate(pictures(3), PROMPTS[:3], num_beams=beams, **EXACT)


def test_a_second_call_of_a_bucket_compiles_nothing(opt):
    _, ours = opt
    ours.caption(pictures(4), **EXACT)
    programs = ours._programs.generate._cache_size()
    ours.caption(pictures(3), **EXACT)
    ours.generate(pictures(4), ["a red", "", "the 7", "the 8"], **{**vars(CAPTION), **EXACT})
    assert ours._programs.generate._cache_size() == programs
    ours.caption(pictures(2), **EXACT)
    assert ours._programs.generate._cache_size() == programs + 1


CAPTION = Decoding(
    num_beams=5,
    max_new_tokens=30,
    length_penalty_includes_prompt=True,
    length_penalty_includes_eos=False,
)


def test_scores_of_texts(both):
    """Of each token and of the whole; what they are is held to transformers in `test_decode`."""
    _, _, ours = both
    tokenizer = ours.llm_tokenizer
    for options in ({"num_beams": 1}, {"num_beams": 3}, {"do_sample": True}):
        options = {**options, **EXACT}
        texts = ours.generate(pictures(), PROMPTS, **options)
        scored = ours.generate(pictures(), PROMPTS, return_scores=True, **options)
        assert [each.text for each in scored] == texts
        for each in scored:
            assert tokenizer.decode(each.token_ids, skip_special_tokens=True).strip() == each.text
            ended = len(each.token_log_probs) - len(each.token_ids)
            assert ended == 1 or (ended == 0 and len(each.token_ids) == 9)
            assert (each.token_log_probs <= 0).all()
            assert each.log_prob == pytest.approx(each.token_log_probs.sum(), abs=1e-4)
    several = ours.generate(
        pictures(2), num_beams=3, num_return_sequences=2, return_scores=True, **EXACT
    )
    assert [len(each) for each in several] == [2, 2]
    some = [pictures(1)[0], b"no image"]
    scored = ours.caption(some, return_scores=True, skip_unreadable=True, **EXACT)
    assert scored[1] is None and scored[0].text == ours.caption(some[:1], **EXACT)[0]


def test_candidates_are_ranked_by_their_tokens(both):
    """A decoder-only model's without the end token, as LAVIS; an encoder-decoder's with it."""
    theirs, folder, ours = both
    candidates = ["red", "a red 3", "the blue 7 is small", "4"]
    (got,) = ours.rank(pictures(1), "what is it?", [candidates])
    processor = transformers.Blip2Processor.from_pretrained(folder)
    prompt = ours.settings("answer").prompt.replace("{}", "what is it?")
    for answer, score in zip(candidates, got, strict=True):
        if ours.family == "opt":
            answer_ids = processor.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        else:
            answer_ids = processor.tokenizer(answer)["input_ids"]
        answer_ids = torch.tensor([answer_ids])
        inputs = processor(images=pictures(1), text=[prompt], return_tensors="pt")
        if ours.family == "opt":
            inputs["input_ids"] = torch.cat([inputs["input_ids"], answer_ids], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            with torch.no_grad():
                logits = theirs(**inputs).logits[:, -answer_ids.shape[1] - 1 : -1]
        else:
            start = torch.cat([torch.zeros(1, 1, dtype=int), answer_ids[:, :-1]], dim=1)
            with torch.no_grad():
                logits = theirs(**inputs, decoder_input_ids=start).logits
        want = torch.log_softmax(logits, dim=-1).gather(-1, answer_ids[..., None]).sum()
        assert score == pytest.approx(want.item(), abs=1e-3)


def test_instructblips_repetition_penalty_leaves_out_the_prompt(tmp_path, monkeypatch):
    """As in LAVIS; with `penalties_include_prompt`, as in transformers."""
    theirs = published.instruct_folder(tmp_path)
    ours = blip2_jax.load(tmp_path)
    prompt = "a red 3 or a blue 7?"
    prompt_ids = ours.llm_tokenizer(prompt, return_tensors="pt")["input_ids"]
    asked = ours.qformer_tokenizer(prompt, return_tensors="pt")["input_ids"]
    head = torch.full((1, 5), theirs.config.image_token_index)
    whole = theirs.language_model.generate
    texts = {}
    for with_prompt in (True, False):
        if not with_prompt:
            monkeypatch.setattr(
                theirs.language_model, "generate", lambda input_ids=None, **k: whole(**k)
            )
        with torch.no_grad():
            ids = theirs.generate(
                pixel_values=BlipImages()(images=pictures(1), return_tensors="pt")["pixel_values"],
                qformer_input_ids=asked,
                qformer_attention_mask=torch.ones_like(asked),
                input_ids=torch.cat([head, prompt_ids], dim=1),
                attention_mask=torch.ones(1, 5 + prompt_ids.shape[1]),
                num_beams=3,
                do_sample=False,
                repetition_penalty=1.5,
                max_new_tokens=EXACT["max_new_tokens"],
            )[:, (5 + prompt_ids.shape[1]) * with_prompt :]
        (want,) = ours.llm_tokenizer.batch_decode(ids, skip_special_tokens=True)
        options = {"num_beams": 3, "penalties_include_prompt": with_prompt, **EXACT}
        texts[with_prompt] = ours.generate(pictures(1), prompt, **options)
        assert texts[with_prompt] == [want.strip()]
    assert ours.generate(pictures(1), prompt, num_beams=3, **EXACT) == texts[False]
    default, without, with_it = (
        ours.generate(pictures(1), prompt, num_beams=1, return_scores=True, **EXACT, **options)[0]
        for options in ({}, {"penalties_include_prompt": False}, {"penalties_include_prompt": True})
    )
    assert default.log_prob == without.log_prob != with_it.log_prob


def test_a_stream_is_the_greedy_text_in_pieces(opt):
    _, ours = opt
    for picture, prompt in zip(pictures(), PROMPTS, strict=True):
        pieces = list(ours.stream(picture, prompt, **EXACT))
        want = ours.generate([picture], [prompt], num_beams=1, **EXACT)[0]
        assert "".join(pieces).strip() == want
        assert len(pieces) > 1 or len(want) < 3


def test_scores_and_features_equal_those_of_transformers(retrieval):
    theirs, folder, ours = retrieval
    texts = ["a red 3", "the 7 is small and blue and the 2 is green", "an orange 1"]
    tokens = ours.qformer_tokenizer(texts, padding=True, return_tensors="pt")
    pixels = BlipImages()(images=pictures(3), return_tensors="pt")["pixel_values"]
    text = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        itm = theirs(pixels, **text, use_image_text_matching_head=True).logits_per_image
        itc = theirs(pixels, **text, use_image_text_matching_head=False)
    match = torch.softmax(itm, dim=-1)[:, 1].numpy()
    np.testing.assert_allclose(ours.match(pictures(3), texts), match, atol=1e-4)
    similarity = ours.similarity(pictures(3), texts)
    np.testing.assert_allclose(similarity, itc.logits_per_image.numpy(), atol=1e-4)
    np.testing.assert_allclose(ours.embed_images(pictures(3)), itc.image_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(ours.embed_texts(texts), itc.text_embeds.numpy(), atol=1e-4)
    text_tokens = ours.tokenize(texts)
    logits = ours.match_candidates(
        pictures(3), text_tokens, np.array([0, 1, 2]), np.array([0, 1, 2])
    )
    np.testing.assert_allclose(logits, itm.numpy()[:, 1], atol=1e-4)
    features = ours.embed_texts(texts)
    np.testing.assert_allclose(ours.similarity(pictures(3), features), similarity, atol=1e-6)
    assert ours.embed_multimodal(pictures(3), texts).shape == (3, 5, 128)
    maps = ours.attention_maps(pictures(3))
    assert maps.shape == (3, 5, 4, 4) and (maps >= 0).all() and (maps.sum((-1, -2)) <= 1.001).all()


def BlipImages():
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    return BlipImageProcessorPil(size={"height": published.SIDE, "width": published.SIDE})


# ----------------------------------------------------------------------------------- bad input


def test_an_unreadable_image_is_named_or_skipped(opt, retrieval, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty.png").write_bytes(b"")
    _, ours = opt
    good = pictures(2)
    for bad, message in (
        (tmp_path / "bad.png", r"Image 1 .*bad\.png.* not a readable image"),
        (tmp_path / "empty.png", "Image 1 .* no bytes"),
        (tmp_path / "none.png", "Image 1 .* No such file"),
        ("https://example.org/x.png", "not fetched; download"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64"),
        (object(), "not an image|shape"),
    ):
        with pytest.raises(ImageError, match=message):
            ours.caption([good[0], bad, good[1]], **EXACT)
        texts = ours.caption([good[0], bad, good[1]], skip_unreadable=True, **EXACT)
        assert texts == [ours.caption(good, **EXACT)[0], None, ours.caption(good, **EXACT)[1]]
    features = retrieval[2].embed_images([good[0], b"", good[1]], skip_unreadable=True)
    assert np.isnan(features[1]).all() and np.isfinite(features[[0, 2]]).all()


@pytest.mark.parametrize("kind", ["file", "bytesio", "memoryview", "mapping", "path", "tensor"])
def test_images_of_any_kind(opt, tmp_path, kind):
    _, ours = opt
    picture = pictures(1)[0]
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    pixels = np.array(picture)
    same = {
        "file": lambda: [open(tmp_path / "a.png", "rb")],  # noqa: SIM115
        "bytesio": lambda: [io.BytesIO(data)],
        "memoryview": lambda: [memoryview(data)],
        "mapping": lambda: [
            {"bytes": data, "path": None},
            {"bytes": None, "path": tmp_path / "a.png"},
        ],
        "path": lambda: [tmp_path / "a.png", str(tmp_path / "a.png"), f"file://{tmp_path}/a.png"],
        "tensor": lambda: [
            torch.tensor(pixels),
            torch.tensor(pixels).permute(2, 0, 1),
            torch.tensor(pixels / 255.0, requires_grad=True),
            jax.numpy.asarray(pixels),
            np.moveaxis(pixels, -1, 0),
        ],
    }[kind]
    want = images.open_image(picture)
    for image in same():
        np.testing.assert_array_equal(np.array(images.open_image(image)), np.array(want))
    for image in same()[:1]:
        assert ours.caption(image, **EXACT) == ours.caption([picture], **EXACT)
        if kind in ("file", "bytesio"):  # read once, and again
            assert ours.caption([image, image], **EXACT) == 2 * ours.caption([picture], **EXACT)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_images_in_half_precision(dtype):
    """An eighth of a step of 255 is lost at most, and no image is taken for another thing."""
    pixels = np.linspace(0, 1, 90, dtype=np.float32).reshape(5, 6, 3)
    want = np.array(images.open_image(pixels)).astype(int)
    for image in (
        torch.tensor(pixels).to(getattr(torch, dtype)),
        torch.tensor(pixels).to(getattr(torch, dtype)).permute(2, 0, 1),
        jax.numpy.asarray(pixels, dtype),
    ):
        got = np.array(images.open_image(image)).astype(int)
        assert got.shape == want.shape and np.abs(got - want).max() <= 1


def test_what_is_no_image_is_named(opt, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    closed = open(tmp_path / "a.txt", "rb")  # noqa: SIM115
    closed.close()
    with open(tmp_path / "a.txt") as text:
        for bad, message in (
            (text, "open for text; open it with mode 'rb'"),
            (closed, "closed file"),
            ({"image": 1}, "None is not an image"),
            (None, "None is not an image"),
            (io.BytesIO(b""), "no bytes"),
            (torch.zeros(2, 3, 4, 5), "shape"),
        ):
            with pytest.raises(ImageError, match=f"Image 0.*{message}"):
                opt[1].caption([bad])


def test_none_is_one_message(opt, retrieval):
    _, ours = opt
    other = retrieval[2]
    for call in (
        lambda: ours.caption(None),
        lambda: ours.attention_maps(None),
        lambda: other.embed_images(None),
        lambda: other.similarity(None, ["a"]),
        lambda: other.match(None, ["a"]),
    ):
        with pytest.raises(ValueError, match="There are no images: None was given"):
            call()
    for call in (
        lambda: ours.answer(pictures(1), None),
        lambda: ours.generate(pictures(1), None),
        lambda: other.embed_texts(None),
        lambda: other.match(pictures(1), None),
        lambda: other.embed_texts(b"a"),
    ):
        with pytest.raises(ValueError, match="where a text or a list of texts goes"):
            call()
    for texts in (["a", None], ["a", 3], [b"a", "b"]):
        with pytest.raises(ValueError, match=r"Text \d is .*; it must be a str"):
            other.embed_texts(texts)
    blind = list(ours.stream(None, "a red", **EXACT))
    assert "".join(blind).strip() == ours.generate(None, "a red", num_beams=1, **EXACT)[0]


def test_similarity_skips_what_cannot_be_read(retrieval):
    ours = retrieval[2]
    some = [pictures(1)[0], b"no image"]
    got = ours.similarity(some, ["a red 3", "blue"], skip_unreadable=True)
    np.testing.assert_allclose(got[0], ours.similarity(some[:1], ["a red 3", "blue"])[0], atol=1e-6)
    assert np.isnan(got[1]).all()
    maps = ours.attention_maps(some, skip_unreadable=True)
    assert np.isfinite(maps[0]).all() and np.isnan(maps[1]).all()
    features = ours.embed_texts(["a red 3", "blue"])
    for kind in (jax.numpy.asarray, torch.tensor):
        np.testing.assert_allclose(ours.similarity(some[:1], kind(features))[0], got[0], atol=1e-6)


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", None, True])
def test_batch_sizes_that_cannot_be(opt, size):
    with pytest.raises(ValueError, match="batch_size is .*; it must be a whole number from 1 on"):
        blip2_jax.load(opt[0], batch_size=size)


def test_a_batch_size_that_is_whole(opt):
    assert blip2_jax.load(opt[0], batch_size=np.int64(3)).batch_size == 3
    assert blip2_jax.load(opt[0], batch_size=4.0).batch_size == 4


def test_truncate_that_cannot_be(opt, retrieval):
    for truncate in (0, -1, 2.5, "8", True):
        for call in (
            lambda truncate: opt[1].answer(pictures(1), "why?", truncate=truncate),
            lambda truncate: retrieval[2].embed_texts("a red 3", truncate=truncate),
        ):
            with pytest.raises(ValueError, match="truncate is .*; it must be a whole number of"):
                call(truncate)


def test_prompts_that_are_too_long_or_empty(opt):
    _, ours = opt
    long = "a red 3 and " * 30
    with pytest.raises(ValueError, match=r"Prompt 1 has \d+ tokens; .* 60 positions.*truncate"):
        ours.generate(pictures(2), ["a red 3", long], **EXACT)
    cut = ours.generate(pictures(1), [long], truncate=4, **EXACT)
    assert cut == ours.generate(pictures(1), ["a red 3"], truncate=4, **EXACT)
    with pytest.raises(ValueError, match="Question 1 is empty"):
        ours.answer(pictures(2), ["how many?", "  "])
    with pytest.raises(ValueError, match="2 images and 3 prompts"):
        ours.generate(pictures(2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="nothing to do"):
        ours.caption([])


def test_the_placeholder_of_an_image_stands_where_its_queries_go(opt):
    _, ours = opt
    want = ours.generate(pictures(1), "a red", **EXACT)
    assert ours.generate(pictures(1), "<image>a red", **EXACT) == want
    assert ours.generate(pictures(1), 5 * "<image>" + " a red", **EXACT) == want
    assert ours.caption(pictures(1), prompt="<image>\na red", **EXACT) == want
    assert ours.settings("caption", prompt="<image>a red").prompt == "a red"
    asked = ours.answer(pictures(1), "how many?", **EXACT)
    assert ours.answer(pictures(1), "<image>how many?", **EXACT) == asked
    template = "<image> Question: {} Answer:"
    assert ours.answer(pictures(1), "how many?", prompt=template, **EXACT) == asked
    scores = ours.rank(pictures(1), "how many?", [["2", "3"]])
    np.testing.assert_array_equal(ours.rank(pictures(1), "<image>how many?", [["2", "3"]]), scores)
    pieces = [*ours.stream(pictures(1)[0], "<image>a red", **EXACT)]
    assert pieces == [*ours.stream(pictures(1)[0], "a red", **EXACT)]
    for call in (
        lambda: ours.generate(pictures(1), "a <image> red"),
        lambda: ours.generate(pictures(2), ["a", "<image><image>b"]),
        lambda: ours.caption(pictures(1), prompt="a photo <image>"),
        lambda: ours.answer(pictures(1), "what does <image> show?"),
        lambda: ours.rank(pictures(1), "what does <image> show?", [["a"]]),
        lambda: next(ours.stream(pictures(1)[0], "a<image>")),
    ):
        with pytest.raises(ValueError, match="write <image> once, in front, or leave it out"):
            call()


def test_a_question_that_is_too_long_gives_way(both, monkeypatch):
    """Its form and the language model's cue to answer stay, in every way to ask."""
    _, _, ours = both
    seen = []
    pad = tokenizers.pad_rows
    monkeypatch.setattr(
        tokenizers, "pad_rows", lambda t, ids, *a, **k: seen.extend(ids) or pad(t, ids, *a, **k)
    )
    question, form = 9 * "what color is the digit " + "?", ours.settings("answer").prompt
    ours.answer(pictures(1), question, truncate=40, **EXACT)
    ours.generate(pictures(1), form.replace("{}", question), truncate=40, **EXACT)
    assert len(seen) == 2 and seen[0] == seen[1] and len(seen[0]) <= 40
    tail = ours.llm_tokenizer(form.split("{}")[1])["input_ids"]
    bos = [i for i in tail[:1] if ours.family == "opt"]
    tail = tail[len(bos) :]
    assert seen[0][-len(tail) :] == tail
    assert ours.llm_tokenizer.decode(seen[0], skip_special_tokens=True).startswith(
        "Question: what color"
    )
    with pytest.raises(ValueError, match="truncate is 3, and the prompt has .* without the text"):
        ours.answer(pictures(1), question, truncate=3)


def test_a_method_without_its_head_says_what_has_it(opt, retrieval):
    with pytest.raises(ValueError, match="^similarity needs the heads of stage 1"):
        opt[1].similarity(pictures(1), ["a"])
    with pytest.raises(ValueError, match="match needs .*blip2-itm-vit-g"):
        opt[1].match(pictures(1), ["a"])
    for method in ("caption", "generate"):
        with pytest.raises(ValueError, match=f"{method} needs a language model.*opt-2.7b"):
            getattr(retrieval[2], method)(pictures(1))
    with pytest.raises(ValueError, match="Text 0 has .* tokens, the Q-Former reads 40"):
        retrieval[2].embed_texts(["a red 3 and " * 30])
    assert retrieval[2].embed_texts(["a red 3 and " * 30], truncate=40).shape == (1, 24)


def test_weights_that_are_not_numbers(opt):
    folder, _ = opt
    broken = blip2_jax.load(folder)
    broken.params["language_projection"]["bias"] = jax.numpy.full_like(
        broken.params["language_projection"]["bias"], np.nan
    )
    for beams in (1, 3):
        with pytest.raises(FloatingPointError, match="weights hold NaN"):
            broken.caption(pictures(2), num_beams=beams, **EXACT)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0 .greedy"),
        ({"num_return_sequences": 9}, "9 of 5 beams"),
        ({"do_sample": True, "num_beams": 3}, "not supported"),
        ({"length_penalty_includes_prompt": "all"}, "it must be True or False"),
        ({"min_new_tokens": 99}, "from 0 to max_new_tokens"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1; it must be at least 0"),
        ({"num_beams": 2.5}, "num_beams is 2.5; it must be a whole number"),
        ({"num_beams": True}, "num_beams is True; it must be a whole number"),
        ({"num_beams": "5"}, "num_beams is '5'; it must be a whole number"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens is inf; it must be a whole number"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
        ({"length_penalty": "1"}, "length_penalty is '1'; it must be a finite number"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; it must be True or False"),
    ],
)
def test_decoding_that_cannot_be(opt, wrong, message):
    with pytest.raises(ValueError, match=message):
        opt[1].caption(pictures(1), **wrong)


@pytest.mark.parametrize(
    "options, meant",
    [
        ({"num_beam": 3}, "num_beam. Did you mean num_beams"),
        ({"max_length": 9}, "max_length. Did you mean max_new_tokens"),
        ({"max_len": 9}, "max_len. Did you mean max_new_tokens"),
        ({"min_length": 1}, "min_length. Did you mean min_new_tokens"),
        ({"num_captions": 2}, "num_captions. Did you mean num_return_sequences"),
        ({"use_nucleus_sampling": True}, "use_nucleus_sampling. Did you mean do_sample"),
        ({"skip_unreadables": True}, "skip_unreadables. Did you mean skip_unreadable"),
        ({"output_scores": True}, "output_scores. Did you mean return_scores"),
        ({"zzz": True}, "zzz. There are max_new_tokens, .*truncate"),
    ],
)
def test_an_unknown_option_names_the_one_that_was_meant(opt, options, meant):
    calls = {
        "caption": lambda: opt[1].caption(pictures(1), **options),
        "answer": lambda: opt[1].answer(pictures(1), "how many?", **options),
        "generate": lambda: opt[1].generate(pictures(1), **options),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match=f"No option {meant}"):
            call()


def test_numbers_of_any_library_are_taken_and_none_is_the_default(opt):
    _, ours = opt
    options = {"num_beams": 2.0, "max_new_tokens": np.int64(5), "length_penalty": np.float32(1)}
    options |= {
        "top_k": None,
        "temperature": None,
        "early_stopping": 0,
        "min_new_tokens": torch.tensor(0),
    }
    plain = {"num_beams": 2, "max_new_tokens": 5, "length_penalty": 1.0, "min_new_tokens": 0}
    assert ours.settings("generate", **options) == ours.settings("generate", **plain)
    assert ours.settings("generate", **dict.fromkeys(options)) == ours.settings("generate")
    assert ours.generate(pictures(1), **options) == ours.generate(pictures(1), **plain)
