"""Questions about images, answered by the likeliest of some candidate answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from blip2_jax.evals.tasks.vqa import Question, Vqa
from blip2_jax.inference.pipeline import Blip2


class Ranking(Vqa):
    """The likeliest of some candidate answers: InstructBLIP's way where answers are few."""

    kind = "ranking"

    def _select_records(self) -> list[int]:
        numbers = super()._select_records()
        questions = (q for n in numbers for q in self.dataset.questions(n))
        missing = [q["id"] for q in questions if not self._candidates(q)]
        if missing:
            raise ValueError(
                f"{self.name}: {len(missing)} questions have no `choices` (the first: "
                f"{missing[0]!r}). Name the answers to choose from in `candidates`, or give each "
                "question its own."
            )
        return numbers

    def _candidates(self, question: Question) -> list[str]:
        return list(self.config.candidates) or list(question.get("choices", []))

    def _decoding(self) -> dict[str, Any]:
        return {}

    def _answer(
        self, model: Blip2, images: list[np.ndarray] | None, questions: Sequence[Question]
    ) -> list[str]:
        candidates = [self._candidates(question) for question in questions]
        scores = model.rank(
            images, self._question_texts(questions), candidates, prompt=self.config.prompt
        )
        return [
            of_question[int(np.argmax(each))]
            for of_question, each in zip(candidates, scores, strict=True)
        ]
