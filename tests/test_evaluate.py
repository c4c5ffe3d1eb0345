"""The evaluation command from outside: official files in, official files out, scores by the rules.

Models are small and random, data sets are generated in their owners' formats; every score is
computed a second time, from its definition.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

import blip2_jax
import tests.data.made as made
from blip2_jax import cli, evaluate
from blip2_jax.data.eval_dataset import EvalDataset
from blip2_jax.evals import evaluator, submissions, tasks
from blip2_jax.evals.metrics import vqa
from blip2_jax.evals.predictions import Predictions
from blip2_jax.inference.defaults import DEFAULTS
from blip2_jax.inference.options import Decoding
from tests.evals.metrics.test_captioning import bleu, cider_d, needs_java, rouge_l
from tests.evals.metrics.test_retrieval import slow_recalls, slow_rerank
from tests.evals.metrics.test_vqa import literal_accuracy, literal_punctuation, literal_words
from tests.inference import published

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
ADD = "blip2_jax.evals.predictions.Predictions.add"  # an event; see `tests.interrupted`


def config(tmp_path, tasks: str, **changes) -> str:
    """A config file with these tasks; the model's batches are small."""
    path = tmp_path / "config.py"
    body = f"""
        from ml_collections import ConfigDict
        from configs.eval.default import get_config as default, task

        def get_config():
            config = default()
            config.name = "test"
            config.batch_size = 4
            config.threads = 2
            config.report.attention = 1
            config.update({changes!r})
            config.tasks = ConfigDict({{
                {tasks}
            }})
            return config
    """
    path.write_text(textwrap.dedent(body))
    return str(path)


