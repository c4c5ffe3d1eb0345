"""Launchers, on stand-ins for the clouds: what they run, that they go on, that words stay words."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from blip2_jax.runtime import run_dir
from blip2_jax.runtime.checkpoint import Checkpointer
from blip2_jax.runtime.jsonl import read_jsonl
from tests.launch import fakes

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("local", "slurm", "tpu", "gke")
RECIPE = "configs/digits/stage1.py"
SETTINGS = {
    "TPU_NAME": "mine",
    "TPU_TYPE": "v5litepod-16",
    "IMAGE": "registry/image",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x4",
    "POLL": "0.05",
}
LIMIT = 600  # seconds; what is not over then hangs
HOSTILE = [
    "a  b",
    'it\'s "quoted"',
    "$(touch pwned) `touch pwned` $HOME ${HOME} $$(HOME)",
    "; touch pwned; & | > pwned",
    "first\nsecond\n",
    "back\\slash \\n *?[a-z] ~ # %d {a,b} !x",
    "-n",
    "",
]
# Notes its words and what it sees of the environment, and leaves with the next code of codes.json.
BLIP2 = """#!{python}
import json, os, pathlib, sys, time
here = pathlib.Path({folder!r})
seen = {{k: v for k, v in os.environ.items() if k.startswith(("JAX_", "BLIP2_", "HOME", "CUDA"))}}
with open(here / "started.jsonl", "a") as log:
    log.write(json.dumps([sys.argv[1:], seen]) + "\\n")
print("a word from the run", flush=True)
while (here / "wait").exists():
    time.sleep(0.02)
codes = here / "codes.json"
left = json.loads(codes.read_text()) if codes.exists() else []
if left:  # processes that run at the same time have none
    codes.write_text(json.dumps(left[1:]))
