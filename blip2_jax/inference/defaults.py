"""How published results were decoded, by family of language model and task: one table.

Sources: LAVIS `blip2_opt.py`, `blip2_t5.py`, `blip2_vicuna_instruct.py` (`generate` and
`predict_answers`) and its task configs; the paper's section 4.1 for prompts and the length penalty
of question answering. `blip2 generate --help` prints this table.
"""

import dataclasses
import textwrap
from typing import NamedTuple

from blip2_jax.inference.decode import Decoding


class Task(NamedTuple):
    """Attributes: `prompt`, with {} where the user's text goes; and how to decode."""

    prompt: str
    decoding: Decoding


_CAPTION = Decoding(num_beams=5, max_new_tokens=30, min_new_tokens=1)
_ANSWER = Decoding(num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)
_INSTRUCT = Decoding(
    num_beams=5, max_new_tokens=256, min_new_tokens=1, repetition_penalty=1.5, length_penalty=1.0
)
_INSTRUCT_ANSWER = dataclasses.replace(_INSTRUCT, max_new_tokens=10, length_penalty=-1.0)

# (family, task). Families: of the language model; "instruct" is any whose Q-Former reads the
# prompt too (InstructBLIP).
DEFAULTS = {
    ("opt", "caption"): Task("", _CAPTION),
    ("opt", "answer"): Task("Question: {} Answer:", _ANSWER),
    ("opt", "generate"): Task("{}", _CAPTION),
    ("t5", "caption"): Task("", _CAPTION),
    ("t5", "answer"): Task("Question: {} Short answer:", _ANSWER),
    ("t5", "generate"): Task("{}", _CAPTION),
    ("llama", "caption"): Task("", _CAPTION),
    ("llama", "answer"): Task("Question: {} Answer:", _ANSWER),
    ("llama", "generate"): Task("{}", _CAPTION),
    ("instruct", "caption"): Task("A short image description:", _INSTRUCT),
    ("instruct", "answer"): Task("Question: {} Short answer:", _INSTRUCT_ANSWER),
    ("instruct", "generate"): Task("{}", _INSTRUCT),
}


def table(width: int = 79) -> str:
    """The defaults, in columns of a help text this wide."""
    columns = "  {:<9}{:<10}{:<29}"
    lines = [columns.format("family", "task", "prompt") + "decoding"]
    indent = len(columns.format("", "", ""))
    plain = Decoding()
    for (family, task), (prompt, how) in DEFAULTS.items():
        shown = {"num_beams": how.num_beams, "max_new_tokens": how.max_new_tokens}
        shown |= {k: v for k, v in vars(how).items() if k not in shown and v != getattr(plain, k)}
        settings = " ".join(f"{name}={value:g}" for name, value in shown.items())
        first, *rest = textwrap.wrap(settings, width - indent, break_on_hyphens=False)
        lines.append(columns.format(family, task, prompt or "(none)") + first)
        lines += [" " * indent + line for line in rest]
    return "\n".join(lines)
