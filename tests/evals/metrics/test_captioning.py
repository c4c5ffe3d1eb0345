"""Caption scores equal small second implementations, and the two tokenizers agree."""

import math
from collections import Counter

import numpy as np
import pytest

from blip2_jax.evals.metrics import captioning

needs_java = pytest.mark.skipif(not captioning.has_java(), reason="needs Java")

WORDS = "a the red blue 3 7 on left top dog runs in is and".split()


def random_split(seed, images=12):
    rng = np.random.default_rng(seed)

    def sentence():
        return " ".join(rng.choice(WORDS, size=rng.integers(3, 12)))

    references = {i: [sentence() for _ in range(rng.integers(1, 4))] for i in range(images)}
    # Half copied from a reference in part, so that long n-grams match too.
    predictions = {
        i: f"{refs[0]} {sentence()}" if i % 2 else sentence() for i, refs in references.items()
    }
    return predictions, references


def ngrams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(predictions, references):
    """CIDEr-D from its definition (Vedantam et al. 2015, section 4 and the "D" variant)."""
    images = len(references)
    total = 0.0
    for n in range(1, 5):
        seen = Counter(
            g for refs in references.values() for g in {g for r in refs for g in ngrams(r, n)}
        )

        def weigh(text, n=n, seen=seen):
            return {g: c * math.log(images / max(1, seen[g])) for g, c in ngrams(text, n).items()}

        for key, refs in references.items():
            hypothesis = weigh(predictions[key])
            for ref in refs:
                truth = weigh(ref)
                dot = sum(min(w, truth.get(g, 0)) * truth.get(g, 0) for g, w in hypothesis.items())
                norms = math.hypot(*hypothesis.values()) * math.hypot(*truth.values())
                # coco-caption measures lengths in bigrams
                gap = ngrams(predictions[key], 2).total() - ngrams(ref, 2).total()
                penalty = math.exp(-(gap**2) / (2 * 6.0**2))
                total += penalty * dot / (norms or 1.0) / len(refs)
    return 10 * total / 4 / images


def bleu(predictions, references, most):
    """Corpus BLEU with the closest reference length (Papineni et al. 2002)."""
    logs = 0.0
    for n in range(1, most + 1):
        right = guessed = 0
        for key, refs in references.items():
            predicted = ngrams(predictions[key], n)
            allowed = Counter()
            for ref in refs:
                allowed |= ngrams(ref, n)
            right += (predicted & allowed).total()
            guessed += predicted.total()
        logs += math.log(right / guessed) / most
    length = sum(len(text.split()) for text in predictions.values())
    closest = sum(
        min((len(r.split()) for r in refs), key=lambda m: (abs(m - len(predictions[k].split())), m))
        for k, refs in references.items()
    )
    return math.exp(logs + min(0.0, 1 - closest / length))


def rouge_l(prediction, references, beta=1.2):
    def common(a, b):
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return 1 + common(a[:-1], b[:-1])
        return max(common(a[:-1], b), common(a, b[:-1]))

    words = prediction.split()
    precision = max(common(words, ref.split()) / len(words) for ref in references)
    recall = max(common(words, ref.split()) / len(ref.split()) for ref in references)
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


@pytest.mark.parametrize("seed", range(3))
def test_cider_and_bleu_equal_their_definitions(seed):
    predictions, references = random_split(seed)
    metrics = captioning.caption_metrics(predictions, references, tokenizer="fallback")
    assert metrics["cider"] == pytest.approx(cider_d(predictions, references), rel=1e-9)
    assert metrics["cider"] > 0.1
    for n in range(1, 5):
        expected = bleu(predictions, references, n)
        assert metrics[f"bleu{n}"] == pytest.approx(expected, rel=1e-6)


def test_rouge_l_equals_its_definition():
    predictions = {1: "a red dog runs", 2: "the 7 is left", 3: "blue"}
    references = {1: ["the red dog", "a dog runs in"], 2: ["a 7 on the left"], 3: ["a red 3"]}
    metrics = captioning.caption_metrics(predictions, references, tokenizer="fallback")
    expected = np.mean([rouge_l(predictions[k], references[k]) for k in predictions])
    assert metrics["rouge_l"] == pytest.approx(expected)


def test_perfect_captions_score_the_scales_top():
    references = {i: [f"a {w} {i} in the top left"] for i, w in enumerate(WORDS)}
    metrics = captioning.caption_metrics(
        {i: refs[0] for i, refs in references.items()}, references, tokenizer="fallback"
    )
    assert metrics["cider"] == pytest.approx(10.0)
    assert metrics["bleu4"] == pytest.approx(1.0) and metrics["rouge_l"] == pytest.approx(1.0)
    assert metrics["tokenizer"] == "fallback"


