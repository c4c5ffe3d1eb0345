"""Images from texts and texts from images: all pairs by ITC, the best of them by ITM."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from blip2_jax.data import texts
from blip2_jax.data.eval_dataset import EvalDataset
from blip2_jax.evals.metrics import retrieval
from blip2_jax.evals.predictions import Prediction, Predictions, PredictionsByRecord
from blip2_jax.evals.tasks.task import SINGLE_PROCESS, Execution, Metrics, Reasons, Task
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.runtime import atomic
from blip2_jax.runtime.progress import Progress

NUM_WRITTEN = 10  # best matches of each query, in the file of predictions


class Retrieval(Task):
    """Every image against every text, by ITC, then the best by ITM.

    Only the texts' features and the similarities of this process's images are held; what ITM reads
    of images is computed again, for one batch of images at a time, and dropped when their
    candidates are scored.

    A prediction has an image's candidates ("texts", by number within the group) with their ITC and
    ITM scores, and the ranks by ITC alone of the image and of its own texts, which need the
    similarities of all pairs.

    Attributes:
      groups: numbers of the records that are scored together, group by group.
    """

    kind = "retrieval"

    def __init__(self, name: str, config: ConfigDict, dataset: EvalDataset, threads: int):
        super().__init__(name, config, dataset, threads)
        size, count = self.config.group or len(self.numbers), len(self.numbers)
        if count < size:
            raise ValueError(
                f"{self.name}: the split holds {count} images, fewer than the {size} of "
                "config.group; lower it."
            )
        self.groups = [np.arange(g * size, (g + 1) * size) for g in range(count // size)]
        self.numbers = [int(n) for group in self.groups for n in group]

    def _select_records(self) -> list[int]:
        missing = [record["id"] for record in self.dataset.records if not record["captions"]]
        if missing:
            raise ValueError(
                f"{self.name}: {len(missing)} images have no text (the first: {missing[0]!r}); "
                "leave them out of the list."
            )
        return list(range(len(self.dataset)))

    def group_texts(self, group: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Texts of a group of images, and which of the group each belongs to: int[M]."""
        group_texts: list[str] = []
        owner: list[int] = []
        clean = texts.clean_caption if self.config.clean_text else str
        for image, number in enumerate(group):
            captions = self.dataset.records[int(number)]["captions"]
            captions = captions[: self.config.captions or None]
            group_texts += [clean(caption) for caption in captions]
            owner += [image] * len(captions)
        return group_texts, retrieval.check_owner(np.array(owner), len(group))

    # ------------------------------------------------------------------------ with a model

    def predict(
        self, model: Blip2, predictions: Predictions, execution: Execution = SINGLE_PROCESS
    ) -> None:
        """See `Task`; ITC first, of all images, then ITM of the candidates."""
        host = execution.host
        total = sum(len(group[host.index :: host.count]) for group in self.groups)
        with (
            Progress(total, label=f"{self.name} ITC", unit="image") as embedded,
            Progress(total, label=f"{self.name} ITM", unit="image") as matched,
        ):
            for group in self.groups:
                candidates = self._find_candidates(model, group, execution, embedded)
                self._match(model, group, candidates, predictions, execution, matched)

    def _find_candidates(
        self, model: Blip2, group: np.ndarray, execution: Execution, progress: Progress
    ) -> dict[int, Prediction]:
        """Predictions of this process's images of a group, by number, without "itm"; arrays."""

        def gather_all(x: np.ndarray) -> np.ndarray:
            execution.barrier()
            return multihost_utils.process_allgather(x)

        host = execution.host
        gather = gather_all if host.count > 1 else retrieval.alone
        group_texts, owner = self.group_texts(group)
        features = model.embed_texts(
            group_texts, progress=f"{self.name} texts", truncate=self.config.truncate or None
        )
        mine = np.arange(len(group))[host.index :: host.count]
        row = {int(group[image]): i for i, image in enumerate(mine)}
        itc = np.zeros((len(mine), len(group_texts)), np.float32)
        for numbers, images, faults in self._batches(model, list(row), execution):
            if faults:
                raise ValueError(
                    f"{self.name}: {faults[0][1]} cannot be read, and retrieval needs every image."
                )
            itc[[row[n] for n in numbers]] = model.similarity(images, features)
            progress.update(len(numbers))
        image_ranks, text_ranks = retrieval.ranks(itc, mine, owner, gather)
        image_index, text = retrieval.candidates(itc, mine, self.config.rerank, gather)
        ends = np.searchsorted(image_index, np.arange(len(mine) + 1))
        return {
            n: {
                "record": n,
                "id": self.dataset.records[n]["id"],
                "itc_rank": int(image_ranks[i]),
                "itc_text_ranks": text_ranks[owner == mine[i]],
                "texts": text[ends[i] : ends[i + 1]],
                "itc": itc[i, text[ends[i] : ends[i + 1]]],
            }
            for n, i in row.items()
        }

    def _match(
        self,
        model: Blip2,
        group: np.ndarray,
        candidates: dict[int, Prediction],
        predictions: Predictions,
        execution: Execution,
        progress: Progress,
    ) -> None:
        """Adds predictions of images whose candidates ITM has not read yet."""
        todo = [
            n
            for n, candidate in candidates.items()
            if not _covers(predictions.by_record.get(n), candidate["texts"])
        ]
        progress.update(len(candidates) - len(todo))
        group_texts, _ = self.group_texts(group)
        text_tokens = model.tokenize(group_texts, truncate=self.config.truncate or None)
        for numbers, images, _ in self._batches(model, todo, execution):
            pairs = [candidates[n]["texts"] for n in numbers]
            counts = [len(each) for each in pairs]
            owners = np.repeat(np.arange(len(numbers)), counts)
            logits = model.match_candidates(images, text_tokens, owners, np.concatenate(pairs))
            if np.isnan(logits).any():
                raise ValueError(
                    f"{self.name}: ITM logits are NaN: check the model's weights and dtype."
                )
            parts = np.split(logits, np.cumsum(counts)[:-1])
            predictions.add(
                [
                    _as_lists(candidates[n] | {"itm": part})
                    for n, part in zip(numbers, parts, strict=True)
                ]
            )
            progress.update(len(numbers))

    # -------------------------------------------------------- from saved predictions alone

    def _pairs(
        self, group: np.ndarray, predictions: PredictionsByRecord
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Image (of the group), text, ITC and ITM of all candidates."""
        of_group = [predictions[int(n)] for n in group]
        image = np.repeat(np.arange(len(group)), [len(each["texts"]) for each in of_group])
        text, itc, itm = (
            np.concatenate([each[name] for each in of_group]) for name in ("texts", "itc", "itm")
        )
        return image, text, itc, itm

    def _score(self, predictions: PredictionsByRecord) -> tuple[Metrics, Reasons]:
        recalls: dict[str, float] = {}
        for group in self.groups:
            image, text, itc, itm = self._pairs(group, predictions)
            _, owner = self.group_texts(group)
            ranks = retrieval.reranked(image, text, itc, itm, owner, len(group), self.config.rerank)
            of_group = [predictions[int(n)] for n in group]
            itc_image_ranks = np.array([each["itc_rank"] for each in of_group])
            itc_text_ranks = np.concatenate([each["itc_text_ranks"] for each in of_group])
            scores = retrieval.recalls(*ranks)
            itc_scores = retrieval.recalls(itc_image_ranks, itc_text_ranks)
            for name, value in {
                **{n: v for n, v in scores.items() if "_r" in n},
                **{f"itc_{n}": v for n, v in itc_scores.items() if "_r" in n},
            }.items():
                recalls[name] = recalls.get(name, 0.0) + float(value) / len(self.groups)
        rest = len(self.dataset) - len(self.numbers)
        left_out = {"images": f"the last {rest} make no whole group"} if rest else {}
        metrics: Metrics = {**recalls}
        metrics["candidates"] = len(self.groups[0])
        if scores["candidate_texts"] != scores["candidates"]:
            metrics["candidate_texts"] = scores["candidate_texts"]
        return metrics, left_out

    def write(self, path: Path, predictions: PredictionsByRecord) -> None:
        """The best texts of each image and the best images of each text, with their scores."""
        matches: dict[str, list[dict[str, Any]]] = {"image_to_text": [], "text_to_image": []}
        for group in self.groups:
            image, text, itc, itm = self._pairs(group, predictions)
            group_texts, _ = self.group_texts(group)
            ids = [self.dataset.records[int(n)]["id"] for n in group]
            scores = itc + itm
            matches["image_to_text"] += _best_matches(image, text, scores, ids, group_texts)
            matches["text_to_image"] += _best_matches(text, image, scores, group_texts, ids)
        atomic.write_json(path, matches, indent=None)


def _best_matches(
    query: np.ndarray,
    other: np.ndarray,
    scores: np.ndarray,
    query_names: Sequence[Any],
    other_names: Sequence[Any],
) -> list[dict[str, Any]]:
    """For each query its name, and the names and scores of the best others."""
    order = np.lexsort((-scores, query))
    starts = np.searchsorted(query[order], np.arange(len(query_names) + 1))
    matches = []
    for number, name in enumerate(query_names):
        best = order[starts[number] : starts[number + 1]][:NUM_WRITTEN]
        scored = [[other_names[other[pair]], round(float(scores[pair]), 4)] for pair in best]
        matches.append({"query": name, "best": scored})
    return matches


def _covers(prediction: Prediction | None, candidates: np.ndarray) -> bool:
    """Whether ITM has read all these candidates of an image."""
    return prediction is not None and set(candidates.tolist()) <= set(prediction["texts"])


def _as_lists(prediction: Prediction) -> Prediction:
    """A prediction as JSON holds it."""
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in prediction.items()}
