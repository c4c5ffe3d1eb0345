"""What can be evaluated: question answering, captioning, retrieval, ranking of candidate answers.

A task reads a data set with a model, one line an image, and scores what was said:

    task = tasks.make("vqav2_val", config, dataset, threads)
    task.model = model
    task.predict(lines, host)              what the model says, into lines that survive a kill
    metrics, left_out = task.score(lines.rows)

Nothing is scored that was not predicted for every image, unless the config allows some of them to
be unreadable; then the result says how many.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from blip2_jax.data import files, texts, world
from blip2_jax.data.heldout import Heldout
from blip2_jax.data.lists import Row
from blip2_jax.data.loader import Host
from blip2_jax.evals import captioning, check_ids, retrieval, submissions, vqa
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.runtime import distributed, journal
from blip2_jax.runtime.metrics import Progress

# Keys of a task that may change when it goes on: they decide nothing of what is said.
SCORING = ("metric", "forms", "lemmatize", "scores", "by", "tokenizer", "examples")

Metrics = dict[str, float | str]
Rows = dict[int, Row]  # lines, by record number
COMMAND = "blip2 evaluate"
PACKED = {"texts": np.int32, "itc": np.float32, "itm": np.float32}  # in a line's long columns


class Lines:
    """What was said, by record number: in memory, and in a file of this process.

    Args:
      folder: where the files of all processes are; None: in memory only.
      name: of the task.
      request: all that decides what is said.
      host: which process this is, and of how many that share the work.

    Raises:
      ValueError: there are lines of another request.
    """

    def __init__(self, folder: Path | None, name: str, request: Row, host: Host):
        self.rows: Rows = {}
        self._folder, self._name, self._request = folder, name, request
        self._journal = None
        if folder is None:
            return
        if host.index == 0:  # which also mends what a kill has cut
            self.read()
        wait(host, "read")
        self.read()
        wait(host, "go")
        self._journal = journal.Journal(folder / f"{name}.{host.index}.jsonl", request)

    def read(self) -> None:
        """Takes over the lines of all processes."""
        if self._folder is not None:
            for path in sorted(self._folder.glob(f"{self._name}.*.jsonl")):
                for row in journal.read(path, self._request, COMMAND):
                    known = self.rows.get(row["row"])
                    if known is None or "unreadable" in known:
                        self.rows[row["row"]] = _packed(row)

    def add(self, rows: Sequence[Row]) -> None:
        """Takes lines of this process, and writes them down."""
        self.rows |= {row["row"]: _packed(row) for row in rows}
        if self._journal is not None:
            self._journal.write(rows)

    def done(self, number: int) -> bool:
        """Whether something was said about a record; what could not be read counts as not."""
        return number in self.rows and "unreadable" not in self.rows[number]


def _packed(row: Row) -> Row:
    return row | {name: np.array(row[name], kind) for name, kind in PACKED.items() if name in row}


def wait(host: Host, what: str) -> None:
    """Until all processes that share the work are here."""
    if host.count > 1:
        distributed.barrier(what)


class Task:
    """One data set, one kind of prediction.

    Args:
      name: its metrics begin with it.
      config: see `configs/eval/default.py`.
      dataset: what is read.
      threads: that decode images.

    Attributes:
      model: what reads the images; set it before predicting.
    """

    kind = ""

    def __init__(self, name: str, config: ConfigDict, dataset: Heldout, threads: int):
        self.name, self.config, self.dataset, self.threads = name, config, dataset, threads
        self.model: Blip2 | None = None
        self.units = self._units()  # numbers of the records that something is to be said about
        if not self.units:
            raise ValueError(
                f"{name}: {dataset.name} has nothing for the task {config.task!r}: no record has "
                f"{'questions' if config.task in ('vqa', 'ranking') else 'captions'}."
            )

    @property
    def submission(self) -> str:
        """The server's form of its predictions, of `submissions.FIELDS`; "": there is none."""
        return ""

    @property
    def _reader(self) -> Blip2:
        """The model, which must have been set."""
        if self.model is None:
            raise ValueError(f"{self.name}: set `model` before predicting.")
        return self.model

    def _units(self) -> list[int]:
        return list(range(len(self.dataset)))

    def settings(self) -> Row:
        """All that decides the scores: the config, what it resolves to, the model, the data."""
        keep = {key: value for key, value in self.config.to_dict().items() if key != "data"}
        settings = json.loads(json.dumps(keep)) | {"data": self.dataset.identity()}
        if self.model is None:
            return settings
        model = self.model
        return settings | {
            "model": model.source,
            "weights": stamp(model.source),
            "resolution": model.config.vit.image_size,
            "dtype": str(model.dtype),
        }

    def request(self) -> Row:
        """What decides what is said: the settings without those that only score it."""
        return {key: value for key, value in self.settings().items() if key not in SCORING}

    def predict(self, lines: Lines, host: Host) -> None:
        """Says something about each image that nothing was said about; this process's share."""
        todo = [number for number in self.units if not lines.done(number)]
        done = len(self.units) - len(todo)
        for number in todo:  # what could not be read is tried again
            lines.rows.pop(number, None)
        share = todo[host.index :: host.count]
        total = len(share) + done
        with Progress(total, initial=done, label=self.name, unit="image") as progress:
            for numbers, images, faults in self._batches(share):
                self._note(faults, lines)
                if numbers:
                    lines.add(self._describe(numbers, images))
                progress.update(len(numbers) + len(faults))

    def _batches(
        self, share: Sequence[int]
    ) -> Iterator[tuple[list[int], list[np.ndarray], list[tuple[int, str]]]]:
        size, batch = self._reader.config.vit.image_size, self._reader.batch_size
        return self.dataset.batches(share, size, batch, self.threads) if share else iter(())

    def _note(self, faults: list[tuple[int, str]], lines: Lines) -> None:
        lines.add([{"row": number, "unreadable": where} for number, where in faults])
        self._check_unreadable(lines.rows)

    def _check_unreadable(self, rows: Rows) -> None:
        bad = [row["unreadable"] for row in rows.values() if "unreadable" in row]
        if len(bad) > self.dataset.most_unreadable:
            raise ValueError(
                f"{self.name}: {len(bad)} of {len(self.dataset)} images cannot be read "
                f"({', '.join(bad[:3])}). Mend them and run the same command again, which goes on "
                "where it stopped, or allow a share with data.most_unreadable; scores are then "
                "without them."
            )

    def _describe(self, numbers: list[int], images: list[np.ndarray]) -> list[Row]:
        """A line for each image."""
        raise NotImplementedError

    def score(self, rows: Rows) -> tuple[Metrics, dict[str, str]]:
        """Metrics of what was said, and what could not be scored, with the reason.

        Raises:
          ValueError: something is missing.
        """
        self._check_unreadable(rows)  # those of all processes
        unreadable = [n for n, row in rows.items() if "unreadable" in row]
        missing = [n for n in self.units if n not in rows]
        if missing:
            raise ValueError(
                f"{self.name}: nothing was said about {len(missing)} of {len(self.units)} images "
                f"({', '.join(str(self.dataset.records[n]['id']) for n in missing[:3])}, ...)."
            )
        said = {n: rows[n] for n in self.units if "unreadable" not in rows[n]}
        metrics, left_out = self._score(said)
        metrics = {f"{self.name}/{name}": value for name, value in metrics.items()}
        if unreadable:
            metrics[f"{self.name}/unreadable"] = len(unreadable)
            left_out["images"] = f"{len(unreadable)} of {len(self.units)} cannot be read"
        if self.dataset.left_out:
            left_out["records"] = f"rows that are of no use ({self.dataset.left_out})"
        return metrics, {f"{self.name}/{name}": reason for name, reason in left_out.items()}

    def _score(self, rows: Rows) -> tuple[Metrics, dict[str, str]]:
        raise NotImplementedError

    def read(self, path: Path) -> Rows:
        """Lines from a file in a server's form, which something else may have written.

        Raises:
          ValueError: it is in another form, or not of exactly these images or questions.
        """
        if not self.submission:
            raise ValueError(f"{self.name}: no server takes files of {self.kind}; pass a --model.")
        return self._rows_of(submissions.read(path, self.submission))

    def _rows_of(self, predictions: dict[Any, str]) -> Rows:
        """Lines from texts by official id."""
        raise NotImplementedError

    def write(self, folder: Path, rows: Rows) -> Path:
        """Writes what was said, in a server's form where there is one."""
        path = folder / f"{self.name}.json"
        submissions.write(path, self.submission, self.predictions(rows))
        return path

    def predictions(self, rows: Rows) -> dict[Any, str]:
        """Texts by official id."""
        raise NotImplementedError


