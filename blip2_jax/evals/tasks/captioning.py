"""A caption an image, scored as the paper's tables are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from blip2_jax.data import world
from blip2_jax.data.containers import Row
from blip2_jax.evals import submissions
from blip2_jax.evals.metrics import captioning, check_ids
from blip2_jax.evals.tasks.task import Metrics, Rows, Task


class Captioning(Task):
    """A caption an image."""

    kind = "captioning"

    @property
    def submission(self) -> str:
        """See `Task`."""
        return "captions"

    def settings(self) -> Row:
        """See `Task`; with the prompt and the decoding that the model resolves them to."""
        settings = super().settings()
        if self.model is not None:
            options = self.config.decoding.to_dict()
            how = self.model.settings("caption", prompt=self.config.prompt, **options)
            settings |= {"prompt": how.prompt, "decoding": dataclasses.asdict(how.decoding)}
        return settings

    def _describe(self, numbers: list[int], images: list[np.ndarray]) -> list[Row]:
        how = {"truncate": self.config.truncate or None, **self.config.decoding.to_dict()}
        said = self._reader.caption(images, prompt=self.config.prompt, **how)
        rows = [
            {"row": number, "id": self.dataset.records[number]["id"], "caption": text}
            for number, text in zip(numbers, said, strict=True)
        ]
        if self.config.blind:  # without an image all captions are one
            prompt = self._reader.settings("caption", prompt=self.config.prompt).prompt
            (blind,) = self._reader.generate(None, [prompt], **how)
            rows = [{**row, "blind": blind} for row in rows]
        return rows

    def _ids(self) -> dict[int, Any]:
        """Official number of each record."""
        ids = {n: self.dataset.records[n]["id"] for n in range(len(self.dataset))}
        official = submissions.official_ids(ids.values())
        return {n: official[key] for n, key in ids.items()}

    def predictions(self, rows: Rows) -> dict[Any, str]:
        """See `Task`."""
        official = self._ids()
        return {official[n]: row["caption"] for n, row in rows.items() if "unreadable" not in row}

    def _rows_of(self, predictions: dict[Any, str]) -> Rows:
        number = {official: n for n, official in self._ids().items()}
        check_ids(predictions, number, "images")
        return {
            number[key]: {"row": number[key], "caption": text} for key, text in predictions.items()
        }

    def _score(self, rows: Rows) -> tuple[Metrics, dict[str, str]]:
        records = {n: self.dataset.records[n] for n in rows}
        reasons = captioning.left_out(self.config.scores)
        bare = [n for n, record in records.items() if not record["captions"]]
        if len(bare) == len(records):
            return {}, {"captions": "the references of this split are not public"}
        if bare:
            reasons["references"] = f"{len(bare)} of {len(records)} images have none"
            records = {n: record for n, record in records.items() if record["captions"]}
            rows = {n: rows[n] for n in records}
        scores = [name for name in self.config.scores if name not in reasons]
        metrics: Metrics = {}
        for suffix, key in (("", "caption"), ("_blind", "blind")):
            if all(key in row for row in rows.values()):
                said = {n: row[key] for n, row in rows.items()}
                found = self._numbers(said, records, scores)
                metrics |= {f"{name}{suffix}": found[name] for name in found if name != "tokenizer"}
                metrics["tokenizer"] = found["tokenizer"]
        if self.config.by:
            for part, some in self._parts(records).items():
                said = {n: rows[n]["caption"] for n in some}
                found = self._numbers(said, some, scores)
                metrics |= {f"{part}_{name}": found[name] for name in scores}
        if metrics["tokenizer"] != "ptb" and self.config.tokenizer == "auto":
            reasons["ptb"] = "the Penn Treebank tokenizer needs Java; a stand-in cut the captions"
        return metrics, reasons

    def _parts(self, records: Rows) -> dict[str, Rows]:
        """Records by the field that the config names: NoCaps' "in-domain" becomes "in"."""
        parts: dict[str, Rows] = {}
        for number, record in records.items():
            if not isinstance(record.get(self.config.by), str):
                raise ValueError(
                    f"{self.name}: image {record['id']!r} has no {self.config.by!r}. The owners' "
                    "annotations have it (of NoCaps: nocaps_val_4500_captions.json); LAVIS's lists "
                    "do not. Take those, or set by=''."
                )
            part = record[self.config.by].removesuffix("-domain")
            parts.setdefault(part, {})[number] = record
        return parts

    def _numbers(self, said: dict[int, str], records: Rows, scores: Sequence[str]) -> Metrics:
        references = {n: records[n]["captions"] for n in said}
        found = captioning.caption_metrics(
            said, references, scores=scores, tokenizer=self.config.tokenizer
        )
        if all("scene" in record for record in records.values()):  # the embedded world
            scenes = {n: world.scene_from_json(records[n]["scene"]) for n in said}
            found |= captioning.facts_metrics(said, scenes, world.facts_correct)
        return found
