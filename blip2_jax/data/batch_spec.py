"""What a batch holds, in one place: the arrays of each stage, with their shapes and dtypes.

The loader holds its batches to it, `recipe` plans with it, and tests make theirs from it.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from blip2_jax.data.language import LanguageConfig

# Stages whose examples are made elsewhere, by modules that have an `example_spec` as below, and
# `make_example` and `load_tokenizers` as `data.examples` has them.
EXAMPLE_MAKERS = {
    "pretrain_vit": "blip2_jax.digits.patches",
    "pretrain_lm": "blip2_jax.digits.stories",
}


class ArraySpec(NamedTuple):
    """Of one example: a batch has one more dimension in front."""

    shape: tuple[int, ...]
    dtype: Any


Spec = dict[str, ArraySpec]


def example_spec(config: ConfigDict, image_size: int, llm: LanguageConfig | None = None) -> Spec:
    """The arrays of an example.

        image                uint8[H, W, 3]
        image_id             int32[], the same in all records of one image
        text_ids, text_mask  int32[T], what the Q-Former reads
        llm_ids, llm_mask    int32[S], what the language model reads
        llm_labels           int32[L], what it learns; -100: nothing

    Args:
      config: a recipe's config; its stage decides.
      image_size: side of the images, in pixels.
      llm: the language model's config; needed by stage 2.
    """
    data, stage = config.data, config.stage.name
    if stage in EXAMPLE_MAKERS:
        spec: Spec = import_module(EXAMPLE_MAKERS[stage]).example_spec(config, image_size, llm)
        return spec
    spec = {
        "image": ArraySpec((image_size, image_size, 3), np.uint8),
        "image_id": ArraySpec((), np.int32),
    }
    if stage == "stage1" or config.model.qformer_reads_prompt:
        spec |= dict.fromkeys(("text_ids", "text_mask"), ArraySpec((data.text_length,), np.int32))
    if stage == "stage2":
        if llm is None:
            raise ValueError("Stage 2's texts need the language model's config.")
        read, learned = llm_lengths(config, encoder_decoder=llm.is_encoder_decoder)
        spec |= dict.fromkeys(("llm_ids", "llm_mask"), ArraySpec((read,), np.int32))
        spec["llm_labels"] = ArraySpec((learned,), np.int32)
    return spec


def check_batch(batch: Mapping[str, np.ndarray], spec: Spec) -> None:
    """Refuses a batch that holds other arrays than `spec` says.

    Raises:
      ValueError: naming both.
    """
    held = {name: (array.shape[1:], array.dtype) for name, array in batch.items()}
    if held != {name: (array.shape, np.dtype(array.dtype)) for name, array in spec.items()}:
        raise ValueError(f"Batches hold {held}; `data.batch_spec` says {spec}.")


def llm_lengths(config: ConfigDict, *, encoder_decoder: bool) -> tuple[int, int]:
    """Tokens of what the language model reads in stage 2, and of its labels."""
    data = config.data
    prompt = data.max_prompt_length if is_instruction(config) else data.llm_length
    if encoder_decoder:
        return prompt, data.llm_length
    whole = data.max_prompt_length + data.llm_length if is_instruction(config) else data.llm_length
    return whole, whole


def is_instruction(config: ConfigDict) -> bool:
    """Whether prompt and text have lengths of their own, as in LAVIS's InstructBLIP."""
    return bool(config.data.task == "answer" or config.model.qformer_reads_prompt)
