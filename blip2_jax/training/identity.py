"""The identity of a run, which its checkpoints hold: what must be the same for it to go on.

How it is executed may differ, and so may the paths of what it reads, whose content is compared by
digest. `runtime.compare` holds the keys of each kind.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from blip2_jax import cli
from blip2_jax.data import examples, tokenizers
from blip2_jax.data.source import Source
from blip2_jax.evals.training import TrainingEvaluator
from blip2_jax.runtime import compare, run_dir

STARTS = ("checkpoint", "bert")  # keys of config.init


def contents(
    config: ConfigDict,
    fingerprints: Mapping[str, str],
    source: Source,
    eval_source: Source | None = None,
    evals: TrainingEvaluator | None = None,
) -> dict[str, Any]:
    """Digests of all that a run reads.

    Args:
      config: the recipe's.
      fingerprints: of the frozen towers.
      source: the records that are trained on.
      eval_source: those that losses are evaluated on; None: none are.
      evals: the evaluations in the run; None: there are none.
    """
    texts_of = examples.load_tokenizers(config)
    return {
        "fingerprints": dict(fingerprints),
        "data": source.identity(),  # other records would be other batches
        "eval_data": None if eval_source is None else eval_source.identity(),
        "tokenizers": {name: tokenizers.digest(tokenizer) for name, tokenizer in texts_of.items()},
        "evals": None if evals is None else evals.identity(),
    }


def start_digests(config: ConfigDict) -> dict[str, str]:
    """Digests of what a fresh run starts from."""
    return {key: run_dir.stamp(config.init[key]) if config.init[key] else "" for key in STARTS}


def check_start(saved: Mapping[str, Any], config: ConfigDict, workdir: Path) -> None:
    """Refuses to go on where another start is asked for than a run had.

    It is not read again, so it need not be there any more under its name of then.

    Raises:
      ConfigError: it has another name now, and holds something else or cannot be read.
    """
    before = saved["config"]["init"]
    other = [key for key in STARTS if config.init[key] != before[key]]
    now = {key: run_dir.stamp(config.init[key]) if config.init[key] else "" for key in other}
    same = {key: digest for key, digest in now.items() if digest and digest == saved["init"][key]}
    lines = [
        f"  config.init.{key}: {before[key]!r} saved, {config.init[key]!r} now "
        f"({compare.HINTS['init']})"
        for key in other
        if key not in same
    ]
    if lines:
        raise cli.ConfigError(cli.another_run(workdir, lines))
