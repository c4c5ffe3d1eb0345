"""The table of the two claims is what the runs measured, whichever way it went."""

import json
import shutil
from pathlib import Path

import pytest

from blip2_jax import cli
from blip2_jax.sweeps import points

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
            write(claims.folder(("stage2", way, seed)), {"eval/vqa/accuracy": right})
            if way != claims.NOTHING:
                ranks = dict.fromkeys(claims.recall("itc_"), 0.9 - 0.1 * w)
                ranks["eval/retrieval/image_to_text_r1"] = 0.2
                ranks["eval/retrieval/text_to_image_r1"] = 0.4
                write(claims.folder(("stage1", way, seed)), ranks)
    return tmp_path


def test_the_table_says_who_is_better_and_in_how_many_seeds(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["claims.py", f"--pictures={runs / 'a'}"])
    assert claims.main() == 0
    table = capsys.readouterr().out
    assert "| question answering after stage 2: stage 1 | 41.0% | 40.0% to 42.0% |  |  |" in table
    assert "without ITG | 51.0% | 50.0% to 52.0% | -10.0 points | 0 of 3 |" in table
    assert "no stage 1 | 57.0% | 30.0% to 71.0% | -16.0 points | 1 of 3 |" in table
    assert "ITC + ITM: mismatched pairs | 30.0% | 30.0% to 30.0% | +0.0 points | 0 of 3 |" in table
    assert "ITC alone: without ITG | 80.0% | 80.0% to 80.0% | +10.0 points | 3 of 3 |" in table
    assert "<svg" in (runs / "a/claims.svg").read_text()


def test_runs_that_are_not_finished_are_named_and_the_others_scores_are_kept(
    runs, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["claims.py", f"--pictures={runs / 'a'}"])
    late = [("stage1", "without ITG", seed) for seed in conditions.SEEDS[1:]]
    for run in late:
        Path(claims.folder(run), "done.json").unlink()
    with pytest.raises(SystemExit, match="19 runs are in .*no finished run is in") as ended:
        claims.main()
    assert all(f"  {claims.folder(run)}\n" in str(ended.value) for run in late)

    for run in claims.all_runs():
        if run in late:
            Path(claims.folder(run), "done.json").write_text("{}")
        else:
            shutil.rmtree(claims.folder(run))
    assert claims.main() == 0
    table = capsys.readouterr().out
    assert "question answering after stage 2: stage 1 | 41.0% | 40.0% to 42.0%" in table
    assert "ITC alone: without ITG | 80.0%" in table


def test_the_sweeps_are_of_these_runs(monkeypatch):
    """The folders that the table reads are those that the sweeps write."""
    monkeypatch.chdir(claims.ROOT)
    runs = {
        stage: {
            str(run.workdir)
            for run in points.make_runs(
                f"configs/digits/claims_{stage}.py", Path(f"{conditions.FOLDER}/{stage}"), []
            )
        }
        for stage in ("stage1", "stage2")
    }
    for stage, found in runs.items():
        assert found == {claims.folder(run) for run in claims.all_runs() if run[0] == stage}
