"""What an evaluation leaves in its workdir: predictions, metrics.json and a page; and its table."""

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from blip2_jax import __version__, cli
from blip2_jax.data import transforms
from blip2_jax.data.faults import RecordError
from blip2_jax.data.prepared import PREPARED, read_json
from blip2_jax.evals import predictions
from blip2_jax.evals.metrics import truth, vqa
from blip2_jax.evals.predictions import PredictionsByRecord
from blip2_jax.evals.tasks.task import Task
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.reporting.run_page import write_report
from blip2_jax.runtime import distributed, run_dir
from blip2_jax.runtime.outputs import Own
from blip2_jax.runtime.run_dir import RunDir

LIBRARIES = (
    "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "pycocoevalcap", "pillow",
)  # fmt: skip
METRICS, REPORT = "metrics.json", "report.html"

Scored = Sequence[tuple[Task, PredictionsByRecord]]


class Results:
    """Scores of the tasks so far, and at the end the files."""

    def __init__(self, config: ConfigDict, workdir: Path):
        self.config, self.workdir = config, workdir
        self.own = Own(workdir, predictions.COMMAND)
        self.metrics: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.settings: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.scored: list[tuple[Task, PredictionsByRecord]] = []

    def check_files(self, tasks: Iterable[Task]) -> None:
        """Refuses to replace files that no evaluation has written.

        Raises:
          Taken: naming them.
        """
        self.own.check(METRICS, REPORT, *map(_file, tasks))

    def add(
        self, task: Task, predicted: PredictionsByRecord, source: str, settings: dict[str, Any]
    ) -> None:
        """Scores a task, and writes its predictions.

        Args:
          task: the task.
          predicted: its predictions.
          source: where they come from: a model, or a file.
          settings: all that decides the scores (`Task.settings`).
        """
        metrics, left_out = task.score(predicted)
        self.metrics |= metrics
        self.left_out |= left_out
        self.settings[task.name] = settings
        self.sources[task.name] = source
        self.scored.append((task, predicted))
        with self.own.replacing(_file(task)) as draft:
            task.write(draft, predicted)
        print(f"{task.name}: predictions in {self.workdir / _file(task)}")

    def finish(self, seconds: float, model: Blip2 | None) -> None:
        """Writes metrics.json and the page, and prints the table."""
        self.metrics |= costs(self.sources.values(), self.scored, seconds)
        content = {
            **self.metrics,
            "left_out": self.left_out,
            "settings": {
                "config": json.loads(cli.config_to_json(self.config)),
                "tasks": self.settings,
                "versions": versions(),
            },
        }
        with self.own.replacing(METRICS) as draft:
            draft.write_text(json.dumps(content, indent=1) + "\n")
        with self.own.replacing(REPORT) as draft:
            self._write_page(draft, model)
        print_table(self.metrics, self.config.published.scores)
        for name, reason in self.left_out.items():
            print(f"Left out: {name}: {reason}.")
        print(f"Report: {self.workdir / REPORT}")

    def _write_page(self, path: Path, model: Blip2 | None) -> None:
        config = self.config
        shown = list(examples(self.scored, config.seed))
        attention = []
        mapped = shown[: config.report.attention]
        if mapped and model is not None:
            maps = model.attention_maps([example["image"] for example in mapped])
            attention = [
                {"image": example["image"], "attention": maps[i], "text": example.get("reference")}
                for i, example in enumerate(mapped)
            ]
        runs = [run for run in map(run_dir.find, dict.fromkeys(self.sources.values())) if run]
        logs = {run.name: RunDir(run.workdir).read_metrics() for run in runs if run.workdir}
        write_report(
            path,
            title=config.title or f"BLIP-2: {config.name}",
            metrics=self.metrics,
            curves={name: records for name, records in logs.items() if records},
            examples=shown,
            attention=attention,
            timings={
                name.removeprefix("seconds/"): value
                for name, value in self.metrics.items()
                if name.startswith("seconds/")
            },
            versions=versions(),
            config=cli.config_to_json(config),
            summary=" ".join(f"{name} is left out: {why}." for name, why in self.left_out.items()),
        )


