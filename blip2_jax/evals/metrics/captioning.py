"""Captions against references: CIDEr-D, BLEU, ROUGE-L and, where Java is, METEOR and SPICE.

The scorers are those of `pycocoevalcap` (the COCO caption evaluation), one by one: its own
`COCOEvalCap.evaluate` always runs SPICE, which downloads its models. Here nothing is downloaded:
`left_out` says which scores cannot be had on this machine, and why. Scales are the scorers' own:
CIDEr-D is 0..10, all others are 0..1; papers print all of them times 100.

CIDEr-D weighs n-grams by how many of the *evaluated* images have them in a reference. A part of
a split therefore scores differently from the whole split, and a single image always scores 0.

COCO's scores are defined on Penn Treebank tokens, which a Java program cuts. Without Java,
`fallback_tokens` stands in, and the result says so under "tokenizer": on ordinary captions the
two agree, on rare spellings (abbreviations, fractions, symbols) they may not.
"""

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice.spice import Spice

from blip2_jax.evals.metrics import check_ids

TOKENIZERS = ("auto", "ptb", "fallback")
SCORES = ("cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor", "spice")

# What the COCO evaluation drops after tokenizing. Texts are in lower case by then, so brackets
# ("-lrb-") are in fact never dropped; scores are published with that, and so it stays.
DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

_BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True))
_SPLIT_WORDS = {
    whole: f"{whole[:cut]} {whole[cut:]}"
    for whole, cut in dict(cannot=3, gonna=3, wanna=3, gotta=3, gimme=3, lemme=3).items()
}
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'}
    | {"\u2013": "--", "\u2014": "--", "\u2026": "..."}
)
_TOKEN = re.compile(
    r"""
    \d+(?:[.,:/]\d+)+               # 3.5  1,000  9:30  1/2
  | (?:[^\W\d_]\.){2,}              # u.s.  p.m.
  | (?:mrs?|ms|dr|st|jr|sr|vs|etc)\.(?=\s+\S)   # titles and the like, inside of a sentence
  | \w+(?:[-/&]\w+)*(?=n't\b)       # the "is" of "isn't"
  | n't\b
  | '(?:s|m|d|re|ve|ll)\b           # 's 're
  | \w+(?:[-/&]\w+)*                # words; hyphens and slashes stay within: t-shirt  black/white
  | \.{2,} | --+ | \S               # dots, dashes, any other mark alone
    """,
    re.VERBOSE,
)


def fallback_tokens(text: str) -> str:
    """Cuts a caption as the Penn Treebank tokenizer does on ordinary text, and drops punctuation.

    Lower case; "isn't" -> "is n't", "dog's" -> "dog 's", "cannot" -> "can not"; hyphens and
    slashes stay within words; "(" -> "-lrb-".
    """
    tokens = []
    for token in _TOKEN.findall(text.lower().translate(_PLAIN)):
        if set(token) == {"."} and len(token) > 1:
            token = "..."
        tokens.append(_BRACKETS.get(token) or _SPLIT_WORDS.get(token, token))
    return " ".join(token for token in tokens if token not in DROPPED and token != '"')


def _ptb_tokens(texts: Sequence[str]) -> list[str]:
    """The Stanford tokenizer that `pycocoevalcap` ships, one Java process for all texts.

    Run here rather than through its wrapper, which writes into its own installation folder.
    """
    folder = _folder("pycocoevalcap")
    jar = os.path.join(folder, "tokenizer", "stanford-corenlp-3.4.1.jar")
    command = ["java", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", "-encoding", "utf-8"],
        input=lines.encode(),
        capture_output=True,
        check=False,
    )
    tokenized = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(tokenized) != len(texts):
        raise RuntimeError(
            f"Java's PTB tokenizer gave {len(tokenized)} lines for {len(texts)} texts (exit code "
            f"{done.returncode}): {done.stderr.decode(errors='replace').strip()[-300:]}"
        )
    return [
        " ".join(token for token in line.split(" ") if token and token not in DROPPED)
        for line in tokenized
    ]


