"""Tars are read in place: any record, at any position, and damage is named."""

import importlib.util
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest

import tests.data.made as made
from blip2_jax.data import files, sources, tars
from blip2_jax.data.faults import RecordError


def test_every_record_is_found_at_its_position(tmp_path):
    made.write_shards(tmp_path, 3, 4)
    source = sources.open_files(str(tmp_path))
    assert len(source) == 12
    for position in (11, 0, 5, 4, 7):  # any order
        record = source[position]
        shard, n = divmod(position, 4)
        assert record["id"] == f"{shard:05d}{n:04d}"
        assert record["image"] == made.jpeg(position)
        assert record["captions"] == [f"picture {shard} {n}"]
        assert record["url"].startswith("http://x/")
    with pytest.raises(IndexError):
        source[12]


def test_braces_and_globs_name_the_same_shards(tmp_path):
    made.write_shards(tmp_path, 3, 1)
    braces = sources.open_files(f"{tmp_path}/{{00000..00002}}.tar")
    stars = sources.open_files(f"{tmp_path}/0000*.tar")
    assert [r["id"] for r in braces] == [r["id"] for r in stars]
    with pytest.raises(ValueError, match="no such file"):
        sources.open_files(f"{tmp_path}/nothing")


NAMES = ("short", "a/" * 40 + "deep", "naïve–名", "n" * 200)  # ustar has no place for the last
TARS = [(tarfile.USTAR_FORMAT, name) for name in NAMES[:3]]
TARS += [(format, name) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for name in NAMES]


@pytest.mark.parametrize(("format", "key"), TARS)
def test_all_tar_formats_and_long_names(tmp_path, format, key):
    path = made.write_tar(
        tmp_path / "x.tar",
        [(f"{key}.jpg", made.jpeg(1)), (f"{key}.txt", b"one"), ("z.jpg", made.jpeg(2)),
         ("z.txt", b"two")],
        format=format,
    )  # fmt: skip
    with tarfile.open(path) as tar, open(path, "rb") as file:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
        found = list(tars.scan(file, os.path.getsize(path)))
    assert [(m.name, m.offset, m.size) for m in found] == expected
    assert [r["captions"] for r in tars.TarSource([path])] == [["one"], ["two"]]


def test_sizes_in_base_256(tmp_path):
    header = bytearray(tarfile.TarInfo("big.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (7).to_bytes(11, "big")
    data = bytes(header) + b"content".ljust(512, b"\0") + bytes(1024)
    (member,) = tars.scan(io.BytesIO(data), len(data))
    assert member == tars.Member("big.jpg", 512, 7)


def test_an_index_is_made_once_and_again_when_the_archive_changes(tmp_path):
    (path,) = made.write_shards(tmp_path, 1, 3)
    assert len(tars.TarSource([path])) == 3
    before = os.stat(f"{path}.idx").st_mtime_ns
    assert len(tars.TarSource([path])) == 3
    assert os.stat(f"{path}.idx").st_mtime_ns == before
    os.remove(path)
    made.write_shards(tmp_path, 1, 5)
    assert len(tars.TarSource([path])) == 5


def test_indexes_go_elsewhere_when_asked_and_a_broken_one_is_made_again(tmp_path):
    (tmp_path / "tars").mkdir()
    (path,) = made.write_shards(tmp_path / "tars", 1, 2)
    folder = str(tmp_path / "indexes")
    assert len(tars.TarSource([path], index_folder=folder)) == 2
    assert os.listdir(tmp_path / "tars") == ["00000.tar"]
    for name in ("*.json", "*.idx"):  # a kill or a power cut in the middle of something
        for content in (b"", b"{", b"[]", b"\0" * 40):
            (file,) = (tmp_path / "indexes").glob(name)
            file.write_bytes(content)
            assert len(tars.TarSource([path], index_folder=folder)) == 2


def test_the_digest_is_of_what_an_archive_holds_wherever_it_lies(tmp_path):
    (path,) = made.write_shards(tmp_path, 1, 3)
    before = tars.TarSource([path]).identity()
    moved = tmp_path / "elsewhere" / "other.tar"
    moved.parent.mkdir()
    os.rename(path, moved)
    assert tars.TarSource([str(moved)]).identity() == before
    members = [(f"{i:09d}.jpg", made.jpeg(i)) for i in range(3)]
    members += [(f"{i:09d}.txt", b"one more word") for i in range(3)]
    made.write_tar(moved, sorted(members))
    assert tars.TarSource([str(moved)]).identity() != before


def test_an_index_costs_32_bytes_a_record_and_is_mapped(tmp_path):
    (path,) = made.write_shards(tmp_path, 1, 50)
    source = tars.TarSource([path])
    assert os.path.getsize(f"{path}.idx") <= 50 * 32 + 1024
    assert all(isinstance(rows, np.memmap) for rows in source._maps)
    assert len(pickle.dumps(source)) < 2000  # what a worker process is sent
    assert pickle.loads(pickle.dumps(source))[7]["id"] == "000000007"


def test_captions_in_all_their_places(tmp_path):
    image = made.jpeg()
    path = made.write_tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", image), ("a.json", b'["first", "second"]'),  # CapFilt's
            ("b.png", image), ("b.json", b'{"caption": ["one", "two"]}'),
            ("c.jpeg", image), ("c.txt", b"plain\n"), ("c.cls", b"7"),
            ("d.jpg", image), ("d.json", b'{"width": 3}'), ("d.txt", b"of the text"),
        ],
    )  # fmt: skip
    captions = [record["captions"] for record in tars.TarSource([path])]
    assert captions == [["first", "second"], ["one", "two"], ["plain"], ["of the text"]]


