"""What is installed from a wheel works by itself, without a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launch import fakes

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package") / "clone"
    fakes.copy_checkout(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(clone):
    offline = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    words = ["wheel", *offline, f"--wheel-dir={clone.parent}", str(clone)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (file,) = clone.parent.glob("*.whl")
    return zipfile.ZipFile(file)


def test_a_wheel_has_every_file_of_the_package_and_every_recipe(clone, wheel):
    package = [path.relative_to(clone) for path in clone.glob("blip2_jax/**/*") if path.is_file()]
    recipes = ["blip2_jax" / path.relative_to(clone) for path in clone.glob("configs/**/*.py")]
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {str(path) for path in (*package, *recipes)}


def test_commands_of_a_wheel_find_its_recipes_and_towers(wheel, tmp_path):
    """Outside the checkout, which neither the path nor the folder leads to."""
    wheel.extractall(tmp_path / "site")

    def blip2(*words):
        code = "import sys; from blip2_jax.__main__ import main; sys.exit(main())"
        ran = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    blip2("prepare", "--source=digits", "--out=data", "--train=24", "--test=8", "--held_out=4")
    small = ["steps=2", "data.dir=data", "data.batch_size=8", "optim.warmup_steps=1"]
    options = [f"--config.{word}" for word in (*small, "eval.every=0", "log.every=1")]
    blip2("train", "--config=digits/stage1", "--workdir=run", *options)
    assert (tmp_path / "run/done.json").is_file()
    for name in ("plan", "evaluate"):
        assert blip2(name, "--help").startswith(f"usage: blip2 {name} ")
