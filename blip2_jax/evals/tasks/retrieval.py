"""Images from texts and texts from images: all pairs by ITC, the best of them by ITM."""

from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from blip2_jax.data import texts
from blip2_jax.data.containers import Row
from blip2_jax.data.heldout import Heldout
from blip2_jax.evals.metrics import retrieval
from blip2_jax.evals.tasks.task import PACKED, Lines, Metrics, Rows, Task
from blip2_jax.runtime import atomic
from blip2_jax.runtime.distributed import Host
from blip2_jax.runtime.metrics import Progress


class Retrieval(Task):
    """Every image against every text, by ITC, then the best by ITM.

    Only the texts' features and this process's rows of similarities are held; what ITM reads of
    images is computed again, for one batch of images at a time, and dropped when their candidates
    are scored.
    """

    kind = "retrieval"
    TOP = 10  # that are written for each query

    def __init__(self, name: str, config: ConfigDict, dataset: Heldout, threads: int):
        super().__init__(name, config, dataset, threads)
        self._text_ranks: list[np.ndarray] = []  # ITC's, by group
        size, count = self.config.group or len(self.units), len(self.units)
        if count < size:
            raise ValueError(
                f"{self.name}: the split holds {count} images, fewer than the {size} of "
                "config.group; lower it."
            )
        self.groups = [np.arange(g * size, (g + 1) * size) for g in range(count // size)]
        self.units = [int(n) for group in self.groups for n in group]

    def _units(self) -> list[int]:
        bare = [r["id"] for r in self.dataset.records if not r["captions"]]
        if bare:
            raise ValueError(
                f"{self.name}: {len(bare)} images have no text (the first: {bare[0]!r}); leave "
                "them out of the list."
            )
        return list(range(len(self.dataset)))

    def texts(self, group: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Texts of a group of images, and which of the group each belongs to."""
        found: list[str] = []
        owner: list[int] = []
        clean = texts.clean_caption if self.config.clean_text else str
        for place, number in enumerate(group):
            captions = self.dataset.records[int(number)]["captions"]
            captions = captions[: self.config.captions or None]
            found += [clean(caption) for caption in captions]
            owner += [place] * len(captions)
        return found, retrieval.check_owner(np.array(owner), len(group))

    def predict(self, lines: Lines, host: Host) -> None:
        """See `Task`; ITC first, of all images, then ITM of the candidates."""
        total = sum(len(group[host.index :: host.count]) for group in self.groups)
        self._text_ranks = []
        with (
            Progress(total, label=f"{self.name} ITC", unit="image") as embedded,
            Progress(total, label=f"{self.name} ITM", unit="image") as matched,
        ):
            for group in self.groups:
                self._predict_group(group, lines, host, embedded, matched)

    def _predict_group(
        self,
        group: np.ndarray,
        lines: Lines,
        host: Host,
        embedded: Progress,
        matched: Progress,
    ) -> None:
        gather = self._gather if host.count > 1 else retrieval.alone
        said, owner = self.texts(group)
        cut = {"truncate": self.config.truncate or None}
        features = self._reader.embed_texts(said, progress=f"{self.name} texts", **cut)
        mine = np.arange(len(group))[host.index :: host.count]
        place = {int(group[at]): i for i, at in enumerate(mine)}
        itc = np.zeros((len(mine), len(said)), np.float32)
        for numbers, images, faults in self._batches([int(n) for n in group[mine]]):
            if faults:
                raise ValueError(
                    f"{self.name}: {faults[0][1]} cannot be read, and retrieval needs every image."
                )
            itc[[place[n] for n in numbers]] = self._reader.similarity(images, features)
            embedded.update(len(numbers))
        image_ranks, text_ranks = retrieval.ranks(itc, mine, owner, gather)
        self._text_ranks.append(text_ranks)
        at, text = retrieval.candidates(itc, mine, self.config.rerank, gather)
        ends = np.searchsorted(at, np.arange(len(mine) + 1))
        wanted = {n: text[ends[i] : ends[i + 1]] for n, i in place.items()}
        # A line is taken over if ITM has read all of the image's candidates.
        todo = [n for n, some in wanted.items() if not _covers(lines.rows.get(n), some)]
        matched.update(len(wanted) - len(todo))
        words = self._reader.tokenize(said, **cut)
        for numbers, images, _ in self._batches(todo):
            pairs = [wanted[n] for n in numbers]
            owners = np.repeat(np.arange(len(numbers)), [len(some) for some in pairs])
            logits = self._reader.match_candidates(images, words, owners, np.concatenate(pairs))
            if np.isnan(logits).any():
                raise ValueError(
                    f"{self.name}: ITM logits are NaN: check the model's weights and dtype."
                )
            parts = np.split(logits, np.cumsum([len(some) for some in pairs])[:-1])
            lines.add(
                [
                    {
                        "row": n,
                        "id": self.dataset.records[n]["id"],
                        "itc_rank": int(image_ranks[place[n]]),
                        "texts": some.tolist(),
                        "itc": itc[place[n], some].tolist(),
                        "itm": part.tolist(),
                    }
                    for n, some, part in zip(numbers, pairs, parts, strict=True)
                ]
            )
            matched.update(len(numbers))

    def _gather(self, x: np.ndarray) -> np.ndarray:
        """x of each process, stacked; it has the same shape in all of them."""
        self.meet()
        return multihost_utils.process_allgather(x)

    def _pairs(self, group: np.ndarray, rows: Rows) -> tuple[np.ndarray, ...]:
        """Image (of the group), text, ITC and ITM of all candidates."""
        some = [rows[int(n)] for n in group]
        image = np.repeat(np.arange(len(group)), [len(row["texts"]) for row in some])
        return image, *(np.concatenate([row[name] for row in some]) for name in PACKED)

    def _score(self, rows: Rows) -> tuple[Metrics, dict[str, str]]:
        recalls: dict[str, float] = {}
        for number, group in enumerate(self.groups):
            image, text, itc, itm = self._pairs(group, rows)
            _, owner = self.texts(group)
            ranks = retrieval.reranked(image, text, itc, itm, owner, len(group), self.config.rerank)
            plain = np.array([rows[int(n)]["itc_rank"] for n in group])
            found = retrieval.recalls(*ranks)
            alone = retrieval.recalls(plain, self._text_ranks[number])
            for name, value in {
                **{n: v for n, v in found.items() if "_r" in n},
                **{f"itc_{n}": v for n, v in alone.items() if "_r" in n},
            }.items():
                recalls[name] = recalls.get(name, 0.0) + float(value) / len(self.groups)
        rest = len(self.dataset) - len(self.units)
        left_out = {"images": f"the last {rest} make no whole group"} if rest else {}
        metrics: Metrics = {**recalls}
        metrics["candidates"] = len(self.groups[0])
        if found["candidate_texts"] != found["candidates"]:
            metrics["candidate_texts"] = found["candidate_texts"]
        return metrics, left_out

    def write(self, path: Path, rows: Rows) -> None:
        """The best texts of each image and the best images of each text, with their scores."""
        answers: dict[str, list[Row]] = {"image_to_text": [], "text_to_image": []}
        for group in self.groups:
            image, text, itc, itm = self._pairs(group, rows)
            said, _ = self.texts(group)
            ids = [self.dataset.records[int(n)]["id"] for n in group]
            final = itc + itm
            for way, query, other, names, found in (
                ("image_to_text", image, text, ids, said),
                ("text_to_image", text, image, said, ids),
            ):
                order = np.lexsort((-final, query))
                starts = np.searchsorted(query[order], np.arange(len(names) + 1))
                for q, name in enumerate(names):
                    best = order[starts[q] : starts[q + 1]][: self.TOP]
                    scored = [[found[other[i]], round(float(final[i]), 4)] for i in best]
                    answers[way].append({"query": name, "best": scored})
        atomic.write_json(path, answers, indent=None)


def _covers(row: Row | None, wanted: np.ndarray) -> bool:
    return row is not None and set(wanted.tolist()) <= set(row["texts"])
