"""Nothing is overwritten or deleted that was not written here, and nothing is left half-written."""

import signal
import subprocess
import sys

import pytest

from blip2_jax.runtime import outputs
from blip2_jax.runtime.outputs import Own, Taken, check_folder, replacing_folder


def write(folder, text, **options):
    with replacing_folder(folder, **options) as draft:
        (draft / "sub").mkdir()
        (draft / "sub/weights").write_text(text)
        (draft / "config.json").write_text(text)


def content(folder):
    return {p.name: p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_replaced_only_when_asked_and_only_by_its_writer(tmp_path):
    folder = tmp_path / "model"
    write(folder, "old")
    with pytest.raises(Taken, match="written before; .* --overwrite"):
        write(folder, "new")
    write(folder, "new", overwrite=True)
    assert content(folder)["weights"] == content(folder)["config.json"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("change", ["another file", "an edited file", "a link", "in a subfolder"])
def test_what_is_not_ours_is_left_alone(change, tmp_path):
    folder = tmp_path / "model"
    write(folder, "old")
    if change == "another file":
        (folder / "README.md").write_text("mine")
    elif change == "an edited file":
        (folder / "config.json").write_text("wld")  # as long as before
    elif change == "a link":
        (folder / "link").symlink_to(tmp_path)
    else:
        (folder / "sub/mine").write_text("mine")
    before = content(folder)
    with pytest.raises(Taken, match="did not write"):
        write(folder, "new", overwrite=True)
    assert content(folder) == before


def test_other_folders_files_and_the_working_folder_are_refused(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("other", "model.safetensors"), ("file", "is a file")):
        for overwrite in (False, True):
            with pytest.raises(Taken, match=message):
                check_folder(tmp_path / name, overwrite=overwrite)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for name in (".", ".."):
        with pytest.raises(Taken, match="where this command runs"):
            check_folder(type(tmp_path)(name))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new")  # an empty folder is nobody's
    assert content(tmp_path / "empty")["weights"] == "new"


def test_a_failure_leaves_the_old_one_and_no_draft(tmp_path):
    folder = tmp_path / "model"
    write(folder, "old")
    before = content(folder)
    with pytest.raises(RuntimeError), replacing_folder(folder, overwrite=True) as draft:
        (draft / "config.json").write_text("half")
        raise RuntimeError
    (tmp_path / "model.partial").mkdir()  # a name that is somebody's
    write(tmp_path / "model", "new", overwrite=True)
    assert before["weights"] == "old" and content(folder)["weights"] == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.partial"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_a_file_system_without_exchange_does_too(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(outputs.ctypes, "CDLL", lambda *a, **k: object())
    write(tmp_path / "model", "old")
    write(tmp_path / "model", "new", overwrite=True)
    assert content(tmp_path / "model")["weights"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


KILLED = """
import os, pathlib, signal, sys
from blip2_jax.runtime import outputs
folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the swap":
    outputs._swap = die
if moment == "after the swap":
    outputs.shutil.rmtree = die
with outputs.replacing_folder(folder, overwrite=True) as draft:
    (draft / "config.json").write_text("new")
    if moment == "half written":
        die()
    (draft / "weights").write_text("new")
"""


@pytest.mark.integration
@pytest.mark.parametrize("moment", ["half written", "before the swap", "after the swap"])
def test_killed_at_any_moment_the_folder_is_the_old_or_the_new(moment, tmp_path):
    folder = tmp_path / "model"
    write(folder, "old")
    command = [sys.executable, "-c", KILLED, str(folder), moment]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    texts = {text for name, text in content(folder).items() if name != outputs.RECEIPT}
    assert texts == ({"new"} if moment == "after the swap" else {"old"})
    assert len(list(tmp_path.iterdir())) == 2  # and what it left behind
    write(folder, "newer", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # which the next one clears


def test_files_of_a_shared_folder_are_replaced_by_their_writer_alone(tmp_path):
    own = Own(tmp_path, "blip2 evaluate")

    def put(text):
        with own.replacing("predictions/a.json") as draft:
            draft.write_text(text)

    put("1")
    put("2")
    own.check("predictions/a.json", "metrics.json")
    (tmp_path / "metrics.json").write_text("mine")
    with pytest.raises(Taken, match=r"blip2 evaluate would write, .*metrics\.json"):
        own.check("predictions/a.json", "metrics.json")
    (tmp_path / "predictions/a.json").write_text("3")
    with pytest.raises(Taken, match=r"a\.json"):
        put("4")
    assert (tmp_path / "predictions/a.json").read_text() == "3"
    (tmp_path / outputs.RECEIPT).write_text("{")
    with pytest.raises(Taken, match="is damaged"):
        own.check("predictions/a.json")
