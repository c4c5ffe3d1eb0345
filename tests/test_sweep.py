"""A sweep does each of its runs once, whatever happens to it, and refuses what it cannot do."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blip2_jax import cli, sweep
from blip2_jax.runtime import jobs
from blip2_jax.runtime.jsonl import read_jsonl
from blip2_jax.runtime.run_dir import RunDir
from blip2_jax.sweeps import backends, points
from tests.launch import fakes
from tests.reporting.test_run_page import Page

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "recipes" / "tiny_lm.py")


@pytest.fixture
def recipe(tmp_path):
    """Makes a recipe of the digits' stage 1 with a sweep of one's own."""

    def make(body: str, name: str = "recipe.py") -> str:
        file = tmp_path / name
        file.write_text("from configs.digits.stage1 import get_config\n\n" + body)
        return str(file)

    return make


def points_of(recipe, body):
    return points.read_points(recipe(body))


def refused(capsys, *arguments):
    code = sweep.main(list(arguments))
    assert code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------------ points


def test_both_forms_give_points(recipe):
    assert points_of(recipe, "def sweep(add):\n    for s in range(2):\n        add(seed=s)\n") == [
        {"seed": 0},
        {"seed": 1},
    ]
    body = """
def get_hyper(hyper):
    lr = hyper.sweep("config.optim.peak_lr", hyper.discrete([1e-4, 1e-3]))
    both = hyper.zipit([hyper.sweep("seed", [1, 2]), hyper.sweep("steps", [10, 20])])
    return hyper.chainit([hyper.product([lr, both]), hyper.fixed("seed", 9)])
