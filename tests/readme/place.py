"""The guides' reader: a fresh clone with a reader's own files in it, and a shell that types there.

Names that the guides use for things of their readers are folders and files here, small and random:
hub names (`Salesforce/blip2-opt-2.7b`) are folders in the published layout, which come before the
hub; `photos/`, `cc3m/`, `list.jsonl`, `configs/R.py` and others are as they describe them.
What has a name that cannot exist here is in `STANDS_FOR`, and nothing else is replaced.
"""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import torch
import transformers

from blip2_jax.data import tokenizers
from blip2_jax.weights import checkpoint, lavis
from tests.data import made
from tests.inference import published
from tests.launch import fakes
from tests.launch.test_launchers import SETTINGS, Place
from tests.readme.run import parse, run
from tests.readme.text import ROOT
from tests.test_evaluate import write_coco, write_gqa, write_nocaps, write_vqa
from tests.weights import models

STANDS_FOR = {
    "SRC": "Salesforce/blip2-opt-2.7b",  # any model
    "/data/": "published/",  # data sets in their owners' form
    "gs://bucket/": "memory://bucket/",
    "/shared/mine": "shared/mine",
}
# DIR is a new folder for every command, or what its entry says.

RECIPE = '''"""A recipe of the reader's own: stage 2 as published, on towers that are small here."""

from ml_collections import ConfigDict

from configs.stage2 import get_config as published


def get_config():
    config = published("vitg-opt2.7b-paper")
    config.name = "mine"
    config.steps = 2
    config.dtype = config.frozen_dtype = "float32"
    config.init.checkpoint = ""
    config.model.llm.remat = "none"
    config.model.qformer.update(
        dict(num_query_tokens=4, hidden_size=64, num_layers=2, num_heads=2, mlp_dim=64, dropout=0.0)
    )
    config.data.mixture = ConfigDict()
    config.data.dir = "runs/mine/data"
    config.data.threads = 2
    config.data.batch_size = 64
    config.optim.warmup_steps = 1
    config.log.every = 1
    return config
'''
# One that is trained in a second, for a sweep of many.
SWEPT = '''"""A recipe of the reader's own, with the guides' sweep."""

from tests.recipes.tiny_lm import get_config as tiny


def get_config():
    config = tiny()
    config.steps, config.optim.warmup_steps = 2, 1
    return config


'''


def write_all(home: Path, sweep: str) -> None:
    """Everything that a reader has.

    Args:
      home: the clone.
      sweep: the guides' `sweep(add)`.
    """
    (home / "configs/R.py").write_text(RECIPE)
    (home / "configs/swept.py").write_text(SWEPT + sweep)
    write_models(home)
    write_pictures(home)
    write_datasets(home)
    (home / "runs").mkdir()
    for name, workdir in (("stage1", "mine/stage1"), ("caption", "stage2")):
        (home / "runs" / name).symlink_to(workdir)  # is there once that run is


def write_models(home: Path) -> None:
    """Under their names on the hub, or as the guides call the reader's copies."""
    hub = home / "Salesforce"
    published.generation_folder(hub / "blip2-opt-2.7b", "opt")
    published.generation_folder(hub / "blip2-flan-t5-xl", "t5")
    # As many queries and as wide features as published: the guides say these shapes.
    itm = hub / "blip2-itm-vit-g"
    published.retrieval_folder(itm, num_query_tokens=32, projection_dim=256)
    (hub / "blip2-itm-vit-g-coco").symlink_to(itm)
    (home / "blip2-opt-2.7b").symlink_to(hub / "blip2-opt-2.7b")
    # For a benchmark that counts on the published numbers of pixels, queries and words.
    published.generation_folder(
        home / "published_sizes",
        num_query_tokens=32,
        vision=models.VISION | {"image_size": 224, "patch_size": 56},
        vocab_size=50304,
        hidden_size=32,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
    )
    # Towers: those of a whole model serve, but for an encoder of CLIP's depth.
    vision = models.VISION | {"num_hidden_layers": 24, "hidden_size": 32, "intermediate_size": 32}
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    clip.save_pretrained(home / "my-clip")
    models.hub_form(home / "my-clip")
    (home / "my-llm").symlink_to(hub / "blip2-opt-2.7b")
    (home / "facebook").mkdir()
    (home / "facebook/opt-2.7b").symlink_to(hub / "blip2-opt-2.7b")
    (home / "google/flan-t5-xxl").mkdir(parents=True)
    (home / "google/flan-t5-xxl/config.json").write_text(json.dumps(models.T5))
    tokenizers.load("package:digits-bert").save_pretrained(home / "bert-base-uncased")
    # LAVIS's two files.
    found = checkpoint.open_checkpoint(str(itm))
    params = found.load(found.abstract())
    lavis.save(home / "blip2_pretrained.pth", found.config, params, with_vit=False)
    lavis.save(home / "whole.pth", found.config, params, with_vit=True)
    tensors = torch.load(home / "whole.pth", weights_only=True)["model"]
    prefix = "visual_encoder."
    vit = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    torch.save(vit, home / "eva_vit_g.pth")
    (home / "whole.pth").unlink()


