"""Questions about images, answered in free text."""

import dataclasses
from typing import Any

import numpy as np

from blip2_jax.data import prompting, texts
from blip2_jax.data.containers import Row
from blip2_jax.evals.metrics import check_ids, vqa
from blip2_jax.evals.tasks.task import Lines, Metrics, Rows, Task
from blip2_jax.runtime.distributed import Host


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

    def predict(self, lines: Lines, host: Host) -> None:
        """See `Task`; questions that cannot be asked are found before the first is."""
        queries = self._reader.config.qformer.num_query_tokens
        for question in (q for n in self.units for q in self.dataset.questions(n)):
            try:
                prompting.strip_image_token(question["question"], queries)
            except ValueError as error:
                raise ValueError(f"{self.name}, question {question['id']!r}: {error}") from error
        super().predict(lines, host)

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
        known = [q for q in questions if q.get("answers") or q.get("answer")]
        if not known:
            where = "hand the file of predictions to the data set's evaluation server"
            return {}, {"accuracy": f"the answers of this split are not public: {where}"}
        reasons = {}
        if len(known) < len(questions):
            bare = len(questions) - len(known)
            reasons["questions"] = f"{bare} of {len(questions)} have no answer to compare with"
        metrics: Metrics = {}
        for suffix, key in (("_blind", "blind"), ("", "answers")):
            if key == "blind" and not self._has_blind(rows):
                continue
            every = self.by_question(rows, key)
            said = {question["id"]: every[question["id"]] for question in known}
            if self.config.lemmatize:
                said = dict(zip(said, vqa.lemmatize(list(said.values())), strict=True))
            if self.config.metric == "exact":
                found = vqa.gqa_metrics(said, known)
            else:
                first, *others = self.config.forms
                found = vqa.vqa_metrics(said, known, form=first)
                for form in others:
                    overall = vqa.vqa_metrics(said, known, form=form)["accuracy"]
                    found[f"accuracy_{form}"] = overall
            metrics |= {f"{name}{suffix}": value for name, value in found.items()}
        return metrics, reasons

    def _has_blind(self, rows: Rows) -> bool:
        return all("blind" in row for row in rows.values())
