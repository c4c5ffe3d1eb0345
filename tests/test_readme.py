"""Everything that the README and docs/ tell their readers to type is typed here, and does it.

Every command of a ```bash block, and every command quoted in its text or tables, is one test; so is
every ```python block. They run in the order of the README and of the pages that it lists, in one
clone with a reader's files in it (`readme/place.py`), each once; and after one another where one
builds on another's results.

To add a command to a page, add a function here:

    @command("blip2 convert runs/stage2 exported --to=huggingface", after=[MY_STAGE2])
    def _(ran):
        assert (ran.home / "exported/config.json").is_file()

The function checks what the page promises. The words are the page's, to the letter, in one
line; `blip2` and `python` run in this process, scripts in bash with stand-ins for the clouds'
tools. Keyword arguments say how it is run here:

    small="--config.steps=2"    words added to it, which make it small and change nothing else
    stands={"...": "photos/"}   what names of READERS stand for, besides place.STANDS_FOR; DIR is
                                a new folder for every command
    after=[COMMAND]             the commands of earlier pages that it builds on; they are run before
    environment={"DRY_RUN": "1"}
    beside=True                 if need be in a second process, while others run: takes long
    needs="libtpu"              skipped without this module
    run=function                how it is run, if not as typed; says what is left out, and why

What a command's own tests run well enough is only parsed here, and its config loaded:

    parsed("blip2 evaluate ...", by="tests/test_evaluate.py")

A block of Python needs @block("its first line"), which gets the code and runs it.

Forms, of which something is left to the reader (`[--task=NAME]`, `...`), are not run: their options
and all other names that the page uses are looked up in `readme/test_names.py`.
"""

import ast
import collections
import configparser
import contextlib
import functools
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from blip2_jax import cli
from blip2_jax.data import loader, sources
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.jsonl import read_jsonl
from tests.readme import place
from tests.readme.place import Entry, Ran, Shell
from tests.readme.text import GUIDES, ROOT

pytestmark = pytest.mark.docs

ENTRIES: dict[str, Entry] = {}
BLOCKS: dict[str, Callable[[Shell, str], None]] = {}


def command(text: str, **how) -> Callable:
    """Registers what a command of the guides is held to."""

    def register(check: Callable[[Ran], None]) -> Callable[[Ran], None]:
        assert text not in ENTRIES, f"{text} is here twice"
        entry = ENTRIES[text] = Entry(check, **how)
        assert not (entry.run and entry.beside), f"{text}: only what is typed can run beside"
        return check

    return register


def parsed(text: str, by: str, **how) -> None:
    """Registers a command that is only parsed, its config loaded: `by` are tests that run such."""
    assert (ROOT / by).is_file(), by
    command(text, parsed=by, **how)(lambda ran: None)


def block(first_line: str) -> Callable:
    """Registers how a block of Python is run; it is known by its first line."""

    def register(run: Callable[[Shell, str], None]) -> Callable[[Shell, str], None]:
        BLOCKS[first_line] = run
        return run

    return register


@pytest.fixture(scope="module")
def shell(tmp_path_factory, request):
    """The reader's clone, on a machine with one device and caches of its own."""
    folder = tmp_path_factory.mktemp("readme")
    (sweep,) = (code for code in GUIDES.blocks("python") if code.startswith("def sweep(add)"))
    seconds = "jax_persistent_cache_min_compile_time_secs"
    names = "jax_compilation_cache_dir", seconds, "jax_platforms", "jax_optimization_level"
    before = {name: getattr(jax.config, name) for name in names}
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        # What some commands compile, others read, in processes of their own too.
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        patch.setenv(seconds.upper(), "0")
        patch.setenv("BLIP2_CACHE", str(folder / "cache"))
        # A name that is no folder here is an error at once, and no download of many gigabytes.
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        flags = os.environ["XLA_FLAGS"].split()
        patch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if "device_count" not in flag))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")  # what libtpu listens to
        jax.config.update(seconds, 0.0)
        jax.config.update("jax_optimization_level", "O0")
        patch.setattr(jax, "devices", lambda *args: devices)
        patch.setattr(jax, "local_devices", lambda *args, **kwargs: devices)
        shell = Shell(folder, ENTRIES, sweep)
        patch.chdir(shell.home)
        selected = [item.callspec.params for item in request.session.items if is_mine(item)]
        shell.begin(params["text"] for params in selected if "text" in params)
        yield shell
        shell.close()
    for name, value in before.items():
        jax.config.update(name, value)
    logging.getLogger(meshes.__name__).setLevel(logging.NOTSET)  # `blip2 plan` quietens it


