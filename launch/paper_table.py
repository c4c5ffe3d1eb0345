"""Prints the table of docs/evaluation.md: rows of the paper's tables 2 to 5, and their configs.

  python launch/paper_table.py

All of it comes from the configs in configs/eval; tests/test_recipes.py holds the page to it.
"""

from collections.abc import Iterator, Mapping

from blip2_jax import cli

CONFIGS = ("vqa", "caption", "vqa_finetuned", "retrieval")  # tables 2, 3, 4, 5
HEAD = (
    "| paper | `blip2 evaluate --config=` | published there | status |",
    "| --- | --- | --- | --- |",
)
# What metrics are called in the table; those that are not here are in the config alone.
LABELS = {
    "accuracy": "",
    "cider": "CIDEr",
    "spice": "SPICE",
    "bleu4": "BLEU-4",
    "image_to_text_r1": "TR@1",
    "text_to_image_r1": "IR@1",
}


def rows() -> Iterator[str]:
    """The table's lines."""
    yield from HEAD
    for name in CONFIGS:
        recipe = f"eval/{name}"
        for variant in cli.load_module(recipe).VARIANTS:
            config = cli.load_config(f"{recipe}:{variant}")
            weights = f"public weights needed (`{config.published.weights}`)"
            if not config.published.weights:
                weights = "its weights were not published"
            yield (
                f"| table {config.published.table}, {variant} | `{recipe}:{variant}` | "
                f"{scores(config.published.scores)} | not measured here: {weights} |"
            )


def scores(published: Mapping[str, Mapping[str, float]]) -> str:
    """`coco BLEU-4 43.7, CIDEr 145.8; nocaps CIDEr 119.7, SPICE 15.4`."""
    tasks = []
    for task, some in published.items():
        shown = [f"{label} {some[key]:g}" for key, label in LABELS.items() if key in some]
        tasks.append(f"{task} {', '.join(text.strip() for text in shown)}")
    return "; ".join(tasks)


if __name__ == "__main__":
    print("\n".join(rows()))
