"""The embedded world can be taken away: the rest imports, prepares, trains and evaluates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tests.data.made as made

ROOT = Path(__file__).parent.parent

PROGRAM = '''
import importlib, pkgutil, sys
from pathlib import Path

class NoDigits:
    """A finder that knows no `blip2_jax.digits`."""

    def find_spec(self, name, path=None, target=None):
        if (name + ".").startswith("blip2_jax.digits."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoDigits())

import blip2_jax

for module in pkgutil.walk_packages(blip2_jax.__path__, "blip2_jax."):
    if not (module.name + ".").startswith("blip2_jax.digits."):
        importlib.import_module(module.name)

import tests.tiny as tiny
from blip2_jax import cli, evaluate, prepare, train

folder = Path(sys.argv[1])
given = [f"--dir={folder}/list.json", f"--images={folder}/images", f"--out={folder}/data"]
for split in ("train", "test"):
    words = ["--source=files", "--workers=0", f"--split={split}"]
    assert prepare.main([*words, *given]) == 0
changes = {
    "steps": 2, "data.dir": f"{folder}/data", "data.qformer_tokenizer": "package:digits-bert",
    "model.qformer.vocab_size": 190, "model.qformer.bos_token_id": 189, "data.threads": 2,
    "optim.warmup_steps": 1, "eval.every": 2, "eval.batch_size": 8, "log.every": 1,
}
config = tiny.config("stage1", **changes)
config.trainable = ("vit", *config.trainable)
assert train.train(cli.config_from_json(cli.config_to_json(config)), folder / "run") == 0
words = [f"--config={folder}/evaluation.py", f"--workdir={folder}/scores"]
assert evaluate.main([*words, f"--model={folder}/run"]) == 0
'''

EVALUATION = """
from ml_collections import ConfigDict
from configs.eval.default import get_config as default, task

def get_config():
    config = default()
    config.tasks = ConfigDict({{"x": task("retrieval", "tfds", "test", "{folder}/data")}})
    return config
"""


@pytest.mark.integration
def test_the_rest_works_without_the_embedded_world(tmp_path):
    names = made.write_images(tmp_path / "images", 16)
    rows = [
        {"image": name, "caption": f"a red {n % 10}", "split": "train" if n < 8 else "test"}
        for n, name in enumerate(names)
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "evaluation.py").write_text(EVALUATION.format(folder=tmp_path))
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    losses = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1]["step"] == 2 and "eval/loss" in losses[-1]
    assert "x/text_to_image_r1" in json.loads((tmp_path / "scores" / "metrics.json").read_text())
