"""From a record to the arrays that a stage's batches are made of."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from blip2_jax.data import prompting, texts, tokenizers, transforms
from blip2_jax.data.batch_spec import EXAMPLE_MAKERS, is_instruction
from blip2_jax.data.faults import RecordError
from blip2_jax.data.language import IMAGE_TOKEN, LanguageConfig, check_vocabulary, with_end
from blip2_jax.data.source import Record

Example = dict[str, np.ndarray | np.generic]
ExampleOf = Callable[[Record, int, np.random.Generator], Example]
ImageOf = Callable[[Record, np.random.Generator], np.ndarray]


def make_example(
    config: ConfigDict,
    image_size: int,
    *,
    train: bool,
    resample: str = "bicubic",
    llm: LanguageConfig | None = None,
) -> ExampleOf:
    """The function (record, index, rng) -> arrays that a stage's batches are made of.

    Args:
      config: a recipe's config; its stage decides which arrays these are.
      image_size: side of the images, in pixels.
      train: whether images are cropped and augmented, and captions drawn.
      resample: how images are resized; see `transforms.resize`.
      llm: the language model's config; needed by stage 2.

    Raises:
      ValueError: `config.data.task`, `prompt` or `end_of_text` does not fit, or a tokenizer.
    """
    data, stage = config.data, config.stage.name
    if stage in EXAMPLE_MAKERS:
        make: Callable[..., ExampleOf] = import_module(EXAMPLE_MAKERS[stage]).make_example
        return make(config, image_size, train=train, resample=resample, llm=llm)
    texts_of = load_tokenizers(config)
    image = image_reader(data, image_size, resample, train=train)
    if stage == "stage1":
        encode = _qformer_text(texts_of["qformer"], data.text_length)
    else:
        if llm is None:
            raise ValueError("Stage 2's texts need the language model's config.")
        tokenizer = texts_of["llm"]
        check_vocabulary(tokenizer, llm.vocab_size, "language model")
        llm = with_end(tokenizer, llm, data.end_of_text)
        queries = config.model.qformer.num_query_tokens
        prompt = prompting.strip_image_token(data.prompt, queries)
        reads_prompt = texts_of.get("qformer")
        encode = _llm_text(tokenizer, llm, data, prompt, reads_prompt, is_instruction(config))
        if data.task == "answer":
            return _answer_example(image, encode, prompt, queries, data, train=train)
        if data.task != "caption":
            raise ValueError(f"config.data.task is {data.task!r}; known: caption, answer.")

    def example(record: Record, index: int, rng: np.random.Generator) -> Example:
        captions = _captions(texts.folded(record) if data.fold_whitespace else record, data)
        text = captions[rng.integers(len(captions)) if train else 0]
        number = np.int32(record.get("image_number", index))
        return {"image": image(record, rng), "image_id": number, **encode(text, rng)}

    return example


def llm_tokenizer(config: ConfigDict, *, at_hand: bool = False) -> Any:
    """The tokenizer of a config's language model, with the config's special tokens.

    With `at_hand` nothing is fetched from the hub: None where there is none on this machine.
    """
    data = config.data
    load = tokenizers.at_hand if at_hand else tokenizers.load
    return load(data.llm_tokenizer or config.model.llm.source, data.llm_special_tokens.to_dict())


def load_tokenizers(config: ConfigDict) -> dict[str, Any]:
    """The tokenizers of a stage's examples: "qformer", "llm" or both."""
    data, stage = config.data, config.stage.name
    if stage in EXAMPLE_MAKERS:
        others: dict[str, Any] = import_module(EXAMPLE_MAKERS[stage]).load_tokenizers(config)
        return others
    loaded: dict[str, Any] = {}
    if stage == "stage2":
        loaded["llm"] = llm_tokenizer(config)
    if stage == "stage1" or (stage == "stage2" and config.model.qformer_reads_prompt):
        loaded["qformer"] = tokenizers.load(data.qformer_tokenizer)
    return loaded


def _captions(record: Record, data: ConfigDict) -> list[str]:
    """The captions to draw from, cleaned; those with nothing left of them go."""
    captions = record["captions"][: data.first_captions or None]
    if data.clean_text:
        captions = [texts.clean_caption(caption) for caption in captions]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise RecordError("empty caption")
    return captions


