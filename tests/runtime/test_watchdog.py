"""A process that hangs ends; one that takes long does not."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import tests.data.made as made
from blip2_jax.data import lists, tars
from blip2_jax.models.vit import ViT, ViTConfig
from blip2_jax.runtime import watchdog
from blip2_jax.runtime.progress import Progress
from blip2_jax.weights import huggingface

SETUP = (
    "import time; from blip2_jax.runtime.watchdog import Watchdog, alive, waiting_for_others\n"
    "def stuck(): time.sleep(60)\n"
)


def run(script):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SETUP + script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)


@pytest.mark.integration
def test_a_process_that_shows_no_sign_of_life_ends_and_says_where_it_was():
    ended = run(
        "with Watchdog(2):\n"
        "    for _ in range(30): time.sleep(0.1); alive()\n"
        "    with waiting_for_others(every=0.1): time.sleep(3)\n"
        "    print('alive', flush=True); stuck()\n"
    )
    assert ended.returncode == 1 and ended.stdout == "alive\n"
    assert "Timeout" in ended.stderr and "in stuck" in ended.stderr


@pytest.mark.integration
def test_outside_of_it_nothing_is_watched():
    ended = run("alive()\nwith Watchdog(1): alive()\ntime.sleep(1.2); alive(); time.sleep(1.2)\n")
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def signs(monkeypatch):
    """Counts signs of life."""
    count = itertools.count()

    class Counter:
        def alive(self):
            next(count)

    monkeypatch.setattr(watchdog, "_current", Counter())
    return lambda: next(count)


def test_every_record_of_an_archive_is_a_sign_of_life(signs, tmp_path):
    tars.TarSource(made.write_shards(tmp_path, 2, 5))
    assert signs() >= 2 * 5


def test_every_row_of_a_list_is_a_sign_of_life(signs):
    lists.ListSource(iter([{"image": f"{n}.jpg", "caption": "x"} for n in range(7)]))
    assert signs() >= 7


def test_every_tensor_that_is_loaded_is_a_sign_of_life(signs, tmp_path):
    sizes = ViTConfig(16, 8, 24, 3, 2, 32, "quick_gelu", 1e-5, "qkvo", False, True)
    params = nnx.to_pure_dict(nnx.state(ViT(sizes, rngs=nnx.Rngs(0))))
    huggingface.save(tmp_path / "vit", sizes, params)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    loaded = huggingface.load(str(tmp_path / "vit"), sizes, abstract)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    stacked = [x for x in jax.tree.leaves(params) if len(x) == sizes.num_layers]
    assert len(stacked) > 5 and signs() >= 3 * len(stacked)


def test_every_batch_that_is_reported_is_a_sign_of_life(signs):
    with Progress(4, active=False) as progress:
        for _ in range(4):
            progress.update(1)
    assert signs() == 4
