"""The page of a run: scores, curves, pictures, attention, and how it was made.

What a run did not produce is left out with a line that says so.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2_jax.reporting.charts import draw_curves
from blip2_jax.reporting.page import render
from blip2_jax.reporting.pictures import attention_maps, example_card
from blip2_jax.reporting.scores import group_rows, headline_rows, is_baseline, label_of, score_rows


def write_report(
    path: str | Path,
    *,
    title: str,
    metrics: Mapping[str, float | str],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    examples: Sequence[Mapping[str, Any]],
    attention: Sequence[Mapping[str, Any]],
    timings: Mapping[str, float],
    versions: Mapping[str, str],
    config: str,
    summary: str = "",
) -> Path:
    """Writes the page; every part may be empty.

    Args:
      path: the HTML file; its folder is made.
      title: heading of the page.
      metrics: flat, as in `metrics.json`: "vqa/accuracy" with its baseline "vqa/accuracy_blind"
        ("_chance" and "_shuffled" are known too); fractions of 1, CIDEr-D as it is. The chance of
        "retrieval/*_rK" follows from "retrieval/candidates" and "retrieval/candidate_texts".
      curves: by stage, the records of its `metrics.jsonl`: {"step": int, "loss": float,
        "itc/loss": float, ...}; all names that end in "loss" are drawn.
      examples: each {"image": PNG or JPEG bytes or uint8[H, W, 3], "reference": str, "caption":
        str, "correct": bool | None, "questions": [{"question", "answer", "prediction",
        "correct"}]}; all but the image may be absent.
      attention: each {"image": uint8[H, W, 3], "attention": float[Q, h, w]} and, optionally,
        "text": str and "queries": [int], which to show; by default the most concentrated ones.
      timings: seconds by what took them.
      versions: of Python, the libraries and the machine, by name.
      config: the exact config as text.
      summary: one or two sentences under the title.

    Returns:
      The path written.

    Raises:
      ValueError: an image or an attention map of the wrong shape.
    """
    scores = score_rows(metrics)
    return render(
        path,
        "run.html.j2",
        title=title,
        summary=summary,
        headlines=headline_rows(scores),
        groups=group_rows(scores),
        other={k: _plain(v) for k, v in metrics.items() if k not in scores and not is_baseline(k)},
        curves=draw_curves(curves),
        examples=[example_card(example) for example in examples],
        attention=[attention_maps(item, i) for i, item in enumerate(attention)],
        timings=_timings(timings),
        versions=versions,
        config=config,
    )


def _plain(value: float | str) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _timings(timings: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(what, how long, share of all); the total has no share."""
    whole = sum(value for name, value in timings.items() if name != "total") or 1.0
    return [
        (label_of(name), _duration(value), 0.0 if name == "total" else value / whole)
        for name, value in timings.items()
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
