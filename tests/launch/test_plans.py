"""Tables of plans say what there is, what is missing, and what spreads."""

import json

from blip2_jax import cli
from blip2_jax.planning import topology

plans = cli.load_module("launch/plans.py")


def plan_sending(*sent):
    kinds = zip(("all-gather", "all-reduce"), sent, strict=True)
    return {
        "fits": True,
        "collectives": [{"kind": kind, "axes": ["fsdp"], "sent": n * 2**20} for kind, n in kinds],
    }


def test_scaling_shows_all_that_is_sent_and_its_spread():
    lines = plans.scaling_rows("stage", [plan_sending(100, 100), plan_sending(100, 120), None])
    assert lines.splitlines() == [
        "| stage | 200.0 | 220.0 |  | 10% |",
        "| all-gather on fsdp | 100.0 | 100.0 |  | 0% |",
        "| all-reduce on fsdp | 100.0 | 120.0 |  | 20% |",
    ]


def test_the_table_says_what_fits_how_and_what_is_missing(tmp_path):
    where = topology.parse("v5e-16")
    common = {
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "remat": {"llm": "full"},
        "accumulate": 5,
        "batch_size": 128,
        "published_batch_size": 120,
        "refused": False,
        "why_not": "too large",
    }
    numbers = {
        "memory": {"peak": 2**30, "usable": 2**31},
        "samples_per_second": {"expected": 10, "at_most": 20},
        "days": {"expected": 1.5},
    }
    for name, more in {
        "a.py:x": {"fits": True, "own_mesh_fits": False, **numbers},
        "b.py:x": {"fits": False, "own_mesh_fits": False},
    }.items():
        path = plans.kept(name, where, tmp_path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**common, **more}))
    recipes = [(name, where) for name in ("a.py:x", "b.py:x", "c.py:x")]
    *_, first, second, _, last = plans.table(recipes, tmp_path).splitlines()
    assert first == (
        "| `a.py:x` | v5e-16 | 128 (120) | 1x16x1, llm remat full, 5 parts * | 1.0 (2.0) | "
        "10 (20) | 1.5 days |"
    )
    assert "does not fit: too large" in second
    assert last == "1 of 3 are not compiled yet."


def test_every_recipe_of_the_table_is_there():
    for name in plans.RECIPES:
        cli.load_config(f"configs/{name}")
