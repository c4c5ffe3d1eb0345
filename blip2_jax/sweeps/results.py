"""The workdir of a sweep: which sweep it is of, and the table and page of its results."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2_jax import cli
from blip2_jax.reporting.sweep_page import write_sweep_report
from blip2_jax.runtime import atomic
from blip2_jax.runtime.outputs import Own
from blip2_jax.runtime.run_dir import RunDir
from blip2_jax.sweeps.points import Run

SWEEP_FILE, RESULTS, PAGE = "sweep.json", "results.csv", "results.html"


def check_workdir(workdir: Path, identity: Mapping[str, Any]) -> None:
    """Refuses a folder that holds another sweep, or a run."""
    file = workdir / SWEEP_FILE
    if file.is_file():
        cli.check_same_run(_read(file), identity, workdir)
    elif RunDir(workdir).holds_a_run():
        raise cli.ConfigError(f"{workdir} holds a run, not a sweep; name another --workdir.")


def _read(file: Path) -> dict[str, Any]:
    return atomic.read_json(
        file, "Remove it and give the same command again: the runs beside it stay as they are."
    )


def remember(own: Own, identity: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Writes down whose workdir this is, and says which runs are no longer in the sweep."""
    file = own.folder / SWEEP_FILE
    known = _read(file)["runs"] if file.is_file() else {}
    gone = known.keys() - {run.name for run in runs}
    if gone:
        print(f"No longer in the sweep, and left as they are: {', '.join(sorted(gone))}.")
    content = {**identity, "runs": {**known, **{run.name: run.point for run in runs}}}
    with own.replacing(SWEEP_FILE) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_results(
    own: Own, title: str, runs: Sequence[Run], failed: Mapping[str, int] | None = None
) -> None:
    """Writes results.csv and results.html, and prints the table."""
    keys = list(dict.fromkeys(key for run in runs for key in run.point))
    shown_runs, table = [], []
    for run in runs:
        records = RunDir(run.workdir).read_metrics()
        status = "finished"
        costs: dict[str, Any] = {}
        if run.is_finished():
            finished = RunDir(run.workdir).read_finished() or {}
            costs = {
                name: finished[name] for name in ("seconds", "peak_memory_gb") if name in finished
            }
        elif failed and run.name in failed:
            status = f"failed ({failed[run.name]})"
        else:
            status = "not finished" if records else "not started"
        shown_runs.append(
            {"run": run.name, "status": status, "point": run.point, "records": records}
        )
        last: dict[str, Any] = {"step": 0}
        for record in records:  # not all steps have all metrics
            last |= record
        table.append({"run": run.name, "status": status, **run.point, **last, **costs})

    columns = list(dict.fromkeys(name for row in table for name in row))
    table_file, page_file = (own.folder / name for name in (RESULTS, PAGE))
    with own.replacing(RESULTS) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    num_finished = sum(row["status"] == "finished" for row in table)
    with own.replacing(PAGE) as draft:
        write_sweep_report(
            draft,
            title=f"Sweep of {title}",
            summary=f"{num_finished} of {len(runs)} runs finished.",
            keys=keys,
            runs=shown_runs,
        )
    width = max(len(run.name) for run in runs)
    shown = [name for name in ("loss", "eval/loss") if name in columns]
    print(f"{'':<{width}}  {'status':<14}{'step':>8}" + "".join(f"{name:>12}" for name in shown))
    for row in table:
        numbers = "".join(f"{row[name]:>12.4g}" if name in row else " " * 12 for name in shown)
        print(f"{row['run']:<{width}}  {row['status']:<14}{row['step']:>8}{numbers}")
    print(f"Results: {table_file}, {page_file}")


def last_line(log: Path) -> str:
    """The last line of a run's output, and where all of it is."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    printed = [line.strip() for line in lines if line.strip()]
    return f"{printed[-1]}  ({log})" if printed else f"It printed nothing ({log})."
