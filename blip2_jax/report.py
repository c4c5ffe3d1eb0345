"""Self-contained HTML pages: a run (scores, curves, pictures, attention, how it was made), a sweep.

Everything is inside a page (pictures as data, curves as SVG, no scripts), so that it opens
offline and can be mailed. What a run did not produce is left out with a line that says so.
"""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from blip2_jax.runtime import atomic

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
_INK, _LINE = "#010203", "#040506"  # stand-ins, replaced by the page's own colors
_CURVE_COLORS = ("#0f8b8d", "#e08e0b", "#6c6fe0", "#d6487e", "#7a8699", "#5a9e3a")
_HELD_OUT = "eval/"  # what begins so was measured on test data
_MAX_CIDER = 10.0  # of CIDEr-D, whose scale is not 0..1
_COMPARED = ("loss", "accuracy")  # what a sweep's runs are compared by
_MAX_POINTS = 300
_MAX_QUERIES = 7  # with the image itself, one row of the page
_PICTURE = 192  # pixels of a heatmap's side; pictures of 64 pixels become three times as large


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
    rows = score_rows(metrics)
    return _render(
        path,
        "report.html.j2",
        title=title,
        summary=summary,
        headlines=_headlines(rows),
        groups=_groups(rows),
        other={k: _plain(v) for k, v in metrics.items() if k not in rows and not _is_baseline(k)},
        curves=_draw_curves(curves),
        examples=[_example(example) for example in examples],
        attention=[_attention(item, i) for i, item in enumerate(attention)],
        timings=_timings(timings),
        versions=versions,
        config=config,
    )


def write_sweep_report(
    path: str | Path,
    *,
    title: str,
    summary: str,
    keys: Sequence[str],
    runs: Sequence[Mapping[str, Any]],
) -> Path:
    """Writes the page of a sweep: a table over its runs, and one chart a metric with all of them.

    Args:
      path: the HTML file; its folder is made.
      title: heading of the page.
      summary: one or two sentences under the title.
      keys: what is swept.
      runs: each {"run": its name, "status": a word, "point": {key: text}, "records": those of its
        `metrics.jsonl`}. Losses and accuracies are drawn; the table shows the last of each, and
        which finished run has the best.

    Returns:
      The path written.
    """
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run in runs:
        for record in run["records"]:
            for name, value in record.items():
                number = isinstance(value, (int, float)) and math.isfinite(value)
                if number and name.endswith(_COMPARED):
                    curves.setdefault(name, {}).setdefault(run["run"], [])
                    curves[name][run["run"]].append((record["step"], value))
    # Held-out metrics first, and totals before their parts.
    names = sorted(curves, key=lambda name: (not name.startswith("eval/"), name.count("/"), name))
    colors = dict(zip((run["run"] for run in runs), _colors(len(runs)), strict=True))
    last = {name: {run: points[-1][1] for run, points in curves[name].items()} for name in names}
    finished = {run["run"] for run in runs if run["status"] == "finished"}
    best = {}
    for name in names:
        ended = {run: value for run, value in last[name].items() if run in finished}
        if len(ended) > 1:
            best[name] = (min if name.endswith("loss") else max)(ended, key=ended.__getitem__)
    return _render(
        path,
        "sweep.html.j2",
        title=title,
        summary=summary,
        keys=keys,
        names=names,
        rows=[
            {
                "name": run["run"],
                "color": colors[run["run"]],
                "status": run["status"],
                "step": run["records"][-1]["step"] if run["records"] else "",
                "point": run["point"],
                "metrics": {
                    n: f"{last[n][run['run']]:.4g}" for n in names if run["run"] in last[n]
                },
                "best": {n for n in names if best.get(n) == run["run"]},
            }
            for run in runs
        ],
        charts=[
            (_words(name), _svg(curves[name], f"curve{i}-", name.rpartition("/")[2], colors))
            for i, name in enumerate(names)
        ],
    )


def _render(path: str | Path, template: str, **parts: Any) -> Path:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**parts)
    path = Path(path)
    atomic.write_text(path, page)
    return path


