"""Batches are a function of the step alone, and unreadable records do not stop a run."""

import itertools

import jax
import numpy as np
import pytest

import tests.tiny as tiny
from blip2_jax import prepare
from blip2_jax.data import loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare.prepare_digits(out, 0, {"train": 20, "test": 10, "held_out": 1})
    return out


def make_config(folder, stage="stage1", **changes):
    names = {
        "data.dir": str(folder),
        "data.qformer_tokenizer": "package:digits-bert",
        "data.llm_tokenizer": "package:digits-opt",
        "data.text_length": 28,
        "data.llm_length": 28,
        "data.threads": 2,
        "eval.batch_size": 4,
        **changes,
    }
    return tiny.config(stage, **names)


def take(config, n, start=0):
    with loader.train_batches(config, 16, start_step=start) as batches:
        return list(itertools.islice(batches, n))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_resuming_at_any_step_gives_the_batches_of_the_run_never_stopped(folder, stage):
    config = make_config(folder, stage)
    whole = take(config, 7)  # more than two epochs of 20 records in batches of 8
    for start in (1, 3, 6):
        assert_same(whole[start:], take(config, 7 - start, start))


def test_the_number_of_threads_changes_nothing(folder):
    many = take(make_config(folder, **{"data.threads": 8}), 5)
    assert_same(take(make_config(folder, **{"data.threads": 0}), 5), many)


def test_the_global_batch_does_not_depend_on_the_number_of_hosts(folder, monkeypatch):
    """Two hosts' shares interleave to one host's batch: crops, captions and all."""
    config = make_config(folder)
    one = take(config, 4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for host in range(2):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shares.append(take(config, 4))
    for whole, first, second in zip(one, *shares, strict=True):
        for name in whole:
            np.testing.assert_array_equal(whole[name][0::2], first[name])
            np.testing.assert_array_equal(whole[name][1::2], second[name])


def test_each_epoch_sees_every_record_once_in_another_order(folder):
    ids = np.concatenate([batch["image_id"] for batch in take(make_config(folder), 5)])
    first, second = ids[:20], ids[20:40]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()


def test_another_seed_is_another_order(folder):
    a, b = take(make_config(folder), 1), take(make_config(folder, seed=1), 1)
    assert a[0]["image_id"].tolist() != b[0]["image_id"].tolist()


class Broken:
    """A source whose records 3 and 4 are damaged."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        record = self.source[index]
        if index in (3, 4):
            record["image"] = record["image"][: 40 * (index - 3)]  # empty; cut short
        return record


def test_a_corrupt_record_is_replaced_by_the_next_good_one_and_counted(folder, monkeypatch, capsys):
    config = make_config(folder)
    good = take(config, 5)
    real = loader.make_source
    monkeypatch.setattr(loader, "make_source", lambda *a: Broken(real(*a)))
    with loader.train_batches(config, 16) as batches:
        bad = list(itertools.islice(batches, 5))
        batches.skipped.report()
        assert batches.skipped.count == 2
    for before, after in zip(good, bad, strict=True):
        damaged = np.isin(before["image_id"], (3, 4))
        assert (after["image_id"][damaged] == 5).all()
        for name in before:  # the others, their randomness included, are as they were
            np.testing.assert_array_equal(before[name][~damaged], after[name][~damaged])
    assert "Skipped 2 of 20 records" in capsys.readouterr().out


def test_too_many_corrupt_records_stop_the_run():
    skipped = loader.Skipped(total=20)
    skipped.add(0, ValueError("cut short"))
    skipped.add(1, ValueError("cut short"))
    skipped.add(1, ValueError("cut short"))  # the same one in the next epoch is no new one
    with pytest.raises(ValueError, match="3 of 20 .* cut short"):
        skipped.add(2, ValueError("cut short"))


def test_heldout_batches_are_whole_ordered_and_repeatable(folder):
    config = make_config(folder)
    with loader.heldout_batches(config, 16) as batches:
        first = list(batches)
    assert np.concatenate([b["image_id"] for b in first]).tolist() == list(range(8))
    with loader.heldout_batches(config, 16) as batches:
        assert_same(first, list(batches))


def test_stories_grow_from_easy_to_hard(folder):
    changes = {"data.source": "stories", "data.story_warmup": 0.5, "data.llm_length": 128}
    config = make_config(folder, "pretrain_lm", steps=100, **changes)
    source = loader.make_source(config, "train")
    commas = [sum(", " in s["story"][0] for s in map(source.__getitem__, part))
              for part in (range(0, 130), range(600, 730))]  # fmt: skip
    assert commas[0] == 0 < commas[1]  # three things are joined by a comma
    batch = take(config, 1)[0]
    assert batch["llm_ids"].shape == (8, 128)


def test_an_unknown_source_is_named(folder):
    with pytest.raises(ValueError, match="webdataset.*tfds, stories, easy_stories"):
        loader.make_source(make_config(folder, **{"data.source": "webdataset"}), "train")
