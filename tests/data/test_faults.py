"""The fault drill: what is broken is counted by reason and place, and the run goes on as it would
anywhere, up to a bounded share."""

import itertools
import json
import os

import numpy as np
import pytest
from ml_collections import ConfigDict

import tests.data.made as made
import tests.tiny as tiny
from blip2_jax.data import examples, faults, files, loader, reader, sources, tars
from blip2_jax.data.faults import Skipped, TooManySkipped
from blip2_jax.data.source import skipped_at_start
from blip2_jax.runtime import mesh as meshes


def make_config(**changes):
    names = {
        "data.source": "files",
        "data.qformer_tokenizer": "package:digits-bert",
        "data.text_length": 28,
        "data.threads": 2,
        "data.max_skipped": 0.9,
        **changes,
    }
    return tiny.config("stage1", **names)


def take(config, n, start=0, rows=None):
    with loader.train_batches(config, 16, start_step=start, batch_rows=rows) as batches:
        return list(itertools.islice(batches, n)), batches.count_skipped()


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


@pytest.fixture
def broken(tmp_path):
    """Good and bad side by side: tars and an image folder with every fault there is."""
    folder = tmp_path / "tars"
    folder.mkdir()
    made.write_shards(folder, 4, 6)
    (folder / "00003.tar").write_bytes((folder / "00003.tar").read_bytes()[:12_000])  # cut short
    (folder / "00004.tar").touch()
    image = made.jpeg(50)
    made.write_tar(
        folder / "00005.tar",
        [
            ("a.jpg", b"<html>404 not found</html>"), ("a.txt", b"no image"),
            ("b.jpg", made.jpeg(50, (300, 200))[:900]), ("b.txt", b"half an image"),
            ("c.jpg", b""), ("c.txt", b"nothing"),
            ("d.jpg", image), ("d.txt", b" "),
            ("e.jpg", image), ("e.txt", b"...!"),  # nothing is left after cleaning
            ("f.jpg", made.bomb()), ("f.txt", b"a bomb"),
            ("g.jpg", image), ("g.txt", "caf\u00e9".encode("latin1")),
            ("h.jpg", image), ("h.txt", b"fine"),
            ("h.jpg", image), ("h.txt", b"again"),
        ],
    )  # fmt: skip
    names = made.write_images(tmp_path / "images", 8)
    (tmp_path / "images" / "3.jpg").unlink()
    (tmp_path / "images" / "4.jpg").write_bytes(b"")
    rows = [{"image": name, "caption": f"picture {name}"} for name in names]
    (tmp_path / "list.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    parts = {
        "list": {"dir": str(tmp_path / "list.jsonl"), "images": str(tmp_path / "images")},
        "tars": {"dir": str(folder)},
    }
    return make_config(**{"data.mixture": ConfigDict(parts), "data.mixture_by": "size"})


# What the list and the tars hold, by reason.
ALL = {
    "archive cut short": 1,
    "duplicated key": 1,
    "empty file": 3,  # a tar, a member and an image file
    "not JSON": 1,
    "no such file": 1,
    "not a readable image": 1,
    "not a readable image: damaged": 1,
    "empty caption": 2,
    "too many pixels": 1,
    "not UTF-8": 1,
}


def test_every_fault_is_counted_once_by_reason_and_place(broken):
    batches, skipped = take(broken, 15)
    assert skipped.by_reason == ALL
    for batch in batches:
        assert np.isfinite(batch["image"]).all() and batch["text_mask"].sum(axis=1).min() > 2
    places = {reason: found["examples"] for reason, found in skipped.to_json().items()}
    assert places["not a readable image"][0].endswith("00005.tar:a.jpg")
    assert places["no such file"][0].endswith("images/3.jpg")
    assert places["archive cut short"][0].startswith(broken.data.mixture.tars.dir + "/00003.tar")


@pytest.mark.integration
def test_with_all_that_broken_batches_are_still_a_function_of_the_step(broken):
    whole, skipped = take(broken, 8)
    rest, _ = take(broken, 5, start=3)
    assert_same(whole[3:], rest)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for host in np.split(mesh.devices.ravel(), 2):
        rows = meshes.local_rows(mesh, 8, host)
        part, _ = take(broken, 8, rows=rows)
        assert_same(part, [{name: x[rows] for name, x in batch.items()} for batch in whole])
    changed = ConfigDict(broken.to_dict())
    changed.data.workers = 2
    same, from_workers = take(changed, 8)
    assert_same(whole, same)
    assert from_workers.to_json() == skipped.to_json()  # faults travel with the batches


