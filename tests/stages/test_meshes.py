"""The step is the same step on any number of devices and hosts, for both stages and all LLMs."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from blip2_jax.models.blip2 import AXES, Blip2Config
from blip2_jax.models.llama import LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.models.t5 import T5Config
from blip2_jax.runtime import distributed
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.rules import RULES
from blip2_jax.weights import checkpoint
from tests.stages import families

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device finds, by family."""
    folder, result = tmp_path_factory.mktemp("alone"), {}

    def of(family: str):
        if family not in result:
            result[family] = families.step(families.config(family, folder), (1, 1, 1))
        return result[family]

    return of


# Megatron-LM (Shoeybi et al. 2019, section 3): of two products in a row, the first is split by what
# it gives and the second by what it reads, so that nothing between them travels but its sum.
FIRST = r"(q_proj|k_proj|v_proj|fc1|gate|up|lm_head)"
SECOND = r"(out_proj|fc2|down)"
HEADS = r"(vision_proj|text_proj|itm_head|language_projection|itg_head/dense)"
SPLITS = {  # of the last two axes; whatever is not here lies whole on every device
    rf"{FIRST}/kernel": ("fsdp", "tensor"),
    rf"{FIRST}/bias": ("tensor",),
    rf"{SECOND}/kernel": ("tensor", "fsdp"),
    r"(embed_tokens|word_embeddings)/embedding": ("tensor", "fsdp"),
    r"(embed_positions|position_embeddings)/embedding": (None, "fsdp"),
    r"relative_bias/embedding": (None, "tensor"),
    r"patch_embed/kernel": (None, "fsdp"),
    rf"{HEADS}/kernel": ("fsdp", None),
}


@pytest.mark.parametrize("llm", [None, OPTConfig(), LlamaConfig(), T5Config()], ids=type)
def test_products_are_split_as_megatron_splits_them(llm):
    qformer = QFormerConfig(vocab_size=30524)  # 30,523 words divide by nothing
    abstract = checkpoint.abstract_params(Blip2Config(qformer=qformer, llm=llm))
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placements = meshes.placements_of(abstract, AXES, RULES, mesh)
    assert not [p for p in placements if p.notes]
    split = 0
    for path, shape, _, spec, _ in placements:
        matches = [axes for name, axes in SPLITS.items() if re.search(f"{name}$", path)]
        want = matches[0] if matches else ()
        spec = (*spec, *[None] * (len(shape) - len(spec)))
        assert spec == (None,) * (len(shape) - len(want)) + want, path
        split += bool(want)
    assert split > 25


def assert_same(result, expected):
    """Equal to 1e-5, of the largest number in each array."""
    assert result.keys() == expected.keys()
    for name, want in expected.items():
        scale = max(float(np.abs(want).max()), 1e-3)
        np.testing.assert_allclose(result[name], want, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(("family", "sizes"), families.ON_MESHES, ids=str)
def test_loss_and_gradients_do_not_depend_on_the_mesh(family, sizes, alone, tmp_path):
    result = families.step(families.config(family, tmp_path), sizes)
    assert sum(np.abs(x).max() > 1e-4 for x in result.values()) > 20  # they are no zeros
    assert_same(result, alone(family))


def test_loss_and_gradients_do_not_depend_on_the_number_of_hosts(alone, tmp_path):
    """Two hosts with four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4"),
        distributed.ENABLE: "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, families.__file__, str(tmp_path)]
    hosts = [
        subprocess.Popen(
            command, env=environment | {"JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        errors = [host.communicate(timeout=600)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], errors
    for family in families.FAMILIES:
        assert_same(np.load(tmp_path / f"{family}.npz"), alone(family))
