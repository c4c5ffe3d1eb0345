"""Line charts of a run's or a sweep's metrics, as SVG that takes the page's font and colors."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from blip2_jax.reporting.scores import LABELS, label_of

_INK, _LINE = "#010203", "#040506"  # stand-ins, replaced by the page's own colors

_CURVE_COLORS = ("#0f8b8d", "#e08e0b", "#6c6fe0", "#d6487e", "#7a8699", "#5a9e3a")

_EVAL = "eval/"  # metrics that begin so were measured on test data

_MAX_POINTS = 300


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """(heading, SVG) of each stage that has losses."""
    drawn: list[tuple[str, str]] = []
    for stage, records in curves.items():
        series: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            for name, value in record.items():
                number = isinstance(value, (int, float)) and math.isfinite(value)
                if name.endswith("loss") and number and "step" in record:
                    series.setdefault(name, []).append((record["step"], value))
        for name in [name for name in series if name.removeprefix(_EVAL) != "loss"]:
            total = series.get(f"{_EVAL * name.startswith(_EVAL)}loss")
            if series[name] == total:  # the only loss of its stage
                del series[name]
        if series:
            svg = line_chart(series, f"curve{len(drawn)}-")
            drawn.append((LABELS.get(stage, label_of(stage)), svg))
    return drawn


def line_chart(
    series: Mapping[str, list[tuple[int, float]]],
    prefix: str,
    y_label: str = "loss",
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
        kinds = {name: name.removeprefix(_EVAL) for name in series}
        order = sorted(dict.fromkeys(kinds.values()), key=lambda kind: kind != "loss")  # the total
        for name in sorted(series, key=lambda name: order.index(kinds[name])):
            color = _CURVE_COLORS[order.index(kinds[name]) % len(_CURVE_COLORS)]
            dashed = kinds[name] != name and kinds[name] in series  # beside its training curve
            steps, values = _thin(np.array(series[name], float))
            label = "total" if name == "loss" and len(order) > 1 else name.removesuffix("/loss")
            axes.plot(
                *(steps, values),
                color=colors[name] if colors else color,
                label=None if dashed else label,
                linestyle="--" if dashed else "-",
                linewidth=2.2 if kinds[name] == "loss" and not colors else 1.5,
                marker="o" if len(steps) == 1 else None,
            )
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=0.0 if min(v for p in series.values() for _, v in p) >= 0 else None)
        axes.grid(axis="y", color=_LINE, lw=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if not colors:
            axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", text, count=4)
    text = text.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    return re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}", text)


def colors_for(count: int) -> list[str]:
    """As many different colors; those of the other charts while they last."""
    if count <= len(_CURVE_COLORS):
        return list(_CURVE_COLORS[:count])
    shades = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))
    return [to_hex(shade) for shade in shades]


def _thin(points: np.ndarray) -> np.ndarray:
    """Means over neighbors, so that a curve has at most `_MAX_POINTS` points; float[2, n]."""
    parts = np.array_split(points, min(len(points), _MAX_POINTS))
    return np.array([part.mean(axis=0) for part in parts]).T
