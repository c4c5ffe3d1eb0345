"""Batches are a function of the step alone, however many hosts, threads and workers make them."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import threading

import jax
import numpy as np
import pytest
import transformers
from ml_collections import ConfigDict
from PIL import Image

import tests.data.made as made
import tests.tiny as tiny
from blip2_jax.data import examples, loader, sources, texts, tokenizers, transforms
from blip2_jax.data.faults import RecordError
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.t5 import T5Config
from blip2_jax.runtime import mesh as meshes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "pairs"
    made.prepare_pairs(out, train=20, test=10)
    return out


def make_config(folder, stage="stage1", **changes):
    names = {
        "data.dir": "" if "data.mixture" in changes else str(folder),
        "data.qformer_tokenizer": "package:digits-bert",
        "data.llm_tokenizer": "package:digits-opt",
        "data.text_length": 28,
        "data.llm_length": 28,
        "data.threads": 2,
        "eval.batch_size": 4,
        **changes,
    }
    return tiny.config(stage, **names)


def take(config, n, start=0, llm=None):
    llm = llm or OPTConfig()
    with loader.train_batches(config, 16, start_step=start, llm=llm) as batches:
        return list(itertools.islice(batches, n))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_resuming_at_any_step_gives_the_batches_of_the_run_never_stopped(folder, stage):
    config = make_config(folder, stage)
    whole = take(config, 7)  # more than two epochs of 20 records in batches of 8
    for start in (1, 3, 6):
        assert_same(whole[start:], take(config, 7 - start, start))


def test_the_number_of_threads_changes_nothing(folder):
    many = take(make_config(folder, **{"data.threads": 8}), 5)
    assert_same(take(make_config(folder, **{"data.threads": 0}), 5), many)


def test_each_epoch_sees_every_record_once_in_another_order(folder):
    ids = np.concatenate([batch["image_id"] for batch in take(make_config(folder), 5)])
    first, second = ids[:20], ids[20:40]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()


def test_another_seed_is_another_order(folder):
    a, b = take(make_config(folder), 1), take(make_config(folder, seed=1), 1)
    assert a[0]["image_id"].tolist() != b[0]["image_id"].tolist()


def test_eval_batches_are_whole_ordered_and_repeatable(folder):
    config = make_config(folder)
    with loader.eval_batches(config, 16) as batches:
        first = list(batches)
    assert np.concatenate([b["image_id"] for b in first]).tolist() == list(range(8))
    with loader.eval_batches(config, 16) as batches:
        assert_same(first, list(batches))
    # The whole image, neither cut nor mirrored, and the first caption.
    source = sources.make_source(config, "test")
    bert = tokenizers.load("package:digits-bert")
    for number, (image, ids, mask) in enumerate(
        row for b in first for row in zip(b["image"], b["text_ids"], b["text_mask"], strict=True)
    ):
        whole = Image.open(io.BytesIO(source[number]["image"])).convert("RGB")
        np.testing.assert_array_equal(image, whole.resize((16, 16), Image.Resampling.BICUBIC))
        caption = source[number]["captions"][0].lower().rstrip(".")
        assert bert.decode(ids[mask > 0][1:-1]) == bert.decode(bert(caption)["input_ids"][1:-1])


@pytest.mark.parametrize(
    ("batch_size", "multiple", "found"), [(4, 1, 4), (4, 8, 8), (3, 2, 4), (64, 1, 10), (64, 4, 8)]
)
def test_an_evaluation_batch_divides_over_the_mesh(folder, batch_size, multiple, found):
    """Of ten records."""
    config = make_config(folder, **{"eval.batch_size": batch_size})
    source = sources.make_source(config, "test")
    assert loader.eval_batch_size(config, source, multiple) == found
    with loader.eval_batches(config, 16, batch_size=found, batch_rows=[1]) as batches:
        ids = [batch["image_id"].tolist() for batch in batches]
    assert ids == [[row] for row in range(1, 10 // found * found, found)]


@pytest.mark.parametrize(("batch_size", "multiple"), [(4, 16), (0, 1)])
def test_an_evaluation_batch_that_cannot_divide_is_refused(folder, batch_size, multiple):
    config = make_config(folder, **{"eval.batch_size": batch_size})
    source = sources.make_source(config, "test")
    with pytest.raises(ValueError, match=f"batch_size is {batch_size},.*10 records.*{multiple} "):
        loader.eval_batch_size(config, source, multiple)


def test_a_share_of_the_pairs_is_mismatched_and_always_the_same_ones(folder):
    right = sources.make_source(make_config(folder), "train")
    for share in (0.3, 1.0):
        config = make_config(folder, **{"data.mismatched": share})
        wrong = sources.make_source(config, "train")
        changed = [i for i in range(20) if wrong[i]["captions"] != right[i]["captions"]]
        assert len(changed) == 20 * share
        assert all(wrong[i]["image"] == right[i]["image"] for i in range(20))
        known = {tuple(record["captions"]) for record in right}
        assert {tuple(wrong[i]["captions"]) for i in range(20)} <= known
        assert_same(take(config, 5)[2:], take(config, 3, 2))
    # What is measured on is left alone.
    assert (
        sources.make_source(config, "test")[0]
        == sources.make_source(make_config(folder), "test")[0]
    )


def test_a_share_above_one_is_refused(folder):
    with pytest.raises(ValueError, match="config.data.mismatched is 2"):
        sources.make_source(make_config(folder, **{"data.mismatched": 2.0}), "train")


def test_an_unknown_source_is_named(folder):
    with pytest.raises(ValueError, match="webdataset.*tfds, files, stories, easy_stories, coco"):
        sources.make_source(make_config(folder, **{"data.source": "webdataset"}), "train")


# ------------------------------------------------------------- many sources, hosts and workers


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A config of two sources: tars of 24 pairs, and a list of 10 images."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "tars").mkdir()
    made.write_shards(folder / "tars", 3, 8)
    names = made.write_images(folder / "images", 10)
    rows = [{"image": n, "caption": [f"a picture of {n}", "another wording"]} for n in names]
    (folder / "list.json").write_text(json.dumps(rows))
    parts = {
        "web": {"dir": str(folder / "tars"), "weight": 3.0},
        "own": {"dir": str(folder / "list.json"), "images": str(folder / "images")},
    }
    return make_config(
        folder,
        **{"data.source": "files", "data.mixture": ConfigDict(parts), "data.randaugment": (2, 5)},
    )


def rows_of_hosts(batch_size, sizes, count, order=range(8)):
    """The rows that each of some hosts loads, of a mesh over their devices in some order."""
    devices = jax.devices()
    mesh = meshes.make_mesh(dict(zip(meshes.AXES, sizes, strict=True)), [devices[i] for i in order])
    hosts = np.split(np.array(devices), count)
    return [meshes.local_rows(mesh, batch_size, host) for host in hosts]


def assert_hosts_have_the_rows(config, hosts, whole, start=0):
    """Each host's batches are its rows of the global ones; together they have them all."""
    assert set(itertools.chain(*hosts)) == set(range(config.data.batch_size))
    for rows in hosts:
        with loader.train_batches(
            config, 16, start_step=start, batch_rows=rows, llm=OPTConfig()
        ) as batches:
            for batch, want in zip(batches, whole[start:], strict=False):
                assert_same([batch], [{name: x[rows] for name, x in want.items()}])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_rows_of_a_batch_are_the_same_records_on_any_hosts(folder, stage):
    """Crops, captions and all."""
    config = make_config(folder, stage)
    whole = take(config, 3)
    assert_hosts_have_the_rows(config, rows_of_hosts(8, (1, 8, 1), 2), whole)


