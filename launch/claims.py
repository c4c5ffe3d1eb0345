"""Two claims of the paper in small: the README's table and picture, from the runs of two sweeps.

  blip2 sweep --config=configs/digits/claims_stage1.py --workdir=runs/claims/stage1 --backend=local
  blip2 sweep --config=configs/digits/claims_stage2.py --workdir=runs/claims/stage2 --backend=local
  python launch/claims.py

What was held fixed, and why, is written in configs/digits/claims.py, from before the runs. The data
and the frozen towers are the quickstart's; run that first, or blip2 prepare --source=digits.
Prints a table (mean, lowest and highest of the seeds; in how many of them the whole stage 1 is
better) and draws launch/pictures/claims.svg.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from blip2_jax import cli
from blip2_jax.runtime.metrics import read_jsonl
from blip2_jax.sweep import as_text, run_name

ROOT = Path(__file__).resolve().parent.parent
claims = cli.load_module(str(ROOT / "configs/digits/claims.py"))
PICTURE = ROOT / "launch" / "pictures" / "claims.svg"
NOTHING = "no stage 1"
COLORS = {
    "stage 1": "#1b6ca8",
    "without ITG": "#c8553d",
    "mismatched pairs": "#8a8a8a",
    NOTHING: "#2d2d2d",
}
Curve = dict[int, float]  # step -> score


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path, default=PICTURE, help="default: %(default)s")
    args = parser.parse_args()
    answers = {
        way: [curve(stage2_folder(way, seed), ["eval/vqa/accuracy"]) for seed in claims.SEEDS]
        for way in (*claims.WAYS, NOTHING)
    }
    retrieval = {
        way: [curve(claims.stage1_folder(way, seed), recall("")) for seed in claims.SEEDS]
        for way in claims.WAYS
    }
    contrast = {
        way: [curve(claims.stage1_folder(way, seed), recall("itc_")) for seed in claims.SEEDS]
        for way in claims.WAYS
    }
    print(table(answers, retrieval, contrast))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(answers, retrieval, args.picture)
    return 0


def stage2_folder(way: str, seed: int) -> str:
    start = "" if way == NOTHING else claims.stage1_folder(way, seed)
    point = {"init.checkpoint": as_text(start), "seed": as_text(seed)}
    return f"{claims.FOLDER}/stage2/{run_name(point)}"


def recall(kind: str) -> list[str]:
    """R@1 in both directions: of ITC with ITM (""), or of ITC alone ("itc_")."""
    return [f"eval/retrieval/{kind}{way}_r1" for way in ("image_to_text", "text_to_image")]


def curve(folder: str, names: list[str]) -> Curve:
    """The mean of some metrics of a finished run, by step."""
    if not (Path(folder) / "done.json").is_file():
        sys.exit(f"{folder} holds no finished run. Run the sweeps first: see --help.")
    records = read_jsonl(Path(folder) / "metrics.jsonl")
    found = {r["step"]: statistics.mean(r[n] for n in names) for r in records if names[0] in r}
    return dict(sorted(found.items()))


def last(curves: list[Curve]) -> list[float]:
    return [list(c.values())[-1] for c in curves]


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
        for way, curves in ways.items():
            values = last(curves)
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
        for way, curves in ways.items():
            steps = list(curves[0])
            values = [[c[step] for c in curves] for step in steps]
            axis.plot(steps, [statistics.mean(v) for v in values], color=COLORS[way], label=way)
            bounds = ([min(v) for v in values], [max(v) for v in values])
            axis.fill_between(steps, *bounds, color=COLORS[way], alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel=label, ylim=(0, 1))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