def test_members_stand_in_any_order(tmp_path):
    image = made.jpeg()
    path = made.write_tar(
        tmp_path / "x.tar",
        [(f"{n}.jpg", made.jpeg(n)) for n in range(3)]
        + [(f"{n}.txt", f"text {n}".encode()) for n in (2, 0, 1)]
        + [("1.jpg", image), ("1.txt", b"again")],
    )
    source = tars.TarSource([path])
    assert [r["captions"] for r in source] == [["text 0"], ["text 1"], ["text 2"]]
    assert [r["image"] for r in source] == [made.jpeg(n) for n in range(3)]
    assert source.faults.by_reason == {"duplicated key": 1}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["k.input.jpg", "k.txt"], {"k.input": "k.txt"}),
        (["k.txt", "k.input.jpg"], {"k.input": "k.txt"}),
        (["photo.v1.jpg", "photo.v1.txt"], {"photo.v1": "photo.v1.txt"}),
        (
            ["p.v1.jpg", "p.v2.jpg", "p.v2.txt", "p.v1.txt"],
            {"p.v1": "p.v1.txt", "p.v2": "p.v2.txt"},
        ),
        (["k.jpg", "k.seg.png", "k.txt"], {"k": "k.txt"}),
        (["k.JPEG", "k.caption"], {"k": "k.caption"}),
        (["k.jfif", "k.text"], {"k": "k.text"}),
        (["a.b/k.jpg", "a.b/k.txt"], {"k": "a.b/k.txt"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_dots_in_names(tmp_path, names, expected):
    members = [(n, n.encode() if n[-3:] in ("txt", "ext", "ion") else made.jpeg()) for n in names]
    source = tars.TarSource([made.write_tar(tmp_path / "x.tar", members)])
    assert {r["id"]: r["captions"][0] for r in source} == expected and not source.faults.count


def test_members_that_make_no_record_are_named(tmp_path):
    image = made.jpeg()
    path = made.write_tar(
        tmp_path / "x.tar",
        [("a.jpg", image), ("a.txt", b"fine"), ("b.heic", image), ("b.txt", b"of another kind"),
         ("c.in.jpg", image), ("c.out.jpg", image), ("c.txt", b"of which?")],
    )  # fmt: skip
    source = tars.TarSource([path])
    assert len(source) == 1
    assert source.faults.by_reason == {
        "no image (members end in .heic)": 1, "several images of one key": 1,
    }  # fmt: skip
    assert "c.in, c.out" in source.faults.examples["several images of one key"][0]


def test_what_is_no_record_is_counted_by_reason_and_place(tmp_path):
    image = made.jpeg()
    path = made.write_tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", image), ("a.txt", b"fine"),
            ("b.txt", b"no image"),
            ("c.jpg", b""), ("c.txt", b"empty image"),
            ("d.jpg", image),
            ("a.jpg", image), ("a.txt", b"again"),
            ("._e.jpg", b"x"),
        ],
    )  # fmt: skip
    source = tars.TarSource([path])
    assert len(source) == 1
    assert {reason: found["count"] for reason, found in source.faults.to_json().items()} == {
        "no image": 1, "empty file": 1, "no caption": 1, "duplicated key": 1,
    }  # fmt: skip
    assert source.faults.examples["duplicated key"] == [f"{path}:a"]


