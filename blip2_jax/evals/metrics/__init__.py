"""Metrics: (predictions, ground truth) -> named scores, as fractions of 1 unless said.

Nothing here knows a model: `vqa` and `captioning` take texts by id, `retrieval` takes scores of
pairs.
"""

from collections.abc import Hashable, Iterable, Sequence


def check_ids(predictions: Iterable[Hashable], expected: Iterable[Hashable], what: str) -> None:
    """Holds predictions and ground truth to the same ids, each known and none left out.

    A score over the part that happens to match would look like a score over everything.

    Args:
      predictions: ids that were predicted.
      expected: ids of the ground truth.
      what: what an id stands for, in the plural: "questions", "images".

    Raises:
      ValueError: naming the first few ids without ground truth, or without a prediction, or
        saying that there is nothing to score.
    """
    predicted, known = dict.fromkeys(predictions), dict.fromkeys(expected)
    unknown = [key for key in predicted if key not in known]
    missing = [key for key in known if key not in predicted]
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} predictions are for unknown {what} ({first_few(unknown)})")
    if missing:
        problems.append(f"{len(missing)} {what} have no prediction ({first_few(missing)})")
    if problems:
        if {str(key) for key in unknown} & {str(key) for key in missing}:
            problems.append("the same ids occur once as text and once as numbers")
        raise ValueError(
            f"Predictions and ground truth differ: {'; '.join(problems)}. "
            "Predict every id of the evaluated split once, with the ids that the data set uses."
        )
    if not known:
        raise ValueError(f"There are no {what} to score: the evaluated split is empty.")


def first_few(ids: Sequence[Hashable], max_shown: int = 5) -> str:
    """Ids for a message: the first few, and dots if there are more."""
    return ", ".join(map(repr, ids[:max_shown])) + (", ..." if len(ids) > max_shown else "")