PENN_TREEBANK = dict(
    [
        ("A dog's bone isn't here.", "a dog 's bone is n't here"),
        ("He cannot; they're gonna run!", "he can not they 're gon na run"),
        ("a t-shirt, a 10-year-old: 1/2 black/white", "a t-shirt a 10-year-old 1/2 black/white"),
        ("$5.00 or 50% (crowd) [x]", "$ 5.00 or 50 % -lrb- crowd -rrb- -lsb- x -rsb-"),
        ("in the u.s. at 9:30 p.m. with dr. who", "in the u.s. at 9:30 p.m. with dr. who"),
        ('a "big" dog -- yes... \u2013 \u201cno\u201d', "a big dog yes no"),
        ("it\u2019s 3.5 and 1,000", "it 's 3.5 and 1,000"),
    ]
)


@pytest.mark.parametrize("text", PENN_TREEBANK)
def test_fallback_cuts_as_the_penn_treebank_does(text):
    assert captioning.fallback_tokens(text) == PENN_TREEBANK[text]


@pytest.mark.integration
@needs_java
def test_java_cuts_as_the_penn_treebank_does():
    tokenized = captioning.tokenize(list(PENN_TREEBANK), tokenizer="ptb")
    assert tokenized == (list(PENN_TREEBANK.values()), "ptb")


def test_without_java_the_result_says_fallback(monkeypatch):
    monkeypatch.setenv("PATH", "")
    metrics = captioning.caption_metrics({1: "a dog"}, {1: ["a dog"]})
    assert metrics["tokenizer"] == "fallback"
    with pytest.raises(RuntimeError, match="METEOR needs Java"):
        captioning.caption_metrics({1: "a dog"}, {1: ["a dog"]}, scores=["meteor"])
    missing = captioning.left_out(captioning.SCORES)
    assert missing.keys() == {"meteor", "spice"} and "Java" in missing["spice"]
    assert captioning.left_out(["cider", "bleu4"]) == {}
    with pytest.raises(RuntimeError, match="install a JRE"):
        captioning.tokenize(["a dog"], tokenizer="ptb")


@pytest.mark.integration
def test_java_that_does_not_run_is_reported_and_replaced(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\necho no runtime >&2\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.warns(UserWarning, match="no runtime"):
        assert captioning.tokenize(["A dog."]) == (["a dog"], "fallback")
    with pytest.raises(RuntimeError, match="no runtime"):
        captioning.tokenize(["A dog."], tokenizer="ptb")


@pytest.mark.integration
@needs_java
def test_meteor_only_when_asked_for_and_nothing_is_printed(capfd):
    predictions, references = {1: "a dog runs", 2: ""}, {1: ["a dog ran"], 2: ["the cat"]}
    metrics = captioning.caption_metrics(predictions, references, scores=["meteor"])
    assert 0.1 < metrics["meteor"] < 0.9 and metrics["tokenizer"] == "ptb"
    assert "meteor" not in captioning.caption_metrics(predictions, references)
    assert capfd.readouterr() == ("", "")


def test_spice_says_which_models_it_needs_and_downloads_nothing(monkeypatch, tmp_path):
    def no_network(*args):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(captioning, "has_java", lambda: True)
    monkeypatch.setattr(captioning, "_folder", lambda package: str(tmp_path))
    models = [tmp_path / "lib" / f"stanford-corenlp-3.6.0{end}.jar" for end in ("", "-models")]
    models[0].parent.mkdir()
    for there in range(3):
        reasons = captioning.left_out(["spice"]).get("spice", "")
        assert [model.name in reasons for model in models] == [n >= there for n in range(2)]
        if there < 2:
            with pytest.raises(RuntimeError, match="SPICE needs"):
                captioning.caption_metrics({1: "a"}, {1: ["a"]}, scores=["spice"])
            models[there].touch()
    with pytest.raises(ValueError, match="No caption score clair; known: cider"):
        captioning.left_out(["cider", "clair"])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({1: "a"}, {1: ["a"], 2: ["b"]}, r"1 images have no prediction \(2\)"),
        ({1: "a", 5: "b"}, {1: ["a"]}, r"unknown images \(5\)"),
        ({1: "a"}, {1: []}, "Image 1 has no usable references"),
        ({1: "a"}, {1: "a dog"}, "Image 1 has no usable references"),
        ({1: "a"}, {1: ["", " "]}, "Image 1 has no usable references"),
    ],
)
def test_bad_input_is_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        captioning.caption_metrics(predictions, references)
