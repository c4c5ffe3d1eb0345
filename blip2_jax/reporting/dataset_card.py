"""A prepared data set's card (README.md) and its page of histograms and pictures (report.html)."""

import base64
from typing import Any

from blip2_jax.reporting import page

SHOWN = 24  # pictures


def _amount(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def markdown_card(name: str, splits: dict[str, dict[str, Any]]) -> str:
    """The card, in Markdown.

    Args:
      name: of the data set.
      splits: split -> its summary: "settings", "totals", "skipped" and "lengths".
    """
    lines = [f"# {name}", "", "Image-text pairs, prepared by `blip2 prepare`.", ""]
    lines += ["| split | records | captions | questions | images | shards | left out |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for split, summary in splits.items():
        totals = summary["totals"]
        left_out = sum(entry["count"] for entry in summary["skipped"].values())
        lines.append(
            f"| {split} | {totals['records']:,} | {totals['captions']:,} | "
            f"{totals['questions']:,} | {_amount(totals['bytes'])} | {len(summary['lengths'])} | "
            f"{left_out:,} |"
        )
    for split, summary in splits.items():
        lines += ["", f"## {split}", ""]
        lines += [f"- {key}: `{value}`" for key, value in summary["settings"].items() if value]
        mean_words = summary["totals"]["words"] / max(1, summary["totals"]["captions"])
        lines.append(f"- words of a caption, on average: {mean_words:.1f}")
        if summary["skipped"]:
            lines += ["", "| left out because | records | for example |", "| --- | ---: | --- |"]
            for reason, entry in summary["skipped"].items():
                examples = "<br>".join(f"`{path}`" for path in entry["examples"][:3] if path)
                lines.append(f"| {reason} | {entry['count']:,} | {examples} |")
    lines += ["", "## Reading it", "", "```python", "import tensorflow_datasets as tfds", ""]
    lines += [
        'builder = tfds.builder_from_directory("THIS_FOLDER")',
        f'records = builder.as_data_source("{next(iter(splits))}")  # random access',
        "```",
        "",
        "Training: `--config.data.source=tfds --config.data.dir=THIS_FOLDER`. Every record has",
        "`id`, `image` (encoded), `captions`, `image_number` (records of one image share it) and",
        "`extra` (JSON: questions with answers, url, ...).",
        "",
    ]
    return "\n".join(lines)


def histogram_page(name: str, splits: dict[str, dict[str, Any]]) -> str:
    """The page: HTML that needs nothing beside it."""
    shown = []
    for split, summary in splits.items():
        samples = summary["samples"]
        step = max(1, len(samples) // SHOWN)
        charts = [_chart(title, counts) for title, counts in summary["bins"].items() if counts]
        pictures = [
            {
                "source": "data:image/jpeg;base64,"
                + base64.b64encode(bytes.fromhex(sample["image"])).decode(),
                "texts": sample["texts"],
            }
            for sample in samples[::step][:SHOWN]
        ]
        totals = {key: f"{value:,}" for key, value in summary["totals"].items()}
        totals["bytes"] = _amount(summary["totals"]["bytes"])
        shown.append(
            {
                "name": split,
                "totals": totals,
                "skipped": summary["skipped"],
                "charts": charts,
                "pictures": pictures,
                "settings": {k: v for k, v in summary["settings"].items() if v},
            }
        )
    return page.fill("dataset.html.j2", name=name, splits=shown)


def _chart(title: str, counts: dict[str, int]) -> dict[str, Any]:
    """A histogram as bars: label, count and height in percent of the highest."""
    ordered = sorted(((float(bin), count) for bin, count in counts.items()))
    highest = max(count for _, count in ordered)
    bars = [
        {"label": f"{bin:g}", "count": f"{count:,}", "height": 100 * count / highest}
        for bin, count in ordered
    ]
    return {"title": title, "bars": bars}