def _folder(package: str) -> str:
    """Where an installed package lies."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{package} is not installed as it should be: pip install pycocoevalcap")
    return spec.submodule_search_locations[0]


def tokenize(texts: Sequence[str], *, tokenizer: str = "auto") -> tuple[list[str], str]:
    """Tokens of each text, joined by spaces, and the tokenizer used ("ptb" or "fallback").

    Args:
      texts: captions as written.
      tokenizer: "ptb" needs Java; "fallback" is pure Python; "auto" takes "ptb" where `java` is
        on the PATH and runs.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"Unknown tokenizer {tokenizer!r}; known: {', '.join(TOKENIZERS)}.")
    if tokenizer == "ptb" and not has_java():
        raise RuntimeError('tokenizer="ptb" needs Java: install a JRE, or take "fallback".')
    if tokenizer == "ptb" or (tokenizer == "auto" and has_java()):
        try:
            return _ptb_tokens(texts), "ptb"
        except (RuntimeError, OSError) as error:
            if tokenizer == "ptb":
                raise
            warnings.warn(f"Tokenizing without Java, since it failed: {error}", stacklevel=2)
    return [fallback_tokens(text) for text in texts], "fallback"


def has_java() -> bool:
    """Whether `java` is on the PATH."""
    return shutil.which("java") is not None


def left_out(scores: Sequence[str]) -> dict[str, str]:
    """Why some of `scores` cannot be computed on this machine, by name; empty if all can.

    Raises:
      ValueError: a score that does not exist.
    """
    unknown = sorted(set(scores) - set(SCORES))
    if unknown:
        raise ValueError(f"No caption score {', '.join(unknown)}; known: {', '.join(SCORES)}.")
    reasons = {}
    for name in ("meteor", "spice"):
        if name in scores and not has_java():
            reasons[name] = "needs Java: install a JRE"
    folder = _folder("pycocoevalcap.spice")
    models = [f"stanford-corenlp-3.6.0{end}.jar" for end in ("", "-models")]
    missing = [jar for jar in models if not os.path.exists(os.path.join(folder, "lib", jar))]
    if "spice" in scores and missing:
        reasons["spice"] = (
            f"needs {' and '.join(missing)} (of stanford-corenlp-full-2015-12-09.zip) in "
            f"{os.path.join(folder, 'lib')}" + ("" if has_java() else ", and Java")
        )
    return reasons


def caption_metrics(
    predictions: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    *,
    scores: Sequence[str] = SCORES[:6],
    tokenizer: str = "auto",
) -> dict[str, float | str]:
    """The COCO caption scores.

    Args:
      predictions: one caption by image id.
      references: one or more captions by image id.
      scores: which of `SCORES`. METEOR 1.5 takes seconds per hundred images, SPICE more.
      tokenizer: see `tokenize`.

    Returns:
      {score: float, ..., "tokenizer": str}.

    Raises:
      ValueError: predictions for unknown ids or missing ones (the first few are named), an image
        without references, an unknown score.
      RuntimeError: what was asked for is not to be had here (see `left_out`).
    """
    check_ids(predictions, references, "images")
    for key, texts in references.items():
        if isinstance(texts, str) or not any(text.strip() for text in texts):
            raise ValueError(
                f"Image {key!r} has no usable references ({texts!r}): give a list of captions of "
                "which at least one is not empty."
            )
    for name, reason in left_out(scores).items():
        raise RuntimeError(f"{name.upper()} {reason}, or leave it out.")

    ids = list(references)
    counts = [len(references[key]) for key in ids]
    texts = [predictions[key] for key in ids] + [text for key in ids for text in references[key]]
    tokens, used = tokenize(texts, tokenizer=tokenizer)
    rest = iter(tokens[len(ids) :])
    results = {key: [tokens[i]] for i, key in enumerate(ids)}
    truths = {key: [next(rest) for _ in range(n)] for key, n in zip(ids, counts, strict=True)}

    scorers = {
        "cider": lambda: Cider().compute_score(truths, results)[0],
        "rouge_l": lambda: Rouge().compute_score(truths, results)[0],
        "meteor": lambda: Meteor().compute_score(truths, results)[0],
        "spice": lambda: Spice().compute_score(truths, results)[0],
    }
    bleu: Sequence[float] = ()
    if any(name.startswith("bleu") for name in scores):
        bleu, _ = Bleu(4).compute_score(truths, results, verbose=0)
    metrics: dict[str, float | str] = {}
    for name in scores:
        value = bleu[int(name[-1]) - 1] if name.startswith("bleu") else scorers[name]()
        metrics[name] = float(value)
    return metrics | {"tokenizer": used}


def facts_metrics(
    predictions: Mapping[Any, str], checks: Mapping[Any, Callable[[str], bool]]
) -> dict[str, float]:
    """The share of captions of which every claim holds, where that can be checked.

    Args:
      predictions: one caption by image id.
      checks: by image id, whether a caption is true of the image (`metrics.truth`).

    Returns:
      {"facts_correct": 0..1}.
    """
    check_ids(predictions, checks, "images")
    correct = sum(check(predictions[key]) for key, check in checks.items())
    return {"facts_correct": correct / len(checks)}