def image_reader(data: ConfigDict, size: int, resample: str, *, train: bool) -> ImageOf:
    """The function (record, rng) -> uint8[size, size, 3]; see `make_example`."""
    if data.resize not in transforms.RESIZES:
        raise ValueError(
            f"config.data.resize is {data.resize!r}; known: {', '.join(transforms.RESIZES)}."
        )
    if train and data.resize == "fast" and resample != "bicubic":
        raise ValueError(
            f"config.data.resize=fast is bicubic, and this image encoder's images are {resample}; "
            "set config.data.resize to exact."
        )
    augmented = {
        name: part["randaugment"] for name, part in data.mixture.items() if "randaugment" in part
    }
    transforms.background_color(data.alpha_background)  # a mistake in it is said now

    def image(record: Record, rng: np.random.Generator) -> np.ndarray:
        if not train:
            whole = transforms.decode_image(record["image"], data.alpha_background)
            return transforms.resize(whole, size, resample=resample)
        return transforms.train_image(
            record["image"],
            size,
            rng,
            scale=data.crop_scale,
            flip=data.flip,
            randaugment=augmented.get(record.get("part", ""), data.randaugment),
            resize=data.resize,
            alpha_background=data.alpha_background,
            resample=resample,
        )

    return image


def _qformer_text(tokenizer: Any, length: int) -> Callable[..., Example]:
    def encode(text: str, rng: np.random.Generator) -> Example:
        del rng
        ids, mask = tokenizers.encode_qformer(tokenizer, [text], length)
        return {"text_ids": ids[0], "text_mask": mask[0]}

    return encode


def _llm_text(
    tokenizer: Any,
    llm: LanguageConfig,
    data: ConfigDict,
    own_prompt: str,
    reads_prompt: Any,
    instruction: bool,
) -> Callable[..., Example]:
    """A decoder-only LLM reads the whole text; an encoder-decoder its prefix or the prompt (T5).

    Args:
      tokenizer: the LLM's.
      llm: its config.
      data: the config's section.
      own_prompt: stands before a text that comes without a prompt.
      reads_prompt: the Q-Former's tokenizer, if it reads the prompt too.
      instruction: see `is_instruction`.
    """
    whole = not llm.is_encoder_decoder
    side = "left" if instruction else "right"
    prompt_length = data.max_prompt_length if instruction else data.llm_length
    if whole and not instruction:
        taken = len(tokenizers.tokenize(tokenizer, [own_prompt], llm=llm)[0])
        if taken >= data.llm_length:
            raise ValueError(
                f"config.data.prompt has {taken} tokens, and config.data.llm_length is "
                f"{data.llm_length}: no caption would be learned. Take a longer llm_length."
            )

    def arrays(text: str, prompt: str, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        if not whole:  # with a prompt the encoder reads that, as in caption fine-tuning
            prefix, suffix = (prompt, text) if prompt else texts.split_prefix(text, rng)
            return tokenizers.encode_prefix(
                tokenizer, [prefix], [suffix], prompt_length, data.llm_length, truncation_side=side
            )
        if instruction:
            return tokenizers.encode_answers(
                tokenizer, llm, [prompt], [text], prompt_length, data.llm_length
            )
        return tokenizers.encode_captions(tokenizer, llm, [text], data.llm_length, prompt)

    def encode(text: str, rng: np.random.Generator, prompt: str = own_prompt) -> Example:
        names = ("llm_ids", "llm_mask", "llm_labels")
        example = {
            name: array[0] for name, array in zip(names, arrays(text, prompt, rng), strict=True)
        }
        if reads_prompt is not None:
            ids, mask = tokenizers.encode_qformer(
                reads_prompt, [prompt], data.text_length, truncation_side=side
            )
            example |= {"text_ids": ids[0], "text_mask": mask[0]}
        return example

    return encode


def _answer_example(
    image: ImageOf,
    encode: Callable[..., Example],
    prompt: str,
    num_query_tokens: int,
    data: ConfigDict,
    *,
    train: bool,
) -> ExampleOf:
    """Questions and answers: one question of a record, and one of its answers, as often as given.

    Drawing among ten annotators' answers weighs each by its count, as LAVIS's BLIP-1 VQA does.
    """
    if "{}" not in prompt:
        raise ValueError(
            f"config.data.prompt is {data.prompt!r}; with task=answer it needs {{}} in place of "
            "the question, as in 'Question: {} Answer:'."
        )

    def example(record: Record, index: int, rng: np.random.Generator) -> Example:
        record = texts.folded(record) if data.fold_whitespace else record
        asked = record.get("questions") or []
        questions = [q for q in asked if q.get("answers") or q.get("answer")]
        if not questions:
            raise RecordError("no answer" if asked else "no question")
        question = questions[rng.integers(len(questions)) if train else 0]
        answers = question.get("answers") or [question.get("answer")]
        answer = answers[rng.integers(len(answers)) if train else 0]
        try:
            asked = prompting.strip_image_token(question["question"], num_query_tokens)
        except ValueError as error:
            raise RecordError(f"{IMAGE_TOKEN} inside a question") from error
        asked = texts.clean_question(asked) if data.clean_text else asked
        number = np.int32(record.get("image_number", index))
        pixels = image(record, rng)
        text = encode(answer, rng, prompt.replace("{}", asked))
        return {"image": pixels, "image_id": number, **text}

    return example