def test_a_tar_that_is_cut_short_gives_what_is_whole(tmp_path):
    good, cut, empty = made.write_shards(tmp_path, 3, 4)
    whole = open(cut, "rb").read()
    with tarfile.open(cut) as tar:
        third = tar.getmembers()[6]
    with open(cut, "wb") as file:
        file.write(whole[: third.offset_data + 100])
    open(empty, "w").close()
    source = tars.TarSource([good, cut, empty])
    assert len(source) == 4 + 2
    assert source.faults.by_reason == {"archive cut short": 1, "empty file": 1}
    assert third.name in source.faults.examples["archive cut short"][0]


def test_a_damaged_header_ends_an_archive_and_no_archive_is_an_error(tmp_path):
    (path,) = made.write_shards(tmp_path, 1, 4)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[6]
    with open(path, "r+b") as file:
        file.seek(third.offset)
        file.write(os.urandom(512))
    source = tars.TarSource([path])
    assert (len(source), source.faults.by_reason) == (2, {"damaged archive": 1})
    (tmp_path / "z.tar").write_bytes(made.jpeg())
    with pytest.raises(ValueError, match="not one record.*\n.*damaged archive"):
        tars.TarSource([str(tmp_path / "z.tar")])


def test_links_and_devices_are_never_followed(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in made.members("a", 0, "fine"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("../../b.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert len(tars.TarSource([str(path)])) == 1
    assert sorted(os.listdir(tmp_path)) == ["x.tar", "x.tar.idx", "x.tar.idx.json"]


def test_text_that_is_not_utf8_or_not_json_is_said(tmp_path):
    image = made.jpeg()
    path = made.write_tar(
        tmp_path / "x.tar",
        [("a.jpg", image), ("a.txt", "é".encode("latin1")), ("b.jpg", image), ("b.json", b"{"),
         ("c.jpg", image), ("c.txt", b"  \n")],
    )  # fmt: skip
    source = tars.TarSource([path])
    for position, reason in enumerate(["not UTF-8", "not JSON", "empty caption"]):
        with pytest.raises(RecordError) as error:
            source[position]
        assert error.value.reason == reason and f"{path}:" in error.value.where


def test_remote_tars_are_read_by_range(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    import fsspec

    (path,) = made.write_shards(tmp_path, 1, 6)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/00000.tar", open(path, "rb").read())
    local, remote = tars.TarSource([path]), sources.open_files("memory://bucket")
    assert [remote[i] for i in (5, 2)] == [local[i] for i in (5, 2)]
    assert "memory://" in remote.where(3)
    fs.rm("/bucket/00000.tar")
    with pytest.raises(RecordError, match="no such file"):
        remote[3]
    with pytest.raises(ValueError, match="nosuch://bucket/x.*not known"):
        files.expand("nosuch://bucket/x")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_driver_is_named():
    with pytest.raises(ValueError, match="gs://bucket/x: pip install 'blip2_jax.gcs.'"):
        files.expand("gs://bucket/x")


def test_the_notes_beside_an_index_say_what_it_is_of(tmp_path):
    (path,) = made.write_shards(tmp_path, 1, 2)
    tars.TarSource([path])
    note = json.loads(open(f"{path}.idx.json").read())
    assert note["records"] == 2 and note["size"] == os.path.getsize(path)


def test_other_members_of_a_record_are_stepped_over_and_large_ones_refused(tmp_path, monkeypatch):
    from blip2_jax.data import lists

    monkeypatch.setattr(lists, "MAX_BYTES", 10_000)
    image = made.jpeg(1)
    path = made.write_tar(
        tmp_path / "x.tar",
        [("a.jpg", image), ("a.npy", bytes(500_000)), ("a.txt", b"far away"),
         ("b.jpg", image), ("b.txt", b"x" * 20_000)],
    )  # fmt: skip
    source = tars.TarSource([path])
    read = []
    real = files.Ranges.read
    monkeypatch.setattr(files.Ranges, "read", lambda s, *a: read.append(a[2]) or real(s, *a))
    (record,) = source
    assert record["captions"] == ["far away"] and record["image"] == image
    assert sum(read) < 5_000
    assert source.faults.by_reason == {"file of more than 10000 bytes": 1}