"""
    assert points_of(recipe, body) == [
        {"optim.peak_lr": 1e-4, "seed": 1, "steps": 10},
        {"optim.peak_lr": 1e-4, "seed": 2, "steps": 20},
        {"optim.peak_lr": 1e-3, "seed": 1, "steps": 10},
        {"optim.peak_lr": 1e-3, "seed": 2, "steps": 20},
        {"seed": 9},
    ]


def test_every_sweep_of_the_repository_can_be_run(tmp_path):
    files = [
        path
        for path in sorted(ROOT.glob("configs/**/*.py"))
        if re.search(r"^def (sweep|get_hyper)\(", path.read_text(), re.M)
    ]
    assert ROOT / "configs" / "digits" / "stage1.py" in files
    for path in files:
        assert points.make_runs(str(path), tmp_path)


HOSTILE = [
    "a b",
    'it\'s "q"',
    "$(touch pwned)",
    "a;b&c|d",
    "new\nline\n",
    "../..",
    "~",
    "",
    "é",
    "%",
]


def test_hostile_values_arrive_in_the_config_and_make_safe_names(recipe, tmp_path):
    body = f"def sweep(add):\n    for p in {HOSTILE!r}:\n        add(**{{'data.prompt': p}})\n"
    path = recipe(body)
    runs = points.make_runs(path, tmp_path / "w")
    for value, run in zip(HOSTILE, runs, strict=True):
        assert json.loads(run.config)["data"]["prompt"] == value
        assert cli.load_config(path, run.flags[2:]).data.prompt == value
        assert re.fullmatch(r"[A-Za-z0-9._=,+-]+", run.name)
        assert run.workdir.parent == tmp_path / "w"
    assert len({run.name for run in runs}) == len(HOSTILE)


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ({"seed": 3}, "seed=3"),
        ({"seed": 1, "optim.peak_lr": 1e-4}, "optim.peak_lr=0.0001,seed=1"),
        ({"optim.decay_biases": True}, "optim.decay_biases=True"),
        ({}, "base"),
    ],
)
def test_names_say_what_is_overridden(point, name):
    texts = {key: points.as_text(value) for key, value in point.items()}
    assert points.run_name(texts) == name
    assert points.run_name(dict(reversed(texts.items()))) == name


def test_long_names_are_cut_and_stay_apart():
    names = {points.run_name({"data.prompt": "x" * 300 + end}) for end in "ab"}
    assert len(names) == 2 and max(map(len, names)) < 128


def test_tuples_and_numbers_take_the_type_of_their_key(recipe, tmp_path):
    body = "def sweep(add):\n    add(**{'optim.betas': (0.9, 0.95), 'optim.peak_lr': 1})\n"
    (run,) = points.make_runs(recipe(body), tmp_path)
    optim = json.loads(run.config)["optim"]
    assert (optim["betas"], optim["peak_lr"]) == ([0.9, 0.95], 1.0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", r"defines no sweep. A sweep is a function"),
        ("def sweep(add):\n    pass\n", "has no points"),
        ("def sweep(add):\n    add(3)\n", r"add\(3\) .*keys have names"),
        ("def sweep(add):\n    add(sed=3)\n", r"Point 1 .*no key --config.sed. Did you mean"),
        ("def sweep(add):\n    add(seed=1)\n    add(seed='x')\n", "Point 2 .*takes a whole number"),
        ("def sweep(add):\n    add(seed=1)\n    add(seed=2)\n    add(seed=1)\n", "Points 1 and 3"),
        ("def sweep(add):\n    add()\n    add(seed=0)\n", "Points 1 and 2 .* are the same run"),
        ("def sweep(add):\n    pass\ndef get_hyper(hyper):\n    pass\n", "both .*keep one"),
        (
            "def get_hyper(h):\n"
            "    return h.zipit([h.sweep('seed', [1]), h.sweep('steps', [1, 2])])\n",
            r"zipit takes sweeps of one length; these have \[1, 2\] points",
        ),
        (
            "def get_hyper(h):\n"
            "    return h.product([h.sweep('seed', [1]), h.sweep('seed', [2])])\n",
            "Two parts of the sweep set seed",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["print", "local"])
def test_a_bad_sweep_is_refused_before_anything_starts(
    recipe, tmp_path, capsys, body, message, backend
):
    path, workdir = recipe(body), tmp_path / "w"
    output = refused(capsys, f"--config={path}", f"--workdir={workdir}", f"--backend={backend}")
    assert re.search(message, output, re.S), output
    assert not workdir.exists()


def test_what_is_swept_cannot_be_set_for_all(recipe, tmp_path, capsys):
    path = recipe("def sweep(add):\n    add(seed=1)\n")
    output = refused(capsys, f"--config={path}", f"--workdir={tmp_path}", "--config.seed=4")
    assert "--config.seed is on the command line, but" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--workers=0"], "at least 1"), (["--backend=local", "--workdir=gs://b/w"], "gcsfuse")],
)
def test_wrong_settings_are_refused(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, f"--config={TINY}", f"--workdir={tmp_path}", *arguments)


@pytest.mark.parametrize(
    ("backend", "tool"), [("slurm", "sbatch"), ("tpu", "gcloud"), ("gke", "kubectl")]
)
def test_a_missing_tool_is_named_with_where_to_get_it(tmp_path, capsys, monkeypatch, backend, tool):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "env", "awk", "dirname"):
        (bare / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(bare))
    arguments = (f"--config={TINY}", f"--workdir={tmp_path / 'w'}", f"--backend={backend}")
    assert f"{tool} is not installed here. " in refused(capsys, *arguments)
    assert not (tmp_path / "w").exists()


# ----------------------------------------------------------------------------------------- running


def start(workdir, *arguments, **environment):
    """The command, in a session of its own."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.interrupted", "sweep", f"--config={TINY}"),
            *(f"--workdir={workdir}", "--backend=local", "--workers=2", *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(workdir):
    return {path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("*/done.json")}


def test_a_sweep_that_was_killed_does_each_run_once(tmp_path):
    """Four real runs, two at a time: kill -9 in between, later Ctrl-C, and then the end."""
    workdir = tmp_path / "sweep"
    # Of two places, one is free for the third run when another run has ended.
    first = start(workdir, INTERRUPT="blip2_jax.sweeps.backends.command:3:SIGKILL")
    first.communicate(timeout=600)
    assert first.returncode == -signal.SIGKILL and len(finished(workdir)) >= 1
    # What was running goes on without its sweep; the next one must neither disturb nor repeat it.
    second = start(workdir, INTERRUPT="blip2_jax.sweeps.backends.command:2:SIGINT")
    assert second.communicate(timeout=600) and second.returncode == 42
    before = finished(workdir)
    assert 1 <= len(before) < 4
    third = start(workdir)
    out, _ = third.communicate(timeout=600)
    assert third.returncode == 0, out
    after = finished(workdir)
    assert sorted(after) == [f"seed={seed}" for seed in range(4)]
    assert {name: after[name] for name in before} == before, "what was done was left alone"
    for run in sorted(after):
        records = read_jsonl(workdir / run / "metrics.jsonl")
        assert [record["step"] for record in records] == list(range(2, 42, 2))
        log = (workdir / run / "log.txt").read_text()
        starts, resumed = log.count("tiny-lm: 40 steps"), log.count("Resuming at step")
        assert "finished before" not in log
        assert starts - resumed == 1, "begun once; a later start only goes on"
    done = [json.loads((workdir / run / "done.json").read_text()) for run in sorted(after)]
    assert [each["config"]["seed"] for each in done] == list(range(4))

    # All that is left is to say so.
    assert re.search(r"seed=3 +finished +40 +\d", out)
    table = list(csv.DictReader((workdir / "results.csv").open()))
    assert [(row["run"], row["status"], row["seed"], row["step"]) for row in table] == [
        (f"seed={seed}", "finished", str(seed), "40") for seed in range(4)
    ]
    last = read_jsonl(workdir / "seed=3" / "metrics.jsonl")[-1]
    assert float(table[3]["loss"]) == last["loss"]
    page = Page((workdir / "results.html").read_text())
    text = " ".join(page.texts)
    assert "4 of 4 runs finished." in text and "seed=3" in text and f"{last['loss']:.4g}" in text
    assert page.tags.count("svg") >= 1 and not {"script", "link"} & set(page.tags) - {"link"}
    assert not re.search(r"(src|href)=\"(?!data:|#)", (workdir / "results.html").read_text())


class Task:
    """Its command notes each start, and leaves with one code after the other."""

    def __init__(self, folder, name, *codes):
        self.name, self.workdir, self.codes = name, folder / name, list(codes)

    def is_finished(self):
        return (self.workdir / "done").exists()

    def command(self, task, worker):
        code = self.codes.pop(0)
        script = f"echo started; {'touch done; ' if code == 0 else ''}exit {code}"
        return ["sh", "-c", f"cd '{self.workdir}' && {script}"], {}

    def starts(self):
        return (self.workdir / "log.txt").read_text().count("started")


def run_tasks(tasks, workers=2):
    return jobs.run_all(tasks, workers, lambda task, worker: task.command(task, worker))


def test_code_42_starts_again_and_a_failure_stops_no_other(tmp_path, capsys):
    tasks = [
        Task(tmp_path, "fails", 3),
        Task(tmp_path, "stops", 42, 42, 0),
        Task(tmp_path, "works", 0),
    ]
    assert run_tasks(tasks) == ({"fails": 3}, False)
    assert [task.starts() for task in tasks] == [1, 3, 1]
    output = capsys.readouterr().err
    assert "fails failed with code 3." in output
    assert "run 3/3" in output and "failed 1" in output
    # Again: what is finished is left alone, what failed is tried.
    tasks[0].codes = [0]
    assert run_tasks(tasks) == ({}, False)
    assert [task.starts() for task in tasks] == [2, 3, 1]


def test_a_sweep_reports_its_failures_and_their_last_words(recipe, tmp_path, capfd, monkeypatch):
    body = "def sweep(add):\n    add(seed=1)\n    add(seed=2)\n"
    script = (
        "import pathlib, sys; w = pathlib.Path(sys.argv[1]); c = w / 'config.json'\n"
        "if 'seed=1' in str(w): sys.exit('ValueError: no such folder')\n"
        "(w / 'done.json').write_text(c.read_text())\n"
    )

    def command(backend, run, worker, workers):
        run.workdir.mkdir(parents=True)
        (run.workdir / "config.json").write_text(
            json.dumps({"recipe": "digits-stage1", "config": json.loads(run.config)})
        )
        return [sys.executable, "-S", "-c", script, str(run.workdir)], {}

    monkeypatch.setattr(backends, "command", command)
    arguments = [f"--config={recipe(body)}", f"--workdir={tmp_path / 'w'}", "--backend=local"]
    assert sweep.main(arguments) == 1
    out = capfd.readouterr().out
    assert "1 of 2 runs failed; the same command tries them again:" in out
    assert "seed=1: exit code 1. ValueError: no such folder" in out
    assert re.search(r"seed=1 +failed \(1\)", out) and re.search(r"seed=2 +finished", out)


def test_a_damaged_file_of_a_sweep_is_named_and_a_runs_is_no_end(
    recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(jobs, "run_all", lambda *_: ({}, False))
    path, workdir = recipe("def sweep(add):\n    add(seed=1)\n"), tmp_path / "w"
    arguments = (f"--config={path}", f"--workdir={workdir}", "--backend=local")
    assert sweep.main(list(arguments)) == 0
    (run,) = points.make_runs(str(path), workdir)
    document = {"recipe": "digits-stage1", "config": json.loads(run.config)}
    RunDir(run.workdir).write_finished(document)
    assert run.is_finished()
    longer, elsewhere = (json.loads(json.dumps(document)) for _ in range(2))
    longer["config"]["steps"] -= 1  # what is asked for now is more
    elsewhere["config"]["data"]["dir"] = "/moved"  # the run itself compares what lies there
    for other in (longer, elsewhere):
        RunDir(run.workdir).write_finished(other)
        assert not run.is_finished()
    run.workdir.joinpath("done.json").write_text('{"recipe"')
    assert not run.is_finished()
    for text in ("", '{"runs"', "\0\0"):
        (workdir / "sweep.json").write_text(text)
        assert "sweep.json" in refused(capsys, *arguments)


def test_two_sweeps_at_once_are_refused(tmp_path, capsys):
    tmp_path.joinpath("w").mkdir()
    with jobs.only_one(tmp_path / "w" / "sweep.lock", ""):
        arguments = (f"--config={TINY}", f"--workdir={tmp_path / 'w'}", "--backend=local")
        assert "Another blip2 sweep is at work" in refused(capsys, *arguments)


def test_a_workdir_of_another_sweep_or_of_a_run_is_refused(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "run_all", lambda *_: ({}, False))
    path = recipe("def sweep(add):\n    add(seed=1)\n")
    arguments = (f"--config={path}", f"--workdir={tmp_path / 'w'}", "--backend=local")
    assert sweep.main(list(arguments)) == 0
    assert "steps: 1200 saved, 7 now" in refused(capsys, *arguments, "--config.steps=7")
    # The same sweep may grow, and may lose points.
    recipe("def sweep(add):\n    add(seed=2)\n    add(seed=3)\n")
    assert sweep.main(list(arguments)) == 0
    assert "No longer in the sweep, and left as they are: seed=1." in capsys.readouterr().out
    for name in ("sweep.json", "results.csv", "results.html"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        output = refused(capsys, f"--config={path}", f"--workdir={tmp_path / name}")
        assert "blip2 sweep would write" in output and name in output
        assert (tmp_path / name / name).read_text() == "mine"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    output = refused(capsys, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert "holds a run, not a sweep" in output


def test_print_shows_commands_that_a_shell_takes(recipe, tmp_path, capsys):
    body = "def sweep(add):\n    add(**{'data.prompt': \"it's $(touch pwned)\"})\n"
    sweep.main([f"--config={recipe(body)}", f"--workdir={tmp_path / 'w'}", "--config.steps=500"])
    line = capsys.readouterr().out.strip()
    shown = subprocess.run(
        ["sh", "-c", f'blip2() {{ for w; do echo "[$w]"; done; }}; {line}'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    ).stdout
    assert "[--config.data.prompt=it's $(touch pwned)]" in shown and "[--config.steps=500]" in shown
    assert not list(tmp_path.rglob("pwned")) and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("slurm", "sbatch --parsable"),
        ("gke", "kind: JobSet"),
        ("tpu", "queued-resources create m-0"),
    ],
)
def test_launchers_get_every_run(tmp_path, capfd, monkeypatch, backend, expected):
    monkeypatch.setenv("PATH", f"{fakes.install(tmp_path)}:{os.environ['PATH']}")
    settings = {"TPU_NAME": "m", "TPU_TYPE": "v5p-8", "IMAGE": "i", "ACCELERATOR": "a"}
    for name, value in (settings | {"TOPOLOGY": "2x2", "DRY_RUN": "1"}).items():
        monkeypatch.setenv(name, value)
    workdir = tmp_path / "a dir"
    arguments = [f"--config={ROOT}/configs/digits/stage1.py", f"--workdir={workdir}", "--workers=2"]
    assert sweep.main([*arguments, f"--backend={backend}"]) == 0
    out = capfd.readouterr().out
    assert out.count(expected) == 3
    for seed in range(3):
        assert f"{workdir}/seed={seed}" in out and f"--config.seed={seed}" in out
    assert not workdir.exists() and fakes.calls(tmp_path) == []


def test_workers_share_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    visible = [each["CUDA_VISIBLE_DEVICES"] for each in backends.share_gpus(3)]
    assert visible == ["0,5", "1", "2"]
    assert backends.share_gpus(1) == [{}]
    with pytest.raises(cli.ConfigError, match="--workers=5, but there are 4 GPUs"):
        backends.share_gpus(5)
