"""Evaluate trained runs: retrieval, captioning, visual question answering; write a report.

  blip2 evaluate --config=configs/digits/evaluate.py --workdir=runs/quickstart
  blip2 evaluate --config=configs/digits/evaluate.py --workdir=runs/mine --model=runs/mine/stage2

Each task evaluates the run that the config names for it (config.models); --model takes one run
for all the tasks that its model has the heads for. The workdir receives metrics.json,
predictions.json and report.html. Scores are fractions of 1, CIDEr-D is on its own scale of 10;
a score ending in _blind is the same thing done without the image.
"""

import argparse
import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from blip2_jax import __version__, cli, recipe
from blip2_jax.data import sources, transforms, world
from blip2_jax.evals import captioning, retrieval, vqa
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.report import write_report
from blip2_jax.runtime import distributed
from blip2_jax.runtime.metrics import read_jsonl

TASKS = ("retrieval", "captioning", "vqa")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder for the results")
    parser.add_argument("--model", help="a run's workdir, instead of those that the config names")


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(__doc__, argv, add_arguments, prog="blip2 evaluate")
    distributed.setup_compilation_cache()
    return evaluate(args.config, Path(args.workdir), args.model)


def evaluate(config, workdir: Path, model: str | None = None) -> int:
    """Runs every task of a config; returns the exit code."""
    workdir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    test = Examples(config.data.dir, config.data.split)
    held_out = Examples(config.data.dir, config.data.held_out_split)
    metrics: dict[str, Any] = {}
    predictions: dict[str, Any] = {}
    loaded: dict[str, Blip2] = {}
    for task in TASKS:
        source = model or config.models[task]
        if source not in loaded:
            loaded[source] = recipe.load_run(Path(source), batch_size=config.batch_size)
        blip2 = loaded[source]
        if not blip2.can(task):
            print(f"{task}: left out, {source} has no head for it.")
            continue
        print(f"{task}: {source}")
        if task == "retrieval":
            metrics |= evaluate_retrieval(blip2, test, config)
        elif task == "captioning":
            scores, predictions["captions"] = evaluate_captioning(blip2, test, config)
            metrics |= scores
        else:
            for split, name in ((test, "vqa"), (held_out, "vqa_held_out")):
                scores, predictions[name] = evaluate_vqa(blip2, split, config, name)
                metrics |= scores
    metrics |= costs(config, time.monotonic() - started)
    settings = json.loads(cli.config_to_json(config))
    for name, content in {
        "metrics.json": {**metrics, "settings": settings},
        "predictions.json": predictions,
    }.items():
        (workdir / name).write_text(json.dumps(content, indent=1) + "\n")
    report(workdir, config, metrics, predictions, test, loaded)
    print_table(metrics)
    print(f"Report: {workdir / 'report.html'}")
    return 0


class Examples:
    """A split, decoded: images uint8[N, H, W, 3] and what is known of them."""

    def __init__(self, folder: str, split: str):
        self.records = list(sources.TfdsSource(folder, split))
        self.images = np.stack(
            [np.asarray(transforms.decode_image(record["image"])) for record in self.records]
        )
        self.ids = [record["id"] for record in self.records]
        self.captions = [record["captions"] for record in self.records]
        self.scenes = [world.scene_from_json(record["scene"]) for record in self.records]
        self.questions = [
            {"id": f"{record['id']}/{number}", "row": row, **question}
            for row, record in enumerate(self.records)
            for number, question in enumerate(record["questions"])
        ]


def evaluate_retrieval(blip2: Blip2, examples: Examples, config) -> dict[str, float]:
    """Recall within groups of `retrieval.candidates` pairs, averaged over all whole groups.

    The first caption of each image stands for it. Scores `itc_*` are ITC alone; the others are
    ITC re-ranked by ITM, as the paper reports them.
    """
    size = config.retrieval.candidates
    groups = len(examples.images) // size
    if not groups:
        raise ValueError(
            f"The split holds {len(examples.images)} images, fewer than the "
            f"{size} of config.retrieval.candidates; lower it."
        )
    totals: dict[str, float] = {}
    for group in tqdm(range(groups), desc="retrieval", unit=" groups", leave=False):
        rows = slice(group * size, (group + 1) * size)
        images, texts = examples.images[rows], [c[0] for c in examples.captions[rows]]
        itc = blip2.similarity(images, texts)
        score = blip2.pair_scorer(images, texts)
        ranked = retrieval.rerank(
            itc,
            lambda i, t: score(i, t)[:, 1],  # noqa: B023  the published re-ranking: raw class-1 logit
            config.retrieval.rerank,
            batch_size=4 * config.batch_size,
            progress=False,
        )
        same = np.arange(size)
        plain = retrieval.recall_metrics(itc, same)
        reranked = retrieval.recall_metrics(ranked[0], same, scores_t2i=ranked[1])
        for name, value in {
            **{f"retrieval/{n}": v for n, v in reranked.items() if "_r" in n},
            **{f"retrieval/itc_{n}": v for n, v in plain.items() if "_r" in n},
        }.items():
            totals[name] = totals.get(name, 0.0) + float(value) / groups
    return {**totals, "retrieval/candidates": size}


