"""How published results were decoded, by family of language model and task: one table.

Sources: LAVIS `blip2_opt.py`, `blip2_t5.py`, `blip2_vicuna_instruct.py`, `blip2_t5_instruct.py`
(`generate` and `predict_answers`) and its task configs; the paper's section 4.1 for prompts.
`blip2 generate --help` prints this table.

LAVIS sets `min_length`, with the meaning that transformers had then: until 4.26 it counted OPT's
prompt too, BOS included, and so did the length penalty; of T5 it counts the start token. So 1 is 0
new tokens there. Its question answering passes no length penalty, so each model's own default
holds: 0 of OPT and Vicuna, -1 of T5 (the paper says -1 for all). "generate" has today's meanings.

InstructBLIP's prompts and lengths are those of its YAMLs in LAVIS, whose images are resized by the
shorter side and cropped to the center; here, as in its Hugging Face processor, they are resized
whole. Its paper (appendix E) prints "A short image description:" and "Question: {} Short answer:".
"""

import dataclasses
import textwrap
from typing import NamedTuple

from blip2_jax.inference.options import Decoding


class GenerationSettings(NamedTuple):
    """Attributes: `prompt`, with {} where the user's text goes; and `decoding`."""

    prompt: str
    decoding: Decoding


_BEAMS = Decoding(num_beams=5, max_new_tokens=30)  # LAVIS's defaults in all of `generate`
# Lengths as transformers until 4.26 counted them (of the prompt too, the end token not), and as
# 4.27 to 4.35 did of prompts given as embeddings (the end token not).
_OLD_LENGTH = {"length_penalty_includes_prompt": True, "length_penalty_includes_eos": False}
_TEXT_LENGTH = {"length_penalty_includes_prompt": False, "length_penalty_includes_eos": False}
_CAPTION = dataclasses.replace(_BEAMS, **_OLD_LENGTH)
_INSTRUCT = dataclasses.replace(
    _BEAMS, max_new_tokens=256, repetition_penalty=1.5, penalties_include_prompt=False
)
_INSTRUCT_THEN = dataclasses.replace(_INSTRUCT, **_TEXT_LENGTH)
# An encoder-decoder is given the ids of its start token: that counts, as it does in BLIP-2.
_INSTRUCT_T5 = dataclasses.replace(_INSTRUCT, penalties_include_prompt=True)
_INSTRUCT_T5_THEN = dataclasses.replace(_INSTRUCT_T5, **_OLD_LENGTH)

_OPT_QUESTION = "Question: {} Answer:"
_INSTRUCT_CAPTION, _INSTRUCT_QUESTION = "A short image caption.", "Question: {} Short Answer:"


def _with(decoding: Decoding, at_least: int, at_most: int, penalty: float) -> Decoding:
    return dataclasses.replace(
        decoding, min_new_tokens=at_least, max_new_tokens=at_most, length_penalty=penalty
    )


# (family, task). Families: of the language model; "instruct" is any whose Q-Former reads the
# prompt too (InstructBLIP), "instruct-t5" if it is an encoder-decoder.
DEFAULTS = {
    ("opt", "caption"): GenerationSettings("", _CAPTION),
    ("opt", "answer"): GenerationSettings(_OPT_QUESTION, _with(_BEAMS, 1, 10, 0.0)),
    ("opt", "generate"): GenerationSettings("{}", _with(_BEAMS, 1, 30, 1.0)),
    ("t5", "caption"): GenerationSettings("", _CAPTION),
    ("t5", "answer"): GenerationSettings(
        "Question: {} Short answer:", _with(_CAPTION, 0, 10, -1.0)
    ),
    ("t5", "generate"): GenerationSettings("{}", _BEAMS),
    ("llama", "caption"): GenerationSettings("", _with(_BEAMS, 1, 30, 1.0)),
    ("llama", "answer"): GenerationSettings(_OPT_QUESTION, _with(_BEAMS, 1, 10, 0.0)),
    ("llama", "generate"): GenerationSettings("{}", _with(_BEAMS, 1, 30, 1.0)),
    ("instruct", "caption"): GenerationSettings(
        _INSTRUCT_CAPTION, _with(_INSTRUCT_THEN, 10, 80, 1.0)
    ),
    ("instruct", "answer"): GenerationSettings(
        _INSTRUCT_QUESTION, _with(_INSTRUCT_THEN, 1, 10, 0.0)
    ),
    ("instruct", "generate"): GenerationSettings("{}", _with(_INSTRUCT, 1, 256, 1.0)),
    ("instruct-t5", "caption"): GenerationSettings(
        _INSTRUCT_CAPTION, _with(_INSTRUCT_T5_THEN, 9, 80, 1.0)
    ),
    ("instruct-t5", "answer"): GenerationSettings(
        _INSTRUCT_QUESTION, _with(_INSTRUCT_T5_THEN, 0, 10, -1.0)
    ),
    ("instruct-t5", "generate"): GenerationSettings("{}", _INSTRUCT_T5),
}


def table(width: int = 79) -> str:
    """The defaults, in columns of a help text this wide."""
    columns = "  {:<13}{:<10}{}"
    lines = [columns.format("family", "task", "prompt and decoding")]
    indent = len(columns.format("", "", ""))
    plain = Decoding()
    for (family, task), (prompt, decoding) in DEFAULTS.items():
        shown = {"num_beams": decoding.num_beams, "max_new_tokens": decoding.max_new_tokens}
        shown |= {
            k: v for k, v in vars(decoding).items() if k not in shown and v != getattr(plain, k)
        }
        settings = " ".join(f"{name}={_text(value)}" for name, value in shown.items())
        lines.append(columns.format(family, task, prompt or "(none)"))
        lines += textwrap.wrap(
            settings,
            width,
            initial_indent=" " * indent,
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _text(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
