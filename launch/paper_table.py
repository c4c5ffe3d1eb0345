"""Prints the README's table: each row of the paper's tables 2 to 5, and the config that makes it.

  python launch/paper_table.py

All of it comes from the configs in configs/eval; tests/test_recipes.py holds the README to it.
"""

from collections.abc import Iterator

from blip2_jax import cli
from blip2_jax.evaluate import flat

CONFIGS = ("vqa", "caption", "vqa_finetuned", "retrieval")  # tables 2, 3, 4, 5
HEAD = (
    "| paper | `blip2 evaluate --config=` | published | status |",
    "| --- | --- | --- | --- |",
)


def rows() -> Iterator[str]:
    """The table's lines."""
    yield from HEAD
    for name in CONFIGS:
        path = f"configs/eval/{name}.py"
        for variant in cli.load_module(path).VARIANTS:
            published = cli.load_config(f"{path}:{variant}").published
            scores = [f"{key} {x:g}" for key, x in flat(published.scores).items()]
            weights = f"public weights needed (`{published.weights}`)"
            if not published.weights:
                weights = "its weights were never published"
            yield (
                f"| table {published.table}, {published.row} | `{path}:{variant}` | "
                f"{summary(scores)} | not measured here: {weights} |"
            )


def summary(scores: list[str]) -> str:
    """Scores of one task in one group: `coco bleu4 43.7, cider 145.8`."""
    groups: dict[str, list[str]] = {}
    for score in scores:
        task, _, rest = score.partition("/")
        groups.setdefault(task, []).append(rest)
    return "; ".join(f"{task} {', '.join(some)}" for task, some in groups.items())


if __name__ == "__main__":
    print("\n".join(rows()))
