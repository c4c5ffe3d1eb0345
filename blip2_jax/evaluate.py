"""Evaluate a model as the paper reports it: question answering, captioning, retrieval, ranking.

    blip2 evaluate --config=configs/eval/vqa.py:vitg-flant5xl --workdir=runs/eval/vqa
    blip2 evaluate --config=configs/eval/caption.py:vitg-opt2.7b --workdir=DIR --model=runs/caption
    blip2 evaluate --config=configs/digits/evaluate.py --workdir=runs/quickstart
    blip2 evaluate --config=configs/eval/vqa.py:vitg-flant5xl --workdir=DIR --task=okvqa \\
        --config.tasks.okvqa.data.dir=/data/okvqa --config.tasks.okvqa.decoding.num_beams=1
    blip2 evaluate --config=configs/eval/caption.py:vitg-opt2.7b --workdir=DIR --task=coco \\
        --predictions=captions_of_another_system.json

A config in configs/eval is one row of the paper's tables, with every prompt, beam and penalty that
it was made with; configs/eval/default.py explains each key. SRC of --model is a run's workdir
(its newest checkpoint, finished or not), one of its checkpoints (WORKDIR/checkpoints/STEP), a
Hugging Face folder or hub name, a native folder or a LAVIS .pth (with --config.vit, --config.llm);
one model serves all the tasks that it has the heads for.

It leaves with 0 at its end, and with 42 when it was told to stop (SIGTERM), after the batch that it
was at: the same command goes on. The workdir receives

    lines/        what was said, image by image; the same command goes on where it was stopped, and
                  lines of other settings are refused
    predictions/  the same in the form that evaluation servers take
    metrics.json  scores, every setting that they were made with, and what was left out and why
    report.html   a page with scores and examples

Scores are fractions of 1, CIDEr-D is on its own scale of 10; a score ending in _blind is the same
thing done without the image. With BLIP2_DISTRIBUTED=1 hosts share the images; each holds the model.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from blip2_jax import __version__, cli, pretrained, recipe
from blip2_jax.data import transforms, world
from blip2_jax.data.faults import RecordError
from blip2_jax.data.heldout import Heldout
from blip2_jax.evals import tasks
from blip2_jax.evals.metrics import vqa
from blip2_jax.evals.tasks.task import Lines, Metrics, Rows, Task
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.reporting.run_page import write_report
from blip2_jax.runtime import distributed, run_dir
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.distributed import Host
from blip2_jax.runtime.metrics import METRICS_FILE, read_jsonl
from blip2_jax.runtime.outputs import Own

LIBRARIES = (
    "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "pycocoevalcap", "pillow",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `blip2 evaluate`."""
    parser.add_argument("--workdir", required=True, help="folder for the results")
    parser.add_argument(
        "--model", default="", metavar="SRC", help="instead of what the config names"
    )
    parser.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument(
        "--predictions",
        default="",
        metavar="FILE",
        help="score a file in a server's form instead of a model; needs a single task",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs `blip2 evaluate`; returns its exit code."""
    args = cli.parse(__doc__, argv, add_arguments, prog="blip2 evaluate")
    try:
        return evaluate(args.config, Path(args.workdir), args.model, args.task, args.predictions)
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"blip2 evaluate: {error}") from error


def evaluate(
    config: ConfigDict,
    workdir: Path,
    model: str = "",
    only: Sequence[str] = (),
    predictions: str = "",
) -> int:
    """Runs the tasks of a config; returns the exit code.

    Args:
      config: see `configs/eval/default.py`.
      workdir: receives the results.
      model: what all tasks evaluate, instead of what the config names.
      only: names of tasks; none: all.
      predictions: a file to score instead of a model.

    Raises:
      ValueError: everything that does not fit, as early as it can be known.
    """
    started = time.monotonic()
    distributed.initialize(config.distributed)
    distributed.setup_compilation_cache()
    cli.make_workdir(workdir)
    with distributed.StopSignal() as stop:
        try:
            _evaluate(config, workdir, model, only, predictions, stop, started)
        except distributed.Stopped:
            if distributed.is_first_process():
                print("Asked to stop. The same command goes on.")
            return distributed.PREEMPTED
    return 0


def _evaluate(
    config: ConfigDict,
    workdir: Path,
    model: str,
    only: Sequence[str],
    predictions: str,
    stop: distributed.StopSignal,
    started: float,
) -> None:
    host = Host.this()
    result = Result(config, workdir)
    planned = open_tasks(config, only)  # what is wrong with any of them shows here
    if host.index == 0:
        names = [predictions_path(task) for task in planned]
        result.own.check("metrics.json", "report.html", *names)
    loaded: Blip2 | None = None
    sources: dict[str, str] = {}  # a run that is at work has other checkpoints from task to task
    if predictions:
        if len(planned) > 1:
            raise ValueError(f"--predictions is of one task; name it: --task={planned[0].name}.")
        (task,) = planned
        result.add(task, task.read(Path(predictions)), predictions)
        planned = []
    for task in planned:
        source = model or task.config.model or config.model
        if not source:
            raise ValueError(
                f"{task.name}: no model is named. Pass --model=SRC, or set config.model."
            )
        if source not in sources:
            run = run_dir.find(source) if host.index == 0 else None
            sources[source] = distributed.from_first(str(run.folder) if run else source)
        source = sources[source]
        if loaded is None or loaded.source != source:
            task.model = loaded = None  # not two at once
            loaded = load(source, config)
        if not loaded.supports(task.kind):
            print(f"{task.name}: left out, {source} has no head for it.")
            continue
        task.model, task.between_batches, task.meet = loaded, stop.check, stop.meet
        prompt = task.settings().get("prompt")
        print(f"{task.name}: {source}" + (f", prompt {prompt!r}" if prompt is not None else ""))
        lines = Lines(workdir / "lines", task.name, task.request(), host, stop.meet)
        task.predict(lines, host)
        stop.meet()
        if host.index == 0:
            lines.read()
            result.add(task, lines.rows, source)
        task.model = None
    if host.index == 0:
        result.finish(time.monotonic() - started, loaded)
    stop.meet()


def open_tasks(config: ConfigDict, only: Sequence[str] = ()) -> list[Task]:
    """The tasks of a config, without a model yet; those of one kind side by side.

    Raises:
      ValueError: there are none, or not one of `only`; what is wrong with a task's data.
    """
    unknown = sorted(set(only) - set(config.tasks))
    if unknown or not config.tasks:
        raise ValueError(
            f"{config.name} has no task {', '.join(unknown)}; there are: "
            f"{', '.join(config.tasks) or 'none'}."
        )
    datasets: dict[str, Heldout] = {}
    made = []
    for name in only or config.tasks:
        section = config.tasks[name]
        data = cli.config_to_json(section.data)  # tasks on the same data share them
        if data not in datasets:
            datasets[data] = Heldout(section.data)
        made.append(tasks.make(name, section, datasets[data], config.threads))
    return sorted(made, key=lambda task: list(tasks.TASKS).index(task.kind))


def load(source: str, config: ConfigDict) -> Blip2:
    """The model on this host's devices."""
    return pretrained.load(
        source,
        dtype=config.dtype or None,
        mesh=meshes.make_mesh(config.mesh, jax.local_devices()),
        vit=config.vit,
        llm=config.llm,
        qformer_tokenizer=config.qformer_tokenizer,
        llm_tokenizer=config.llm_tokenizer,
        batch_size=config.batch_size,
    )


class DuringTraining:
    """An evaluation that a training run makes at intervals, of the parameters it has right then.

    All hosts of the run say the same things in step, since they hold the parameters together: keep
    it small with `data.first`. While it goes on, the language model is held twice.

    Args:
      run: the training run.
      frozen: its frozen towers.
      path: of the evaluation's config, `FILE.py` or `FILE.py:ARG`.
      between_batches: called before each batch is computed; may raise, to leave the evaluation.
    """

    def __init__(
        self,
        run: recipe.Recipe,
        frozen: Any,
        path: str,
        between_batches: Callable[[], None] = lambda: None,
    ):
        self.config = cli.load_config(path)
        self.run, self.frozen = run, frozen
        self.tasks = open_tasks(self.config)  # mistakes show before the first step
        self.model: Blip2 | None = None
        sizes = run.model_config
        for task in self.tasks:
            task.between_batches = between_batches
            if not isinstance(sizes, Blip2Config) or (
                (sizes.llm is None) != (task.kind == "retrieval")
            ):
                raise ValueError(
                    f"config.eval.tasks: {run.config.name} has no head for {task.name} "
                    f"({task.kind}) of {path}. Name another, or --config.eval.tasks='' for none."
                )

    def identity(self) -> dict[str, Any]:
        """What the scores are of, wherever it lies: each task's settings and its data."""
        left_out = ("model", "examples")
        return {
            task.name: {k: v for k, v in task.settings().items() if k not in left_out}
            for task in self.tasks
        }

    def __call__(self, params: Any) -> dict[str, float]:
        """Scores as "eval/NAME", of parameters that the run trains."""
        if self.model is None:
            self.model = pretrained.from_run(
                self.run, params, self.frozen, batch_size=self.config.batch_size
            )
        else:
            self.model.set_params(pretrained.copied_params(self.run, params, self.frozen))
        together = Host(0, 1)
        found: Metrics = {}
        try:
            for task in self.tasks:
                task.model = self.model
                lines = Lines(None, task.name, {}, together)
                task.predict(lines, together)
                found |= task.score(lines.rows)[0]
        finally:
            self.model.set_params(None)
        return {f"eval/{name}": v for name, v in found.items() if not isinstance(v, str)}


class Result:
    """Scores of the tasks so far, and at the end the files."""

    def __init__(self, config: ConfigDict, workdir: Path):
        self.config, self.workdir = config, workdir
        self.own = Own(workdir, "blip2 evaluate")
        self.metrics: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.settings: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.done: list[tuple[Task, Rows]] = []

    def add(self, task: Task, rows: Rows, source: str) -> None:
        """Scores a task, and writes what was said."""
        metrics, left_out = task.score(rows)
        self.metrics |= metrics
        self.left_out |= left_out
        self.settings[task.name] = task.settings()
        self.sources[task.name] = source
        self.done.append((task, rows))
        with self.own.replacing(predictions_path(task)) as draft:
            task.write(draft, rows)
        print(f"{task.name}: predictions in {self.workdir / predictions_path(task)}")

    def finish(self, seconds: float, model: Blip2 | None) -> None:
        """Writes metrics.json and the page, and prints the table."""
        self.metrics |= costs(self.sources.values(), self.done, seconds)
        content = {
            **self.metrics,
            "left_out": self.left_out,
            "settings": {
                "config": json.loads(cli.config_to_json(self.config)),
                "tasks": self.settings,
                "versions": versions(),
            },
        }
        with self.own.replacing("metrics.json") as draft:
            draft.write_text(json.dumps(content, indent=1) + "\n")
        with self.own.replacing("report.html") as draft:
            page(self, model, draft)
        print_table(self.metrics, self.config.published.scores)
        for name, reason in self.left_out.items():
            print(f"Left out: {name}: {reason}.")
        print(f"Report: {self.workdir / 'report.html'}")


def predictions_path(task: Task) -> str:
    """Of a task's predictions, in the workdir."""
    return f"predictions/{task.name}.json"


def versions() -> dict[str, str]:
    """Of all that scores depend on."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}",
        "blip2_jax": __version__,
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def costs(
    models: Iterable[str], done: Sequence[tuple[Task, Rows]], seconds: float
) -> dict[str, float]:
    """Seconds of each part over all its restarts, and the most host memory of any of them.

    Parts are the runs that were evaluated and the data that `blip2 prepare` made for them.
    """
    known: dict[str, Mapping[str, Any]] = {}
    if done:
        known["prepare"] = run_dir.read_done(Path(done[0][0].dataset.data.dir)) or {}
    for run in map(run_dir.find, models):
        if run is not None:
            end = run_dir.read_done(run.workdir) if run.workdir and run.step >= run.steps else None
            known[run.name] = end or run.document
    took = {f"seconds/{name}": of["seconds"] for name, of in known.items() if "seconds" in of}
    took["seconds/evaluate"] = seconds
    memory = [of.get("peak_memory_gb", 0.0) for of in known.values()]
    return {
        **took,
        "seconds/total": sum(took.values()),
        "peak_memory_gb": max([distributed.peak_memory_gb(), *memory]),
    }


# ------------------------------------------------------------------------------------- the page


def page(result: Result, model: Blip2 | None, path: Path) -> None:
    """Writes report.html."""
    config = result.config
    shown = list(pictures(result.done, config.seed))
    attention = []
    some = shown[: config.report.attention]
    if some and model is not None:
        maps = model.attention_maps([example["image"] for example in some])
        attention = [
            {"image": example["image"], "attention": maps[i], "text": example.get("reference")}
            for i, example in enumerate(some)
        ]
    runs = [run for run in map(run_dir.find, dict.fromkeys(result.sources.values())) if run]
    logs = {run.name: run.workdir / METRICS_FILE for run in runs if run.workdir}
    write_report(
        path,
        title=config.title or f"BLIP-2: {config.name}",
        metrics=result.metrics,
        curves={name: read_jsonl(log) for name, log in logs.items() if log.is_file()},
        examples=shown,
        attention=attention,
        timings={
            name.removeprefix("seconds/"): value
            for name, value in result.metrics.items()
            if name.startswith("seconds/")
        },
        versions=versions(),
        config=cli.config_to_json(config),
        summary=" ".join(f"{name} is left out: {why}." for name, why in result.left_out.items()),
    )


def pictures(done: Sequence[tuple[Task, Rows]], seed: int) -> Iterator[dict[str, Any]]:
    """Some images of each data set, with all that was said about them."""
    by_dataset: dict[int, list[tuple[Task, Rows]]] = {}
    for task, rows in done:
        by_dataset.setdefault(id(task.dataset), []).append((task, rows))
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
            for _, rows in group:
                row = rows.get(number, {})
                if "caption" in row:
                    example["caption"] = row["caption"]
                    if "scene" in record:
                        scene = world.scene_from_json(record["scene"])
                        example["correct"] = world.facts_correct(row["caption"], scene)
                for question, said in zip(
                    dataset.questions(number), row.get("answers", ()), strict=False
                ):
                    example["questions"].append(answered(question, said))
            yield example


def answered(question: Mapping[str, Any], said: str) -> dict[str, Any]:
    """A question of the page: right if most annotators would say so; unknown without answers."""
    answers = question.get("answers") or [question.get("answer")]
    if not answers or not answers[0]:
        return {"question": question["question"], "prediction": said}
    answers = answers * vqa.ANNOTATORS if len(answers) == 1 else answers
    return {
        "question": question["question"],
        "answer": max(answers, key=answers.count),
        "prediction": said,
        "correct": vqa.answer_accuracy(said, answers) > 0.5,
    }


def print_table(metrics: Mapping[str, Any], published: Mapping[str, float]) -> None:
    """All scores, one a line, with their baselines and what was published beside them."""
    print(f"\n{'':<44}{'score':>10}{'blind':>10}" + (f"{'paper':>10}" if published else ""))
    published = {name: value / 100 for name, value in flat(published).items()}
    for name, value in metrics.items():
        if name.endswith("_blind") or not isinstance(value, float) or name.startswith("seconds/"):
            continue
        blind, paper = metrics.get(f"{name}_blind"), published.get(name)
        line = f"{name:<44}{value:>10.3f}"
        line += f"{'':>10}" if blind is None else f"{blind:>10.3f}"
        print((line + ("" if paper is None else f"{paper:>10.3f}")).rstrip())


def flat(scores: Mapping[str, Any]) -> dict[str, float]:
    """{"task": {"metric": x}} -> {"task/metric": x}."""
    return {f"{task}/{name}": x for task, some in scores.items() for name, x in some.items()}


if __name__ == "__main__":
    raise SystemExit(main())
