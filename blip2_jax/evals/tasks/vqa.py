"""Questions about images, answered in free text."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip2_jax.data import prompting, texts
from blip2_jax.evals.metrics import check_ids, vqa
from blip2_jax.evals.predictions import Prediction, Predictions, PredictionsByRecord
from blip2_jax.evals.tasks.task import SINGLE_PROCESS, Execution, Metrics, Reasons, Task
from blip2_jax.inference.pipeline import Blip2

Question = dict[str, Any]


class Vqa(Task):
    """Questions answered in free text; the image is encoded once for all its questions."""

    kind = "vqa"

    @property
    def submission(self) -> str:
        """See `Task`."""
        return "gqa" if self.config.metric == "exact" else "vqa"

    def _select_records(self) -> list[int]:
        if self.config.metric not in ("vqa", "exact"):
            raise ValueError(f"{self.name}: metric is {self.config.metric!r}; known: vqa, exact.")
        if self.config.lemmatize:
            vqa.lemmatize([])  # an error now rather than after all the answers
        count = len(self.dataset)
        return [n for n in range(count) if self.dataset.records[n].get("questions")]

    # ------------------------------------------------------------------------ with a model

    def settings(self, model: Blip2 | None = None) -> dict[str, Any]:
        """See `Task`; with the prompt and the decoding that the model resolves them to."""
        settings = super().settings(model)
        if model is not None:
            resolved = model.settings("answer", prompt=self.config.prompt, **self._decoding())
            decoding = dataclasses.asdict(resolved.decoding)
            settings |= {"prompt": resolved.prompt, "decoding": decoding}
        return settings

    def predict(
        self, model: Blip2, predictions: Predictions, execution: Execution = SINGLE_PROCESS
    ) -> None:
        """See `Task`; questions that cannot be asked are found before the first is."""
        num_queries = model.config.qformer.num_query_tokens
        for question in (q for n in self.numbers for q in self.dataset.questions(n)):
            try:
                prompting.strip_image_token(question["question"], num_queries)
            except ValueError as error:
                raise ValueError(f"{self.name}, question {question['id']!r}: {error}") from error
        super().predict(model, predictions, execution)

    def _decoding(self) -> dict[str, Any]:
        return self.config.decoding.to_dict()

    def _predict_batch(
        self, model: Blip2, numbers: list[int], images: list[np.ndarray]
    ) -> list[Prediction]:
        by_image = [self.dataset.questions(number) for number in numbers]
        questions = [question for each in by_image for question in each]
        repeated = [image for image, each in zip(images, by_image, strict=True) for _ in each]
        columns = {"answers": self._answer(model, repeated, questions)}
        if self.config.get("blind"):
            columns["blind"] = self._answer(model, None, questions)
        ends = np.cumsum([0, *map(len, by_image)])
        return [
            {
                "record": number,
                "id": self.dataset.records[number]["id"],
                **{name: answers[ends[i] : ends[i + 1]] for name, answers in columns.items()},
            }
            for i, number in enumerate(numbers)
        ]

    def _question_texts(self, questions: Sequence[Question]) -> list[str]:
        clean = texts.clean_question if self.config.clean_text else str
        return [clean(question["question"]) for question in questions]

    def _answer(
        self, model: Blip2, images: list[np.ndarray] | None, questions: Sequence[Question]
    ) -> list[str]:
        return model.answer(
            images,
            self._question_texts(questions),
            prompt=self.config.prompt,
            truncate=self.config.truncate or None,
            **self._decoding(),
        )

    # -------------------------------------------------------- from saved predictions alone

    def by_question(self, predictions: PredictionsByRecord, key: str = "answers") -> dict[Any, str]:
        """Answers by question id."""
        return {
            question["id"]: answer
            for number, each in predictions.items()
            for question, answer in zip(self.dataset.questions(number), each[key], strict=True)
        }

    def texts(self, predictions: PredictionsByRecord) -> dict[Any, str]:
        """See `Task`."""
        return self.by_question({n: p for n, p in predictions.items() if "unreadable" not in p})

    def _from_texts(self, texts: Mapping[Any, str]) -> dict[int, Prediction]:
        by_image = {n: self.dataset.questions(n) for n in self.numbers}
        known = [question["id"] for questions in by_image.values() for question in questions]
        check_ids(texts, known, "questions")
        return {
            n: {"record": n, "answers": [texts[question["id"]] for question in questions]}
            for n, questions in by_image.items()
        }

    def _score(self, predictions: PredictionsByRecord) -> tuple[Metrics, Reasons]:
        questions = [q for number in predictions for q in self.dataset.questions(number)]
        for question in questions:  # "yes/no" would look like a group of metrics
            kind = question.get("type") or question.get("answer_type")
            question["type"] = kind and kind.replace("/", "_")
        answered = [q for q in questions if q.get("answers") or q.get("answer")]
        if not answered:
            remedy = "hand the file of predictions to the data set's evaluation server"
            return {}, {"accuracy": f"the answers of this split are not public: {remedy}"}
        reasons = {}
        if len(answered) < len(questions):
            unanswered = len(questions) - len(answered)
            reasons["questions"] = (
                f"{unanswered} of {len(questions)} have no answer to compare with"
            )
        metrics: Metrics = {}
        for suffix, key in (("_blind", "blind"), ("", "answers")):
            if key == "blind" and not all("blind" in each for each in predictions.values()):
                continue
            scores = self._accuracies(self.by_question(predictions, key), answered)
            metrics |= {f"{name}{suffix}": value for name, value in scores.items()}
        return metrics, reasons

    def _accuracies(
        self, answers: Mapping[Any, str], questions: Sequence[Question]
    ) -> dict[str, float]:
        """Scores of answers by question id, for the questions that have true answers."""
        answers = {question["id"]: answers[question["id"]] for question in questions}
        if self.config.lemmatize:
            answers = dict(zip(answers, vqa.lemmatize(list(answers.values())), strict=True))
        if self.config.metric == "exact":
            return vqa.gqa_metrics(answers, questions)
        first, *others = self.config.forms
        scores = vqa.vqa_metrics(answers, questions, form=first)
        for form in others:
            overall = vqa.vqa_metrics(answers, questions, form=form)["accuracy"]
            scores[f"accuracy_{form}"] = overall
        return scores
