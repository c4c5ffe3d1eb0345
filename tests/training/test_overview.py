"""What a run prints at its start."""

import jax
import pytest

import tests.tiny as tiny
from blip2_jax import recipe
from blip2_jax.training.overview import describe


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_part_and_every_trained_array_has_a_row(stage):
    run = recipe.build(tiny.config(stage))
    text = describe(run, dict.fromkeys(run.abstract_frozen, "0123456789abcdef-more"), 2.5e9)
    lines = [line.split() for line in text.splitlines() if line.startswith("| ")]
    trained = run.abstract_state["params"]
    for part, tree in trained.items():
        count = sum(x.size for x in jax.tree.leaves(tree))
        assert any(line[1:7:2] == [part, "trained", f"{count:,}"] for line in lines), part
    for part in run.abstract_frozen:
        assert any(line[1:4:2] == [part, "frozen"] and "0123456789abcdef" in line for line in lines)
    arrays = [line for line in lines if "float32" in line]
    assert len(arrays) == len(jax.tree.leaves(trained))
    assert any(line[1] == "query_tokens" and "(None," in line for line in arrays)
    assert "2.50 GFLOPs an example" in text
    assert ("prompt" in text) == (stage == "stage2")