@pytest.mark.parametrize(
    ("sizes", "count", "order", "first"),
    [
        ((1, 8, 1), 2, range(8), [0, 1, 2, 3]),
        ((2, 2, 2), 4, range(8), [0, 1]),
        ((4, 2, 1), 2, (0, 4, 1, 5, 2, 6, 3, 7), [0, 2, 4, 6]),  # hosts side by side nowhere
        ((2, 1, 4), 4, range(8), [0, 1, 2, 3]),  # two hosts hold, and load, the same rows
        ((1, 1, 8), 2, range(8), [*range(8)]),
    ],
)
def test_batches_are_the_same_for_any_hosts_and_any_resume(mixed, sizes, count, order, first):
    whole = take(mixed, 5)
    hosts = rows_of_hosts(8, sizes, count, order)
    assert hosts[0] == first
    assert_hosts_have_the_rows(mixed, hosts, whole, start=3)


def test_rows_that_a_batch_has_not_are_refused(mixed):
    for rows in ([], [8], [-1]):
        with pytest.raises(ValueError, match="A batch of 8 has no rows"):
            loader.train_batches(mixed, 16, batch_rows=rows)


@contextlib.contextmanager
def children_hear_signals(numbers):
    """As when a whole process group is told to stop: from a child's first moment on."""
    heard, ended = set(), threading.Event()

    def send():
        while not ended.wait(0.02):
            for child in multiprocessing.active_children():
                for number in numbers:
                    os.kill(child.pid, number)
                heard.add(child.pid)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield heard
    finally:
        ended.set()
        thread.join()