def is_mine(item: pytest.Item) -> bool:
    return item.path == Path(__file__) and hasattr(item, "callspec")


# --------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("text", GUIDES.commands, ids=GUIDES.commands)
def test_a_command_does_what_it_says(shell, text):
    if text not in ENTRIES:
        pytest.fail(f"There is a command that no test runs; add @command({text!r}) here.")
    entry = ENTRIES[text]
    if not entry.is_possible():
        pytest.skip(f"needs {entry.needs}")
    ran = shell.ran(text)
    assert ran.code == 0, f"{text}\n{ran.out[-3000:]}\n{ran.err[-3000:]}"
    entry.check(ran)


# What readers choose themselves; `stands` replaces nothing else.
READERS = {"DIR", "SRC", "...", "configs/R.py", "RECIPE"}


def test_every_entry_is_in_the_guides():
    """And changes nothing that they say."""
    assert ENTRIES.keys() - GUIDES.commands == set()
    for text, entry in ENTRIES.items():
        assert entry.stands.keys() <= READERS, text
        option = re.compile(r"--[\w.]+")
        twice = set(option.findall(text)) & set(option.findall(entry.small))
        assert not twice, f"{text}\nsays {twice} itself"
    assert BLOCKS.keys() - {code.splitlines()[0] for code in GUIDES.blocks("python")} == set()


def test_commands_stand_in_the_order_in_which_they_work():
    for text, entry in ENTRIES.items():
        for other in entry.after:
            before, then = map(GUIDES.commands.index, (other, text))
            assert before < then, f"{text}\nbuilds on\n{other}\nwhich stands after it"


PAIRS = "--config.steps=2 --config.data.batch_size=8 --config.log.every=1"
DIGITS = f"{PAIRS} --config.optim.warmup_steps=1 --config.eval.every=0"
SCENES = "--train=24 --test=8 --held_out=4"
DECODING = "num_beams=1 max_new_tokens=4 min_new_tokens=1"


def decoding(*tasks: str) -> str:
    """Short texts, for these tasks of an evaluation."""
    return " ".join(
        f"--config.tasks.{task}.decoding.{word}" for task in tasks for word in DECODING.split()
    )


def trained(folder: Path, steps: int = 2) -> None:
    """A workdir is as the guides say."""
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")][-1] == steps
    for name in ("timing.jsonl", "tensorboard", "checkpoints", "done.json"):
        assert (folder / name).exists(), name


@functools.cache
def extras() -> dict[str, str]:
    """What `pip install '.[EXTRA]'` may name, and what it then installs."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return dict(setup["options.extras_require"])


def known_package(shell: Shell, text: str) -> Ran:
    """Nothing is installed: the extras are setup.cfg's."""
    package = shlex.split(text)[-1]
    named = package.removeprefix(".[").removesuffix("]").split(",") if package != "." else []
    return Ran(0, "\n".join(extras()[extra] for extra in named), "", shell.home)