class Vqa(Task):
    """Questions answered in free text; the image is encoded once for all its questions."""

    kind = "vqa"

    @property
    def submission(self) -> str:
        """See `Task`."""
        return "gqa" if self.config.metric == "exact" else "vqa"

    def _units(self) -> list[int]:
        if self.config.metric not in ("vqa", "exact"):
            raise ValueError(f"{self.name}: metric is {self.config.metric!r}; known: vqa, exact.")
        if self.config.lemmatize:
            vqa.lemmatize([])  # an error now rather than after all the answers
        count = len(self.dataset)
        return [n for n in range(count) if self.dataset.records[n].get("questions")]

    def settings(self) -> Row:
        """See `Task`; with the prompt and the decoding that the model resolves them to."""
        settings = super().settings()
        if self.model is not None:
            how = self.model.settings("answer", prompt=self.config.prompt, **self._options())
            settings |= {"prompt": how.prompt, "decoding": dataclasses.asdict(how.decoding)}
        return settings

    def _options(self) -> Row:
        return self.config.decoding.to_dict()

    def _describe(self, numbers: list[int], images: list[np.ndarray]) -> list[Row]:
        asked = [self.dataset.questions(number) for number in numbers]
        pictures = [image for image, some in zip(images, asked, strict=True) for _ in some]
        flat = [question for some in asked for question in some]
        said = {"answers": self._say(pictures, flat)}
        if self.config.get("blind"):
            said["blind"] = self._say(None, flat)
        ends = np.cumsum([0, *map(len, asked)])
        return [
            {
                "row": number,
                "id": self.dataset.records[number]["id"],
                **{key: some[ends[i] : ends[i + 1]] for key, some in said.items()},
            }
            for i, number in enumerate(numbers)
        ]

    def _texts(self, questions: list[Row]) -> list[str]:
        clean = texts.clean_question if self.config.clean_text else str
        return [clean(question["question"]) for question in questions]

    def _say(self, pictures: list[np.ndarray] | None, questions: list[Row]) -> list[str]:
        return self._reader.answer(
            pictures,
            self._texts(questions),
            prompt=self.config.prompt,
            truncate=self.config.truncate or None,
            **self._options(),
        )

    def by_question(self, rows: Rows, key: str = "answers") -> dict[Any, str]:
        """Answers by question id."""
        return {
            question["id"]: answer
            for number, row in rows.items()
            for question, answer in zip(self.dataset.questions(number), row[key], strict=True)
        }

    def predictions(self, rows: Rows) -> dict[Any, str]:
        """See `Task`."""
        said = {n: row for n, row in rows.items() if "unreadable" not in row}
        return self.by_question(said)

    def _rows_of(self, predictions: dict[Any, str]) -> Rows:
        questions = {n: self.dataset.questions(n) for n in self.units}
        known = [question["id"] for some in questions.values() for question in some]
        check_ids(predictions, known, "questions")
        return {
            n: {"row": n, "answers": [predictions[q["id"]] for q in some]}
            for n, some in questions.items()
        }

    def _score(self, rows: Rows) -> tuple[Metrics, dict[str, str]]:
        questions = [q for number in rows for q in self.dataset.questions(number)]
        for question in questions:  # "yes/no" would look like a group of metrics
            kind = question.get("type") or question.get("answer_type")
            question["type"] = kind and kind.replace("/", "_")
        if not any(q.get("answers") or q.get("answer") for q in questions):
            where = "hand the file of predictions to the data set's evaluation server"
            return {}, {"accuracy": f"the answers of this split are not public: {where}"}
        metrics: Metrics = {}
        for suffix, key in (("_blind", "blind"), ("", "answers")):
            if key == "blind" and not self._has_blind(rows):
                continue
            said = self.by_question(rows, key)
            if self.config.lemmatize:
                said = dict(zip(said, vqa.lemmatize(list(said.values())), strict=True))
            if self.config.metric == "exact":
                found = vqa.gqa_metrics(said, questions)
            else:
                first, *others = self.config.forms
                found = vqa.vqa_metrics(said, questions, form=first)
                for form in others:
                    overall = vqa.vqa_metrics(said, questions, form=form)["accuracy"]
                    found[f"accuracy_{form}"] = overall
            metrics |= {f"{name}{suffix}": value for name, value in found.items()}
        return metrics, {}

    def _has_blind(self, rows: Rows) -> bool:
        return all("blind" in row for row in rows.values())