@pytest.mark.integration
def test_batches_are_the_same_for_any_number_of_workers_and_any_resume(mixed):
    """Worker processes, as a run of its own has them (they take seconds to start).

    They go on when the whole process group is told to stop, for the run needs them until it has
    saved itself; and they end with it.
    """
    one = take(mixed, 8)
    for workers, start in ((1, 0), (2, 3), (4, 5)):
        changed = ConfigDict(mixed.to_dict())
        changed.data.workers = workers
        with children_hear_signals((signal.SIGTERM, signal.SIGINT)) as heard:
            assert_same(take(changed, 8 - start, start), one[start:])
        assert len(heard) == workers
    assert not multiprocessing.active_children()


@pytest.mark.integration
def test_batches_are_the_same_for_several_hosts_with_several_workers(mixed):
    one = take(mixed, 6)
    changed = ConfigDict(mixed.to_dict())
    changed.data.workers = 2
    assert_hosts_have_the_rows(changed, rows_of_hosts(8, (2, 2, 2), 2), one, start=3)


def test_the_shares_of_a_mixture_are_exact_in_the_long_run(mixed):
    """3 to 1, and every part's records once before any of them twice."""
    ids = np.concatenate([b["image_id"] for b in take(mixed, 10)])
    web = ids >= 10  # parts are in the order of their names: own, web
    assert [web[:n].sum() for n in (8, 40, 80)] == [6, 30, 60]
    assert sorted(ids[web][:24]) == list(range(10, 34))
    assert sorted(ids[~web][:10]) == list(range(10))


def test_parts_of_a_mixture_have_orders_of_their_own(mixed):
    """Two of one length too."""
    config = ConfigDict(mixed.to_dict())
    own = mixed.data.mixture.own.to_dict()
    config.data.mixture = ConfigDict({"one": own, "two": own})
    source = sources.make_source(config, "train")
    numbers = np.array(
        [n for step in range(5) for n in loader.record_numbers(source, config, step)]
    )
    one, two = numbers[numbers < 10][:10], numbers[numbers >= 10][:10] - 10
    assert sorted(one) == sorted(two) == list(range(10)) and one.tolist() != two.tolist()


def test_captions_are_drawn_at_random_and_cleaned(folder):
    config = make_config(folder, **{"data.crop_scale": (1.0, 1.0), "data.flip": False})
    texts: dict[int, set] = {}
    for batch in take(config, 20):
        for number, row in zip(batch["image_id"], batch["text_ids"], strict=True):
            texts.setdefault(int(number), set()).add(row.tobytes())
    assert np.mean([len(found) for found in texts.values()]) > 3  # of 5
    config.data.first_captions = 1
    one = {}
    for batch in take(config, 6):
        for number, row in zip(batch["image_id"], batch["text_ids"], strict=True):
            assert one.setdefault(int(number), row.tobytes()) == row.tobytes()


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_scores_see_the_rows_asked_for_once_and_in_order(folder, batch_size):
    config = make_config(folder)
    source = sources.make_source(config, "train")
    rows = [7, 0, 3, 9, 1]
    with loader.scored_batches(source, 16, batch_size, numbers=rows) as batches:
        found = list(batches)
    assert {len(b["index"]) for b in found} == {batch_size}
    valid = np.concatenate([b["valid"] for b in found])
    index = np.concatenate([b["index"] for b in found])
    images = np.concatenate([b["image"] for b in found])
    assert index[valid].tolist() == rows and valid.sum() == 5
    for row, image in zip(index[valid], images[valid], strict=True):
        whole = transforms.resize(transforms.decode_image(source[int(row)]["image"]), 16)
        np.testing.assert_array_equal(image, whole)


def test_batches_are_prefetched_to_the_device_in_order(folder):
    config = make_config(folder)
    sent = []

    def put(batch):
        sent.append(len(sent))
        return batch

    with loader.train_batches(config, 16) as batches:
        prefetched = batches.prefetch(put)
        got = [next(prefetched)]
        assert sent == [0, 1]  # the second is on its way while the first is computed
        got += itertools.islice(prefetched, 3)
        assert batches.wait_seconds > 0
    assert_same(got, take(config, 4))


def test_a_split_that_is_not_told_apart_is_refused(mixed):
    with pytest.raises(ValueError, match="Write {split} where the two differ"):
        loader.eval_batches(mixed, 16)


def test_a_part_may_have_a_source_and_a_split_of_its_own(mixed, tmp_path):
    folder = tmp_path / "coco"
    names = made.write_images(folder / "train2017", 3)
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    annotations = [{"image_id": n, "caption": f"number {n}"} for n in range(3)]
    document = json.dumps({"images": images, "annotations": annotations})
    (folder / "captions_train2017.json").write_text(document)
    changed = ConfigDict(mixed.to_dict())
    changed.data.mixture.coco = ConfigDict(
        {"source": "coco", "dir": str(folder), "split": "train2017"}
    )
    changed.data.mixture.web.split = "2019"  # what the tars are called does not matter
    source = sources.make_source(changed, "train")
    assert source.names == ["coco", "own", "web"] and len(source) == 3 + 10 + 24
    assert source[0]["captions"] == ["number 0"]


