"""Measures what docs/benchmarks.md says about data, each figure beside a peer or a target.

  python launch/benchmark_data.py index --folder=/tmp/tars     a million records in tars (4 GB)
  python launch/benchmark_data.py speed --folder=/tmp/photos   JPEG to tensor, beside its peers

index: writes tars as img2dataset does (--shards of --records; kept for the next time) and opens
them in a process of its own: seconds and memory of the first start, which scans them, and of the
next; then reads records anywhere and checks that each is the one asked for.

speed: images/s of one core, from JPEG files to a batch, of this package's loader (exact and fast),
of torch's DataLoader with the same transforms in Pillow and NumPy, and of tf.data with TensorFlow's
own (where it is installed); the same JPEGs, random resized crop to 224 and flip, batches of 64.
Every loader runs pinned to one core in a process of its own, in turn, --rounds times; a second is
one of CPU time of all its threads, so that others on the machine matter little. Printed are the
medians and the ratios of each round's. Also the difference in pixels of the fast way from the exact
one.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = {"500x375": (500, 375), "640x480": (640, 480)}
BATCH, SIDE = 64, 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def memory_mb(field: str) -> float:
    """VmRSS or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# -------------------------------------------------------------------------------------- index


def write_tars(folder: Path, shards: int, records: int) -> None:
    """Records of one kilobyte of "image", a caption and its .json, by the million."""
    import tarfile

    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)

    def member(name: str, data: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)

    # Headers differ in their name and checksum only; to make each anew would take minutes.
    def template(suffix: str, data: bytes) -> tuple[bytearray, int]:
        whole = bytearray(member(f"{'0' * 9}.{suffix}", data))
        return whole, int(bytes(whole[148:154]), 8)

    image = template("jpg", b"\xff\xd8" + os.urandom(998))
    text = template("txt", b"a caption of some length about a picture")
    meta = template("json", json.dumps({"caption": "a caption", "url": "http://x/y"}).encode())
    for shard in tqdm(range(shards), desc="writing tars"):
        path = folder / f"{shard:05d}.tar"
        if path.exists():
            continue
        parts = []
        for record in range(records):
            key = f"{shard:05d}{record:04d}".encode()
            for whole, base in (image, text, meta):
                whole[:9] = key
                check = base + sum(key) - 9 * ord("0")
                whole[148:154] = f"{check:06o}".encode()
                parts.append(bytes(whole))
        draft = path.with_suffix(".partial")
        draft.write_bytes(b"".join(parts) + bytes(1024))
        draft.rename(path)