def _file(task: Task) -> str:
    """A task's predictions in the form of a server, in the workdir."""
    return f"{predictions.FOLDER}/{task.name}.json"


def versions() -> dict[str, str]:
    """Of all that scores depend on."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}",
        "blip2_jax": __version__,
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def costs(sources: Iterable[str], scored: Scored, seconds: float) -> dict[str, float]:
    """Seconds of each part over all its restarts, and the most host memory of any of them.

    Parts are the runs that were evaluated and the data that `blip2 prepare` made for them.
    """
    parts: dict[str, Mapping[str, Any]] = {}
    if scored:
        parts["prepare"] = read_json(scored[0][0].dataset.data.dir, PREPARED)
    for run in map(run_dir.find, sources):
        if run is not None:
            finished = None
            if run.workdir and run.step >= run.steps:
                finished = RunDir(run.workdir).read_finished()
            parts[run.name] = finished or run.document
    took = {f"seconds/{name}": part["seconds"] for name, part in parts.items() if "seconds" in part}
    took["seconds/evaluate"] = seconds
    memory = [part.get("peak_memory_gb", 0.0) for part in parts.values()]
    return {
        **took,
        "seconds/total": sum(took.values()),
        "peak_memory_gb": max([distributed.peak_memory_gb(), *memory]),
    }


# --------------------------------------------------------------------------- examples of the page


def examples(scored: Scored, seed: int) -> Iterator[dict[str, Any]]:
    """Some images of each data set, with all predictions of them."""
    by_dataset: dict[int, list[tuple[Task, PredictionsByRecord]]] = {}
    for task, predicted in scored:
        by_dataset.setdefault(id(task.dataset), []).append((task, predicted))
    for group in by_dataset.values():
        dataset = group[0][0].dataset
        count = max(task.config.examples for task, _ in group)
        for number in np.random.default_rng(seed).permutation(len(dataset))[:count].tolist():
            try:
                data = dataset.source[number]["image"]
                image = np.asarray(transforms.decode_image(data, dataset.data.alpha_background))
            except RecordError:
                continue
            record = dataset.records[number]
            example: dict[str, Any] = {"image": image, "questions": []}
            if record["captions"]:
                example["reference"] = record["captions"][0]
            for _, predicted in group:
                prediction = predicted.get(number, {})
                if "caption" in prediction:
                    example["caption"] = prediction["caption"]
                    is_correct = truth.truth_check(record)
                    if is_correct is not None:
                        example["correct"] = is_correct(prediction["caption"])
                for question, answer in zip(
                    dataset.questions(number), prediction.get("answers", ()), strict=False
                ):
                    example["questions"].append(_answered(question, answer))
            yield example


def _answered(question: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """A question of the page: right if most annotators would say so; unknown without answers."""
    answers = question.get("answers") or [question.get("answer")]
    if not answers or not answers[0]:
        return {"question": question["question"], "prediction": prediction}
    answers = answers * vqa.ANNOTATORS if len(answers) == 1 else answers
    return {
        "question": question["question"],
        "answer": max(answers, key=answers.count),
        "prediction": prediction,
        "correct": vqa.answer_accuracy(prediction, answers) > 0.5,
    }


# ------------------------------------------------------------------------------------- the table


def print_table(metrics: Mapping[str, Any], published: Mapping[str, Mapping[str, float]]) -> None:
    """All scores, one a line, with their baselines and what was published beside them."""
    print(f"\n{'':<44}{'score':>10}{'blind':>10}" + (f"{'paper':>10}" if published else ""))
    paper = {
        f"{task}/{name}": value / 100
        for task, scores in published.items()
        for name, value in scores.items()
    }
    for name, value in metrics.items():
        if name.endswith("_blind") or not isinstance(value, float) or name.startswith("seconds/"):
            continue
        line = f"{name:<44}{value:>10.3f}"
        line += f"{metrics[f'{name}_blind']:>10.3f}" if f"{name}_blind" in metrics else f"{'':>10}"
        line += f"{paper[name]:>10.3f}" if name in paper else ""
        print(line.rstrip())