def test_a_folder_beside_a_mixture_is_refused(mixed):
    """Of a recipe with a mixture, --config.data.dir alone would change nothing."""
    both = mixed.copy_and_resolve_references()
    both.data.dir = "mine"
    with pytest.raises(ValueError, match="'mine'.* mixture of own, web.*data.mixture={}"):
        sources.make_source(both, "train")


def test_an_unknown_key_of_a_mixture_is_refused(mixed):
    changed = ConfigDict(mixed.to_dict())
    changed.data.mixture.web.wieght = 1.0
    with pytest.raises(ValueError, match="mixture.web has no key 'wieght'"):
        loader.train_batches(changed, 16)


@pytest.mark.parametrize("task", ["caption", "answer"])
def test_line_ends_inside_a_text_are_folded_unless_kept(folder, task):
    """OPT's texts end with a newline: one inside would teach it to stop there."""
    prompt = "Question: {} Answer:" if task == "answer" else ""
    changes = {"data.clean_text": False, "data.task": task, "data.prompt": prompt}
    odd = {
        "image": made.jpeg(),
        "captions": ["a red\n3,\ta blue\r\n4 "],
        "questions": [{"question": "a\n3?", "answers": ["3\n\n4"]}],
    }
    even = {
        "image": made.jpeg(),
        "captions": ["a red 3, a blue 4"],
        "questions": [{"question": "a 3?", "answers": ["3 4"]}],
    }

    def ids(record, fold=True):
        config = make_config(folder, "stage2", **changes, **{"data.fold_whitespace": fold})
        example = examples.make_example(config, 16, train=True, llm=OPTConfig())
        return example(record, 0, np.random.default_rng(0))["llm_ids"].tolist()

    assert ids(odd) == ids(even) != ids(odd, fold=False)
    assert texts.folded(odd) == even


def test_questions_without_an_answer_are_not_drawn(folder):
    config = make_config(folder, "stage2", **{"data.task": "answer", "data.prompt": "{} Answer:"})
    example = examples.make_example(config, 16, train=True, llm=OPTConfig())
    asked = [{"question": "a 3?", "answers": []}, {"question": "a 4?", "answers": ["yes"]}]
    record = {"image": made.jpeg(), "captions": [], "questions": asked}
    for seed in range(5):
        example(record, 0, np.random.default_rng(seed))
    with pytest.raises(RecordError, match="no answer"):
        example(record | {"questions": asked[:1]}, 0, np.random.default_rng(0))


def test_a_color_that_is_none_is_refused_before_anything_is_read(folder):
    config = make_config(folder, **{"data.alpha_background": "whit"})
    with pytest.raises(ValueError, match="alpha_background is 'whit'"):
        examples.make_example(config, 16, train=True, llm=OPTConfig())


def test_lists_that_name_splits_are_read_by_split(tmp_path):
    made.write_images(tmp_path, 6)
    rows = [
        {"image": f"{n}.jpg", "caption": "a 3", "split": ("train", "val")[n % 2]} for n in range(6)
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    data = {"data.source": "files", "data.eval_split": "val", "eval.batch_size": 3}
    config = make_config(tmp_path / "x.json", **data)
    assert len(sources.make_source(config, "train")) == 3
    with loader.eval_batches(config, 16) as batches:
        assert len(list(batches)) == 1
    for row in rows:
        del row["split"]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="is the same for 'train' and 'val'"):
        loader.eval_batches(config, 16)


def test_t5_gets_a_prefix_and_a_suffix_drawn_per_sample(folder):
    tokenizer = transformers.T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
        + [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789,:?"],
        extra_ids=0,
    )
    tokenizer.save_pretrained(folder.parent / "t5")
    config = make_config(folder, "stage2", **{"data.llm_tokenizer": str(folder.parent / "t5")})
    config.data.llm_length = 128
    cuts = set()
    for batch in take(config, 5, llm=T5Config()):
        for ids, mask, labels in zip(
            batch["llm_ids"], batch["llm_mask"], batch["llm_labels"], strict=True
        ):
            prefix = tokenizer.decode(ids[mask > 0], skip_special_tokens=True).split()
            suffix = tokenizer.decode(labels[labels >= 0], skip_special_tokens=True).split()
            assert ids[mask.sum() - 1] == labels[labels >= 0][-1] == tokenizer.eos_token_id
            assert 1 <= len(prefix) <= max(1, (len(prefix) + len(suffix)) // 2)
            cuts.add(len(prefix))
    assert len(cuts) > 2
    config.data.prompt = "a photo of"
    ids = take(config, 1, llm=T5Config())[0]["llm_ids"]
    assert (ids == ids[0]).all()
