"""Runs the tasks of an evaluation one after the other, with one model in memory at a time."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from blip2_jax import cli, pretrained
from blip2_jax.data.eval_dataset import EvalDataset
from blip2_jax.evals import predictions, tasks
from blip2_jax.evals.predictions import Predictions
from blip2_jax.evals.results import Results
from blip2_jax.evals.tasks.task import Execution, Task
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.runtime import distributed, run_dir
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.distributed import Host


def open_tasks(
    configs: Mapping[str, ConfigDict], threads: int, names: Iterable[str] | None = None
) -> list[Task]:
    """Tasks by name, those of one kind side by side; tasks on the same data share the data set.

    Args:
      configs: see `task` in `configs/eval/default.py`.
      threads: that decode images.
      names: of the tasks to open; None: all.

    Raises:
      ValueError: what is wrong with a task or its data.
    """
    datasets: dict[str, EvalDataset] = {}
    opened = []
    for name in configs if names is None else names:
        data = cli.config_to_json(configs[name].data)
        if data not in datasets:
            datasets[data] = EvalDataset(configs[name].data)
        opened.append(tasks.make(name, configs[name], datasets[data], threads))
    return sorted(opened, key=lambda task: list(tasks.TASKS).index(task.kind))


class Evaluator:
    """What `blip2 evaluate` does: predictions and scores of a config's tasks, in a workdir.

    Args:
      config: see `configs/eval/default.py`.
      workdir: receives predictions and results.
      stop: tells when the processes of the evaluation are to stop.
      only: names of tasks; none: all.

    Raises:
      ValueError: there are no tasks, or not one of `only`; what is wrong with a task's data.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        stop: distributed.StopSignal,
        only: Sequence[str] = (),
    ):
        unknown = sorted(set(only) - set(config.tasks))
        if unknown or not config.tasks:
            raise ValueError(
                f"{config.name} has no task {', '.join(unknown)}; there are: "
                f"{', '.join(config.tasks) or 'none'}."
            )
        self.config, self.workdir = config, workdir
        self.results = Results(config, workdir)
        self.tasks = open_tasks(config.tasks, config.threads, only or None)
        self._execution = Execution(Host.this(), stop.check, stop.meet)
        if self._is_first:
            self.results.check_files(self.tasks)
        self._model: Blip2 | None = None
        # What a name stood for first: a run in training has other checkpoints from task to task.
        self._sources: dict[str, str] = {}

    @property
    def _is_first(self) -> bool:
        return self._execution.host.index == 0

    def score_file(self, path: str) -> None:
        """Scores a file in a server's form, instead of a model's predictions.

        Raises:
          ValueError: there are several tasks; the file does not fit the task.
        """
        if len(self.tasks) > 1:
            raise ValueError(f"--predictions is of one task; name it: --task={self.tasks[0].name}.")
        (task,) = self.tasks
        self.results.add(task, task.read(Path(path)), path, task.settings())

    def run(self, source: str = "") -> None:
        """Predicts and scores all tasks; leaves out those that the model has no head for.

        Args:
          source: the model of all tasks, instead of what the config names.

        Raises:
          ValueError: no model is named, or what is named is none; what a task finds.
          Stopped: at `stop`'s word.
        """
        for task in self.tasks:
            self._run_task(task, source)

    def _load(self, task: Task, source: str) -> Blip2:
        """The model of a task, on this host's devices; that of the last task is kept if it can."""
        source = source or task.config.model or self.config.model
        if not source:
            raise ValueError(
                f"{task.name}: no model is named. Pass --model=SRC, or set config.model."
            )
        if source not in self._sources:
            run = run_dir.find(source) if self._is_first else None
            self._sources[source] = distributed.from_first(str(run.folder) if run else source)
        source = self._sources[source]
        if self._model is None or self._model.source != source:
            self._model = None  # not two at once
            self._model = pretrained.load(
                source,
                dtype=self.config.dtype or None,
                mesh=meshes.make_mesh(self.config.mesh, jax.local_devices()),
                vit=self.config.vit,
                llm=self.config.llm,
                qformer_tokenizer=self.config.qformer_tokenizer,
                llm_tokenizer=self.config.llm_tokenizer,
                batch_size=self.config.batch_size,
            )
        return self._model

    def _run_task(self, task: Task, source: str) -> None:
        model, execution = self._load(task, source), self._execution
        if not model.supports(task.kind):
            print(f"{task.name}: left out, {model.source} has no head for it.")
            return
        settings = task.settings(model)
        prompt = settings.get("prompt")
        print(
            f"{task.name}: {model.source}" + (f", prompt {prompt!r}" if prompt is not None else "")
        )
        folder = self.workdir / predictions.FOLDER
        saved = Predictions(
            folder, task.name, task.request(model), execution.host, execution.barrier
        )
        task.predict(model, saved, execution)
        execution.barrier()
        if self._is_first:
            saved.read()
            self.results.add(task, saved.by_record, model.source, settings)

    def finish(self, seconds: float) -> None:
        """Writes metrics.json and the page, and prints the table.

        Args:
          seconds: that the evaluation took so far.
        """
        if self._is_first:
            self.results.finish(seconds, self._model)
        self._execution.barrier()