sys.exit(left[0] if left else 0)
"""


class Place:
    """A checkout, tools that are stand-ins, and a `blip2` that is one too, unless it is real."""

    def __init__(self, folder: Path, checkout: Path, real: bool = False):
        self.folder, self.checkout = folder, checkout
        venv = folder / "venv" / "bin"
        venv.mkdir(parents=True)
        programs = {"python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'}
        programs["blip2"] = (
            f'#!/bin/sh\nexec "{sys.executable}" -m tests.interrupted "$@"\n'
            if real
            else BLIP2.format(python=sys.executable, folder=str(folder))
        )
        for name, text in programs.items():
            (venv / name).write_text(text)
            (venv / name).chmod(0o755)
        for extras in ("[tpu]", "[cuda]"):
            (venv.parent / f".installed{extras}").touch()
        path = [str(fakes.install(folder)), str(venv), os.environ["PATH"]]
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            **SETTINGS,
            "PATH": ":".join(path),
            "BLIP2_VENV": str(venv.parent),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # one device; compiled quickly
        }
        self._launchers: list[subprocess.Popen] = []

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing that a launcher started outlives a test that failed."""
        for launcher in self._launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.communicate()
        for host in self.folder.glob("hosts/*"):
            fakes.kill(fakes.processes_of(host), signal.SIGKILL)

    def start(self, launcher: str, *words: str, **environment: str) -> subprocess.Popen:
        launcher = subprocess.Popen(
            [self.checkout / "launch" / f"{launcher}.sh", *words],
            cwd=self.checkout,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._launchers.append(launcher)
        return launcher

    def run(self, launcher: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """Returns when the last process that has the launcher's output is over."""
        process = self.start(launcher, *words, **environment)
        out, errors = process.communicate(timeout=LIMIT)
        return subprocess.CompletedProcess(words, process.returncode, out, errors)

    def started(self) -> list[tuple[list[str], dict[str, str]]]:
        log = self.folder / "started.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def codes(self, *codes: int) -> None:
        (self.folder / "codes.json").write_text(json.dumps(codes))

    def verbs(self) -> list[str]:
        """What gcloud was told to do with slices, apart from looking at them."""
        words = [call[4] for call in fakes.calls(self.folder, "gcloud") if "queued" in call[3]]
        return [word for word in words if word != "describe"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout, for launchers ship what they lie in."""
    folder = tmp_path_factory.mktemp("checkout") / "with space"
    fakes.copy_checkout(ROOT, folder)
    return folder


@pytest.fixture
def place(tmp_path, checkout):
    with Place(tmp_path / "place", checkout) as place:
        yield place


# ------------------------------------------------------------------------------ what they look like


def test_shellcheck_finds_nothing():
    files = [*sorted(ROOT.glob("launch/*.sh")), ROOT / ".ci" / "run"]
    for file in files:
        subprocess.run(["bash", "-n", file], check=True)
    checked = subprocess.run(
        ["shellcheck", "--shell=bash", "--external-sources", *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_help_is_the_header(place, launcher):
    said = place.run(launcher, "--help")
    header = (ROOT / "launch" / f"{launcher}.sh").read_text().split("\n\n")[0].splitlines()
    lines = [line.removeprefix("#").removeprefix(" ") for line in header[1:]]
    assert said.stdout.splitlines()[: len(lines)][0] == lines[0]
    for needed in ("CONFIG", "DRY_RUN=1", "[--config.KEY=VALUE ...]"):
        assert needed in said.stdout
    assert "set -euo" not in said.stdout
    assert said.returncode == 0


def test_no_launcher_names_a_project_or_a_bucket_of_its_own():
    for file in ROOT.glob("launch/*.sh"):
        text = file.read_text()
        assert "--project=" not in text.replace('"--project=$PROJECT"', "")
        assert "gs://" not in text.replace("gs://BUCKET", "").replace("gs://*", "").replace(
            "gs://?*", ""
        ).replace("#gs://}", ""), file


# ----------------------------------------------------------------------------------------- dry runs


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ("local", ["blip2 train --config=configs/digits/stage1.py --workdir=/w --config.seed=3"]),
        (
            "slurm",
            ["sbatch ", "--requeue", "--signal=TERM@120", "slurm.sh' --job", "--config.seed=3"],
        ),
        (
            "tpu",
            [
                "queued-resources create mine --accelerator-type=v5litepod-16",
                "--runtime-version=v2-alpha-tpuv5-lite --node-id=mine",
                "tpu-vm scp",
                "tpu-vm ssh mine --worker=all",
                "tpu_host.sh run --config=configs/digits/stage1.py --workdir=/w --config.seed=3",
                "queued-resources delete mine --force",
            ],
        ),
        ("gke", ["kind: JobSet", "parallelism: 4", '- "--config.seed=3"', "kubectl apply"]),
    ],
)
def test_a_dry_run_shows_all_and_does_nothing(place, launcher, expected):
    said = place.run(launcher, RECIPE, "/w", "--config.seed=3", DRY_RUN="1")
    assert said.returncode == 0, said.stderr
    at = -1
    for part in expected:
        assert (at := said.stdout.find(part, at + 1)) >= 0, (part, said.stdout)
    assert fakes.calls(place.folder) == []
    assert place.started() == []
    assert not Path("/w").exists()


def test_several_slices_and_spot(place):
    settings = {"DRY_RUN": "1", "SLICES": "2", "SPOT": "1", "ZONE": "z", "PROJECT": "p"}
    said = place.run("tpu", RECIPE, "/w", **settings).stdout
    assert "--node-count=2 --node-prefix=mine --spot --quiet --zone=z --project=p" in said
    assert "ssh mine-0 " in said and "ssh mine-1 " in said
    said = place.run("gke", RECIPE, "gs://bucket/w", **settings).stdout
    job = yaml.safe_load(said[: said.rindex("kubectl")])["spec"]["replicatedJobs"][0]
    assert job["replicas"] == 2
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "--workdir=/gcs/bucket/w" in pod["containers"][0]["command"]
    assert pod["volumes"][0]["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"


# --------------------------------------------------------------------------------- words stay words


def arguments(place, real_workdir=True):
    prompts = [f"--config.data.prompt={value}" for value in HOSTILE]
    return [RECIPE, str(place.folder / "the $(touch pwned) 'work' dir"), *prompts]


def expected(words):
    return ["train", f"--config={words[0]}", f"--workdir={words[1]}", *words[2:]]


def assert_nothing_ran(place):
    assert not list(place.folder.rglob("pwned")) and not list(place.checkout.rglob("pwned"))


@pytest.mark.parametrize("launcher", ["local", "slurm", "tpu"])
def test_hostile_words_arrive_as_they_are(place, launcher):
    words = arguments(place)
    said = place.run(launcher, *words)
    assert said.returncode == 0, said.stderr
    assert [started[0] for started in place.started()] == [expected(words)]
    assert_nothing_ran(place)


def test_hostile_words_arrive_in_kubernetes(place):
    words = arguments(place)
    assert place.run("gke", *words).returncode == 0
    manifest = yaml.safe_load((place.folder / "manifest.yaml").read_text())
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    # What a kubelet makes of it: $(NAME) is replaced where NAME is known, $$ is one dollar.
    assert not any("$(" in word.replace("$$", "") for word in command)
    assert [word.replace("$$", "$") for word in command] == ["blip2", *expected(words)]
    assert manifest["metadata"]["annotations"]["blip2/workdir"] == words[1]
    assert len(manifest["metadata"]["name"]) <= 30
    assert_nothing_ran(place)


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_dry_run_can_be_pasted_into_a_shell(place, shell):
    words = arguments(place)
    line = place.run("local", *words, DRY_RUN="1").stdout
    subprocess.run([shell, "-c", line], env=place.environment, check=True, cwd=place.folder)
    assert [started[0] for started in place.started()] == [expected(words)]
    assert_nothing_ran(place)


# ----------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("launcher", ["local", "slurm", "tpu"])
def test_code_42_starts_the_same_command_again(place, launcher):
    place.codes(42, 42, 0)
    said = place.run(launcher, RECIPE, str(place.folder / "w"), "--config.seed=3")
    assert said.returncode == 0, said.stderr
    started = [words for words, _ in place.started()]
    assert len(started) == 3 and started[0] == started[1] == started[2]
    if launcher == "tpu":
        assert place.verbs() == ["create", "delete"], "the slice was healthy"
    if launcher == "slurm":
        assert fakes.calls(place.folder, "scontrol") == [["scontrol", "requeue", "7"]] * 2


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_another_code_is_a_failure_and_ends_it(place, launcher):
    place.codes(3, 0)
    said = place.run(launcher, RECIPE, str(place.folder / "w"))
    assert len(place.started()) == 1
    assert said.returncode == (3 if launcher == "local" else 0)  # a queue takes jobs, not results
    assert fakes.calls(place.folder, "scontrol") == []


def test_a_run_that_fails_on_a_healthy_slice_is_tried_so_often_and_no_more(place):
    place.codes(3, 3, 3, 0)
    said = place.run("tpu", RECIPE, str(place.folder / "w"), RETRIES="1")
    assert said.returncode == 1
    assert len(place.started()) == 2
    assert "2 in a row" in said.stderr
    assert place.verbs() == ["create", "delete"], "nothing is left that costs money"


def test_a_service_that_cannot_be_asked_is_no_lost_slice(place):
    (place.folder / "wait").touch()
    launcher = place.start("tpu", RECIPE, str(place.folder / "w"), KEEP="1")
    wait_until(place.started, launcher)
    (place.folder / "trouble").touch()
    place.codes(3, 0)
    (place.folder / "wait").unlink()
    _, errors = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, errors
    assert "UNKNOWN" in errors or not (place.folder / "trouble").exists()
    assert place.verbs() == ["create"]
    assert len(place.started()) == 2


def test_a_launcher_that_was_killed_attaches_to_its_run(place):
    (place.folder / "wait").touch()
    words = (RECIPE, str(place.folder / "w"), "--config.seed=3")
    first = place.start("tpu", *words)
    wait_until(place.started, first)
    os.killpg(first.pid, signal.SIGKILL)  # with its connection
    first.communicate(timeout=LIMIT)
    second = place.start("tpu", *words)
    (_, environment), *_ = place.started()
    wait_until(lambda: fakes.runs_on(Path(environment["HOME"]), "flock"), second)
    (place.folder / "wait").unlink()
    out, errors = second.communicate(timeout=LIMIT)
    assert second.returncode == 0, errors
    assert "a word from the run" in out
    assert len(place.started()) == 1
    assert place.verbs() == ["create", "delete"]


def test_another_run_on_the_slice_is_refused(place):
    (place.folder / "wait").touch()
    first = place.start("tpu", RECIPE, str(place.folder / "w"))
    wait_until(place.started, first)
    said = place.run("tpu", RECIPE, str(place.folder / "other"))
    assert said.returncode == 2
    assert "another run is on mine" in said.stderr
    (place.folder / "wait").unlink()
    assert first.communicate(timeout=LIMIT) and first.returncode == 0
    assert len(place.started()) == 1


def test_all_hosts_of_all_slices_run(place):
    said = place.run("tpu", RECIPE, str(place.folder / "w"), SLICES="2", FAKE_WORKERS="2")
    assert said.returncode == 0, said.stderr
    homes = {Path(seen["HOME"]).name for _, seen in place.started()}
    assert homes == {"mine-0.0", "mine-0.1", "mine-1.0", "mine-1.1"}
    assert all(seen["BLIP2_DISTRIBUTED"] == "1" for _, seen in place.started())


def test_local_processes_know_of_each_other(place):
    assert place.run("local", RECIPE, "/w", PROCESSES="3").returncode == 0
    seen = [environment for _, environment in place.started()]
    assert {environment["JAX_PROCESS_ID"] for environment in seen} == {"0", "1", "2"}
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "BLIP2_DISTRIBUTED"):
        assert len({environment[name] for environment in seen}) == 1


def test_a_local_launcher_that_is_told_to_stop_passes_it_on(place):
    (place.folder / "wait").touch()
    launcher = place.start("local", RECIPE, "/w")
    wait_until(place.started, launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 128 + signal.SIGTERM  # of this run, which saves nothing
    assert len(place.started()) == 1


@pytest.mark.parametrize(
    ("state", "verbs"),
    [("", ["get", "apply"]), ("name ", ["get"]), ("name Failed", ["get", "delete", "apply"])],
)
def test_a_job_in_kubernetes_is_not_started_twice(place, state, verbs):
    (place.folder / "jobset").write_text(state)
    assert place.run("gke", RECIPE, "gs://bucket/w").returncode == 0
    assert [call[1] for call in fakes.calls(place.folder, "kubectl")] == verbs


def test_a_job_in_the_queue_is_not_submitted_twice(place):
    workdir = str(place.folder / "w")
    (place.folder / "job").write_text(f"blip2:{workdir}")
    said = place.run("slurm", RECIPE, workdir)
    assert "in the queue already" in said.stderr
    assert fakes.calls(place.folder, "sbatch") == []
    assert place.run("slurm", RECIPE, workdir + "2").returncode == 0
    assert len(fakes.calls(place.folder, "sbatch")) == 1


def wait_until(condition, launcher):
    while not condition():
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_launcher_starts_anything_on_a_key_that_is_not_there(place, launcher):
    said = place.run(launcher, RECIPE, "/w", "--config.sed=1")
    assert said.returncode == 2
    assert "There is no key --config.sed. Did you mean --config.seed?" in said.stderr
    assert fakes.calls(place.folder) == [] and place.started() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "it takes CONFIG WORKDIR"),
        ([RECIPE], "it takes CONFIG WORKDIR"),
        (["configs/nothing.py", "/w"], "there is no config file configs/nothing.py"),
        ([RECIPE, "--config.seed=1"], "it must be a folder"),
        ([RECIPE, "/w", "--sed=1"], "unknown argument --sed=1"),
        ([RECIPE, "/w", "--config.seed"], "unknown argument --config.seed"),
        ([RECIPE, "/w", "--config.optim.peak_lrs=1"], "Did you mean --config.optim.peak_lr"),
        ([RECIPE, "/w", "--config.steps=many"], "takes a whole number"),
    ],
)
def test_wrong_words_are_refused(place, words, message):
    said = place.run("local", *words)
    assert said.returncode == 2
    assert message in said.stderr
    assert place.started() == []


@pytest.mark.parametrize(
    ("launcher", "words", "environment", "message"),
    [
        ("tpu", [RECIPE, "runs/w"], {}, "must be gs://BUCKET/PATH or an absolute path"),
        ("gke", [RECIPE, "runs/w"], {}, "must be gs://BUCKET/PATH or an absolute path"),
        ("tpu", [RECIPE, "/w"], {"TPU_NAME": ""}, "TPU_NAME is not set"),
        ("tpu", [RECIPE, "/w"], {"TPU_TYPE": ""}, "TPU_TYPE is not set"),
        ("tpu", [RECIPE, "/w"], {"TPU_NAME": "$(id)"}, "lower-case letters"),
        ("tpu", [RECIPE, "/w"], {"SLICES": "none"}, "SLICES is none"),
        ("gke", [RECIPE, "/w"], {"IMAGE": ""}, "IMAGE is not set"),
        ("gke", [RECIPE, "/w"], {"TOPOLOGY": "16"}, "write it as 4x4"),
        ("gke", [RECIPE, "/w"], {"SLICES": "two"}, "two is no whole number"),
        ("local", [RECIPE, "/w"], {"PROCESSES": "0"}, "PROCESSES is 0"),
    ],
)
def test_wrong_settings_are_refused(place, launcher, words, environment, message):
    said = place.run(launcher, *words, **environment)
    assert said.returncode == 2
    assert message in said.stderr
    assert place.started() == [] and not place.verbs()


def test_a_shell_without_the_environment_finds_what_the_quickstart_made(place, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for tool in ("bash", "sh", "env", "awk", "dirname", "cat", "sed"):
        (bare / tool).symlink_to(shutil.which(tool))
    said = place.run("local", RECIPE, "/w", PATH=str(bare))
    assert said.returncode == 0, said.stderr
    assert len(place.started()) == 1
    said = place.run("local", RECIPE, "/w", PATH=str(bare), BLIP2_VENV=str(tmp_path / "none"))
    assert said.returncode == 2
    assert "blip2 is not installed here. Run ./launch/quickstart.sh" in said.stderr


def test_a_recipe_outside_the_checkout_is_refused_where_it_would_not_arrive(place):
    shutil.copy(ROOT / RECIPE, place.folder / "mine.py")
    for launcher in ("tpu", "gke"):
        said = place.run(launcher, str(place.folder / "mine.py"), "/w")
        assert said.returncode == 2
        assert "it must be inside" in said.stderr
    # One inside, by its full name from anywhere, is what the hosts know it as.
    said = place.run("tpu", str(place.checkout / RECIPE), "/w", DRY_RUN="1")
    assert f"run --config={RECIPE} --workdir=/w" in said.stdout


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("slurm", "sbatch is not installed here. Log in to a node"),
        ("tpu", "gcloud is not installed here. Install the Google Cloud CLI: https://"),
        ("gke", "kubectl is not installed here. Install it with: gcloud components"),
    ],
)
def test_a_missing_tool_is_named_with_where_to_get_it(place, tmp_path, launcher, message):
    bare = tmp_path / "bare"
    bare.mkdir()
    for tool in ("bash", "sh", "env", "awk", "dirname", "mktemp", "rm", "cat", "python3", "sed"):
        (bare / tool).symlink_to(shutil.which(tool))
    said = place.run(launcher, RECIPE, "/w", PATH=str(bare))
    assert said.returncode == 2
    assert message in said.stderr


# ----------------------------------------------------------------------------------- the real thing

TINY = "tests/recipes/tiny_lm.py"
STEPS = [f"--config.{key}" for key in ("steps=8", "log.every=1", "checkpoint.every=3")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkout):
    """What a run says that one process makes and nothing stops."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with Place(workdir.parent / "place", checkout, real=True) as place:
        said = place.run("local", TINY, str(workdir), *STEPS)
    assert said.returncode == 0, said.stderr
    records = read_jsonl(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    return records


@pytest.fixture
def real(tmp_path, checkout):
    with Place(tmp_path / "place", checkout, real=True) as place:
        yield place


def test_a_preempted_slice_is_made_anew_and_the_run_ends_as_if_nothing_had_been(
    real, whole, tmp_path
):
    """A real run in a real process: warned and stopped, then killed, then left alone."""
    recipe = "configs/tiny_lm.py"  # new and not committed: it arrives as well
    shutil.copy(ROOT / TINY, real.checkout / recipe)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # What the hosts of a slice find by themselves.
    host = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    fakes.preempt(real.folder, "TERM", "KILL")
    workdir = tmp_path / "run"
    said = real.run("tpu", recipe, str(workdir), *STEPS, SPOT="1", **host)
    assert said.returncode == 0, said.stdout + said.stderr
    assert real.verbs() == ["create", "delete", "create", "delete", "create", "delete"], said
    warned, killed = (real.folder / "lost" / str(i) / ".blip2_run" / "log" for i in (0, 1))
    assert "Asked to stop: saved step 2." in warned.read_text()
    assert "Resuming at step 2 of 8." in killed.read_text()
    # Killed while it saved step 6; only that it may have been quick about.
    assert re.search("Resuming at step [36] of 8.", said.stdout), said.stdout
    assert (workdir / "done.json").is_file()
    assert read_jsonl(workdir / "metrics.jsonl") == whole


def test_a_whole_process_group_that_is_told_to_stop_saves_itself(real, tmp_path):
    """As SLURM and spot machines do it: launcher, run and the run's workers all hear the signal."""
    workdir = tmp_path / "run"
    event = "blip2_jax.runtime.distributed.Preemption.should_stop:4:SIGTERM:group:until_true"
    words = [TINY, str(workdir), *STEPS, "--config.data.workers=2"]
    said = real.run("local", *words, INTERRUPT=event)
    assert said.returncode == 42, said.stderr
    assert "Asked to stop: saved step 4." in said.stdout
    assert run_dir.find(workdir).step == 4


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "dies"])
def test_a_process_that_is_lost_ends_the_run_and_the_next_start_goes_on(
    real, whole, tmp_path, number
):
    """Of two real processes that work as one: the same numbers, but for the order of sums."""
    workdir = tmp_path / "run"
    words = [TINY, str(workdir), *STEPS]
    event = f"blip2_jax.runtime.checkpoint.Checkpointer.save:2:{number.name}:process=1"
    quick = "--config.faults.peer_timeout=10"  # for the other to find that this one hangs
    lost = real.run("local", *words, quick, PROCESSES="2", GRACE="2", INTERRUPT=event)
    assert lost.returncode not in (0, 42), lost.stderr
    assert "the others have 2 seconds" in lost.stderr
    assert not (workdir / "done.json").exists()
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        assert 3 in checkpointer.all_steps()
    if number == signal.SIGSTOP:  # what it leaves is the same
        return
    said = real.run("local", *words, PROCESSES="2")
    assert said.returncode == 0, said.stderr
    assert "Resuming at step" in said.stdout and (workdir / "done.json").is_file()
    two = read_jsonl(workdir / "metrics.jsonl")
    for a, b in zip(whole, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
