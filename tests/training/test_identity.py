"""What may differ when a run goes on, and what is said of what may not."""

import copy
import json
import os
import re
import shutil

import pytest

import tests.tiny as tiny
from blip2_jax import cli
from blip2_jax.data import tokenizers
from blip2_jax.runtime import digest
from blip2_jax.runtime.compare import moved, run_differences
from blip2_jax.training import identity

CONFIG = json.loads(
    cli.config_to_json(
        tiny.config(
            **{
                "data.mixture": {"web": {"dir": "/a", "images": "/b", "weight": 1.0}},
                "evals": {
                    "coco": {"model": "", "prompt": "a", "data": {"dir": "", "split": "val"}}
                },
                "steps": 10,
            }
        )
    )
)
SAVED = {
    "config": CONFIG,
    "data": {"web": {"records": 3, "digest": "01"}},
    "tokenizers": {"llm": "0"},
}


def changed(path, value):
    document = copy.deepcopy(SAVED)
    *parents, name = path.split(".")
    holder = document
    for parent in parents:
        holder = holder[parent]
    holder[name] = value
    return document


@pytest.mark.parametrize(
    "path",
    [
        "config.data.dir", "config.data.images", "config.data.mixture.web.dir",
        "config.data.mixture.web.images", "config.data.llm_tokenizer", "config.model.vit.source",
        "config.init.checkpoint", "config.evals.coco.data.dir",
    ],
)  # fmt: skip
def test_places_are_free_and_known_to_differ(path):
    now = changed(path, "/elsewhere")
    assert run_differences(SAVED, now) == []
    assert moved(SAVED["config"], now["config"])


@pytest.mark.parametrize(
    "path",
    [
        "config.mesh.fsdp",
        "config.checkpoint.every",
        "config.data.workers",
        "config.evals.coco.model",
    ],
)
def test_execution_is_free(path):
    now = changed(path, 7)
    assert run_differences(SAVED, now) == [] and not moved(SAVED["config"], now["config"])


def test_steps_may_become_more():
    assert run_differences(SAVED, changed("config.steps", 11)) == []
    assert "10 saved, 9 now" in run_differences(SAVED, changed("config.steps", 9))[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("config.data.mixture.web.weight", "mixture.web.weight: 1.0 saved"),
        ("data.web.digest", "data.web.digest: '01' saved.*config.data leads to other records"),
        ("data.web.records", "data.web.records: 3 saved.*config.data leads to other records"),
        ("tokenizers.llm", "tokenizers.llm: '0' saved.*another tokenizer"),
        ("config.seed", "config.seed: 0 saved"),
        ("config.evals.coco.prompt", "config.evals.coco.prompt: 'a' saved"),
        ("config.evals.coco.data.split", "config.evals.coco.data.split: 'val' saved"),
    ],
)
def test_contents_are_not_free_and_named(path, message):
    (line,) = run_differences(SAVED, changed(path, "other"))
    assert re.search(message, line), line


def test_a_start_may_move_but_not_change(tmp_path):
    """It is not read again: under its name of then it may be gone."""
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "weights").write_text("some")
    config = tiny.config(**{"init.bert": str(tmp_path / "bert")})
    saved = {
        "config": json.loads(cli.config_to_json(config)),
        "init": identity.start_digests(config),
    }
    moved_to = shutil.copytree(tmp_path / "bert", tmp_path / "moved")
    elsewhere = tiny.config(**{"init.bert": str(moved_to)})
    identity.check_start(saved, elsewhere, tmp_path)
    (moved_to / "weights").write_text("else")
    for other in (elsewhere, tiny.config(), tiny.config(**{"init.bert": "owner/name"})):
        with pytest.raises(
            cli.ConfigError, match="config.init.bert: .*started from something else"
        ):
            identity.check_start(saved, other, tmp_path)
    shutil.rmtree(tmp_path / "bert")
    identity.check_start(saved, config, tmp_path)


def test_a_digest_of_files_sees_sizes_and_contents_and_no_names(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "BLOCK", 16)
    monkeypatch.setattr(digest, "MAX_BLOCKS", 8)
    paths = [tmp_path / "a", tmp_path / "b"]
    data = os.urandom(1000)
    for path in paths:
        path.write_bytes(data)
    before = digest.of_files(paths)
    renamed = [path.rename(path.with_suffix(".x")) for path in paths]
    assert digest.of_files(renamed) == before
    for other in (data + b"1", b"!" + data[1:], data[:-1] + b"!", bytes(1000)):
        renamed[1].write_bytes(other)
        assert digest.of_files(renamed) != before
    small = tmp_path / "small"
    small.write_bytes(data[:100])
    before = digest.of_files([small])
    for i in range(100):  # of what is small, every byte counts
        small.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 : 100])
        assert digest.of_files([small]) != before
    assert digest.of_files([]) and digest.of_files([small]) != digest.of_files([small, small])


def test_a_digest_of_a_tokenizer_sees_words_merges_and_special_tokens(tmp_path):
    for name in ("digits-bert", "digits-opt"):
        tokenizer = tokenizers.load(f"package:{name}")
        before = tokenizers.digest(tokenizer)
        folder = tmp_path / name
        tokenizer.save_pretrained(folder)
        assert tokenizers.digest(tokenizers.load(str(folder))) == before
        other = tokenizers.load(str(folder))
        other.add_special_tokens({"eos_token": "[NEW]"})
        assert tokenizers.digest(other) != before
        files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
        whole, settings = (json.loads(file.read_text()) for file in files)
        whole["model"].get("merges", []).reverse()
        settings["do_lower_case"] = False  # BERT's kind, which has no merges
        for file, content in zip(files, (whole, settings), strict=True):
            file.write_text(json.dumps(content))
        assert tokenizers.digest(tokenizers.load(str(folder))) != before
