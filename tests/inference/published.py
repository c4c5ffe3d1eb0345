"""Folders as the hub has them, with random weights and the embedded world's tokenizers.

Their `config.json` says what differs from the class's defaults, and no more.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_jax.data import tokenizers
from tests.weights import models

SIDE = models.VISION["image_size"]


def generation_folder(
    folder: Path,
    llm: str = "opt",
    *,
    num_query_tokens: int = 5,
    vision: Mapping[str, int] = models.VISION,
    **text_config: int,
) -> torch.nn.Module:
    """A `Blip2ForConditionalGeneration` with processor and tokenizer, as the hub has it."""
    side = vision["image_size"]
    tokenizer = t5_tokenizer() if llm == "t5" else tokenizers.load("package:digits-opt")
    processor = transformers.Blip2Processor(
        BlipImageProcessorPil(size={"height": side, "width": side}),
        tokenizer,
        num_query_tokens=num_query_tokens,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    eos = tokenizer("\n")["input_ids"][-1]
    special = {"vocab_size": 256, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
    if llm != "t5":
        special["bos_token_id"] = tokenizer.bos_token_id
    text = models.TEXT[llm] | special | text_config
    config = transformers.Blip2Config(
        vision_config=vision,
        qformer_config=models.QFORMER | {"use_qformer_text_input": False},
        text_config=text,
        num_query_tokens=num_query_tokens,
        image_token_index=image,
    )
    theirs = transformers.Blip2ForConditionalGeneration(config)
    if llm == "t5":
        head = theirs.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    models.randomize(theirs)
    with torch.no_grad():  # large enough that images and prompts matter, and texts differ
        theirs.language_projection.weight *= 3
        theirs.language_model.get_input_embeddings().weight *= 3
    theirs.save_pretrained(folder)
    models.hub_form(folder)
    processor.save_pretrained(folder)
    return theirs


def t5_tokenizer():
    """A Unigram tokenizer of words, which ends every text with `</s>`."""
    vocabulary = "a red green blue digit three seven question answer what color is there".split()
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        *("▁" + w for w in vocabulary),
        *map(chr, range(33, 123)),
    ]
    return transformers.T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0
    )


def retrieval_folder(
    folder: Path, *, num_query_tokens: int = 5, projection_dim: int = 24
) -> torch.nn.Module:
    """A `Blip2ForImageTextRetrieval` with the embedded world's BERT tokenizer."""
    tokenizer = tokenizers.load("package:digits-bert")
    config = transformers.Blip2Config(
        vision_config=models.VISION,
        qformer_config=models.QFORMER
        | {
            "use_qformer_text_input": True,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 40,
        },
        text_config={"model_type": "opt"},
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=projection_dim,
    )
    config.image_token_index = None
    theirs = models.randomize(transformers.Blip2ForImageTextRetrieval(config))
    theirs.save_pretrained(folder)
    models.hub_form(folder)
    tokenizer.save_pretrained(folder)
    return theirs


def instruct_folder(folder: Path) -> torch.nn.Module:
    """An `InstructBlipForConditionalGeneration` on a Llama, with both tokenizers."""
    tokenizer, bert = tokenizers.load("package:digits-opt"), tokenizers.load("package:digits-bert")
    config = transformers.InstructBlipConfig(
        vision_config=models.VISION,
        qformer_config=models.QFORMER | {"vocab_size": len(bert), "max_position_embeddings": 40},
        text_config=models.LLAMA
        | {
            "vocab_size": 256,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        num_query_tokens=5,
        image_token_index=255,
    )
    theirs = models.randomize(transformers.InstructBlipForConditionalGeneration(config))
    with torch.no_grad():
        theirs.language_projection.weight *= 3
        theirs.language_model.get_input_embeddings().weight *= 3
    theirs.save_pretrained(folder)
    models.hub_form(folder)
    tokenizer.save_pretrained(folder)
    bert.save_pretrained(folder / "qformer_tokenizer")
    return theirs
