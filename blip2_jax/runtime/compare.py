"""Differences of two JSON documents, entry by entry; and whether two are of the same run."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

# How a run is executed, which may change when it goes on; all else is what it computes.
EXECUTION = frozenset(
    {
        "config.checkpoint",
        "config.distributed",
        "config.faults",
        "config.mesh",
        "config.profile",
        "config.data.threads",
        "config.data.workers",
        "config.data.index_dir",
        "config.evals.*.data.index_dir",
        "config.evals.*.examples",  # of the page of `blip2 evaluate`
        "config.evals.*.model",  # of `blip2 evaluate`; here it is the run's own
        "config.data.max_skipped",
    }
)
# Paths, which may change too: the contents are compared by digest.
PLACES = frozenset(
    {
        "config.data.dir",
        "config.data.images",
        "config.data.mixture.*.dir",
        "config.data.mixture.*.images",
        "config.data.qformer_tokenizer",
        "config.data.llm_tokenizer",
        "config.model.vit.source",
        "config.model.llm.source",
        "config.init.checkpoint",
        "config.init.bert",
        "config.evals.*.data.dir",
        "config.evals.*.data.images",
    }
)
STEPS = "config.steps"  # a run may go on for more

# For messages: what an entry of a run's document that is no config key stands for.
HINTS = {
    "fingerprints": "other weights in config.model.NAME.source",
    "data": "config.data leads to other records",
    "eval_data": "config.data.eval_split has other records",
    "tokenizers": "another tokenizer in config.data.NAME_tokenizer, or in config.model.llm.source",
    "evals": "config.evals.NAME.data leads to other records",
    "init": "the run was started from something else; take a new workdir to start from this",
}


def differences(
    name: str,
    saved: Any,
    wanted: Any,
    ignored: Collection[str] = EXECUTION,
    names: tuple[str, str] = ("saved", "now"),
) -> list[str]:
    """One line for every entry, however deep, that is not the same in both and not `ignored`.

    Args:
      name: of the entry, for messages; what is below it follows after a dot.
      saved, wanted: JSON documents.
      ignored: names, in which `*` stands for any text.
      names: what messages call the two documents.
    """
    if any(fnmatchcase(name, pattern) for pattern in ignored):
        return []
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        lines = []
        for key in sorted(saved.keys() | wanted.keys()):
            lines += differences(f"{name}.{key}", saved.get(key), wanted.get(key), ignored, names)
        return lines
    return [] if saved == wanted else [f"  {name}: {saved!r} {names[0]}, {wanted!r} {names[1]}"]


def run_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why a run cannot go on as what is asked for now; no lines where it can.

    Execution and places may differ, and `config.steps` may be more.

    Args:
      saved: the document of the run; may have more entries than `now`.
      now: what is about to run, as JSON would hold it: "config", "recipe", digests.
    """
    lines = []
    for key, value in now.items():
        different = differences(key, saved.get(key), value, EXECUTION | PLACES | {STEPS})
        lines += [f"{line} ({HINTS[key]})" for line in different] if key in HINTS else different
    before, after = (document.get("config", {}).get("steps") for document in (saved, now))
    if before is not None and after is not None and after < before:
        lines.append(f"  {STEPS}: {before} saved, {after} now (it can be more, not fewer)")
    return lines


def moved(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a path differs in two configs of one run."""
    return bool(differences("config", saved, now, EXECUTION | {STEPS}))