# ---------------------------------------------------------------------------------------- scores


def score_rows(metrics: Mapping[str, float | str]) -> dict[str, dict[str, Any]]:
    """Each score with its baseline, ready to show: texts, and bar lengths in 0..1."""
    rows = {}
    for name, value in metrics.items():
        if _NOT_SCORES.match(name) or _is_baseline(name) or not isinstance(value, (int, float)):
            continue
        baseline, against = _baseline(name, metrics)
        fraction = not name.endswith("cider")
        scale = 1.0 if fraction else _MAX_CIDER
        gain = None if baseline is None else value - baseline
        rows[name] = {
            "name": name,
            "headline": LABELS.get(name, _words(name)),
            "label": "All"
            if name.endswith("/accuracy")
            else _words(name.partition("/")[2] or name),
            "value": _score(value, fraction),
            "bar": _clip(value / scale),
            "baseline": None if baseline is None else _score(baseline, fraction),
            "baseline_bar": None if baseline is None else _clip(baseline / scale),
            "against": against,
            "gain": None if gain is None else _gain(gain, fraction),
            "better": gain is not None and gain > 0,
        }
    return rows


def _headlines(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the embedded world, or the first score of every group."""
    first = {name.partition("/")[0]: name for name in reversed(rows)}
    chosen = [name for name in HEADLINES if name in rows] or list(first.values())[::-1]
    return [rows[name] for name in chosen]


def _is_baseline(name: str) -> bool:
    return name.endswith(tuple(BASELINES))


def _baseline(name: str, metrics: Mapping[str, Any]) -> tuple[float | None, str]:
    for suffix, words in BASELINES.items():
        if name + suffix in metrics:
            return float(metrics[name + suffix]), words
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


def _groups(rows: Mapping[str, dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        group = name.partition("/")[0] if "/" in name else "Other"
        groups.setdefault(group, []).append(row)
    return [(LABELS.get(group, _words(group)), some) for group, some in groups.items()]


def _words(name: str) -> str:
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


def _plain(value: float | str) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _timings(timings: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(what, how long, share of all); the total has no share."""
    whole = sum(value for name, value in timings.items() if name != "total") or 1.0
    return [
        (_words(name), _duration(value), 0.0 if name == "total" else value / whole)
        for name, value in timings.items()
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


# ---------------------------------------------------------------------------------------- curves


def _draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """(heading, SVG) of each stage that has losses."""
    drawn: list[tuple[str, str]] = []
    for stage, records in curves.items():
        series: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            for name, value in record.items():
                number = isinstance(value, (int, float)) and math.isfinite(value)
                if name.endswith("loss") and number and "step" in record:
                    series.setdefault(name, []).append((record["step"], value))
        for name in [name for name in series if name.removeprefix(_HELD_OUT) != "loss"]:
            total = series.get(f"{_HELD_OUT * name.startswith(_HELD_OUT)}loss")
            if series[name] == total:  # the only loss of its stage
                del series[name]
        if series:
            drawn.append((LABELS.get(stage, _words(stage)), _svg(series, f"curve{len(drawn)}-")))
    return drawn


def _svg(
    series: Mapping[str, list[tuple[int, float]]],
    prefix: str,
    what: str = "loss",
    colors: Mapping[str, str] | None = None,
) -> str:
    """A line chart; its text takes the page's font and color, its ids start with `prefix`.

    With `colors`, by name, the page says elsewhere which line is which: there is no legend.
    """
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 9.5}
    style["text.parse_math"] = False
    ink = {f"{part}.color": _INK for part in ("xtick", "ytick", "text")}
    with matplotlib.rc_context(style | ink | {"axes.labelcolor": _INK}):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        kinds = {name: name.removeprefix(_HELD_OUT) for name in series}
        order = sorted(dict.fromkeys(kinds.values()), key=lambda kind: kind != "loss")  # the total
        for name in sorted(series, key=lambda name: order.index(kinds[name])):
            place, held_out = (
                order.index(kinds[name]),
                kinds[name] != name and kinds[name] in series,
            )
            steps, values = _thin(np.array(series[name], float))
            label = "total" if name == "loss" and len(order) > 1 else name.removesuffix("/loss")
            axes.plot(
                *(steps, values),
                color=colors[name] if colors else _CURVE_COLORS[place % len(_CURVE_COLORS)],
                label=None if held_out else label,
                linestyle="--" if held_out else "-",
                linewidth=2.2 if kinds[name] == "loss" and not colors else 1.5,
                marker="o" if len(steps) == 1 else None,
            )
        axes.set_xlabel("step")
        axes.set_ylabel(what)
        axes.set_ylim(bottom=0.0 if min(v for p in series.values() for _, v in p) >= 0 else None)
        axes.grid(axis="y", color=_LINE, lw=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if not colors:
            axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", text, count=4)
    text = text.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    return re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}", text)


def _colors(count: int) -> list[str]:
    """As many different colors; those of the other charts while they last."""
    if count <= len(_CURVE_COLORS):
        return list(_CURVE_COLORS[:count])
    shades = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))
    return [to_hex(shade) for shade in shades]


