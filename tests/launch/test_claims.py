"""The table of the two claims is what the runs measured, whichever way it went."""

import json
from pathlib import Path

import pytest

from blip2_jax import cli, sweep

claims = cli.load_module("launch/claims.py")
conditions = claims.claims
WAYS = (*conditions.WAYS, claims.NOTHING)


def write(folder: str, metrics: dict[str, float]) -> None:
    Path(folder).mkdir(parents=True)
    Path(folder, "done.json").write_text("{}")
    rows = [{"step": 1, "loss": 3.0}, {"step": 25, **dict.fromkeys(metrics, 0.1)}]
    lines = [json.dumps(row) + "\n" for row in [*rows, {"step": 50, **metrics}]]
    Path(folder, "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Way w of seed s answers 40 + 10 w + s per cent right, but for one seed of one way."""
    monkeypatch.chdir(tmp_path)
    for s, seed in enumerate(conditions.SEEDS):
        for w, way in enumerate(WAYS):
            right = 0.3 if (s, w) == (2, 3) else 0.4 + 0.1 * w + 0.01 * s
            write(claims.stage2_folder(way, seed), {"eval/vqa/accuracy": right})
            if way != claims.NOTHING:
                ranks = dict.fromkeys(claims.recall("itc_"), 0.9 - 0.1 * w)
                ranks["eval/retrieval/image_to_text_r1"] = 0.2
                ranks["eval/retrieval/text_to_image_r1"] = 0.4
                write(conditions.stage1_folder(way, seed), ranks)
    return tmp_path


def test_the_table_says_who_is_better_and_in_how_many_seeds(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["claims.py", f"--picture={runs / 'a/claims.svg'}"])
    assert claims.main() == 0
    table = capsys.readouterr().out
    assert "| question answering after stage 2: stage 1 | 41.0% | 40.0% to 42.0% |  |  |" in table
    assert "without ITG | 51.0% | 50.0% to 52.0% | -10.0 points | 0 of 3 |" in table
    assert "no stage 1 | 57.0% | 30.0% to 71.0% | -16.0 points | 1 of 3 |" in table
    assert "ITC + ITM: mismatched pairs | 30.0% | 30.0% to 30.0% | +0.0 points | 0 of 3 |" in table
    assert "ITC alone: without ITG | 80.0% | 80.0% to 80.0% | +10.0 points | 3 of 3 |" in table
    assert "<svg" in (runs / "a/claims.svg").read_text()


def test_a_run_that_is_not_finished_is_named(runs, monkeypatch):
    monkeypatch.setattr("sys.argv", ["claims.py"])
    folder = conditions.stage1_folder("without ITG", conditions.SEEDS[1])
    Path(folder, "done.json").unlink()
    with pytest.raises(SystemExit, match="holds no finished run. Run the sweeps first") as ended:
        claims.main()
    assert folder in str(ended.value)


def test_the_sweeps_are_of_these_runs(monkeypatch):
    """The folders that the table reads are those that the sweeps write."""
    monkeypatch.chdir(claims.ROOT)
    runs = {
        stage: {
            str(run.workdir)
            for run in sweep.make_runs(
                f"configs/digits/claims_{stage}.py", Path(f"{conditions.FOLDER}/{stage}"), []
            )
        }
        for stage in ("stage1", "stage2")
    }
    seeds = conditions.SEEDS
    assert runs["stage2"] == {claims.stage2_folder(w, s) for w in WAYS for s in seeds}
    ways = conditions.WAYS
    assert runs["stage1"] == {conditions.stage1_folder(w, s) for w in ways for s in seeds}
