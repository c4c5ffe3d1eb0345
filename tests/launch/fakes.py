"""Stand-ins for gcloud, kubectl and SLURM, which do on this machine what they are asked to do.

`install(folder)` makes the commands; each appends its words to `folder/calls.jsonl` and keeps its
state in the folder. Hosts of a slice are folders, `ssh` is a shell with one of them as HOME, and
pre-emption is what it is in a cloud: SIGTERM to all processes of a host, SIGKILL, then no host. It
comes at a moment of the run, which is `tests.interrupted`, not of the clock.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Where a run stops itself, to be pre-empted there: between two steps, of which it does none before
# it has heard that it is told to stop; and while it saves, not for the first time.
MOMENTS = {
    "TERM": "blip2_jax.runtime.distributed.Preemption.should_stop:2:SIGSTOP:until_true",
    "KILL": "blip2_jax.runtime.checkpoint.Checkpointer.save:2:SIGSTOP",
}
COMMANDS = ("gcloud", "kubectl", "sbatch", "srun", "squeue", "scontrol")


def install(folder: Path, commands=COMMANDS) -> Path:
    """Makes the commands; returns the folder to put on PATH."""
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name in commands:
        program = programs / name
        program.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "{folder}" {name} "$@"\n'
        )
        program.chmod(0o755)
    return programs


def copy_checkout(root: Path, folder: Path) -> None:
    """The files of a checkout that git knows, and new ones, as they are now: a fresh clone."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def calls(folder: Path, command: str | None = None) -> list[list[str]]:
    """All calls so far, in their order, the command's name first."""
    log = folder / "calls.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    found = [json.loads(line) for line in lines]
    return [words for words in found if command in (None, words[0])]


def preempt(folder: Path, *kinds: str) -> None:
    """Pre-empts the next runs that start, once for each kind: TERM (with a warning) or KILL.

    What was on the hosts can be read in `folder/lost` afterwards.
    """
    (folder / "preempt.json").write_text(json.dumps(kinds))


def option(words: list[str], name: str, default: str = "") -> str:
    return next((w.partition("=")[2] for w in words if w.startswith(f"--{name}=")), default)


def runs_on(host: Path, program: str) -> bool:
    """Whether this host has a process of that program."""
    for process in processes_of(host):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except OSError:  # over
            continue
        if Path(words[0].decode()).name == program:
            return True
    return False


def processes_of(host: Path) -> list[int]:
    """Processes whose HOME is this host."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"HOME={host}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # another user's, or over
                continue
    return found


def kill(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def has_stopped(pid: int) -> bool:
    """Whether this process has got SIGSTOP, and nothing since."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # over
        return False
    return state == "T"


def take_preemption(folder: Path) -> str | None:
    file = folder / "preempt.json"
    kinds = json.loads(file.read_text()) if file.is_file() else []
    if kinds:
        file.write_text(json.dumps(kinds[1:]))
    return kinds[0] if kinds else None


# ------------------------------------------------------------------------------------------ gcloud