def _thin(points: np.ndarray) -> np.ndarray:
    """Means over neighbors, so that a curve has at most `_MAX_POINTS` points; float[2, n]."""
    parts = np.array_split(points, min(len(points), _MAX_POINTS))
    return np.array([part.mean(axis=0) for part in parts]).T


# -------------------------------------------------------------------------------------- pictures


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image": _data_uri(example["image"]),
        "reference": example.get("reference"),
        "caption": example.get("caption"),
        "correct": _right_or_wrong(example),
        "questions": [
            {"answer": None, "prediction": None} | dict(q) | {"correct": _right_or_wrong(q)}
            for q in example.get("questions") or ()
        ],
    }


def _right_or_wrong(item: Mapping[str, Any]) -> bool | None:
    return None if item.get("correct") is None else bool(item["correct"])


def _data_uri(image: bytes | np.ndarray) -> str:
    if not isinstance(image, bytes):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"An image must be uint8[H, W, 3], got {image.dtype}{image.shape}.")
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", optimize=True)
        image = buffer.getvalue()
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _attention(item: Mapping[str, Any], number: int) -> dict[str, Any]:
    image, maps = np.asarray(item["image"]), np.asarray(item["attention"], float)
    if maps.ndim != 3:
        raise ValueError(f"attention[{number}] must be float[Q, h, w], got shape {maps.shape}.")
    maps = np.nan_to_num(maps)
    queries = item.get("queries")
    if queries is None:
        queries = sorted(_most_concentrated(maps))
    return {
        "image": _data_uri(image),
        "text": item.get("text"),
        "overlays": [(int(q), _data_uri(overlay(image, maps[q]))) for q in queries],
    }


def _most_concentrated(maps: np.ndarray) -> np.ndarray:
    """The queries of lowest entropy: those that look somewhere rather than everywhere."""
    shares = np.maximum(maps.reshape(len(maps), -1), 1e-12)
    shares /= shares.sum(axis=1, keepdims=True)
    return np.argsort((-shares * np.log(shares)).sum(axis=1), kind="stable")[:_MAX_QUERIES]


def overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Attention over an image: gray where none is, glowing where it is highest.

    Args:
      image: uint8[H, W, 3].
      attention: float[h, w], any scale; the patches' grid.

    Returns:
      uint8[192, 192 * W / H, 3].
    """
    size = (max(1, round(_PICTURE * image.shape[1] / image.shape[0])), _PICTURE)
    large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST), float) / 255
    low, high = attention.min(), attention.max()
    heat = ((attention - low) / ((high - low) or 1.0)).astype(np.float32)
    heat = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    glow = matplotlib.colormaps["inferno"](heat)[..., :3]
    faded = 0.5 * large + 0.2 * large.mean(axis=2, keepdims=True)
    strength = 0.75 * heat[..., None] ** 0.8
    return np.rint(255 * ((1 - strength) * faded + strength * glow).clip(0, 1)).astype(np.uint8)