def evaluate_captioning(
    blip2: Blip2, examples: Examples, config
) -> tuple[dict[str, float | str], dict[str, str]]:
    """Caption scores against the references, and fact by fact against the scene."""
    how = dict(config.captioning.decoding)
    texts = blip2.caption(examples.images, progress="captions", **how)
    blind = blip2.generate(None, [""], **how) * len(texts)
    scores: dict[str, float | str] = {}
    references = dict(zip(examples.ids, examples.captions, strict=True))
    scenes = dict(zip(examples.ids, examples.scenes, strict=True))
    for suffix, said in (("", texts), ("_blind", blind)):
        said = dict(zip(examples.ids, said, strict=True))
        found = captioning.caption_metrics(said, references)
        found |= captioning.facts_metrics(said, scenes, world.facts_correct)
        keep = ("cider", "bleu4", "rouge_l", "facts_correct")
        scores |= {f"caption/{name}{suffix}": found[name] for name in keep}
        scores["caption/tokenizer"] = found["tokenizer"]
    return scores, dict(zip(examples.ids, texts, strict=True))


def evaluate_vqa(
    blip2: Blip2, examples: Examples, config, name: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Zero-shot question answering, by type of question; and without the image."""
    questions = examples.questions
    texts = [question["question"] for question in questions]
    images = examples.images[[question["row"] for question in questions]]
    scores, said = {}, {}
    for suffix, seen in (("_blind", None), ("", images)):
        answers = blip2.answer(seen, texts, progress=name + suffix, **config.vqa.decoding)
        said = {q["id"]: a for q, a in zip(questions, answers, strict=True)}
        found = vqa.vqa_metrics(said, questions, form=config.vqa.form)
        scores |= {f"{name}/{key}{suffix}": value for key, value in found.items()}
    return scores, said


def costs(config, seconds: float) -> dict[str, float]:
    """Seconds of each part over all its restarts, and the most host memory of any of them."""
    runs = {"prepare": Path(config.data.dir)}
    runs |= {Path(workdir).name: Path(workdir) for workdir in config.models.values()}
    finished = {name: run / "done.json" for name, run in runs.items()}
    done = {name: json.loads(path.read_text()) for name, path in finished.items() if path.is_file()}
    parts = {f"seconds/{name}": of["seconds"] for name, of in done.items()}
    parts["seconds/evaluate"] = seconds
    memory = [of.get("peak_memory_gb", 0.0) for of in done.values()]
    return {
        **parts,
        "seconds/total": sum(parts.values()),
        "peak_memory_gb": max([distributed.peak_memory_gb(), *memory]),
    }


def report(workdir: Path, config, metrics, predictions, test: Examples, loaded) -> None:
    """Writes report.html."""
    captions, answers = predictions.get("captions", {}), predictions.get("vqa", {})
    by_row: dict[int, list[dict]] = {}
    for question in test.questions:
        said = answers.get(question["id"])
        if said is not None:
            right = vqa.answer_accuracy(said, [question["answer"]] * 10) > 0.5
            by_row.setdefault(question["row"], []).append(
                {**question, "prediction": said, "correct": right}
            )
    shown = np.random.default_rng(config.seed).permutation(len(test.ids))
    examples = [
        {
            "image": test.images[row],
            "reference": test.captions[row][0],
            "caption": captions.get(test.ids[row]),
            "correct": world.facts_correct(captions.get(test.ids[row], ""), test.scenes[row]),
            "questions": by_row.get(row, []),
        }
        for row in shown[: config.report.examples]
    ]
    last = list(loaded.values())[-1]
    some = shown[: config.report.attention]
    attention = [
        {"image": test.images[row], "attention": maps, "text": test.captions[row][0]}
        for row, maps in zip(some, last.attention_maps(test.images[some]), strict=True)
    ]
    runs = [Path(w) for w in dict.fromkeys(config.models[task] for task in TASKS)]
    names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    write_report(
        workdir / "report.html",
        title="BLIP-2 in the embedded world",
        metrics=metrics,
        curves={
            run.name: read_jsonl(run / "metrics.jsonl")
            for run in runs
            if (run / "metrics.jsonl").is_file()
        },
        examples=examples,
        attention=attention,
        timings={k.removeprefix("seconds/"): v for k, v in metrics.items() if "seconds/" in k},
        versions={
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}",
            "blip2_jax": __version__,
            **{name: metadata.version(name) for name in names},
        },
        config=cli.config_to_json(config),
    )


def print_table(metrics: dict[str, Any]) -> None:
    """All scores, one a line, with their baselines beside them."""
    print(f"\n{'':<40}{'score':>10}{'blind':>10}")
    for name, value in metrics.items():
        if name.endswith("_blind") or not isinstance(value, float) or name.startswith("seconds/"):
            continue
        blind = metrics.get(f"{name}_blind")
        print(f"{name:<40}{value:>10.3f}" + (f"{blind:>10.3f}" if blind is not None else ""))


if __name__ == "__main__":
    raise SystemExit(main())
