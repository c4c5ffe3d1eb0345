"""A caption an image, scored as the paper's tables are."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip2_jax.evals import submissions
from blip2_jax.evals.metrics import captioning, check_ids, truth
from blip2_jax.evals.predictions import Prediction, PredictionsByRecord
from blip2_jax.evals.tasks.task import Metrics, Reasons, Task
from blip2_jax.inference.pipeline import Blip2

Records = dict[int, dict[str, Any]]  # by number


class Captioning(Task):
    """A caption an image."""

    kind = "captioning"

    @property
    def submission(self) -> str:
        """See `Task`."""
        return "captions"

    # ------------------------------------------------------------------------ with a model

    def settings(self, model: Blip2 | None = None) -> dict[str, Any]:
        """See `Task`; with the prompt and the decoding that the model resolves them to."""
        settings = super().settings(model)
        if model is not None:
            options = self.config.decoding.to_dict()
            resolved = model.settings("caption", prompt=self.config.prompt, **options)
            decoding = dataclasses.asdict(resolved.decoding)
            settings |= {"prompt": resolved.prompt, "decoding": decoding}
        return settings

    def _predict_batch(
        self, model: Blip2, numbers: list[int], images: list[np.ndarray]
    ) -> list[Prediction]:
        options = {"truncate": self.config.truncate or None, **self.config.decoding.to_dict()}
        captions = model.caption(images, prompt=self.config.prompt, **options)
        predictions: list[Prediction] = [
            {"record": number, "id": self.dataset.records[number]["id"], "caption": caption}
            for number, caption in zip(numbers, captions, strict=True)
        ]
        if self.config.blind:  # without an image all captions are one
            prompt = model.settings("caption", prompt=self.config.prompt).prompt
            (blind,) = model.generate(None, [prompt], **options)
            predictions = [{**each, "blind": blind} for each in predictions]
        return predictions

    # -------------------------------------------------------- from saved predictions alone

    def _official_ids(self) -> dict[int, Any]:
        """The data set's own number of each record."""
        ids = {n: self.dataset.records[n]["id"] for n in range(len(self.dataset))}
        official = submissions.official_ids(ids.values())
        return {n: official[key] for n, key in ids.items()}

    def texts(self, predictions: PredictionsByRecord) -> dict[Any, str]:
        """See `Task`."""
        official = self._official_ids()
        return {official[n]: p["caption"] for n, p in predictions.items() if "unreadable" not in p}

    def _from_texts(self, texts: Mapping[Any, str]) -> dict[int, Prediction]:
        numbers = {official: n for n, official in self._official_ids().items()}
        check_ids(texts, numbers, "images")
        return {
            numbers[key]: {"record": numbers[key], "caption": text} for key, text in texts.items()
        }

    def _score(self, predictions: PredictionsByRecord) -> tuple[Metrics, Reasons]:
        records = {n: self.dataset.records[n] for n in predictions}
        reasons = captioning.left_out(self.config.scores)
        bare = [n for n, record in records.items() if not record["captions"]]
        if len(bare) == len(records):
            return {}, {"captions": "the references of this split are not public"}
        if bare:
            reasons["references"] = f"{len(bare)} of {len(records)} images have none"
            records = {n: record for n, record in records.items() if record["captions"]}
            predictions = {n: predictions[n] for n in records}
        names = [name for name in self.config.scores if name not in reasons]
        metrics: Metrics = {}
        for suffix, key in (("", "caption"), ("_blind", "blind")):
            if all(key in each for each in predictions.values()):
                captions = {n: each[key] for n, each in predictions.items()}
                scores = self._scores(captions, records, names)
                metrics |= {f"{n}{suffix}": x for n, x in scores.items() if n != "tokenizer"}
                metrics["tokenizer"] = scores["tokenizer"]
        if self.config.by:
            for part, part_records in self._parts(records).items():
                captions = {n: predictions[n]["caption"] for n in part_records}
                scores = self._scores(captions, part_records, names)
                metrics |= {f"{part}_{name}": scores[name] for name in names}
        if metrics["tokenizer"] != "ptb" and self.config.tokenizer == "auto":
            reasons["ptb"] = "the Penn Treebank tokenizer needs Java; a stand-in cut the captions"
        return metrics, reasons

    def _parts(self, records: Records) -> dict[str, Records]:
        """Records by the field that the config names: NoCaps' "in-domain" becomes "in"."""
        parts: dict[str, Records] = {}
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

    def _scores(
        self, captions: Mapping[int, str], records: Records, names: Sequence[str]
    ) -> Metrics:
        references = {n: records[n]["captions"] for n in captions}
        scores = captioning.caption_metrics(
            captions, references, scores=names, tokenizer=self.config.tokenizer
        )
        checks = {n: truth.truth_check(record) for n, record in records.items()}
        known = {n: check for n, check in checks.items() if check is not None}
        if len(known) == len(records):
            scores |= captioning.facts_metrics(captions, known)
        return scores
