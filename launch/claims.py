"""Two claims of the paper in small: table and picture of docs/digits.md, from two sweeps.

  blip2 sweep --config=configs/digits/claims_stage1.py --workdir=runs/claims/stage1 --backend=local
  blip2 sweep --config=configs/digits/claims_stage2.py --workdir=runs/claims/stage2 --backend=local
  python launch/claims.py

What was held fixed, and why, is written in configs/digits/claims.py, from before the runs. The data
and the frozen towers are the quickstart's; run that first, or blip2 prepare --source=digits.
Keeps the scores of all finished runs in docs/pictures/claims.csv, from then on with or without
their folders; remove it when the conditions change. When every run is there, prints a table (mean,
lowest and highest of the seeds; in how many of them the whole stage 1 is better) and draws
docs/pictures/claims.svg.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from blip2_jax import cli
from blip2_jax.runtime.jsonl import read_jsonl
from blip2_jax.sweeps.points import as_text, run_name

ROOT = Path(__file__).resolve().parent.parent
claims = cli.load_module(str(ROOT / "configs/digits/claims.py"))
PICTURES = ROOT / "docs" / "pictures"
NOTHING = "no stage 1"
COLORS = {
    "stage 1": "#1b6ca8",
    "without ITG": "#c8553d",
    "mismatched pairs": "#8a8a8a",
    NOTHING: "#2d2d2d",
}
ANSWERS = ["eval/vqa/accuracy"]


def recall(kind: str) -> list[str]:
    """R@1 in both directions: of ITC with ITM (""), or of ITC alone ("itc_")."""
    return [f"eval/retrieval/{kind}{way}_r1" for way in ("image_to_text", "text_to_image")]


METRICS = {"stage1": [*recall(""), *recall("itc_")], "stage2": ANSWERS}
COLUMNS = ("stage", "way", "seed", "step", "metric", "value")
Curve = dict[int, float]  # step -> score
Run = tuple[str, str, int]  # stage, way, seed
Scores = dict[Run, dict[str, Curve]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="default: %(default)s")
    args = parser.parse_args()
    args.pictures.mkdir(parents=True, exist_ok=True)
    kept = args.pictures / "claims.csv"
    scores = read(kept) | {run: finished(run) for run in all_runs() if is_finished(run)}
    write(scores, kept)
    if missing := [run for run in all_runs() if run not in scores]:
        sys.exit(
            f"{len(scores)} runs are in {kept}; no finished run is in\n  "
            + "\n  ".join(folder(run) for run in missing)
            + "\nRun the sweeps first: see --help."
        )
    ways = (*claims.WAYS, NOTHING)
    answers = {way: curves(scores, "stage2", way, ANSWERS) for way in ways}
    retrieval = {way: curves(scores, "stage1", way, recall("")) for way in claims.WAYS}
    contrast = {way: curves(scores, "stage1", way, recall("itc_")) for way in claims.WAYS}
    print(table(answers, retrieval, contrast))
    draw(answers, retrieval, args.pictures / "claims.svg")
    return 0


def all_runs() -> list[Run]:
    stage1 = [("stage1", way, seed) for seed in claims.SEEDS for way in claims.WAYS]
    return stage1 + [
        ("stage2", way, seed) for seed in claims.SEEDS for way in (*claims.WAYS, NOTHING)
    ]


def folder(run: Run) -> str:
    """Where its sweep leaves a run."""
    stage, way, seed = run
    if stage == "stage1":
        return claims.stage1_folder(way, seed)
    start = "" if way == NOTHING else claims.stage1_folder(way, seed)
    point = {"init.checkpoint": as_text(start), "seed": as_text(seed)}
    return f"{claims.FOLDER}/stage2/{run_name(point)}"


def is_finished(run: Run) -> bool:
    return (Path(folder(run)) / "done.json").is_file()


def finished(run: Run) -> dict[str, Curve]:
    records = read_jsonl(Path(folder(run)) / "metrics.jsonl")
    return {
        metric: {record["step"]: record[metric] for record in records if metric in record}
        for metric in METRICS[run[0]]
    }


def read(path: Path) -> Scores:
    scores: Scores = {}
    if path.is_file():
        with path.open(newline="") as lines:
            for row in csv.DictReader(lines):
                run = (row["stage"], row["way"], int(row["seed"]))
                curve = scores.setdefault(run, {}).setdefault(row["metric"], {})
                curve[int(row["step"])] = float(row["value"])
    return scores


def write(scores: Scores, path: Path) -> None:
    with path.open("w", newline="") as lines:
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(COLUMNS)
        for run in sorted(scores):
            for metric, curve in scores[run].items():
                rows.writerows((*run, step, metric, value) for step, value in curve.items())


def curves(scores: Scores, stage: str, way: str, metrics: list[str]) -> list[Curve]:
    """The mean of some metrics by step; a curve for each seed."""
    runs = [scores[stage, way, seed] for seed in claims.SEEDS]
    return [
        {step: statistics.mean(run[m][step] for m in metrics) for step in sorted(run[metrics[0]])}
        for run in runs
    ]


def last(seeds: list[Curve]) -> list[float]:
    return [list(curve.values())[-1] for curve in seeds]


def table(*scores: dict[str, list[Curve]]) -> str:
    """A table in Markdown; the last column counts the seeds in which the full stage 1 is better."""
    heads = ("question answering after stage 2", "R@1 of 100, ITC + ITM", "R@1 of 100, ITC alone")
    lines = [
        f"| {len(claims.SEEDS)} seeds | mean | lowest to highest "
        "| stage 1 is better by | in seeds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for head, ways in zip(heads, scores, strict=True):
        full = last(ways["stage 1"])
        for way, seeds in ways.items():
            values = last(seeds)
            gains = [a - b for a, b in zip(full, values, strict=True)]
            cells = [
                f"{statistics.mean(values):.1%}",
                f"{min(values):.1%} to {max(values):.1%}",
                "" if way == "stage 1" else f"{100 * statistics.mean(gains):+.1f} points",
                "" if way == "stage 1" else f"{sum(g > 0 for g in gains)} of {len(gains)}",
            ]
            lines.append(f"| {head}: {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(answers: dict[str, list[Curve]], retrieval: dict[str, list[Curve]], path: Path) -> None:
    """Lines are means, bands go from the lowest seed to the highest."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    panels = (
        (axes[0], answers, "question answering, zero-shot", "steps of stage 2"),
        (axes[1], retrieval, "R@1 of 100, ITC + ITM", "steps of stage 1"),
    )
    for axis, ways, title, label in panels:
        for way, seeds in ways.items():
            steps = list(seeds[0])
            values = [[curve[step] for curve in seeds] for step in steps]
            axis.plot(steps, [statistics.mean(v) for v in values], color=COLORS[way], label=way)
            bounds = ([min(v) for v in values], [max(v) for v in values])
            axis.fill_between(steps, *bounds, color=COLORS[way], alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel=label, ylim=(0, 1))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    with plt.rc_context({"svg.hashsalt": "claims"}):  # the same scores, the same file
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
