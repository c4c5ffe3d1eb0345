"""Files are there whole or not at all."""

import pytest

from blip2_jax.runtime import atomic


def test_what_was_there_stays_until_the_new_is_whole(tmp_path):
    path = tmp_path / "new" / "file.json"
    atomic.write_json(path, {"text": "ä"})
    with pytest.raises(OSError, match="disk full"):
        with atomic.replacing(path) as draft:
            draft.write_text('{"te')
            raise OSError("disk full")
    assert path.read_bytes() == '{\n  "text": "ä"\n}\n'.encode()
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b"\0\0", b"[1]", b"\xff\xfe"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(atomic.DamagedFile, match=r"x\.json is damaged .* Make it again\."):
        atomic.read_json(tmp_path / "x.json", "Make it again.")