def write_pictures(home: Path) -> None:
    """Photos, a list of them, and tars in the numbers that the guides have."""
    names = made.write_images(home / "photos", 8)
    shutil.copy(home / "photos/0.jpg", home / "beach.jpg")
    rows = [{"image": name, "caption": f"a picture, number {name[0]}"} for name in names]
    (home / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder, count in (("cc3m", 332), ("web", 2)):
        (home / folder).mkdir()
        for number in range(count):
            members = made.members(f"{number:09d}", number % 8, f"picture {number}")
            made.write_tar(home / folder / f"{number:05d}.tar", members)
    one = (home / "web/00000.tar").read_bytes()
    bucket = fsspec.filesystem("memory")
    for number in range(1243):
        bucket.pipe_file(f"/bucket/cc12m/{number:05d}.tar", one)


def write_datasets(home: Path) -> None:
    """As their owners publish them, in the splits that are trained and evaluated on."""
    root = home / "published"
    write_vqa(root / "vqav2")
    write_vqa(root / "vqav2", "test2015", answers=False)
    stem = root / "vqav2" / "v2_OpenEnded_mscoco_test"
    Path(f"{stem}2015_questions.json").rename(f"{stem}-dev2015_questions.json")
    write_vqa(root / "okvqa", name="")
    write_gqa(root / "gqa")
    write_nocaps(root / "nocaps")
    truth = write_coco(root / "coco")
    lists = root / "coco/annotations"
    rows = json.loads((lists / "coco_karpathy_test.json").read_text())
    training = [{"image": row["image"], "caption": row["caption"][0]} for row in rows] * 2
    (lists / "coco_karpathy_train.json").write_text(json.dumps(training))
    said = [{"image_id": number, "caption": "a red dog runs"} for number in truth]
    (home / "captions_of_another_system.json").write_text(json.dumps(said))
    (root / "flickr30k/flickr30k_images").mkdir(parents=True)
    images = []
    for i in range(6):
        (root / f"flickr30k/flickr30k_images/{i}.jpg").write_bytes(made.jpeg(i))
        sentences = [{"raw": f"a red {i}."}, {"raw": f"the {i} is blue"}]
        images.append({"filename": f"{i}.jpg", "imgid": i, "split": "test", "sentences": sentences})
    (root / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    # Where the configs of configs/eval look for them.
    (home / "data").mkdir()
    for name in ("vqav2", "okvqa", "gqa", "nocaps", "flickr30k"):
        (home / "data" / name).symlink_to(root / name)


# ---------------------------------------------------------------------------------------- entries


@dataclass
class Ran:
    """What came of a command.

    Attributes:
      code: how it ended.
      out, err: what it said.
      home: the folder that it was typed in.
      dir: what DIR stood for.
      started: the words of every `blip2` that a script started.
    """

    code: int
    out: str
    err: str
    home: Path
    dir: Path = Path()
    started: list[list[str]] = field(default_factory=list)

    def json(self, path: str | Path) -> dict:
        return json.loads((self.home / path).read_text())


@dataclass(frozen=True)
class Entry:
    """How a command of the guides is run; see `test_readme.py`."""

    check: Callable[[Ran], None]
    small: str = ""
    stands: Mapping[str, str] = field(default_factory=dict)
    after: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    run: Callable[["Shell", str], Ran] | None = None
    beside: bool = False
    parsed: str = ""
    needs: str = ""

    def is_possible(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None


class Shell:
    """Types commands of the guides in a clone, each once, after those that it builds on.

    Args:
      folder: an empty one.
      entries: by command.
      sweep: the guides' `sweep(add)`.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry], sweep: str):
        self.entries, self.home = entries, folder / "blip2_jax"
        self._ran: dict[str, Ran | BaseException] = {}
        fakes.copy_checkout(ROOT, self.home)
        write_all(self.home, sweep)
        self.stands = Place(folder / "stands", self.home)
        # Commands spend their time in one thread, compiling; a second process takes some of them.
        self._other = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=os.chdir, initargs=(self.home,)
        )
        self._begun: dict[str, Future] = {}
        self._wanted: list[str] = []  # of the other process, and not begun yet
        self._lock = threading.RLock()  # of these two

    def begin(self, commands: Iterable[str]) -> None:
        """Has the other process run those of the commands that can be run beside the others.

        It begins with the last, so that the two meet in the middle.
        """
        here = {c: self.entries[c] for c in commands if c in self.entries}
        self._wanted = [c for c, entry in here.items() if entry.beside and entry.is_possible()]
        self._wanted.reverse()
        self._begin_next()

    def _begin_next(self, _: Future | None = None) -> None:
        """Gives the other process the first command that can be run by now, if it has none."""
        with self._lock:
            if not all(future.done() for future in self._begun.values()):
                return
            for command in self._wanted:
                if self._ran.keys() >= set(self.entries[command].after):
                    self._wanted.remove(command)
                    program, *words = self._words(command)
                    self._begun[command] = self._other.submit(run, program, words)
                    self._begun[command].add_done_callback(self._begin_next)
                    return

    def close(self) -> None:
        with self._lock:
            self._wanted = []
        self._other.shutdown(cancel_futures=True)

    def ran(self, command: str) -> Ran:
        """What came of a command of the guides; it is run if it was not yet."""
        if command not in self._ran:
            entry = self.entries[command]
            for other in entry.after:
                before = self.ran(other)
                assert before.code == 0, f"{other} failed, which this builds on:\n{before.err}"
            try:
                self._ran[command] = (entry.run or Shell.type)(self, command)
            except BaseException as error:
                self._ran[command] = error
                raise
            finally:
                self._begin_next()
        found = self._ran[command]
        if isinstance(found, BaseException):
            raise found
        return found

    def type(self, command: str) -> Ran:
        """Runs a command as it stands, but for what its entry says."""
        text, entry = self._filled(command), self.entries[command]
        with self._lock:
            if command in self._wanted:
                self._wanted.remove(command)
        if entry.parsed:
            program, *words = self._words(command)
            ran = Ran(*parse(program, words), self.home)
        elif command in self._begun:
            ran = Ran(*self._begun[command].result(), self.home)
        elif text.startswith(("blip2 ", "python ")):
            program, *words = self._words(command)
            ran = Ran(*run(program, words), self.home)
        else:
            ran = self._script(text, entry.environment)
        ran.dir = self.home / self._dir(command)
        return ran

    def blip2(self, words: Sequence[str]) -> Ran:
        """`blip2 WORDS`."""
        return Ran(*run("blip2", words), self.home)

    def _dir(self, command: str) -> str:
        number = list(self.entries).index(command)
        return self.entries[command].stands.get("DIR", f"runs/here/{number}")

    def _filled(self, command: str) -> str:
        """The command with what is the reader's filled in, and made small."""
        entry = self.entries[command]
        stands = {**STANDS_FOR, **entry.stands, "DIR": self._dir(command)}
        return f"{replace(command, stands)} {entry.small}".strip()

    def _words(self, command: str) -> list[str]:
        """What bash makes of a command: quotes, globs and braces are its business."""
        text = self._filled(command)
        said = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {text}"],
            cwd=self.home,
            capture_output=True,
            text=True,
            check=True,
        )
        return said.stdout.split("\0")[:-1]

    def _script(self, text: str, environment: Mapping[str, str]) -> Ran:
        """A script, in bash, with stand-ins for the clouds' tools and for `blip2`."""
        ours = {k: v for k, v in self.stands.environment.items() if k not in SETTINGS}
        before = len(self.stands.started())
        said = subprocess.run(
            ["bash", "-c", text],
            cwd=self.home,
            env={**ours, **environment},
            capture_output=True,
            text=True,
        )
        started = [words for words, _ in self.stands.started()[before:]]
        return Ran(said.returncode, said.stdout, said.stderr, self.home, started=started)


def replace(text: str, stands: Mapping[str, str]) -> str:
    """The text with words, or beginnings of paths, replaced."""
    for name, other in stands.items():
        end = r"(?!\w)" if name[-1].isalnum() else ""
        text = re.sub(rf"(?<![\w.]){re.escape(name)}{end}", lambda _: other, text)  # noqa: B023
    return text