class Ranking(Vqa):
    """The likeliest of some candidate answers: InstructBLIP's way where answers are few."""

    kind = "ranking"

    def _units(self) -> list[int]:
        units = super()._units()
        asked = (q for n in units for q in self.dataset.questions(n))
        bare = [q["id"] for q in asked if not self._candidates(q)]
        if bare:
            raise ValueError(
                f"{self.name}: {len(bare)} questions have no `choices` (the first: {bare[0]!r}). "
                "Name the answers to choose from in `candidates`, or give each question its own."
            )
        return units

    def _candidates(self, question: Row) -> list[str]:
        return list(self.config.candidates) or list(question.get("choices", []))

    def _options(self) -> Row:
        return {}

    def _say(self, pictures: list[np.ndarray] | None, questions: list[Row]) -> list[str]:
        scores = self._reader.rank(
            pictures,
            self._texts(questions),
            [self._candidates(question) for question in questions],
            prompt=self.config.prompt,
        )
        return [
            self._candidates(question)[int(np.argmax(some))]
            for question, some in zip(questions, scores, strict=True)
        ]


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
        if not any(record["captions"] for record in records.values()):
            return {}, {"captions": "the references of this split are not public"}
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
        gather = _gather if host.count > 1 else retrieval.alone
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

    def write(self, folder: Path, rows: Rows) -> Path:
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
        path = folder / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(answers, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def _gather(x: np.ndarray) -> np.ndarray:
    """x of each process, stacked; it has the same shape in all of them."""
    return multihost_utils.process_allgather(x)


def _covers(row: Row | None, wanted: np.ndarray) -> bool:
    return row is not None and set(wanted.tolist()) <= set(row["texts"])


def stamp(source: str) -> str:
    """Changes when the files of a model do; "" of one that is not on this machine."""
    path = Path(source)
    if (path / "done.json").is_file():
        return files.short_hash((path / "done.json").read_text())
    inside = [path] if path.is_file() else sorted(path.glob("*"))
    notes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in inside]
    return files.short_hash(json.dumps(notes)) if notes else ""


TASKS = {kind.kind: kind for kind in (Retrieval, Captioning, Vqa, Ranking)}


def make(name: str, config: ConfigDict, dataset: Heldout, threads: int) -> Task:
    """The task of a config.

    Raises:
      ValueError: there is no such kind, or the data set has nothing for it.
    """
    if config.task not in TASKS:
        raise ValueError(f"{name}: task is {config.task!r}; known: {', '.join(TASKS)}.")
    return TASKS[config.task](name, config, dataset, threads)
