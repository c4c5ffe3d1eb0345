"""The libraries that the project is built on are used by the package itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "blip2_jax"


def imported() -> set[str]:
    """Every top-level package that a file of blip2_jax imports."""
    packages = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                packages.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                packages |= {alias.name.partition(".")[0] for alias in node.names}
    return packages


@pytest.mark.parametrize(
    "package",
    [
        "jax", "flax", "optax", "orbax", "transformers", "tensorflow_datasets", "ml_collections",
        "clu",
    ],
)  # fmt: skip
def test_the_package_imports_it(package):
    assert package in imported()


def test_nothing_imports_tensorflow():
    assert "tensorflow" not in imported()