def test_good_records_are_as_if_nothing_were_broken(tmp_path):
    made.write_shards(tmp_path, 2, 8)
    config = make_config(**{"data.dir": str(tmp_path)})
    before, none = take(config, 6)
    assert none.count == 0
    source = sources.open_files(str(tmp_path))
    row = source._maps[0][3]
    with open(source.paths[0], "r+b") as file:
        file.seek(int(row["image"]) * tars.BLOCK)
        file.write(b"x" * int(row["image_size"]))
    after, skipped = take(config, 6)
    assert skipped.by_reason == {"not a readable image": 1}
    for a, b in zip(before, after, strict=True):
        hurt = a["image_id"] == 3
        assert (b["image_id"][hurt] == (3 + 11) % 16).all()  # a golden share further on
        for name in a:
            np.testing.assert_array_equal(a[name][~hurt], b[name][~hurt])


def test_a_shard_that_vanishes_mid_run_leaves_the_others_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_OPEN", 0)  # as if it had not been opened yet
    shards = made.write_shards(tmp_path, 5, 8)
    config = make_config(**{"data.dir": str(tmp_path), "data.threads": 0})
    whole, _ = take(config, 20)
    with loader.train_batches(config, 16) as batches:
        assert_same(itertools.islice(batches, 2), whole[:2])
        os.remove(shards[2])
        hurt = list(itertools.islice(batches, 18))
        assert batches.count_skipped().by_reason == {"no such file": 8}
        assert batches.skipped.examples["no such file"][0] == shards[2]
    lost = range(16, 24)
    for before, after in zip(whole[2:], hurt, strict=True):
        gone = np.isin(before["image_id"], lost)
        assert not np.isin(after["image_id"], lost).any()
        for name in before:
            np.testing.assert_array_equal(before[name][~gone], after[name][~gone])
    replaced = [
        after["image_id"][np.isin(before["image_id"], lost)] // 8
        for before, after in zip(whole[2:], hurt, strict=True)
    ]
    assert len(set(np.concatenate(replaced))) > 1  # by records of several shards
    again, _ = take(config, 15, start=5)  # a restart without the shard
    assert_same(again, hurt[3:])


def test_an_archive_that_was_never_there_is_counted(tmp_path):
    made.write_shards(tmp_path, 3, 4)
    source = sources.open_files(f"{tmp_path}/{{00000..00005}}.tar")
    assert len(source) == 12 and source.faults.by_reason == {"no such file": 3}


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 1])
def test_too_much_that_is_broken_stops_the_run_and_says_so(tmp_path, workers):
    names = made.write_images(tmp_path / "images", 20)
    for name in names[:8]:
        (tmp_path / "images" / name).write_bytes(b"x")
    rows = [{"image": name, "caption": "a picture"} for name in names]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    changes = {"data.dir": str(tmp_path / "list.json"), "data.images": str(tmp_path / "images")}
    config = make_config(**{**changes, "data.max_skipped": 0.2, "data.workers": workers})
    with pytest.raises(
        TooManySkipped, match="8 of 20 records cannot.*max_skipped.*\n.*8 x not a read"
    ):
        take(config, 10)
    for name in names:
        (tmp_path / "images" / name).write_bytes(b"x")
    config.data.max_skipped = 1.0
    with pytest.raises(ValueError, match="20 records in a row.*not a readable image"):
        take(config, 1)


def test_what_a_source_leaves_out_counts_towards_the_share(tmp_path):
    lines = [json.dumps({"image": "a.jpg", "caption": "a"})] + ["{"] * 3
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    config = make_config(**{"data.dir": str(tmp_path / "x.jsonl"), "data.max_skipped": 0.5})
    with pytest.raises(ValueError, match="3 of 4 records .*\n.*3 x not JSON"):
        loader.train_batches(config, 16)


def test_scores_leave_out_what_is_broken_and_replace_nothing(broken):
    source = sources.make_source(broken, "train")
    with loader.scored_batches(source, 16, 4, numbers=range(len(source))) as batches:
        found = list(batches)
        skipped = batches.count_skipped()
    valid = np.concatenate([b["valid"] for b in found])
    index = np.concatenate([b["index"] for b in found])
    total = len(source)
    assert index[:total].tolist() == list(range(total)) and not valid[total:].any()
    known = {"duplicated key", "archive cut short", "not JSON"}  # left out from the start
    started = sum(ALL[reason] for reason in known) + 2  # and two of the empty files
    cleaned = 1  # a caption of which only training's cleaning leaves nothing
    assert total - valid.sum() == sum(ALL.values()) - started - cleaned == skipped.count