def open_tars(folder: str, shards: int, records: int) -> dict[str, float]:
    """One start: seconds and memory, and reading anywhere."""
    import numpy as np

    from blip2_jax.data import tars

    paths = sorted(map(str, Path(folder).glob("*.tar")))[:shards]
    before = memory_mb("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    source = tars.TarSource(paths)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    opened = memory_mb("VmRSS") - before
    assert len(source) == shards * records, "tars of another --records are in --folder"
    positions = np.random.default_rng(0).integers(len(source), size=20_000)
    started = time.perf_counter()
    for position in positions.tolist():
        shard, record = divmod(position, records)
        assert source[position]["id"] == f"{shard:05d}{record:04d}", position
    access = (time.perf_counter() - started) / len(positions)
    source.keys().sum()  # touches every page of every index
    return {
        "seconds": seconds,
        "cpu": cpu,
        "opened_mb": opened,
        "all_mb": memory_mb("VmRSS") - before,
        "peak_mb": memory_mb("VmHWM"),
        "access_us": 1e6 * access,
    }


def index(args: argparse.Namespace) -> None:
    """Writes what is missing, and starts twice."""
    folder = Path(args.folder)
    write_tars(folder, args.shards, args.records)
    for path in folder.glob("*.idx*"):
        path.unlink()
    size = sum(path.stat().st_size for path in folder.glob("*.tar")) / 1e9
    print(f"{args.shards * args.records:,} records in {args.shards} tars, {size:.1f} GB")
    words = (f"--folder={folder}", f"--shards={args.shards}", f"--records={args.records}")
    for name in ("first start (scans)", "next start"):
        found = run_self("index", *words, "--one")
        print(
            f"{name:<20} {found['seconds']:6.2f} s ({found['cpu']:.2f} of CPU)   "
            f"opened {found['opened_mb']:5.1f} MB, with every page of the index "
            f"{found['all_mb']:5.1f} MB, whole process at its peak {found['peak_mb']:5.1f} MB   "
            f"a record anywhere {found['access_us']:.0f} us"
        )
    size = sum(path.stat().st_size for path in folder.glob("*.idx")) / 1e6
    print(f"index files          {size:6.1f} MB")


def run_self(*words: str) -> dict:
    """This file in a process of its own; its last line is JSON."""
    command = [sys.executable, __file__, *words]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


# -------------------------------------------------------------------------------------- speed


def write_photos(folder: Path, sizes: list[str], count: int) -> None:
    """JPEGs (quality 90) of random parts of two photographs that scikit-learn ships."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(array) for array in load_sample_images().images]
    for name in sizes:
        size, place = SIZES[name], folder / name
        place.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for number in range(count):
            photo = photos[number % len(photos)]
            share = rng.uniform(0.6, 1)
            width, height = (round(share * length) for length in photo.size)
            x, y = (
                int(rng.integers(whole - part + 1))
                for whole, part in zip(photo.size, (width, height), strict=True)
            )
            part = photo.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.LANCZOS)
            part.save(place / f"{number:04d}.jpg", quality=90)
        rows = [{"image": f"{number:04d}.jpg", "caption": "a photo"} for number in range(count)]
        (place / "list.json").write_text(json.dumps(rows))


def torch_batches(folder: str, *, host_float: bool):
    """torch's DataLoader; the transforms are Pillow's and NumPy's."""
    import math
    import random

    import numpy as np
    import torch
    from PIL import Image

    torch.set_num_threads(1)

    class Photos(torch.utils.data.Dataset):
        def __init__(self):
            self.paths = sorted(Path(folder).glob("*.jpg"))

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, number):
            image = Image.open(self.paths[number]).convert("RGB")
            image = image.crop(self.box(*image.size)).resize((SIDE, SIDE), Image.BICUBIC)
            if random.random() < 0.5:
                image = image.transpose(Image.FLIP_LEFT_RIGHT)
            array = np.array(image)
            if not host_float:
                return torch.from_numpy(array)
            array = (array.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
            return torch.from_numpy(array.transpose(2, 0, 1).copy())

        @staticmethod
        def box(width, height):
            while True:
                area = width * height * random.uniform(0.5, 1)
                ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
                w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if w <= width and h <= height:
                    x, y = random.randint(0, width - w), random.randint(0, height - h)
                    return x, y, x + w, y + h

    loader = torch.utils.data.DataLoader(Photos(), BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


def tensorflow_batches(folder: str):
    """tf.data with TensorFlow's operations: decodes the crop alone, antialiased bicubic."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    whole = tf.constant([[[0.0, 0.0, 1.0, 1.0]]])

    def image(path):
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            whole,
            area_range=(0.5, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        pixels = tf.io.decode_and_crop_jpeg(data, window, channels=3)
        pixels = tf.image.resize(pixels, (SIDE, SIDE), method="bicubic", antialias=True)
        pixels = tf.image.random_flip_left_right(pixels)
        return (tf.clip_by_value(pixels, 0, 255) / 255 - MEAN) / STD

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    files = tf.data.Dataset.list_files(f"{folder}/*.jpg", shuffle=False)
    dataset = files.cache().shuffle(1000).repeat().map(image, num_parallel_calls=1).batch(BATCH)
    yield from dataset.with_options(options)


def our_batches(folder: str, *, resize: str, threads: int):
    """The package's loader, with images alone."""
    import grain

    from blip2_jax.data import loader, reader, sources, transforms

    source = sources.open_files(f"{folder}/list.json")

    def example(record, index, rng):
        return {"image": transforms.train_image(record["image"], SIDE, rng, resize=resize)}

    read = reader.Reader(source, example)
    order = grain.MapDataset.range(len(source)).seed(0).shuffle().repeat()
    dataset = loader.rows_of_batches(order.random_map(read), BATCH)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    with loader.Batches(dataset.to_iter_dataset(options), loader.Skipped()) as batches:
        yield from batches


LOADERS = {
    "torch, float32 on the host": lambda f: torch_batches(f, host_float=True),
    "torch, uint8": lambda f: torch_batches(f, host_float=False),
    "tf.data, float32": tensorflow_batches,
    "blip2_jax, exact": lambda f: our_batches(f, resize="exact", threads=1),
    "blip2_jax, fast": lambda f: our_batches(f, resize="fast", threads=1),
}
PEER = "torch, float32 on the host"


def speed_one(args: argparse.Namespace) -> None:
    """One loader on one core; prints images/s as JSON."""
    os.sched_setaffinity(0, {args.core})
    batches = LOADERS[args.only](args.folder)
    for _ in range(2):
        next(batches)
    started, count = time.process_time(), 0
    while time.process_time() - started < args.seconds:
        next(batches)
        count += BATCH
    print(json.dumps(count / (time.process_time() - started)))
    sys.stdout.flush()
    os._exit(0)  # without waiting for anyone's threads


def speed(args: argparse.Namespace) -> None:
    """All loaders in turn, round by round."""
    if not importlib.util.find_spec("torch"):
        sys.exit("benchmark_data.py: a peer is torch's loader: pip install 'blip2_jax[convert]'.")
    folder = Path(args.folder)
    write_photos(folder, args.sizes, args.photos)
    known = dict(LOADERS)
    if not importlib.util.find_spec("tensorflow"):
        known.pop("tf.data, float32")
        print("tf.data is left out: pip install tensorflow-cpu to have it measured too.")
    for size in args.sizes:
        place = folder / size
        kilobytes = statistics.mean(p.stat().st_size for p in place.glob("*.jpg")) / 1000
        print(f"{size}, {kilobytes:.0f} KB a file")
        rates: dict[str, list[float]] = {name: [] for name in known}
        for _ in range(args.rounds):
            for name, found in rates.items():
                words = (f"--folder={place}", f"--only={name}", f"--seconds={args.seconds}")
                found.append(run_self("speed", *words, f"--core={args.core}"))
        for name, found in rates.items():
            ratios = [a / b for a, b in zip(found, rates[PEER], strict=True)]
            print(
                f"  {name:<28} {statistics.median(found):6.0f} images/s   "
                f"{statistics.median(ratios):.2f} x   ({min(found):.0f} to {max(found):.0f})"
            )
        print(f"  fast against exact           {difference(place)}")


def difference(folder: Path) -> str:
    """Pixels of the fast way against the exact one's, same crops."""
    import numpy as np

    from blip2_jax.data import transforms

    def make(data: bytes, seed: int, way: str) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return transforms.train_image(data, SIDE, rng, resize=way).astype(float)

    files = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))[:64]]
    pairs = [[make(data, n, way) for way in ("exact", "fast")] for n, data in enumerate(files)]
    errors = np.array([np.abs(a - b) for a, b in pairs])
    psnr = np.mean([10 * np.log10(255**2 / np.mean((a - b) ** 2)) for a, b in pairs])
    return (
        f"mean |difference| {errors.mean():.2f} of 255, 99th percentile "
        f"{np.percentile(errors, 99):.0f}, PSNR {psnr:.1f} dB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    indexing = commands.add_parser("index", help="a million records in tars")
    indexing.add_argument("--folder", required=True, help="where the 4 GB are, or go")
    indexing.add_argument("--shards", type=int, default=100, help="tars (default: 100)")
    indexing.add_argument("--records", type=int, default=10_000, help="of each (default: 10000)")
    indexing.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    indexing.set_defaults(
        run=lambda a: (
            print(json.dumps(open_tars(a.folder, a.shards, a.records))) if a.one else index(a)
        )
    )
    speeding = commands.add_parser("speed", help="JPEG to tensor, beside PyTorch and tf.data")
    speeding.add_argument("--folder", required=True, help="where the photographs go (25 MB)")
    speeding.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    speeding.add_argument(
        "--photos", type=int, default=256, help=f"of each size, {BATCH} or more (default: 256)"
    )
    speeding.add_argument("--rounds", type=int, default=5)
    speeding.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    speeding.add_argument("--core", type=int, default=0, help="the core to measure on")
    speeding.add_argument("--only", choices=list(LOADERS), help=argparse.SUPPRESS)
    speeding.set_defaults(run=lambda a: speed_one(a) if a.only else speed(a))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
