"""Scores with their baselines, ready to show."""

import math
import re
from collections.abc import Mapping
from typing import Any

# What stands on top, in this order, where the run measured it.
HEADLINES = (
    "vqa/accuracy",
    "vqa_held_out/accuracy",
    "caption/facts_correct",
    "caption/cider",
    "retrieval/image_to_text_r1",
    "retrieval/text_to_image_r1",
)

LABELS = {
    "vqa": "Question answering",
    "vqa_held_out": "Question answering, unseen combinations",
    "caption": "Captions",
    "retrieval": "Retrieval",
    "vqa/accuracy": "Answers right",
    "vqa_held_out/accuracy": "Answers right, unseen combinations",
    "caption/facts_correct": "Captions with every fact right",
    "caption/cider": "Caption CIDEr-D",
    "retrieval/image_to_text_r1": "Image to text, first hit right",
    "retrieval/text_to_image_r1": "Text to image, first hit right",
    "stage1": "Stage 1: representation learning",
    "stage2": "Stage 2: generative learning",
}

BASELINES = {"_blind": "no image", "_chance": "chance", "_shuffled": "wrong images"}

_NOT_SCORES = re.compile(r"seconds/|.*(_gb|/candidates|/candidate_texts|/unreadable)$")

_MAX_CIDER = 10.0  # of CIDEr-D, whose scale is not 0..1


def score_rows(metrics: Mapping[str, float | str]) -> dict[str, dict[str, Any]]:
    """Each score with its baseline, ready to show: texts, and bar lengths in 0..1."""
    scores = {}
    for name, value in metrics.items():
        if _NOT_SCORES.match(name) or is_baseline(name) or not isinstance(value, (int, float)):
            continue
        baseline, against = _baseline(name, metrics)
        fraction = not name.endswith("cider")
        scale = 1.0 if fraction else _MAX_CIDER
        gain = None if baseline is None else value - baseline
        scores[name] = {
            "name": name,
            "headline": LABELS.get(name, label_of(name)),
            "label": "All"
            if name.endswith("/accuracy")
            else label_of(name.partition("/")[2] or name),
            "value": _score(value, fraction),
            "bar": _clip(value / scale),
            "baseline": None if baseline is None else _score(baseline, fraction),
            "baseline_bar": None if baseline is None else _clip(baseline / scale),
            "against": against,
            "gain": None if gain is None else _gain(gain, fraction),
            "better": gain is not None and gain > 0,
        }
    return scores


def headline_rows(scores: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the embedded world, or the first score of every group."""
    first = {name.partition("/")[0]: name for name in reversed(scores)}
    chosen = [name for name in HEADLINES if name in scores] or list(first.values())[::-1]
    return [scores[name] for name in chosen]


def is_baseline(name: str) -> bool:
    """Whether a metric is what another one is compared with: the same without the image."""
    return name.endswith(tuple(BASELINES))


def _baseline(name: str, metrics: Mapping[str, Any]) -> tuple[float | None, str]:
    for suffix, kind in BASELINES.items():
        if name + suffix in metrics:
            return float(metrics[name + suffix]), kind
    group, hit = name.partition("/")[0], re.search(r"_r(\d+)$", name)
    images = metrics.get(f"{group}/candidates")
    if not hit or not images:
        return None, ""
    k, ranked, right = int(hit[1]), images, 1.0
    if "image_to_text" in name:
        ranked = metrics.get(f"{group}/candidate_texts", images)
        right = ranked / images  # texts of each image
    missed = math.prod(max(0.0, 1 - right / (ranked - j)) for j in range(min(k, int(ranked))))
    return 1 - missed, "chance"


def group_rows(scores: Mapping[str, dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows by task: what stands before the slash in a metric's name."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, row in scores.items():
        group = name.partition("/")[0] if "/" in name else "Other"
        groups.setdefault(group, []).append(row)
    return [(LABELS.get(group, label_of(group)), members) for group, members in groups.items()]


def label_of(name: str) -> str:
    """A metric's name as people read it, e.g. "Image to text R@1"."""
    text = re.sub(r"_r(\d+)$", r" R@\1", name).replace("_", " ").replace("/", " ")
    text = re.sub(r"\bstage(\d)", r"stage \1", text)
    text = re.sub(r"\bbleu(\d)", r"BLEU-\1", text.replace("cider", "CIDEr-D"))
    text = text.replace("rouge l", "ROUGE-L").replace("meteor", "METEOR")
    text = text.replace("itc ", "ITC only: ")
    return text[:1].upper() + text[1:]


def _clip(value: float) -> float:
    return 0.0 if math.isnan(value) else min(1.0, max(0.0, value))


def _score(value: float, fraction: bool) -> str:
    return f"{100 * value:.1f}%" if fraction else f"{value:.2f}"


def _gain(value: float, fraction: bool) -> str:
    text = f"{100 * value:+.1f}" if fraction else f"{value:+.2f}"
    return text.replace("-", "\N{MINUS SIGN}")