def test_counting():
    skipped = Skipped(20, 0.1)
    skipped.add("cut short", "a", index=0)
    skipped.add("cut short", "b", index=1)
    skipped.add("cut short", "b", index=1)  # the same one in the next epoch is no new one
    skipped.check()
    skipped.add("cut short", "c", index=2)
    with pytest.raises(TooManySkipped, match="3 of 20 .*\n.*3 x cut short: a, b, c"):
        skipped.check()
    other = Skipped()
    other.merge(skipped)
    other.merge(skipped.to_json())
    assert other.count == 6 and len(other.examples["cut short"]) == faults.Skipped.EXAMPLES


class TwoHosts:
    """Two hosts that load half of each batch and count together after every step."""

    def __init__(self, config, start=0, met=None):
        self.source = sources.make_source(config, "train")
        self.batches = []
        for rows in (range(4), range(4, 8)):
            skipped = skipped_at_start(self.source, config.data.max_skipped)
            if met is not None:
                skipped.resume(json.loads(json.dumps(met)))
            args = {"batch_rows": rows, "source": self.source, "skipped": skipped}
            self.batches.append(loader.train_batches(config, 16, start_step=start, **args))

    def step(self):
        """Reads one step; what each host has counted, or its error."""
        for batches in self.batches:
            next(batches)
        both = [batches._uncounted for batches in self.batches]
        found = []
        for batches in self.batches:
            try:
                found.append(batches.count_skipped(lambda _: both).met())
            except TooManySkipped as error:
                found.append(str(error))
        return found


def test_hosts_count_together_and_a_restart_goes_on(tmp_path):
    """Neither host meets more than the bound by itself. A record that another host or an earlier
    start has met is not counted anew."""
    names = made.write_images(tmp_path / "images", 20)
    for name in names[:6]:
        (tmp_path / "images" / name).write_bytes(b"x")
    rows = [{"image": name, "caption": "a picture"} for name in names]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    changes = {"data.dir": str(tmp_path / "list.json"), "data.images": str(tmp_path / "images")}
    config = make_config(**changes, **{"data.max_skipped": 0.2, "data.threads": 0})
    hosts = TwoHosts(config)
    met, step, bad = None, 0, set()
    while True:
        bad |= {n for n in loader.record_numbers(hosts.source, config, step) if n < 6}
        first, second = hosts.step()
        assert first == second
        if len(bad) > 4:
            break
        assert sum(of["count"] for of in first["by_reason"].values()) == len(bad)
        met, step = first, step + 1
    assert "of 20 records cannot be read" in first and step > 0
    assert "of 20 records cannot be read" in TwoHosts(config, step, met).step()[0]
    assert not isinstance(TwoHosts(config, step).step()[0], str)  # which has forgotten


def test_a_note_of_many_faults_holds_as_many_as_fit():
    note = reader.pack_faults([(n, "not a readable image", "x/" * 200 + str(n)) for n in range(50)])
    kept = json.loads(note.tobytes().rstrip(b"\0"))
    assert note.shape == (reader.FAULTS_SIZE,) and 3 <= len(kept) < 50
    assert kept[0][0] == 0 and kept[0][2].endswith("x/0")


def test_replacements_reach_every_record():
    for count in (1, 2, 3, 10, 20, 34, 1000):
        stride = reader._stride(count)
        assert {(7 + n * stride) % count for n in range(count)} == set(range(count))


def test_a_replacement_is_drawn_as_if_it_had_been_asked_for(tmp_path):
    """Whatever was drawn for the broken record before it was found to be: its caption, here."""
    names = made.write_images(tmp_path / "images", 8)
    (tmp_path / "images" / "3.jpg").write_bytes(b"no image")
    rows = [{"image": n, "caption": [f"a {word} {n}" for word in "abcdef"]} for n in names]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    paths = {"data.dir": str(tmp_path / "list.json"), "data.images": str(tmp_path / "images")}
    config = make_config(**paths)
    source = sources.make_source(config, "train")
    read = reader.Reader(source, examples.make_example(config, 16, train=True))
    for seed in range(5):
        got = read(3, np.random.default_rng(seed))
        want = read(int(got["image_id"]), np.random.default_rng(seed))
        assert got["image_id"] != 3 and got.pop(reader.FAULTS)[0] and not want.pop(reader.FAULTS)[0]
        assert_same([got], [want])
