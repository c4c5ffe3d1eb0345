"""Small images, tars and lists for the tests of data."""

import io
import json
import tarfile

import numpy as np
import tokenizers as backend
import transformers
from PIL import Image
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from blip2_jax import prepare
from blip2_jax.data.faults import Skipped
from blip2_jax.data.source import Source


def jpeg(seed: int = 0, size: tuple[int, int] = (48, 36), *, kind: str = "JPEG") -> bytes:
    """A smooth picture; another one for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8))
    out = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(out, format=kind, quality=92)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 pixels wide and high."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_tar(path, members: list[tuple[str, bytes]], **options) -> str:
    """A tar of (name, content), in order."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def members(key: str, seed: int, caption: str) -> list[tuple[str, bytes]]:
    """What img2dataset writes for one pair."""
    meta = {"caption": caption, "key": key, "status": "success", "url": f"http://x/{key}"}
    return [
        (f"{key}.jpg", jpeg(seed)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps(meta).encode()),
    ]


def write_shards(folder, shards: int, records: int) -> list[str]:
    """Tars as img2dataset writes them: 00000.tar, with keys 000000000, ..."""
    return [
        write_tar(
            folder / f"{shard:05d}.tar",
            [
                member
                for n in range(records)
                for member in members(
                    f"{shard:05d}{n:04d}", shard * records + n, f"picture {shard} {n}"
                )
            ],
        )
        for shard in range(shards)
    ]


def write_images(folder, count: int) -> list[str]:
    """JPEGs 0.jpg, 1.jpg, ... in a folder; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return [f"{number}.jpg" for number in range(count)]


COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")


def texts_about(number: int) -> dict:
    """Five captions and two questions, other ones for every number below 80.

    In words that the packaged tokenizers know.
    """
    color, digit = COLORS[number % 8], number // 8 % 10
    thing = f"{color} {digit}"
    captions = [f"a {thing}", f"there is a {thing}", f"a picture of a large {thing}"]
    captions += [f"a small {thing} in the top left", f"an image with a {thing}"]
    return {
        "captions": captions,
        "questions": [
            {"question": f"what color is the {digit}?", "answer": color},
            {"question": f"which digit is {color}?", "answer": str(digit)},
        ],
    }


def prepare_pairs(folder, **sizes: int) -> None:
    """Images of 64 x 64 pixels with texts, prepared: so many in each split."""
    given = folder.with_name(f"{folder.name}_given")
    (given / "images").mkdir(parents=True)
    start, rows = 0, []
    for split, size in sizes.items():
        for number in range(start, start + size):
            name = f"{number}.png"
            (given / "images" / name).write_bytes(jpeg(number, (64, 64), kind="PNG"))
            rows.append({"image": name, "split": split, **texts_about(number)})
        start += size
    (given / "list.json").write_text(json.dumps(rows))
    words = [f"--dir={given}/list.json", f"--images={given}/images", f"--out={folder}"]
    for split in sizes:
        code = prepare.main(["--source=files", "--workers=0", f"--split={split}", *words])
        assert code == 0


class Records(Source):
    """A list as a source."""

    def __init__(self, records):
        self.records, self.faults, self.notes = records, Skipped(), Skipped()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


WORDS = "Question: what color is the 3? Short answer: light blue 7".split()


def llama_tokenizer(kind: str):
    """Llama's tokenizer, in each form in which folders have it.

    "metaspace": transformers 5's class; "prepend": the tokenizer.json of 2023 (Vicuna's), which
    puts a space before every text, and before one that begins with a space another; "bytes":
    Llama 3's.
    """
    trained = backend.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = {
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="first"),
        "prepend": None,
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }[kind]
    if kind == "prepend":
        trained.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    trained.train_from_iterator([*WORDS, *(f" {word}" for word in WORDS), "\n"], trainer)
    if kind == "metaspace":
        model = json.loads(trained.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        return transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained, **names)
