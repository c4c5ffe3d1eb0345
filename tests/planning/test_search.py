"""A search compiles few programs and ranks what it finds."""

from ml_collections import ConfigDict

from blip2_jax import cli
from blip2_jax.planning import search, topology


def test_a_search_saves_memory_only_where_it_must_and_ranks(monkeypatch, tmp_path):
    tried = []

    def pretend(config, tpu_slice, workdir, **_):
        """Too large in fewer than four parts; the faster, the fewer chips share parameters."""
        mesh, parts = dict(config.mesh), config.stage.accumulate
        remat = config.model.llm.remat
        tried.append((mesh["fsdp"], mesh["tensor"], parts, remat))
        rate = {"expected": 1000 / mesh["fsdp"] + (remat == "dots")}
        fits = {"fits": parts >= 4 and remat != "none", "refused": False}
        return {"mesh": mesh, "accumulate": parts, **fits, "samples_per_second": rate}

    monkeypatch.setattr(search, "make_plan", pretend)
    config = ConfigDict(cli.load_config("configs/stage2.py").to_dict())
    plans = search.search(config, topology.parse("v5e-4"), tmp_path, tries=20)
    down = [(4, 1, parts, "full") for parts in (1, 2, 3, 4)]
    assert tried[:6] == [*down, (2, 1, 4, "full"), (1, 1, 4, "full")]
    # On the best mesh, also what computes less again.
    assert tried[-2:] == [(1, 1, 4, "none"), (1, 1, 4, "dots")]
    assert plans[0]["samples_per_second"]["expected"] == 1001
    fits = [p["fits"] for p in plans]
    assert fits == sorted(fits, reverse=True) and fits.count(False) == 4
    tried.clear()
    search.search(config, topology.parse("v5e-4"), tmp_path, tries=5)
    assert len(tried) == 5
