"""blip2 COMMAND [flags]: hands over to a command's file; `blip2 COMMAND --help` teaches it."""

import importlib
import os
import signal
import sys

from blip2_jax.runtime.values import did_you_mean

COMMANDS = {
    "prepare": "turn a data source into shards",
    "train": "train a recipe, or resume it",
    "evaluate": "run the evaluations, write metrics and a report",
    "generate": "caption images, or answer about them",
    "plan": "see whether a recipe fits a TPU slice, and how long it takes, without one",
    "sweep": "run every point of a recipe's sweep",
    "convert": "turn weights from one format into another",
}
# What others call them.
SYNONYMS = {
    "caption": "generate", "predict": "generate", "infer": "generate", "answer": "generate",
    "eval": "evaluate", "test": "evaluate", "export": "convert", "finetune": "train",
}  # fmt: skip

RESUMABLE = ("train", "evaluate")  # which leave with 42 when they are told to stop
PREEMPTED = 42  # as in runtime.distributed, which takes seconds to import


TEXTS = ("train", "evaluate", "generate")  # commands that read tokenizers


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip() + "\n")
        print("\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()))
        return 0
    if arguments[0] == "--version":
        from blip2_jax import __version__

        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        near = did_you_mean(arguments[0], list(COMMANDS), SYNONYMS)
        there = f"there are {', '.join(COMMANDS)}.{near}"
        print(f"blip2: no command {arguments[0]!r}; {there}", file=sys.stderr)
        return 2
    if arguments[0] in RESUMABLE:  # until it hears the signal itself: there is nothing to save yet
        signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))
    if argv is None and arguments[0] in TEXTS:  # this process is the command's own
        _hide_torch_from_transformers()
    return importlib.import_module(f"blip2_jax.{arguments[0]}").main(arguments[1:])


def _hide_torch_from_transformers() -> None:
    """Spares a command the import of PyTorch, two seconds of its start.

    transformers imports it wherever it is installed, and remembers whether it is; its tokenizers
    need none. What reads PyTorch's files imports it itself.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # to importlib: there is none
    try:
        from transformers.utils.import_utils import is_torch_available

        is_torch_available()
    finally:
        del sys.modules["torch"]


if __name__ == "__main__":
    sys.exit(main())
