"""Questions about images, answered by the likeliest of some candidate answers."""

import numpy as np

from blip2_jax.data.containers import Row
from blip2_jax.evals.tasks.vqa import Vqa


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
