"""The page of a sweep: a table over its runs, and one chart a metric with all of them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2_jax.reporting.charts import colors_for, line_chart
from blip2_jax.reporting.page import render
from blip2_jax.reporting.scores import label_of

_COMPARED = ("loss", "accuracy")  # what a sweep's runs are compared by


def write_sweep_report(
    path: str | Path,
    *,
    title: str,
    summary: str,
    keys: Sequence[str],
    runs: Sequence[Mapping[str, Any]],
) -> Path:
    """Writes the page.

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
    # Metrics on evaluation data first, and totals before their parts.
    names = sorted(curves, key=lambda name: (not name.startswith("eval/"), name.count("/"), name))
    colors = dict(zip((run["run"] for run in runs), colors_for(len(runs)), strict=True))
    last = {name: {run: points[-1][1] for run, points in curves[name].items()} for name in names}
    finished = {run["run"] for run in runs if run["status"] == "finished"}
    best = {}
    for name in names:
        ended = {run: value for run, value in last[name].items() if run in finished}
        if len(ended) > 1:
            best[name] = (min if name.endswith("loss") else max)(ended, key=ended.__getitem__)
    return render(
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
            (
                label_of(name),
                line_chart(curves[name], f"curve{i}-", name.rpartition("/")[2], colors),
            )
            for i, name in enumerate(names)
        ],
    )
