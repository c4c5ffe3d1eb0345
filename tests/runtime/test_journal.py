"""Lines survive a kill, belong to one request, and hold any text."""

import pytest

from blip2_jax.runtime import journal
from blip2_jax.runtime.journal import Journal

REQUEST = {"task": "caption", "decoding": {"beams": (1, 2)}}
ROWS = [{"row": 0, "text": "a\nb \u2028 \u00e9 \x85"}, {"row": 1, "text": ""}]


def test_lines_are_found_again_and_a_cut_one_is_dropped(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert journal.read(path, REQUEST, "blip2 test") == []
    with Journal(path, REQUEST) as lines:
        lines.write(ROWS[:1])
    with Journal(path, REQUEST) as lines:  # a second start writes no second first line
        lines.write(ROWS[1:])
    assert journal.read(path, REQUEST, "blip2 test") == ROWS
    whole = path.read_bytes()
    cut = '{"row": 2, "text": "\u00e9"}\n'.encode()
    for size in range(1, len(cut)):  # also inside of a character
        path.write_bytes(whole + cut[:size])
        assert journal.read(path, REQUEST, "blip2 test") == ROWS
        assert path.read_bytes() == whole
    head = whole.split(b"\n")[0]
    for size in range(1, len(head)):  # of the very first line
        path.write_bytes(head[:size])
        assert journal.read(path, REQUEST, "blip2 test") == []
        assert not path.exists()


def test_a_damaged_line_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "lines.jsonl"
    with Journal(path, REQUEST) as lines:
        lines.write(ROWS)
    for damage in (b"\0\0", b"\xff", b'{"row": 0'):
        parts = path.read_bytes().split(b"\n")
        path.write_bytes(b"\n".join([parts[0], damage, *parts[2:]]))
        with pytest.raises(ValueError, match="lines.jsonl, line 2 is damaged .*Remove that line"):
            journal.read(path, REQUEST, "blip2 test")


def test_another_request_or_another_file_is_refused(tmp_path):
    path = tmp_path / "lines.jsonl"
    with Journal(path, REQUEST) as lines:
        lines.write(ROWS)
    with pytest.raises(ValueError, match="request.decoding.beams: .1, 2. saved, .3. now"):
        journal.read(path, {**REQUEST, "decoding": {"beams": (3,)}}, "blip2 test")
    path.write_text('["notes"]\n')
    with pytest.raises(ValueError, match="not written by blip2 test"):
        journal.read(path, REQUEST, "blip2 test")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not written by blip2 test"):
        journal.read(path, REQUEST, "blip2 test")
    assert path.read_bytes() == b"\xff\xfe\x00"
    with pytest.raises(ValueError, match="not written by blip2 test"):
        journal.read(tmp_path, REQUEST, "blip2 test")  # a folder