def known_tests(shell: Shell, text: str) -> Ran:
    """Not run: they are a part of the tests that this is one of."""
    tree = ast.parse((shell.home / shlex.split(text)[1]).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return Ran(0, "\n".join(names), "", shell.home)


# --- installing, which tests/test_package.py does


for package, installed in {
    ".": "",
    ".[cuda]": "jax[cuda12]",
    ".[tpu]": "jax[tpu]",
    ".[plan]": "jax[tpu]",
    ".[gcs]": "gcsfs",
    ".[beam]": "apache-beam",
    ".[convert]": "torch",
    ".[cuda,convert,fast]": "simplejpeg",
}.items():

    @command(f"pip install {shlex.quote(package)}", run=known_package)
    def _(ran, installed=installed):
        assert installed in ran.out


# --- at the top

SMALL = {  # of what the quickstart runs
    "prepare": SCENES,
    "train": DIGITS,
    "evaluate": "--config.batch_size=8 --config.tasks.retrieval.rerank=4 "
    "--config.tasks.retrieval.group=4 --config.report.attention=1",
}


def run_the_quickstart(shell: Shell, text: str) -> Ran:
    """The script itself, whose `blip2` notes its words; then these, in this process, small.

    The environment that it makes first is there already: tests do not install packages.
    """
    ran = shell.type(text)
    assert ran.code == 0 and len(ran.started) == 4, ran.err
    for words in ran.started:
        step = shell.blip2([*words, *SMALL[words[0]].split()])
        assert step.code == 0, f"blip2 {shlex.join(words)}\n{step.err}"
        ran.out += step.out
    return ran


QUICKSTART = "./launch/quickstart.sh"


@command(QUICKSTART, run=run_the_quickstart)
def _(ran):
    scores = ran.json("runs/quickstart/metrics.json")
    assert {"retrieval/image_to_text_r1", "caption/cider", "vqa/accuracy"} <= scores.keys()
    assert "vqa_held_out/accuracy_blind" in scores  # beside its blind baseline
    assert "<html" in (ran.home / "runs/quickstart/report.html").read_text()


def with_stand_ins(shell: Shell, text: str) -> Ran:
    """The script itself; the programs that its environment has say their words and do no more."""
    programs = shell.stands.folder / "environment"
    if not programs.exists():
        (programs / "bin").mkdir(parents=True)
        for name in ("python", "ruff", "shellcheck", "mypy"):
            program = programs / "bin" / name
            program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
            program.chmod(0o755)
        for extra in ("test", "docs"):
            (programs / f".installed[{extra}]").touch()
    return shell.type(text)


STAND_INS = {"BLIP2_VENV": "../stands/environment"}


# Its tests would run this one; tests/launch/test_docs.py makes the site.
@command("./launch/test.sh", run=with_stand_ins, environment=STAND_INS)
def _(ran):
    lint, layout, *_, tests = ran.out.splitlines()
    assert (lint, layout) == ("ruff check .", "ruff format --check .")
    assert tests.startswith("python -m pytest")
    assert "mypy" in ran.out and ".ci/run" in ran.out


@command("./launch/docs.sh", run=with_stand_ins, environment=STAND_INS)
def _(ran):
    assert ran.out == "python launch/docs.py --out=runs/docs\n"


def activate(shell: Shell, text: str) -> Ran:
    """In an environment as the scripts make it, with a stand-in for what pip would install."""
    venv.create(shell.home / ".venv")
    program = shell.home / ".venv/bin/blip2"
    program.touch(mode=0o755)
    said = subprocess.run(
        ["bash", "-c", f"{text} && command -v blip2"], capture_output=True, text=True, check=False
    )
    return Ran(said.returncode, said.stdout, said.stderr, shell.home)


@command("source .venv/bin/activate", run=activate)
def _(ran):
    assert ran.out == f"{ran.home}/.venv/bin/blip2\n"


PREPARE = "blip2 prepare --source=digits --out=DIR"


@command(PREPARE, small=SCENES)
def _(ran):
    assert (ran.dir / "prepared.json").is_file() and "24 train, 8 test" in ran.out


# --- the two claims


def show_the_sweep(shell: Shell, text: str) -> Ran:
    """Without `--backend=local`: its commands are shown, of which each would take minutes."""
    return shell.blip2(shlex.split(text.removesuffix(" --backend=local"))[1:])


for stage, runs in (("stage1", 9), ("stage2", 12)):

    @command(
        f"blip2 sweep --config=configs/digits/claims_{stage}.py --workdir=runs/claims/{stage} "
        "--backend=local",
        run=show_the_sweep,
    )
    def _(ran, stage=stage, runs=runs):
        assert ran.out.count(f"blip2 train --config=configs/digits/claims_{stage}.py") == runs


# From the scores that are kept beside the picture.
@command("python launch/claims.py")
def _(ran):
    table = ran.out.strip().splitlines()
    assert len(table) == 12 and all(line in GUIDES.text.splitlines() for line in table)
    assert "<svg" in (ran.home / "docs/pictures/claims.svg").read_text()


# --- using a model


@command(
    "blip2 generate --model=SRC --image=photos/ --output=captions.jsonl",
    small="--num_beams=1 --max_new_tokens=4",
    beside=True,
)
def _(ran):
    rows = list(map(json.loads, (ran.home / "captions.jsonl").read_text().splitlines()))[1:]
    assert [row["image"] for row in rows] == [f"photos/{n}.jpg" for n in range(8)]
    assert all(isinstance(row["text"], str) for row in rows)


@command("blip2 generate --help")
def _(ran):
    assert "Question: {} Short answer:" in ran.out  # the table of published defaults


ANY_MODEL = {"DIR": "Salesforce/blip2-opt-2.7b"}  # what is there is not written


# Of the three captioners only ours, in this process: the others are transformers' and keras-hub's.
@command(
    "python launch/benchmark.py generate --folder=DIR",
    stands=ANY_MODEL,
    small="--only=blip2_jax",
    beside=True,
)
def _(ran):
    found = json.loads(ran.out.splitlines()[-1])
    assert len(found) == 4 and all(case["rate"] > 0 for case in found.values())


# --- commands


STAGE1 = (
    "blip2 train --config=digits/stage1 --workdir=runs/mine/stage1 --config.data.dir=runs/mine/data"
)
STAGE2 = (
    "blip2 train --config=digits/stage2 --workdir=runs/mine/stage2 "
    "--config.data.dir=runs/mine/data --config.init.checkpoint=runs/mine/stage1"
)
SHARDS = "blip2 prepare --source=digits --out=runs/mine/data"


@command(SHARDS, small=SCENES)
def _(ran):
    assert (ran.home / "runs/mine/data/prepared.json").is_file()


@command(STAGE1, small=DIGITS, after=[SHARDS])
def _(ran):
    trained(ran.home / "runs/mine/stage1")


@command(STAGE2, small=DIGITS, after=[STAGE1])
def _(ran):
    trained(ran.home / "runs/mine/stage2")
    assert "fresh: language_projection" in ran.out  # the rest is stage 1's


@command(
    "python launch/benchmark.py train",
    small="--only=blip2_jax --stage=stage2 --layers=2 --steps=1 --batch_size=1",
    beside=True,
)
def _(ran):
    assert json.loads(ran.out.splitlines()[-1])["seconds"] > 0


# --- evaluation


def scored(ran: Ran, *tasks: str) -> None:
    """Scores, predictions and a page are there; the settings are said again."""
    scores = ran.json(ran.dir / "metrics.json")
    assert set(scores["settings"]["tasks"]) == set(tasks)
    for task in tasks:
        assert (ran.dir / "predictions" / f"{task}.json").is_file(), task
    assert (ran.dir / "report.html").is_file()


EVALUATE = "blip2 evaluate --config=eval/vqa:vitg-flant5xl --workdir=DIR"
VQA = ("vqav2_val", "vqav2_test_dev", "okvqa", "gqa")


# Lemmas need spaCy and its English model, which tests do not install.
@command(
    EVALUATE,
    small=f"--config.tasks.okvqa.lemmatize=False --config.report.attention=1 {decoding(*VQA)}",
    beside=True,
)
def _(ran):
    scored(ran, *VQA)
    assert "0.631" in ran.out  # the row of table 2, beside its scores


# In data/coco, where it is looked for, are shards here: other commands write them.
OWN_COCO = "--config.tasks.coco.data.dir=published/coco"
# Java and what it computes take seconds to start.
FEW_SCORES = "--config.tasks.coco.tokenizer=fallback \"--config.tasks.coco.scores=('cider',)\""


def own_stage2(shell: Shell) -> None:
    """runs/stage2: the reader's own run of stage 2, in the way of the guides' others."""
    if not (shell.home / "runs/stage2/done.json").is_file():
        words = f"train --config=configs/R.py --workdir=runs/stage2 {PAIRS}"
        assert shell.blip2(words.split()).code == 0


def with_own_stage2(shell: Shell, text: str) -> Ran:
    """As typed, where runs/stage2 and runs/caption are."""
    shell.ran(SHARDS)
    own_stage2(shell)
    return shell.type(text)


parsed(
    "blip2 evaluate --config=eval/caption:vitg-opt2.7b --workdir=DIR --model=runs/caption",
    by="tests/test_evaluate.py",
)
parsed(
    "blip2 evaluate --config=eval/retrieval:vitg --workdir=DIR --task=flickr30k "
    "--config.tasks.flickr30k.data.dir=/data/flickr30k",
    by="tests/test_evaluate.py",
)


@command(
    "blip2 evaluate --config=eval/caption:vitg-opt2.7b --workdir=DIR --task=coco "
    "--predictions=captions_of_another_system.json",
    small=f"{OWN_COCO} {FEW_SCORES}",
)
def _(ran):
    scored(ran, "coco")
    assert ran.json(ran.dir / "predictions/coco.json")[0]["caption"] == "a red dog runs"


@command(
    "python launch/benchmark_retrieval.py --folder=DIR --model=runs/quickstart/stage1",
    small="--images 4",
    after=[QUICKSTART],
    beside=True,
)
def _(ran):
    images, texts, pairs, *_ = ran.out.splitlines()[-1].split()
    assert (images, texts, pairs) == ("4", "20", "80")


# --- planning


# What libtpu needs long for: large batches and tables of words, long texts, dropout.
SIZES = " ".join(
    f"--config.{key}"
    for key in (
        *("data.text_length=8", "data.llm_length=8", "model.qformer.num_query_tokens=4"),
        *("model.qformer.num_layers=1", "model.qformer.cross_attention_frequency=1"),
        *("model.qformer.hidden_size=64", "model.qformer.num_heads=2", "model.qformer.mlp_dim=64"),
        *("model.qformer.vocab_size=96", "model.qformer.dropout=0"),
    )
)


def planned(ran: Ran, chips: int) -> None:
    """The plan was printed, and written to the file that its last line names."""
    assert "Measured by the compiler" in ran.out
    plan = ran.json(ran.out.splitlines()[-1].removeprefix("Written to "))
    assert plan["fits"] and plan["chips"] == chips


@command(
    "blip2 plan --config=stage1 --topology=v5p-128 --batch=nearest",
    small=f"{SIZES} --config.data.batch_size=70",
    needs="libtpu",
    beside=True,
)
def _(ran):
    planned(ran, 64)
    assert "The nearest batch size is 64 (the recipe's is 70)" in ran.err


@command(
    "blip2 plan --config=stage2:vitg-flant5xxl-paper --topology=v5e-16 --config.stage.accumulate=5",
    small=f"{SIZES} --config.data.batch_size=80",
    needs="libtpu",
    beside=True,
)
def _(ran):
    planned(ran, 16)
    config = cli.load_config("configs/stage2.py:vitg-flant5xxl-paper")
    assert config.data.batch_size % (16 * 5) == 0  # as it is typed, it divides too


# The reader's recipe is here one that compiles in seconds: see the sweeps below.
SWEPT = {"configs/R.py": "configs/swept.py", "RECIPE": "configs/swept.py", "DIR": "runs/lr"}


@command(
    "blip2 plan --config=configs/R.py --topology=2xv6e-256 --config.mesh.data=2 --batch=nearest",
    stands=SWEPT,
    needs="libtpu",
    beside=True,
)
def _(ran):
    planned(ran, 512)
    assert "The nearest batch size is 512 (the recipe's is 4)" in ran.err


@command(
    "blip2 plan --config=configs/R.py --topology=v5e-64 --mesh=search",
    stands=SWEPT,
    small="--tries=1 --config.data.batch_size=64",
    needs="libtpu",
    beside=True,
)
def _(ran):
    planned(ran, 64)


@command("pytest tests/stages/test_flops.py -m full_size", run=known_tests)
def _(ran):
    assert "test_" in ran.out


# Full-size programs take minutes each: only what there is is shown, which is nothing yet.
@command("python launch/plans.py table", small="--show")
def _(ran):
    assert "| recipe | slice |" in ran.out and "are not compiled yet" in ran.out


@command("python launch/plans.py scaling", small="--show")
def _(ran):
    assert "| 8 rows a chip, MiB sent | v6e-16 |" in ran.out


# --- data


ALONE = "--workers=0"  # processes would each import everything


@command("blip2 prepare --source=files --dir=cc3m/ --check", small=ALONE)
def _(ran):
    assert "usable: 332 train records" in ran.out


@command(
    "blip2 train --config=configs/R.py --workdir=DIR --config.data.source=files "
    "--config.data.dir='cc3m/{00000..00331}.tar'",
    small=PAIRS,
    beside=True,
)
def _(ran):
    trained(ran.dir)


for where, tests in (
    ("files --config.data.dir=list.jsonl --config.data.images=photos", "tests/data/test_lists.py"),
    ("coco --config.data.dir=/data/coco", "tests/data/test_lists.py"),
):
    parsed(
        f"blip2 train --config=configs/R.py --workdir=DIR --config.data.source={where}", by=tests
    )


COCO = "blip2 prepare --source=coco --dir=/data/coco --split=train --out=data/coco"


@command(COCO, small=ALONE)
def _(ran):
    assert "data/coco: 6 train records" in ran.out
    for name in ("README.md", "report.html", "dataset_info.json"):
        assert (ran.home / "data/coco" / name).is_file()


@command("blip2 prepare --source=files --dir=web/ --out=data/web --shorter_side=384", small=ALONE)
def _(ran):
    assert "data/web: 2 train records" in ran.out


@command(
    "blip2 prepare --source=files --dir=web/ --out=data/filtered --capfilt --model=runs/stage2 "
    "--ranker=runs/stage1",
    run=with_own_stage2,
    small=f"{ALONE} --samples=2",
    after=[STAGE1],
)
def _(ran):
    assert "2 train records, 4 captions" in ran.out  # the best two of each


parsed(
    "blip2 train --config=configs/R.py --workdir=DIR --config.data.dir=data/coco",
    by="tests/test_train.py",
)


@command("python launch/benchmark_data.py index --folder=DIR", small="--shards=2 --records=40")
def _(ran):
    assert "80 records in 2 tars" in ran.out and "next start" in ran.out


# Of one size, for a moment each; TensorFlow's loader where it is installed.
@command(
    "python launch/benchmark_data.py speed --folder=DIR",
    small="--rounds=1 --seconds=0.05 --photos=64 --sizes=500x375",
    beside=True,
)
def _(ran):
    for name in ("torch, uint8", "blip2_jax, exact", "fast against exact"):
        assert name in ran.out


# --- your own towers


OWN = "--config.model.vit.source=my-clip --config.model.vit.layers=23"
parsed(
    f"blip2 train --config=stage1 --workdir=runs/own/stage1 {OWN}",
    by="tests/test_train.py",
)
parsed(
    f"blip2 train --config=stage2 --workdir=runs/own/stage2 {OWN} "
    "--config.model.llm.source=my-llm --config.init.checkpoint=runs/own/stage1",
    by="tests/test_train.py",
)


# --- weights


@command("blip2 convert blip2-opt-2.7b runs/native --to=native --dtype=bfloat16")
def _(ran):
    assert "runs/native: " in ran.out and (ran.home / "runs/native").is_dir()


@command("blip2 convert runs/stage2 exported --to=huggingface", run=with_own_stage2)
def _(ran):
    import transformers

    model, info = transformers.Blip2ForConditionalGeneration.from_pretrained(
        ran.home / "exported", output_loading_info=True
    )
    assert not any(info.values()), info


@command(
    "blip2 convert blip2_pretrained.pth exported/itm --to=huggingface --vit=eva_vit_g.pth",
    after=["blip2 convert runs/stage2 exported --to=huggingface"],  # else it is not empty for that
)
def _(ran):
    assert (ran.home / "exported/itm/config.json").is_file()


@command("python launch/benchmark.py load --folder=DIR", stands=ANY_MODEL, small="--only=blip2_jax")
def _(ran):
    assert json.loads(ran.out.splitlines()[-1])["gb"] > 0


@command(
    "python launch/benchmark.py bfloat16 --folder=DIR",
    stands={"DIR": "published_sizes"},
    beside=True,
)
def _(ran):
    assert {"blip2_jax float32", "transformers bfloat16"} <= {
        line[:26].strip() for line in ran.out.splitlines()
    }


# --- when things go wrong


# One run, killed once as it starts; without several processes, SIGTERM and other devices.
@command(
    "python launch/drill.py --out=DIR",
    small="--times=1 --processes=1 --signals=KILL --devices=same --steps=4 --seed=1",
    beside=True,
)
def _(ran):
    assert ran.out.startswith("ok  processes 1")


# --- launching: with stand-ins for the clouds; the launchers look up the config's keys themselves


def started(ran: Ran, *workdirs: str) -> None:
    """`blip2 train` was started so often, on the guides' recipe and workdir."""
    train = ["train", "--config=configs/R.py"]
    assert ran.started == [[*train, f"--workdir={workdir}"] for workdir in workdirs]


@command("PROCESSES=2 ./launch/local.sh configs/R.py runs/mine")
def _(ran):
    started(ran, "runs/mine", "runs/mine")


@command("NODES=2 GPUS=8 TIME=12:00:00 ./launch/slurm.sh configs/R.py /shared/mine")
def _(ran):
    started(ran, "shared/mine")


# Not for real, as it would install gcsfuse and mount the bucket.
@command(
    "TPU_NAME=mine TPU_TYPE=v5litepod-16 SPOT=1 ./launch/tpu.sh configs/R.py gs://BUCKET/mine",
    environment={"DRY_RUN": "1"},
)
def _(ran):
    assert "--accelerator-type=v5litepod-16" in ran.out and "--spot" in ran.out
    assert "run --config=configs/R.py --workdir=/gcs/BUCKET/mine" in ran.out


@command(
    "IMAGE=... ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 ./launch/gke.sh configs/R.py "
    "gs://BUCKET/mine"
)
def _(ran):
    manifest = (ran.home.parent / "stands/manifest.yaml").read_text()
    assert '"--workdir=/gcs/BUCKET/mine"' in manifest and "parallelism: 4" in manifest


# --- sweeps: of a recipe that is trained in a second

SHOWN = "blip2 sweep --config=configs/R.py --workdir=runs/lr"


@command(SHOWN, stands=SWEPT)
def _(ran):
    assert ran.out.count("blip2 train --config=configs/swept.py") == 6
    assert "--workdir=runs/lr/optim.peak_lr=0.0001,seed=0 " in ran.out


def sweep_what_is_left(shell: Shell, text: str) -> Ran:
    """The first run is done before, by the very command that a sweep shows, and so are four more.

    These are copies of it under their own names and configs: it leaves the last to the sweep.
    """
    shown = [shlex.split(line)[1:] for line in shell.ran(SHOWN).out.splitlines()]
    first = shell.blip2(shown[0])
    assert first.code == 0, first.err
    folders = [shell.home / words[2].partition("=")[2] for words in shown]
    done = json.loads((folders[0] / "done.json").read_text())
    for words, folder in zip(shown[1:-1], folders[1:-1], strict=True):
        shutil.copytree(folders[0], folder)
        config = cli.load_config("configs/swept.py", words[3:])
        content = {**done, "config": json.loads(cli.config_to_json(config))}
        (folder / "done.json").write_text(json.dumps(content))
    return shell.type(text)


def swept(ran: Ran) -> None:
    assert len((ran.home / "runs/lr/results.csv").read_text().splitlines()) == 1 + 6
    assert "<svg" in (ran.home / "runs/lr/results.html").read_text()
    trained(ran.home / "runs/lr/optim.peak_lr=0.0003,seed=2")


@command(
    "blip2 sweep --config=RECIPE --workdir=DIR --backend=local",
    stands=SWEPT,
    run=sweep_what_is_left,
)
def _(ran):
    swept(ran)


# In the same workdir, where it finds all runs finished.
@command(
    "blip2 sweep --config=configs/R.py --workdir=runs/lr --backend=local --workers=2", stands=SWEPT
)
def _(ran):
    swept(ran)


# ----------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("code", GUIDES.blocks("python"), ids=lambda code: code.splitlines()[0])
def test_a_block_of_python_runs(shell, code):
    first = code.splitlines()[0]
    if first not in BLOCKS:
        pytest.fail(f"There is Python that no test runs; add @block({first!r}) here.")
    BLOCKS[first](shell, code)


@block("import blip2_jax")
def use_a_model(shell: Shell, code: str) -> None:
    """Line by line; what a line's comment says of its value must be so."""
    picture = Image.open("beach.jpg")
    texts = ["a red dog", "two dogs"]
    names = {
        "pil_image": picture,
        "array": np.asarray(picture),
        "image_bytes": Path("beach.jpg").read_bytes(),
        "images": [f"photos/{n}.jpg" for n in range(3)],
    }
    sizes = {"N": 3, "M": len(texts)}
    lines, said = code.splitlines(), []
    for node in ast.parse(code).body:
        part = ast.unparse(node)
        names["texts"] = [*texts, "a cat"] if ".match(" in part else texts  # one for each image
        if not isinstance(node, ast.Expr):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(part, names)
            said.append(out.getvalue())
            continue
        value = eval(part, names)
        comment = lines[node.end_lineno - 1].partition("  # ")[2]
        if "list[str]" in comment or not comment:
            assert isinstance(value, list) and all(isinstance(text, str) for text in value), part
        else:
            shape = re.match(r"float\[([\w, ]+)\]", comment)[1].split(", ")
            assert value.shape == tuple(sizes.get(n) or int(n) for n in shape), part
            assert value.dtype == np.float32
        if "0..1" in comment:
            assert ((value >= 0) & (value <= 1)).all()
    assert len(said) == 4  # the import, two models, and what was streamed


@block('config.data.source = "files"')
def mix(shell: Shell, code: str) -> None:
    """In a recipe: both parts are opened, and drawn from by their weights."""
    config = ConfigDict(cli.load_config("configs/R.py", ["--config.data.dir="]).to_dict())
    exec(place.replace(code, place.STANDS_FOR), {"config": config, "ConfigDict": ConfigDict})
    source = sources.make_source(config, "train")
    drawn = [n for step in range(10) for n in loader.record_numbers(source, config, step)]
    of_part = collections.Counter(source.names[source.part_of(n)] for n in drawn)
    assert of_part == {"coco": len(drawn) / 4, "web": len(drawn) * 3 / 4}
    assert source[len(source) - 1]["captions"] == ["picture 0"]  # from the bucket


@block("from configs.eval import caption  # in a recipe")
def evaluate_while_training(shell: Shell, code: str) -> None:
    """In a recipe; its keys are those of the evaluation's tasks. tests/test_train.py runs such."""
    recipe = "from configs.R import get_config as R\n\n\ndef get_config():\n    config = R()\n"
    first, *rest = code.splitlines()
    lines = "".join(f"    {line}\n" for line in rest)
    Path("configs/watched.py").write_text(f"{first}\n{recipe}{lines}    return config\n")
    config = cli.load_config("configs/watched.py", ["--config.evals.coco.decoding.num_beams=1"])
    assert set(config.evals) == {"coco", "nocaps"} and config.eval.tasks_every == 5000


@block("def sweep(add):  # in a recipe, beside get_config()")
def sweep(shell: Shell, code: str) -> None:
    """In the recipe that the commands of sweeps are run with."""
    assert code in (shell.home / "configs/swept.py").read_text()


# ------------------------------------------------------------------------- what they log and make


@pytest.mark.parametrize("name", GUIDES.metrics)
def test_a_metric_that_the_guides_name_is_logged(shell, name):
    ran = shell.ran(STAGE1)
    assert name in read_jsonl(ran.home / "runs/mine/stage1/metrics.jsonl")[-1]


# Files that the guides name and that their commands make: by which, and where.
MADE = {
    "runs/quickstart/report.html": (QUICKSTART, "runs/quickstart/report.html"),
    "runs/quickstart/metrics.json": (QUICKSTART, "runs/quickstart/metrics.json"),
    "tensorboard/": (STAGE1, "runs/mine/stage1/tensorboard"),
    "checkpoints/": (STAGE1, "runs/mine/stage1/checkpoints"),
    "WORKDIR/checkpoints/STEP": (STAGE1, "runs/mine/stage1/checkpoints/2"),
    "predictions/vqav2_test_dev.json": (EVALUATE, "{dir}/predictions/vqav2_test_dev.json"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_file_that_the_guides_name_is_made(shell, name):
    text, path = MADE[name]
    ran = shell.ran(text)
    assert name in GUIDES.files and (ran.home / path.format(dir=ran.dir)).exists()