def run(file: str, workdir: Path, *words: str) -> dict:
    """metrics.json of the command."""
    assert evaluate.main([f"--config={file}", f"--workdir={workdir}", *words]) == 0
    return json.loads((workdir / "metrics.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a small BLIP-2 on OPT, of a retrieval model and of an InstructBLIP."""
    root = tmp_path_factory.mktemp("models")
    published.generation_folder(root / "opt", "opt")
    published.retrieval_folder(root / "retrieval")
    published.instruct_folder(root / "instruct")
    return root


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Programs are compiled once for all tests here, and for the processes they start."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    folder = str(tmp_path_factory.mktemp("programs"))
    environment = {"JAX_COMPILATION_CACHE_DIR": folder, names[1].upper(): "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        jax.config.update(names[1], 0.0)
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def one_device(monkeypatch, request):
    """Most tests are not about meshes, and compile faster on one device."""
    if "mesh" not in request.fixturenames:
        device = jax.devices()[:1]
        monkeypatch.setattr(jax, "local_devices", lambda *args, **kwargs: device)


# Loud enough for the small random model to answer differently.
VARIED = "prompt='{}', decoding={'num_beams': 1, 'max_new_tokens': 5, 'min_new_tokens': 3,"
VARIED += "'repetition_penalty': 3.0}"
DECODING = "decoding={'num_beams': 2, 'max_new_tokens': 5, 'min_new_tokens': 1}"


# ------------------------------------------------------------------------------- data sets on disk


ANSWERS = [
    "two",
    "2",
    "a dog",
    "Dog",
    "t-shirt",
    "1,000",
    "dont",
    "The red one.",
    "yes",
    "no",
    "10",
]


def write_vqa(folder: Path, split: str = "val2014", name: str = "v2_", answers: bool = True):
    """VQAv2's files: five images, two questions of each; returns {question id: ten answers}."""
    rng = np.random.default_rng(0)
    images = folder / split
    images.mkdir(parents=True)
    questions, annotations, truth = [], [], {}
    for i in range(5):
        number = 100 + 7 * i
        (images / f"COCO_{split}_{number:012d}.jpg").write_bytes(made.jpeg(i))
        for j in range(2):
            key = number * 1000 + j
            pool = rng.choice(ANSWERS, size=rng.integers(1, 4))
            truth[key] = [str(answer) for answer in rng.choice(pool, size=10)]
            asked = f"What colour is number {j}? (it's {i})"
            questions.append({"image_id": number, "question": asked, "question_id": key})
            annotations.append(
                {
                    "question_id": key,
                    "image_id": number,
                    "question_type": "what",
                    "answer_type": "yes/no" if j else "other",
                    "answers": [
                        {"answer": a, "answer_confidence": "yes", "answer_id": n}
                        for n, a in enumerate(truth[key], 1)
                    ],
                }
            )
    stem = f"{name}OpenEnded_mscoco_{split}"
    (folder / f"{stem}_questions.json").write_text(json.dumps({"questions": questions}))
    if answers:
        (folder / f"{name}mscoco_{split}_annotations.json").write_text(
            json.dumps({"annotations": annotations})
        )
    return truth


def write_coco(folder: Path):
    """Karpathy's test split as LAVIS lists it; {official number: captions}."""
    (folder / "images" / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    rows, truth = [], {}
    for i in range(6):
        name = f"val2014/COCO_val2014_{391895 + i:012d}.jpg"
        (folder / "images" / name).write_bytes(made.jpeg(i))
        truth[391895 + i] = [f"A red dog, {i} runs on it.", f"the {i} is (left) of the blue dog"]
        rows.append({"image": name, "caption": truth[391895 + i]})
    (folder / "annotations" / "coco_karpathy_test.json").write_text(json.dumps(rows))
    return truth


def write_nocaps(folder: Path):
    """NoCaps' own annotations: COCO-style, with a domain an image."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(9):
        name = f"{i:016x}.jpg"
        (folder / "images" / name).write_bytes(made.jpeg(i))
        domain = ("in-domain", "near-domain", "out-domain")[i % 3]
        images.append({"id": i, "file_name": name, "domain": domain, "open_images_id": name[:-4]})
        for j in range(3):
            text = f"picture {j} of a thing {i % 4} that is red {i}"
            annotations.append({"id": 10 * i + j, "image_id": i, "caption": text})
    document = {"images": images, "annotations": annotations}
    (folder / "nocaps_val_4500_captions.json").write_text(json.dumps(document))
    return {i: [a["caption"] for a in annotations if a["image_id"] == i] for i in range(9)}


def write_gqa(folder: Path):
    """GQA's dict by question id; {question id: answer}."""
    (folder / "images").mkdir(parents=True)
    rows = {}
    for i in range(4):
        (folder / "images" / f"n{i}.jpg").write_bytes(made.jpeg(i))
        for j, answer in enumerate(("Two", "the sofa", "red")):
            rows[f"2013{i}{j}"] = {"question": f"what {j}?", "answer": answer, "imageId": f"n{i}"}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    return {key: row["answer"] for key, row in rows.items()}


# ----------------------------------------------------------------- scores of files, by the rules


@pytest.mark.parametrize(("source", "name"), [("vqav2", "v2_"), ("okvqa", "")])
def test_vqa_scores_equal_the_official_rules_in_both_forms(tmp_path, source, name):
    truth = write_vqa(tmp_path / "data", name=name)
    rng = np.random.default_rng(1)
    predicted = {key: str(rng.choice([*answers, *ANSWERS])) for key, answers in truth.items()}
    submissions.write(tmp_path / "predictions.json", "vqa", predicted)
    file = config(tmp_path, f'"val": task("vqa", "{source}", "val", "{tmp_path}/data")')
    metrics = run(file, tmp_path / "out", f"--predictions={tmp_path}/predictions.json")
    for key, form in (("accuracy", "lavis"), ("accuracy_official", "official")):
        each = {q: literal_accuracy(predicted[q], answers, form) for q, answers in truth.items()}
        assert metrics[f"val/{key}"] == pytest.approx(np.mean(list(each.values())))
        if form == "lavis":
            odd = [score for q, score in each.items() if q % 2]
            assert metrics["val/yes_no"] == pytest.approx(np.mean(odd))
    assert 0 < metrics["val/accuracy"] < 1 and metrics["val/accuracy"] != metrics["val/other"]
    assert submissions.read(tmp_path / "out" / "predictions" / "val.json", "vqa") == predicted
    settings = metrics["settings"]["tasks"]["val"]
    assert settings["forms"] == ["lavis", "official"]
    assert settings["decoding"]["num_beams"] is None  # as the model's family has it; there is none
    assert metrics["settings"]["versions"]["transformers"]


def test_gqa_is_exact_match_of_normalized_texts(tmp_path):
    truth = write_gqa(tmp_path / "data")
    rng = np.random.default_rng(2)
    predicted = {key: str(rng.choice(["2", "Sofa.", "red", "dark red"])) for key in truth}
    submissions.write(tmp_path / "predictions.json", "gqa", predicted)
    file = config(
        tmp_path,
        f'"gqa": task("vqa", "gqa", "testdev_balanced", "{tmp_path}/data", metric="exact")',
    )
    metrics = run(file, tmp_path / "out", f"--predictions={tmp_path}/predictions.json")

    def normal(text):
        return literal_words(literal_punctuation(text))

    hits = [normal(predicted[key]) == normal(answer) for key, answer in truth.items()]
    assert metrics["gqa/accuracy"] == pytest.approx(np.mean(hits)) and 0 < np.mean(hits) < 1
    rows = json.loads((tmp_path / "out" / "predictions" / "gqa.json").read_text())
    assert rows[0].keys() == {"questionId", "prediction"}


@pytest.mark.parametrize("empty", [None, [], [{"answer": None}], ""], ids=repr)
def test_questions_without_an_answer_are_counted_and_not_scored(tmp_path, empty):
    truth = write_vqa(tmp_path / "data")
    path = tmp_path / "data/v2_mscoco_val2014_annotations.json"
    document = json.loads(path.read_text())
    document["annotations"][3]["answers"] = empty
    path.write_text(json.dumps(document))
    submissions.write(tmp_path / "predictions.json", "vqa", dict.fromkeys(truth, "None"))
    file = config(tmp_path, f'"val": task("vqa", "vqav2", "val", "{tmp_path}/data")')
    metrics = run(file, tmp_path / "out", f"--predictions={tmp_path}/predictions.json")
    scored = [answers for n, answers in enumerate(truth.values()) if n != 3]
    each = [literal_accuracy("None", answers, "lavis") for answers in scored]
    assert metrics["val/accuracy"] == pytest.approx(np.mean(each)) and np.mean(each) < 1
    assert metrics["left_out"]["val/questions"] == "1 of 10 have no answer to compare with"
    assert "1 x empty answer" in metrics["left_out"]["val/records"]


def test_images_without_a_reference_are_counted_and_not_scored(tmp_path):
    rows = [{"image": f"{n}.jpg", "caption": f"a red dog {n}", "image_id": n} for n in range(4)]
    rows.append({"image": "4.jpg", "question": "What?", "answer": "x", "image_id": 4})
    made.write_images(tmp_path, 5)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    submissions.write(
        tmp_path / "predictions.json", "captions", {n: "a red dog 1" for n in range(5)}
    )
    tasks = (
        f'"c": task("captioning", "files", "", "{tmp_path}/x.json", scores=("bleu4", "rouge_l"))'
    )
    metrics = run(
        config(tmp_path, tasks), tmp_path / "out", f"--predictions={tmp_path}/predictions.json"
    )
    expected = np.mean([rouge_l("a red dog 1", [f"a red dog {n}"]) for n in range(4)])
    assert metrics["c/rouge_l"] == pytest.approx(expected)
    assert metrics["left_out"]["c/references"] == "1 of 5 images have none"


def plain(text: str) -> str:
    """Tokens of the captions above, which need no treebank: but for the known drops."""
    text = text.lower().replace(",", " ").replace(".", " ")
    return " ".join(text.replace("(", "-lrb- ").replace(")", " -rrb-").split())


def test_coco_scores_equal_their_definitions_and_ids_come_from_file_names(tmp_path):
    truth = write_coco(tmp_path / "data")
    predicted = {key: f"a red dog {key % 5} runs (left)" for key in truth}
    submissions.write(tmp_path / "predictions.json", "captions", predicted)
    tasks = f'"coco": task("captioning", "coco", "test", "{tmp_path}/data",'
    file = config(tmp_path, tasks + "scores=('cider', 'bleu4', 'rouge_l'))")
    metrics = run(file, tmp_path / "out", f"--predictions={tmp_path}/predictions.json")
    tokens = {key: plain(text) for key, text in predicted.items()}
    references = {key: [plain(text) for text in texts] for key, texts in truth.items()}
    assert metrics["coco/cider"] == pytest.approx(cider_d(tokens, references), rel=1e-9)
    assert metrics["coco/bleu4"] == pytest.approx(bleu(tokens, references, 4), rel=1e-6)
    expected = np.mean([rouge_l(tokens[k], references[k]) for k in tokens])
    assert metrics["coco/rouge_l"] == pytest.approx(expected)
    assert submissions.read(tmp_path / "out" / "predictions" / "coco.json", "captions") == predicted


def test_nocaps_is_scored_whole_and_by_domain(tmp_path):
    truth = write_nocaps(tmp_path / "data")
    predicted = {key: f"a red thing {key % 4} in a picture" for key in truth}
    submissions.write(tmp_path / "predictions.json", "captions", predicted)
    tasks = f'"nocaps": task("captioning", "nocaps", "val", "{tmp_path}/data", by="domain",'
    tasks += "scores=('cider',), tokenizer='fallback')"
    metrics = run(
        config(tmp_path, tasks), tmp_path / "out", f"--predictions={tmp_path}/predictions.json"
    )
    for part, start in (("in_", 0), ("near_", 1), ("out_", 2), ("", None)):
        keys = [k for k in truth if start is None or k % 3 == start]
        some = {k: predicted[k] for k in keys}, {k: truth[k] for k in keys}
        assert metrics[f"nocaps/{part}cider"] == pytest.approx(cider_d(*some), rel=1e-9)


def test_without_java_what_is_left_out_is_reported(tmp_path, monkeypatch, capsys):
    truth = write_coco(tmp_path / "data")
    submissions.write(
        tmp_path / "predictions.json", "captions", {key: "a red dog" for key in truth}
    )
    monkeypatch.setenv("PATH", "")
    file = config(tmp_path, f'"coco": task("captioning", "coco", "test", "{tmp_path}/data")')
    metrics = run(file, tmp_path / "out", f"--predictions={tmp_path}/predictions.json")
    assert "coco/meteor" not in metrics and metrics["coco/tokenizer"] == "fallback"
    assert metrics["left_out"].keys() == {"coco/meteor", "coco/spice", "coco/ptb"}
    assert "Left out: coco/meteor: needs Java" in capsys.readouterr().out
    assert "needs Java" in (tmp_path / "out" / "report.html").read_text()


@needs_java
def test_with_java_meteor_is_there(tmp_path):
    truth = write_coco(tmp_path / "data")
    submissions.write(
        tmp_path / "predictions.json", "captions", {key: "a red dog" for key in truth}
    )
    file = config(tmp_path, f'"coco": task("captioning", "coco", "test", "{tmp_path}/data")')
    metrics = run(file, tmp_path / "out", f"--predictions={tmp_path}/predictions.json")
    assert 0 < metrics["coco/meteor"] < 1 and metrics["coco/tokenizer"] == "ptb"


# -------------------------------------------------------------------- a model, end to end


def images_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.jpg"))


def test_answers_are_those_of_the_model_one_by_one(tmp_path, models, monkeypatch):
    """With what is asked and how as the config says; every image goes to the encoder once."""
    truth = write_vqa(tmp_path / "data")
    encoded = []
    load_batch = blip2_jax.inference.images.load_batch
    monkeypatch.setattr(
        "blip2_jax.inference.images.load_batch",
        lambda pictures, *a, **k: encoded.append(len(pictures)) or load_batch(pictures, *a, **k),
    )
    tasks = f'"val": task("vqa", "vqav2", "val", "{tmp_path}/data", blind=True, {VARIED})'
    metrics = run(config(tmp_path, tasks), tmp_path / "out", f"--model={models}/opt")
    assert sum(encoded) <= 5 + 4 + 1  # an image whose questions are in two batches; attention maps
    monkeypatch.undo()
    model = blip2_jax.load(models / "opt")
    how = metrics["settings"]["tasks"]["val"]["decoding"]
    predicted = submissions.read(tmp_path / "out" / "predictions" / "val.json", "vqa")
    assert predicted.keys() == truth.keys() and len(set(predicted.values())) > 1
    for number, path in enumerate(images_of(tmp_path / "data")):
        key = (100 + 7 * number) * 1000
        asked = f"what colour is number 0? it's {number}"  # cleaned as LAVIS does
        assert model.answer(path, asked, prompt="{}", **how) == [predicted[key]]
    each = [literal_accuracy(predicted[q], answers, "lavis") for q, answers in truth.items()]
    assert metrics["val/accuracy"] == pytest.approx(np.mean(each))
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("should be") >= 1 and "number 1?" in page
    assert {"val/accuracy_blind", "val/other_blind"} <= metrics.keys()


@pytest.mark.parametrize("name", ["metrics.json", "report.html", "predictions/dev.json"])
def test_files_of_others_in_the_workdir_are_left_alone(name, tmp_path, models):
    write_vqa(tmp_path / "data", "val2014")
    tasks = f'"dev": task("vqa", "vqav2", "val", "{tmp_path / "data"}", {DECODING})'
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(SystemExit, match=rf"blip2 evaluate would write, .*{name}"):
        run(config(tmp_path, tasks), tmp_path / "out", f"--model={models}/opt")
    assert path.read_text() == "mine" and not list((tmp_path / "out").rglob("*.jsonl"))


def test_a_split_without_public_answers_gives_a_file_and_a_note(tmp_path, models):
    folder = tmp_path / "data"
    write_vqa(folder, "test2015", answers=False)
    (folder / "v2_OpenEnded_mscoco_test2015_questions.json").rename(
        folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    )
    tasks = f'"dev": task("vqa", "vqav2", "test-dev", "{folder}", {DECODING})'
    metrics = run(config(tmp_path, tasks), tmp_path / "out", f"--model={models}/opt")
    assert "dev/accuracy" not in metrics
    assert "evaluation server" in metrics["left_out"]["dev/accuracy"]
    rows = json.loads((tmp_path / "out" / "predictions" / "dev.json").read_text())
    assert len(rows) == 10 and all(isinstance(row["question_id"], int) for row in rows)


@pytest.fixture
def pairs(tmp_path):
    """Flickr30k in Karpathy's own form, with one to three captions an image."""
    (tmp_path / "data" / "flickr30k_images").mkdir(parents=True)
    rows, texts, owner = [], [], []
    for i in range(11):
        digit = "0123456789X"[i]
        made_of = [f"a red {digit}.", f"two {digit} and 4", f"the {digit} is blue!"][: 1 + i % 3]
        (tmp_path / "data" / "flickr30k_images" / f"{i}.jpg").write_bytes(made.jpeg(i))
        sentences = [{"raw": text} for text in made_of]
        rows.append({"filename": f"{i}.jpg", "imgid": i, "split": "test", "sentences": sentences})
        texts += [text.lower().strip(".!") for text in made_of]
        owner += [i] * len(made_of)
    (tmp_path / "data" / "dataset_flickr30k.json").write_text(json.dumps({"images": rows}))
    paths = [tmp_path / "data" / "flickr30k_images" / f"{i}.jpg" for i in range(11)]
    return paths, texts, np.array(owner)


def retrieval_task(tmp_path, **changes):
    words = "".join(f", {name}={value!r}" for name, value in changes.items())
    return f'"flickr": task("retrieval", "flickr30k", "test", "{tmp_path}/data"{words})'


@pytest.mark.parametrize("k", [2, 100])
def test_retrieval_equals_scoring_every_pair(tmp_path, models, pairs, k):
    paths, texts, owner = pairs
    file = config(tmp_path, retrieval_task(tmp_path, rerank=k))
    metrics = run(file, tmp_path / "out", f"--model={models}/retrieval")
    model = blip2_jax.load(models / "retrieval")
    itc = model.similarity(paths, texts)
    image, text = (grid.ravel() for grid in np.indices(itc.shape))
    itm = model.match_logits([paths[i] for i in image], [texts[t] for t in text])[:, 1]
    i2t, t2i = slow_rerank(itc, itm.reshape(itc.shape), k)
    for name, value in slow_recalls(i2t, owner, t2i).items():
        assert metrics[f"flickr/{name}"] == pytest.approx(value), name
    for name, value in slow_recalls(itc, owner).items():
        assert metrics[f"flickr/itc_{name}"] == pytest.approx(value), name
    assert metrics["flickr/candidates"] == 11 and metrics["flickr/candidate_texts"] == len(texts)
    best = json.loads((tmp_path / "out" / "predictions" / "flickr.json").read_text())
    top, score = best["image_to_text"][3]["best"][0]
    assert score == pytest.approx(i2t[3].max(), abs=1e-3) and texts[i2t[3].argmax()] == top


def test_ranking_takes_the_likeliest_candidate(tmp_path, models):
    made.write_images(tmp_path / "photos", 3)
    rows = [
        {"image": f"{i}.jpg", "question": "what digit?", "answer": "seven", "question_id": i,
         "choices": ["seven", "a red 3", "blue"]}
        for i in range(3)
    ]  # fmt: skip
    (tmp_path / "list.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    tasks = f'"choices": task("ranking", "files", "", "{tmp_path}/list.jsonl", metric="exact")'
    words = f"--config.tasks.choices.data.images={tmp_path}/photos"
    for name in ("opt", "instruct"):
        out = tmp_path / name
        metrics = run(config(tmp_path, tasks), out, f"--model={models}/{name}", words)
        model = blip2_jax.load(models / name)
        predicted = submissions.read(out / "predictions" / "choices.json", "gqa")
        for i in range(3):
            scores = model.rank(
                tmp_path / "photos" / f"{i}.jpg", "what digit?", [rows[i]["choices"]]
            )
            assert predicted[i] == rows[i]["choices"][int(scores[0].argmax())]
        assert "1 x not JSON" in metrics["left_out"]["choices/records"]
        hits = [answer == "seven" for answer in predicted.values()]
        assert metrics["choices/accuracy"] == pytest.approx(np.mean(hits))


def test_saved_predictions_are_scored_without_a_model(tmp_path, models, pairs):
    file = config(tmp_path, two_tasks(tmp_path, models))
    metrics = run(file, tmp_path / "out")
    for task in evaluator.open_tasks(cli.load_config(file).tasks, threads=1):
        lines = (tmp_path / "out" / "predictions" / f"{task.name}.0.jsonl").read_text().splitlines()
        predictions = {p["record"]: p for p in map(json.loads, lines[1:])}
        scores, _ = task.score(predictions)
        assert len(scores) > 3
        assert scores == {n: x for n, x in metrics.items() if n.startswith(f"{task.name}/")}


# ---------------------------------------------------------------------------- kill and resume


def without_times(metrics: dict) -> dict:
    skip = ("seconds/", "peak_memory")
    return {name: value for name, value in metrics.items() if not name.startswith(skip)}


def test_a_killed_evaluation_goes_on_and_ends_the_same(tmp_path, models, pairs):
    """kill -9 of a real process, in each of two tasks; no image is answered twice."""
    write_vqa(tmp_path / "vqa")
    tasks = (
        f'"val": task("vqa", "vqav2", "val", "{tmp_path}/vqa", {DECODING}, model="{models}/opt"),'
    )
    tasks += retrieval_task(tmp_path, rerank=3, model=f"{models}/retrieval")
    file = config(tmp_path, tasks, batch_size=1)
    whole = run(file, tmp_path / "whole")
    command = [sys.executable, "-m", "tests.interrupted", "evaluate", f"--config={file}"]
    command += [f"--workdir={tmp_path}/killed"]
    # The rest of the first task takes ten calls; those that add none count as well.
    for name, adds, kept in (("flickr", 4, 4), ("val", 10 + 3, 3)):
        event = {"INTERRUPT": f"{ADD}:{adds}:SIGKILL"}
        alone = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **event}
        killed = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with (tmp_path / "killed" / "predictions" / f"{name}.0.jsonl").open("r+") as file_:
            assert len(file_.read().splitlines()) == 1 + kept
            file_.write('{"record": 4, "id"')  # as if in the middle of a line
    assert without_times(run(file, tmp_path / "killed")) == without_times(whole)
    for name, count in (("flickr", 11), ("val", 5)):
        for folder in ("whole", "killed"):
            text = (tmp_path / folder / "predictions" / f"{name}.0.jsonl").read_text()
            rows = [json.loads(line) for line in text.splitlines()]
            assert sorted(row["record"] for row in rows[1:]) == list(range(count))


def test_told_to_stop_an_evaluation_leaves_after_its_batch_and_goes_on(
    tmp_path, models, monkeypatch, capsys
):
    write_vqa(tmp_path / "data")
    tasks = f'"val": task("vqa", "vqav2", "val", "{tmp_path}/data", {DECODING})'
    words = [f"--config={config(tmp_path, tasks)}", f"--model={models}/opt"]
    add, before = Predictions.add, signal.getsignal(signal.SIGTERM)

    def told(predictions, new):
        os.kill(os.getpid(), signal.SIGTERM)
        add(predictions, new)

    def count(name):
        return (tmp_path / name / "predictions" / "val.0.jsonl").read_text().count("\n") - 1

    monkeypatch.setattr(Predictions, "add", told)
    for done in (4, 5):  # in batches of four images; the last is scored at the next start
        ended = evaluate.main([*words, f"--workdir={tmp_path}/stopped"])
        assert ended == (42 if done == 4 else 0) and count("stopped") == done
        assert ("The same command goes on" in capsys.readouterr().out) == (done == 4)
    assert signal.getsignal(signal.SIGTERM) == before


def test_predictions_of_other_settings_are_refused_and_scoring_may_change(tmp_path, models):
    write_vqa(tmp_path / "data")
    tasks = f'"val": task("vqa", "vqav2", "val", "{tmp_path}/data", {DECODING})'
    file, model = config(tmp_path, tasks), f"--model={models}/opt"
    first = run(file, tmp_path / "out", model)
    again = run(file, tmp_path / "out", model, "--config.tasks.val.forms=('official',)")
    assert again["val/accuracy"] == first["val/accuracy_official"]
    with pytest.raises(SystemExit, match=r"(?s)another request.*num_beams: 2 saved, 1 now"):
        run(file, tmp_path / "out", model, "--config.tasks.val.decoding.num_beams=1")


# -------------------------------------------------------------------------------- bad input


def test_annotations_of_another_version_are_refused(tmp_path):
    write_vqa(tmp_path / "data")
    path = tmp_path / "data" / "v2_mscoco_val2014_annotations.json"
    annotations = json.loads(path.read_text())
    annotations["annotations"][3]["question_id"] += 500
    path.write_text(json.dumps(annotations))
    file = config(tmp_path, f'"val": task("vqa", "vqav2", "val", "{tmp_path}/data")')
    with pytest.raises(SystemExit, match=r"(?s)another version or split.*2 ids.*107001"):
        run(file, tmp_path / "out", "--model=none")


def test_missing_images_stop_before_the_model_or_are_counted(tmp_path, models):
    truth = write_coco(tmp_path / "data")
    gone, broken = images_of(tmp_path / "data")[:2]
    gone.unlink()
    broken.write_bytes(broken.read_bytes()[:200])
    tasks = f'"coco": task("captioning", "coco", "test", "{tmp_path}/data", {DECODING})'
    file, model = config(tmp_path, tasks), f"--model={models}/opt"
    with pytest.raises(SystemExit, match="1 of 6 images are missing.*391895.*max_unreadable"):
        run(file, tmp_path / "out", "--model=none")
    allow = "--config.tasks.coco.data.max_unreadable"
    with pytest.raises(SystemExit, match="2 of 6 images cannot be read.*run the same command"):
        run(file, tmp_path / "out", model, f"{allow}=0.17")
    metrics = run(file, tmp_path / "out", model, f"{allow}=0.34")
    assert metrics["coco/unreadable"] == 2 and "2 of 6" in metrics["left_out"]["coco/images"]
    predicted = submissions.read(tmp_path / "out" / "predictions" / "coco.json", "captions")
    assert sorted(predicted) == sorted(truth)[2:]
    gone.write_bytes(made.jpeg(0))  # mended: only these are left to do
    broken.write_bytes(made.jpeg(1))
    metrics = run(file, tmp_path / "out", model)
    assert "coco/unreadable" not in metrics
    predicted = submissions.read(tmp_path / "out" / "predictions" / "coco.json", "captions")
    assert predicted.keys() == truth.keys()


def test_predictions_that_do_not_fit_are_named(tmp_path):
    truth = write_vqa(tmp_path / "data")
    file = config(tmp_path, f'"val": task("vqa", "vqav2", "val", "{tmp_path}/data")')
    path = tmp_path / "predictions.json"

    def refused(content, message):
        path.write_text(content)
        with pytest.raises(SystemExit, match=message):
            run(file, tmp_path / "out", f"--predictions={path}")

    rows = [{"question_id": key, "answer": "red"} for key in truth]
    refused(json.dumps([*rows, {"question_id": 9, "answer": ""}]), r"unknown questions \(9\)")
    refused(json.dumps(rows[1:]), r"1 questions have no prediction \(100000\)")
    refused(json.dumps([*rows, rows[0]]), "100000 twice")
    refused(json.dumps([{"image_id": 1, "caption": "a"}]), r'entry 0 is .*"question_id"')
    refused(json.dumps({"a": 1}), "holds a dict")
    refused("[", "is not JSON")
    path.unlink()
    with pytest.raises(SystemExit, match="There is no file"):
        run(file, tmp_path / "out", f"--predictions={path}")


@pytest.mark.parametrize(
    ("tasks", "words", "message"),
    [
        ("", [], "there are: none"),
        ("{vqa}", ["--task=nothing"], "no task nothing; there are: val"),
        ("{vqa}", [], "no model is named. Pass --model"),
        ("{vqa}", ["--model={models}/nowhere"], "nowhere"),
        ("{vqa}, metric='f1'", ["--model=none"], "metric is 'f1'; known: vqa, exact"),
        ("{vqa}, lemmatize=True", ["--model=none"], "pip install spacy"),
        ("{ranking}", ["--model=none"], "10 questions have no `choices`"),
        ("{retrieval}", ["--model=none"], "5 images have no text"),
        ("{vqa}), 'two': {vqa}", ["--predictions=x.json"], "is of one task; name it: --task="),
        (
            "'x': task('retrieval', 'coco', 'test', '{data}/c'",
            ["--predictions=x"],
            "no server takes",
        ),
        ("'x': task('dancing', 'vqav2', 'val', '{data}'", ["--model=none"], "task is 'dancing'"),
        ("'x': task('vqa', 'vqav3', 'val', '{data}'", ["--model=none"], "is 'vqav3'; known"),
        ("'x': task('vqa', 'vqav2', 'dev', '{data}'", ["--model=none"], "holds no vqav2"),
    ],
)
def test_what_does_not_fit_is_reported_at_once(
    tmp_path, models, monkeypatch, tasks, words, message
):
    data = tmp_path / "data"
    write_vqa(data)
    write_coco(data / "c")
    if "spacy" in message:
        monkeypatch.setitem(sys.modules, "spacy", None)
    parts = {
        kind: f"task({of!r}, 'vqav2', 'val', '{data}'"
        for kind, of in (("vqa", "vqa"), ("captions", "captioning"), ("ranking", "ranking"),
                         ("retrieval", "retrieval"))
    }  # fmt: skip
    tasks = tasks.format(
        data=data, **{k: p if ", 'two'" in tasks else f"'val': {p}" for k, p in parts.items()}
    )
    if ", 'two'" in tasks:
        tasks = f"'val': {tasks}"
    file = config(tmp_path, f"{tasks})" if tasks else "")
    with pytest.raises(SystemExit, match=message):
        run(file, tmp_path / "out", *(word.format(models=models) for word in words))


def test_a_model_without_the_head_leaves_the_task_out(tmp_path, models, capsys):
    write_vqa(tmp_path / "data")
    tasks = f'"val": task("vqa", "vqav2", "val", "{tmp_path}/data", {DECODING})'
    metrics = run(config(tmp_path, tasks), tmp_path / "out", f"--model={models}/retrieval")
    assert "val: left out" in capsys.readouterr().out and "val/accuracy" not in metrics


def test_lemmas_are_of_nouns_and_verbs_alone(monkeypatch):
    class Word:
        def __init__(self, text):
            self.text, self.lemma_ = text, text.rstrip("s")
            self.pos_ = "NOUN" if text.endswith("s") else "ADJ"

    class Spacy:
        @staticmethod
        def load(name):
            return type(
                "Nlp", (), {"pipe": lambda self, texts: [map(Word, t.split()) for t in texts]}
            )()

    monkeypatch.setitem(sys.modules, "spacy", Spacy)
    assert vqa.lemmatize(["red dogs", "cat"]) == ["red dog", "cat"]


def test_every_config_of_the_paper_names_its_settings():
    for name in ("vqa", "vqa_finetuned", "caption", "retrieval"):
        module = cli.load_module(f"configs/eval/{name}.py")
        for variant in module.VARIANTS:
            config = cli.load_config(f"configs/eval/{name}.py:{variant}")
            assert set(config.published.scores) == set(config.tasks)
            for task in config.tasks.values():
                if task.task != "retrieval":
                    assert task.prompt and task.decoding.num_beams == 5


CAPTION, LONG, SHORT = "a photo of", "Question: {} Answer:", "Question: {} Short answer:"


@pytest.mark.parametrize(
    "name, prompt, want",
    [
        # LAVIS's least lengths, less the tokens that they counted: T5's start; "</s>a photo of".
        ("caption.py:vitg-opt2.7b", CAPTION, (4, 30, 1.0, True, False)),
        ("caption.py:vitg-flant5xl", CAPTION, (7, 30, 1.0, True, False)),
        ("caption.py:vitg-vicuna7b", CAPTION, (8, 30, 1.0, False, True)),
        ("vqa.py:vitg-opt6.7b", LONG, (1, 10, 0.0, False, True)),
        ("vqa.py:vitg-flant5xxl", SHORT, (0, 10, -1.0, True, False)),
        ("vqa.py:vitg-vicuna13b", LONG, (1, 10, 0.0, False, True)),
        ("vqa_finetuned.py:vitg-opt2.7b", LONG, (1, 10, 0.0, False, True)),
        ("vqa_finetuned.py:vitg-flant5xl", LONG, (0, 10, -1.0, True, False)),
    ],
)
def test_published_settings_mean_what_they_meant_then(name, prompt, want):
    keys = (
        "min_new_tokens", "max_new_tokens", "length_penalty",
        "length_penalty_includes_prompt", "length_penalty_includes_eos",
    )  # fmt: skip
    config = cli.load_config(f"configs/eval/{name}")
    for task in config.tasks.values():
        assert task.prompt == prompt  # paper, section 4.1 and appendix
        assert tuple(task.decoding[key] for key in keys) == want
        Decoding(**task.decoding)


def test_splits_and_scores_are_those_of_the_papers_tables():
    """OK-VQA with LAVIS's lemmas, GQA by exact match, retrieval by LAVIS's 128 candidates."""
    found = {
        (task.task, task.data.source, task.data.split): task
        for name in ("vqa", "vqa_finetuned", "caption", "retrieval")
        for task in cli.load_config(f"configs/eval/{name}.py").tasks.values()
    }
    answered = {
        ("vqa", "vqav2", "val"): ("vqa", False),
        ("vqa", "vqav2", "test-dev"): ("vqa", False),
        ("vqa", "vqav2", "test"): ("vqa", False),
        ("vqa", "okvqa", "val"): ("vqa", True),
        ("vqa", "gqa", "testdev_balanced"): ("exact", False),
    }
    captioned = {("captioning", "nocaps", "val"): "domain", ("captioning", "coco", "test"): ""}
    retrieved = {("retrieval", name, "test") for name in ("flickr30k", "coco")}
    assert found.keys() == answered.keys() | captioned.keys() | retrieved
    for key, task in found.items():
        assert task.data.form == "image" and task.data.first == 0 and not task.data.max_unreadable
        if key in answered:
            assert (task.metric, task.lemmatize) == answered[key] and task.forms[0] == "lavis"
            assert task.clean_text and task.truncate == 0
        elif key in captioned:
            assert task.by == captioned[key] and {"cider", "bleu4", "spice"} <= set(task.scores)
        else:
            assert (task.rerank, task.truncate, task.captions, task.group) == (128, 35, 0, 0)
            assert task.clean_text


def test_what_is_decoded_by_default_is_what_lavis_decodes():
    """`generate` and `predict_answers` of its models; InstructBLIP's repetition penalty."""
    for (family, task), (prompt, how) in DEFAULTS.items():
        instruct = family.startswith("instruct")
        assert how.num_beams == 5 and not how.do_sample and how.no_repeat_ngram_size == 0
        assert how.repetition_penalty == (1.5 if instruct else 1.0)
        t5 = family in ("t5", "instruct-t5")
        assert how.length_penalty == ((-1.0 if t5 else 0.0) if task == "answer" else 1.0)
        longest = {"answer": 10, "caption": 80 if instruct else 30}
        assert how.max_new_tokens == longest.get(task, 256 if instruct else 30)
        assert (
            prompt
            == {
                "answer": "Question: {} Short Answer:" if instruct else SHORT if t5 else LONG,
                "caption": "A short image caption." if instruct else "",
                "generate": "{}",
            }[task]
        )


def test_a_task_of_ones_own_is_decoded_as_its_family(models, tmp_path):
    write_vqa(tmp_path / "vqa")
    make = cli.load_module("configs/eval/default.py").task
    config = make("vqa", "vqav2", "val", f"{tmp_path}/vqa", decoding={"num_beams": 2})
    for name, penalty in (("opt", 0.0), ("instruct", 0.0)):
        task = tasks.make("val", config, EvalDataset(config.data), 1)
        how = task.settings(blip2_jax.load(models / name))["decoding"]
        assert how["num_beams"] == 2 and how["length_penalty"] == penalty
        assert how["max_new_tokens"] == 10
    with pytest.raises(KeyError, match="promt"):
        make("vqa", "vqav2", "val", promt="a")


def test_the_quickstarts_evaluation_is_a_config_like_the_others():
    words = ["data.dir=D", "models.retrieval=R", "models.captioning=C", "models.vqa=V"]
    words = [f"--config.{word}" for word in words]
    tasks = cli.load_config("configs/digits/evaluate.py", words).tasks
    models = {name: (task.task, task.model, task.data.split) for name, task in tasks.items()}
    assert models == {
        "retrieval": ("retrieval", "R", "test"),
        "caption": ("captioning", "C", "test"),
        "vqa": ("vqa", "V", "test"),
        "vqa_held_out": ("vqa", "V", "held_out"),
    }
    assert {task.data.dir for task in tasks.values()} == {"D"}


# ------------------------------------------------------------------- meshes, processes


def two_tasks(tmp_path, models) -> str:
    write_vqa(tmp_path / "vqa")
    tasks = f'"val": task("vqa", "vqav2", "val", "{tmp_path}/vqa", {VARIED}, model="{models}/opt"),'
    return tasks + retrieval_task(tmp_path, rerank=3, model=f"{models}/retrieval")


@pytest.fixture
def mesh():
    return [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]


def test_eight_devices_predict_and_score_the_same(tmp_path, models, pairs, mesh, monkeypatch):
    file = config(tmp_path, two_tasks(tmp_path, models))
    spread = run(file, tmp_path / "spread", *mesh)
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda *args, **kwargs: devices)
    alone = run(file, tmp_path / "alone")
    scores = [name for name in alone if name.startswith(("val/", "flickr/"))]
    assert len(scores) > 15 and all(spread[name] == alone[name] for name in scores)
    predicted = [tmp_path / name / "predictions" / "val.json" for name in ("spread", "alone")]
    assert predicted[0].read_text() == predicted[1].read_text()


def test_two_processes_share_the_images_and_resume(tmp_path, models, pairs):
    """Each predicts its share, the first scores all; one may go on with the predictions of both.

    One that is told to stop stops both, which leave with 42.
    """
    file = config(tmp_path, two_tasks(tmp_path, models))
    alone = run(file, tmp_path / "alone")
    out = tmp_path / "shared"

    def together(stop=False):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes = []
        for index in range(2):
            environment = os.environ | {
                "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "BLIP2_DISTRIBUTED": "1",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "INTERRUPT": f"{ADD}:1:SIGTERM:process=1" if stop else "",
            }  # fmt: skip
            words = [f"--config={file}", f"--workdir={out}"]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.interrupted", "evaluate", *words],
                    cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        try:
            printed = [process.communicate(timeout=300)[0].decode() for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [42 * stop] * 2, printed
        assert stop == ("The same command goes on" in printed[0])
        return None if stop else json.loads((out / "metrics.json").read_text())

    def same(metrics):
        scores = [name for name in alone if name.startswith(("val/", "flickr/"))]
        return len(scores) > 15 and all(metrics[name] == alone[name] for name in scores)

    assert together(stop=True) is None and not (out / "metrics.json").exists()
    assert same(together())
    for name, count in (("val", 5), ("flickr", 11)):
        shares = [
            (out / "predictions" / f"{name}.{i}.jsonl").read_text().count("\n") - 1 for i in (0, 1)
        ]
        assert sum(shares) == count and min(shares) >= count // 2
    cut = out / "predictions" / "val.1.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:2]) + '{"record"')
    (out / "predictions" / "flickr.0.jsonl").unlink()
    assert same(run(file, out))
