"""The steps of a run, with their log, evaluations and checkpoints."""

import contextlib
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from clu import parameter_overview

from blip2_jax.data import loader
from blip2_jax.runtime import distributed, mesh
from blip2_jax.runtime.bad_steps import BadSteps
from blip2_jax.runtime.checkpoint import Checkpointer
from blip2_jax.runtime.metric_writers import RunWriters
from blip2_jax.runtime.profiler import Profiler
from blip2_jax.runtime.progress import Progress
from blip2_jax.runtime.run_dir import RunDir
from blip2_jax.runtime.timer import Timer
from blip2_jax.runtime.watchdog import alive
from blip2_jax.training.overview import describe_memory
from blip2_jax.training.setup import Setup
from blip2_jax.training.start import Start


class Due(NamedTuple):
    """What is to be done after a step.

    Attributes:
      line: write a line in metrics.jsonl.
      losses: evaluate losses, for that line.
      tasks: score tasks, for that line.
    """

    line: bool
    losses: bool
    tasks: bool


class TrainLoop:
    """Steps from a run's start to the config's last step.

    An evaluation may take long, fail, or be told to stop between two batches. So the step is saved
    before it, with what is known of the step's line in metrics.jsonl; a run that is resumed there
    evaluates first, and writes the line.

    Args:
      setup: what the run works with.
      start: where it begins.
      workdir: its folder.
      checkpointer: of its checkpoints.
      timer: see `Timer`.
      preemption: says when to stop.

    Attributes:
      state: the train state after the last step done.
      bad_steps: the count of steps that were left out.
    """

    def __init__(
        self,
        setup: Setup,
        start: Start,
        workdir: Path,
        checkpointer: Checkpointer,
        timer: Timer,
        preemption: distributed.Preemption,
    ):
        config = setup.run.config
        self.state = start.state
        self.bad_steps = BadSteps(
            step=int(start.state["step"]),
            count=int(start.state["bad_steps"]),
            max_count=config.faults.max_bad_steps,
            records=functools.partial(loader.record_numbers, setup.source, config),
        )
        self._setup, self._config = setup, config
        self._kept, self._unwritten = start.kept, start.unwritten
        self._workdir = RunDir(workdir)
        self._checkpointer, self._timer, self._preemption = checkpointer, timer, preemption

    def save(self, unwritten: dict[str, Any] | None = None) -> None:
        """Saves a checkpoint of the state.

        Args:
          unwritten: see `Start`.
        """
        step = int(self.state["step"])
        document = {
            **self._setup.identity,
            **self._kept,
            "seconds": self._timer.seconds,
            "productive_seconds": self._timer.productive_seconds,
            "skipped": self._setup.skipped.met(),
            "step": step,
            "unwritten": unwritten,
        }
        with self._timer.pause():
            self._checkpointer.save(step, self.state, document)

    def run(self) -> bool:
        """Does the steps; returns whether the run was asked to stop before its end."""
        setup, run, config = self._setup, self._setup.run, self._config
        first = step = int(self.state["step"])
        # Made in place: a key cannot be sent to the devices of other hosts.
        replicated = mesh.replicated(run.mesh)
        key = jax.jit(jax.random.key, static_argnums=0, out_shardings=replicated)(config.seed)
        batch_size = config.data.batch_size
        alive()
        train_step = run.lower_step().compile()  # the very program that `blip2 plan` looks at
        alive()
        if distributed.is_first_process():
            print(describe_memory(train_step), flush=True)
        metrics: dict[str, Any] = {}
        with (
            loader.train_batches(
                config,
                run.image_size,
                start_step=step,
                batch_rows=mesh.local_rows(run.mesh, batch_size),
                source=setup.source,
                skipped=setup.skipped,
                resample=run.resample,
                llm=run.llm,
            ) as batches,
            RunWriters(self._workdir.path, restored_step=step) as writers,
            Progress(config.steps, initial=step, label=config.name) as progress,
            Profiler(
                self._workdir.profile,
                first=first + config.profile.after,
                steps=config.profile.steps,
            ) as profiler,
            contextlib.suppress(distributed.Stopped),  # between batches of an evaluation
        ):
            if first == 0:
                settings = parameter_overview.flatten_dict(config.to_dict(), delimiter=".")
                writers.metrics.write_hparams(settings)
            self._write_late_line(step, writers)
            prefetched = batches.prefetch(
                lambda batch: mesh.global_batch(batch, run.mesh, batch_size)
            )
            self._timer.start()
            # All hosts look at the same numbers: they leave after the same step.
            while step < config.steps and not self.bad_steps.too_many:
                batch = next(prefetched)
                profiler.before(step, metrics)
                self.state, metrics = train_step(self.state, setup.frozen, batch, key)
                step += 1
                alive()
                self.bad_steps.add(metrics["bad_steps"])
                progress.update(1)
                due = self._due(step)
                if due.line:
                    numbers = self._write_line(step, step - first, metrics, due, batches, writers)
                    progress.update(0, loss=numbers.get("loss", math.nan))
                if self._preemption.should_stop():
                    break
                if step % config.checkpoint.every == 0 and step < config.steps:
                    batches.count_skipped(distributed.gather)
                    self.save()
            self.bad_steps.flush()
            batches.count_skipped(distributed.gather)
            if distributed.is_first_process():
                setup.skipped.report()
            return step < config.steps
        return True

    def _due(self, step: int) -> Due:
        config, last = self._config, step == self._config.steps
        every, tasks_every = config.eval.every, config.eval.tasks_every
        losses = self._setup.losses is not None and (last or step % every == 0)
        tasks = self._setup.evals is not None and (
            last or bool(tasks_every and step % tasks_every == 0)
        )
        return Due(last or step % config.log.every == 0 or losses or tasks, losses, tasks)

    def _write_line(
        self,
        step: int,
        done: int,
        metrics: dict[str, jax.Array],
        due: Due,
        batches: loader.Batches,
        writers: RunWriters,
    ) -> dict[str, float]:
        """Writes what a step computed, and its evaluations.

        Args:
          step: steps done by the whole run.
          done: steps done by this process.
          metrics: the step's.
          due: what is to be evaluated.
          batches: those that are trained on.
          writers: where to.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        # Those of a bad step may not be finite, which JSON cannot say.
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self.bad_steps.flush()
        timing = self._timer.read(done, batches.wait_seconds)
        # Not among the metrics: batches are read ahead of the step.
        timing["data/skipped"] = batches.count_skipped(distributed.gather).count
        if due.losses or due.tasks:
            self.save({"numbers": numbers, "losses": due.losses, "tasks": due.tasks})
            numbers = numbers | self._evaluate(due.losses, due.tasks)
        writers.write(step, numbers, timing)
        return numbers

    def _write_late_line(self, step: int, writers: RunWriters) -> None:
        """Writes the line that an earlier process left unwritten, with its evaluations."""
        late = self._unwritten
        if late is not None and distributed.from_first(str(writers.last_step)) != str(step):
            writers.write(step, late["numbers"] | self._evaluate(late["losses"], late["tasks"]))

    def _evaluate(self, losses_due: bool, tasks_due: bool) -> dict[str, float]:
        numbers: dict[str, float] = {}
        losses, evals = self._setup.losses, self._setup.evals
        with self._timer.pause():
            if losses_due and losses is not None:
                numbers |= losses(self.state["params"], self._setup.frozen)
            if tasks_due and evals is not None:
                numbers |= evals(self.state["params"])
        return numbers