class Gcloud:
    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "slices.json"
        self.slices = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def save(self) -> None:
        self.file.write_text(json.dumps(self.slices))

    def main(self, words: list[str]) -> int:
        kind, verb, *rest = words[2:]
        return getattr(self, f"{kind}_{verb}".replace("-", "_"))(rest)

    def hosts(self, node: str) -> list[Path]:
        return sorted((self.folder / "hosts").glob(f"{node}.*"))

    def queued_resources_create(self, words: list[str]) -> int:
        name, count = words[0], int(option(words, "node-count", "1"))
        if name in self.slices:
            print("ALREADY_EXISTS", file=sys.stderr)
            return 1
        nodes = [f"{option(words, 'node-prefix')}-{i}" for i in range(count)]
        nodes = nodes if count > 1 else [option(words, "node-id")]
        self.slices[name] = {"state": "WAITING_FOR_RESOURCES", "nodes": nodes}
        self.save()
        return 0

    def queued_resources_describe(self, words: list[str]) -> int:
        trouble = self.folder / "trouble"
        if trouble.exists():  # a hiccup of the service, once
            trouble.unlink()
            print(
                "ERROR: (gcloud) UNAVAILABLE: The service is currently unavailable.",
                file=sys.stderr,
            )
            return 1
        if words[0] not in self.slices:
            print(
                f"ERROR: (gcloud) NOT_FOUND: Resource '{words[0]}' was not found", file=sys.stderr
            )
            return 1
        slice_ = self.slices[words[0]]
        print(slice_["state"])
        later = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}
        later["SUSPENDING"] = "SUSPENDED"
        if slice_["state"] in later:
            slice_["state"] = later[slice_["state"]]
            if slice_["state"] == "ACTIVE":
                for node in slice_["nodes"]:
                    for worker in range(int(os.environ.get("FAKE_WORKERS", "1"))):
                        (self.folder / "hosts" / f"{node}.{worker}").mkdir(parents=True)
            self.save()
        return 0

    def queued_resources_delete(self, words: list[str]) -> int:
        for node in self.slices.pop(words[0])["nodes"]:
            for host in self.hosts(node):
                kill(processes_of(host), signal.SIGKILL)
                shutil.rmtree(host, ignore_errors=True)
        self.save()
        return 0

    def tpu_vm_scp(self, words: list[str]) -> int:
        node, _, path = words[1].partition(":")
        for host in self.hosts(node):
            shutil.copy(words[0], host / path)
        return 0

    def tpu_vm_ssh(self, words: list[str]) -> int:
        hosts, command = self.hosts(words[0]), option(words, "command")
        if option(words, "worker") != "all":
            hosts = hosts[int(option(words, "worker")) :][:1]
        if not hosts:
            return 255
        kind = take_preemption(self.folder) if "tpu_host.sh run" in command else None
        moment = {"INTERRUPT": MOMENTS[kind]} if kind else {}
        shells = [
            subprocess.Popen(
                ["bash", "-c", command], cwd=host, env={**os.environ, **moment, "HOME": str(host)}
            )
            for host in hosts
        ]
        while kind and shells[0].poll() is None:
            if any(has_stopped(pid) for host in hosts for pid in processes_of(host)):
                self.preempt(words[0], hosts, kind)
                return 255
            time.sleep(0.05)
        return max(shell.wait() for shell in shells)

    def preempt(self, node: str, hosts: list[Path], kind: str) -> None:
        for host in hosts:
            if kind == "TERM":
                # A machine that goes down, in time enough for all that there is to do.
                kill(processes_of(host), signal.SIGTERM)
                kill(processes_of(host), signal.SIGCONT)
                while processes_of(host):
                    time.sleep(0.05)
            kill(processes_of(host), signal.SIGKILL)
            lost = self.folder / "lost"
            lost.mkdir(exist_ok=True)
            host.rename(lost / str(len(list(lost.iterdir()))))
        for slice_ in self.slices.values():
            if node in slice_["nodes"]:
                slice_["state"] = "SUSPENDING"
        self.save()


# ------------------------------------------------------------------------------------------- SLURM


def sbatch(folder: Path, words: list[str]) -> int:
    """Queues a job and runs it at once, as often as it asks to be queued again."""
    count = next(i for i, word in enumerate(words) if not word.startswith("--"))
    script, *arguments = words[count:]
    job = folder / "job"
    job.write_text(option(words, "job-name"))
    spooled = folder / "spooled_script"  # SLURM runs a copy, from somewhere else
    shutil.copy(script, spooled)
    log = option(words, "output").replace("%%", "%")
    again = folder / "requeue"
    again.touch()
    while again.exists():
        again.unlink()
        with open(log, "a") as file:
            subprocess.run(
                ["bash", spooled, *arguments],
                env={**os.environ, "SLURM_JOB_ID": "7"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
    job.unlink()
    print(7)
    return 0


def srun(words: list[str]) -> int:
    count = next(i for i, word in enumerate(words) if not word.startswith("--"))
    return subprocess.run(words[count:]).returncode


def main(folder: Path, name: str, words: list[str]) -> int:
    with open(folder / "calls.jsonl", "a") as log:
        log.write(json.dumps([name, *words]) + "\n")
    if name == "gcloud":
        return Gcloud(folder).main(words)
    if name == "sbatch":
        return sbatch(folder, words)
    if name == "srun":
        return srun(words)
    if name == "squeue":
        job = folder / "job"
        print(job.read_text() if job.is_file() else "")
    if name == "scontrol":
        (folder / "requeue").touch()
    if name == "kubectl" and "apply" in words:
        (folder / "manifest.yaml").write_text(sys.stdin.read())
    if name == "kubectl" and "get" in words:
        answer = folder / "jobset"
        print(answer.read_text() if answer.is_file() else "", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
