"""Imports run one way, and importing the package is cheap."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from blip2_jax.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent / "blip2_jax"

# What a folder may import of the package, besides itself. Files at the top are commands, which may
# import everything, except those named here.
ALLOWED = {
    "models": set(),
    "digits": {"models", "stages", "data", "evals", "runtime"},
    "runtime": set(),
    "data": {"runtime"},
    "stages": {"models", "data", "runtime"},
    "weights": {"models", "data", "runtime"},
    "inference": {"models", "data", "runtime"},
    "evals": {
        "cli", "data", "inference", "models", "pretrained", "recipe", "reporting", "runtime",
        "__version__",
    },
    "evals/tasks": {"data", "evals", "inference", "runtime"},
    "evals/metrics": {"evals"},  # no model
    "planning": {"recipe", "stages", "runtime"},
    "training": {"recipe", "cli", "evals", "planning", "stages", "weights", "data", "runtime"},
    "cli": {"runtime"},
    "recipe": {"stages", "weights", "models", "data", "runtime"},
    "pretrained": {"recipe", "cli", "stages", "inference", "weights", "models", "data", "runtime"},
    "reporting": {"runtime"},
    "sweeps": {"cli", "reporting", "runtime"},
}  # fmt: skip


def imports(file: Path) -> set[str]:
    """First part below blip2_jax of everything a file imports from the package."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        imported |= {name.split(".")[1] for name in names if name.startswith("blip2_jax.")}
    return imported


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    files = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else (ROOT / part).rglob("*.py")
    for file in files:
        extra = imports(file) - ALLOWED[part] - {part}
        assert not extra, f"{file.relative_to(ROOT)} imports {', '.join(sorted(extra))}"


def test_nothing_imports_the_embedded_world():
    """Others name its modules in tables, and work without it: see tests/test_without_digits.py."""
    for file in ROOT.rglob("*.py"):
        if "digits" not in file.parts:
            assert "digits" not in imports(file), file


def test_imports_make_no_circle():
    """Between folders, and between files at the top; imports inside functions count too."""
    parts: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        part = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if part != "__init__":  # which everything imports
            parts.setdefault(part, set()).update(imports(file) - {part, "__version__"})
    graphlib.TopologicalSorter(parts).prepare()  # CycleError names the circle


def modules_printed_by(code: str) -> list[str]:
    """Runs code that prints `sys.modules`, in a process of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.integration
def test_flags_are_parsed_without_jax():
    """Launchers do so at their start, on machines that run nothing."""
    code = (
        "import sys; from blip2_jax import cli\n"
        "cli.parse(None, ['--config=configs/digits/stage1.py', '--config.seed=3'])\n"
        "print(*sys.modules)"
    )
    loaded = modules_printed_by(code)
    assert not {"jax", "flax", "transformers", "torch"} & set(loaded)


def test_everything_but_commands_has_a_rule():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and list(p.glob("*.py"))}
    files = {p.stem for p in ROOT.glob("[!_]*.py")}
    assert folders | files <= ALLOWED.keys() | COMMANDS.keys()
    assert {part for part in ALLOWED if "/" not in part} <= folders | files


@pytest.mark.integration
def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, blip2_jax; print(*sys.modules)"
    loaded = modules_printed_by(code)
    assert not {"jax", "flax", "transformers", "torch", "tensorflow_datasets"} & set(loaded)


@pytest.mark.integration
def test_a_command_and_a_model_import_no_more_than_they_need():
    """Seconds of every start: PyTorch for tokenizers, Orbax where no run is read."""
    code = (
        "import sys; from blip2_jax import __main__; __main__._hide_torch_from_transformers()\n"
        "from blip2_jax.data import tokenizers; from blip2_jax import pretrained\n"
        "assert tokenizers.load('package:digits-opt')('a')['input_ids']; print(*sys.modules)"
    )
    loaded = modules_printed_by(code)
    assert "transformers" in loaded and not {"torch", "blip2_jax.recipe"} & set(loaded)
