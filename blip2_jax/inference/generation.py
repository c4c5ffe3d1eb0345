"""Generating texts: from prompts to arrays to programs to texts, for `Blip2`."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from blip2_jax.data import language, prompting
from blip2_jax.data.prompting import TextPrompt
from blip2_jax.inference.batching import Batcher, report_skipped
from blip2_jax.inference.defaults import DEFAULTS, GenerationSettings
from blip2_jax.inference.inputs import Inputs, as_texts, need_some, paired
from blip2_jax.inference.options import Decoding, changed, check_names
from blip2_jax.inference.outputs import texts_of
from blip2_jax.inference.programs import Programs, take

SEED = 0
# Options of text generation beside those of `Decoding`.
OTHER_OPTIONS = ("prompt", "return_scores", "seed", "skip_unreadable", "truncate", "progress")


class TextGenerator:
    """The part of `Blip2` that generates and ranks texts; see there for arguments.

    Args:
      programs, inputs, batcher: the model's.
    """

    def __init__(self, programs: Programs, inputs: Inputs, batcher: Batcher):
        self.programs, self.inputs, self.batcher = programs, inputs, batcher
        self.tokenizer = inputs.llm_tokenizer

    @property
    def family(self) -> str:
        """Row of `defaults.DEFAULTS`."""
        llm = self.inputs.llm
        if self.inputs.config.qformer_reads_prompt:
            return "instruct-t5" if llm.is_encoder_decoder else "instruct"
        return llm.family

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, as the model's config says; see `language.end_ids`."""
        return language.end_ids(self.tokenizer, self.inputs.llm)

    @property
    def pad_id(self) -> int:
        """What stands after a text's end."""
        return language.pad_id(self.tokenizer, self.inputs.llm)

    def settings(
        self, task: str, *, prompt: str | None = None, **changes: Any
    ) -> GenerationSettings:
        """See `Blip2.settings`."""
        default = DEFAULTS[self.family, task]
        prompt = default.prompt if prompt is None else self._without_image_token(prompt)
        return GenerationSettings(prompt, changed(default.decoding, changes))

    def format_questions(
        self, questions: Sequence[str] | str, prompt: str | None
    ) -> list[TextPrompt]:
        """Questions in their prompt."""
        questions = [self._without_image_token(question) for question in as_texts(questions)]
        empty = [i for i, question in enumerate(questions) if not question.strip()]
        if empty:
            raise ValueError(f"Question {empty[0]} is empty.")
        prompt = self.settings("answer", prompt=prompt).prompt
        if "{}" not in prompt:
            raise ValueError(f"The prompt {prompt!r} has no {{}} for the question.")
        return [prompting.fill(prompt, question) for question in questions]

    def parse_prompts(self, prompts: Sequence[str] | str) -> list[TextPrompt]:
        """Prompts as the user wrote them."""
        return [prompting.parse(self._without_image_token(prompt)) for prompt in as_texts(prompts)]

    def _without_image_token(self, prompt: str) -> str:
        return prompting.strip_image_token(prompt, self.inputs.config.qformer.num_query_tokens)

    def generate_texts(
        self,
        params: Any,
        task: str,
        images: Any | None,
        prompts: Sequence[TextPrompt],
        *,
        seed: int = SEED,
        skip_unreadable: bool = False,
        truncate: int | None = None,
        progress: str = "",
        return_scores: bool = False,
        **changes: Any,
    ) -> list[Any]:
        """Continues prompts; see `Blip2.generate`."""
        known = [field.name for field in dataclasses.fields(Decoding)]
        check_names(changes, [*known, *OTHER_OPTIONS])
        decoding = self.settings(task, **changes).decoding
        images, prompts = paired(images, prompts)
        need_some(prompts)
        skipped: dict[int, str] | None = {} if skip_unreadable else None
        encode = functools.partial(self._visual_prompt, params)
        read = self.inputs.prompts(
            images, prompts, decoding.max_new_tokens, truncate, skipped, encode
        )
        program = functools.partial(
            self.programs.generate,
            key=jax.random.key(seed),
            decoding=decoding,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
        )
        output = self.batcher.map_batches(program, params, len(prompts), read, progress=progress)
        texts = texts_of(
            output,
            self.tokenizer,
            self.pad_id,
            return_scores=return_scores,
            source=self.inputs.source,
        )
        report_skipped(skipped)
        return [None if skipped and i in skipped else text for i, text in enumerate(texts)]

    def stream_text(
        self,
        params: Any,
        image: Any,
        prompts: Sequence[TextPrompt],
        *,
        truncate: int | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yields the pieces of one text; see `Blip2.stream`."""
        default = dataclasses.replace(DEFAULTS[self.family, "generate"].decoding, num_beams=1)
        decoding = changed(default, options)
        if decoding.num_sequences > 1 or decoding.do_sample:
            raise ValueError("A stream is greedy; leave num_beams and do_sample out.")
        images = None if image is None else [image]
        encode = functools.partial(self._visual_prompt, params)
        read = self.inputs.prompts(images, prompts, decoding.max_new_tokens, truncate, None, encode)
        arrays = self.batcher.put(read(0, 1), self.batcher.padded_size(1))
        key = jax.random.key(SEED)  # nothing is drawn with it
        fixed = {"decoding": decoding, "eos_ids": self.eos_ids, "pad_id": self.pad_id}
        state = self.programs.prefill(params, *arrays, key, **fixed)
        yielded = ""
        while True:
            ended = bool(state.done[0, 0]) or int(state.step) >= decoding.max_new_tokens
            tokens = np.asarray(state.tokens[0, 0, : int(state.step)])
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            text = text.rstrip() if ended else text
            # A token may be part of a letter: wait until it is whole.
            if len(text) > len(yielded) and (ended or not text.endswith("\ufffd")):
                yield text[len(yielded) :]
                yielded = text
            if ended:
                return
            state = self.programs.decode_step(params, state, key, **fixed)

    def rank(
        self,
        params: Any,
        images: Any,
        prompts: Sequence[TextPrompt],
        candidates: Sequence[Sequence[str]],
        progress: str,
    ) -> list[np.ndarray]:
        """Log-probabilities of candidate answers; see `Blip2.rank`."""
        images, prompts = paired(images, prompts)
        if len(candidates) != len(prompts) or not all(map(len, candidates)):
            raise ValueError(
                f"{len(candidates)} lists of candidates for {len(prompts)} questions; give as "
                "many, none of them empty."
            )
        counts = [len(answers) for answers in candidates]
        question_index = np.repeat(np.arange(len(prompts)), counts)
        answers = [answer for several in candidates for answer in several]
        read = self.inputs.answers(
            [images[i] for i in question_index],
            [prompts[i] for i in question_index],
            answers,
            functools.partial(self._visual_prompt, params),
        )
        program = self.programs.log_likelihood
        scores = self.batcher.map_batches(program, params, len(answers), read, progress=progress)
        return np.split(scores, np.cumsum(counts)[:-1])

    def _visual_prompt(
        self, params: Any, arrays: Sequence[np.ndarray], index: np.ndarray
    ) -> jax.Array:
        """Visual prompts of distinct images (and texts), one for each of `index`."""
        put, padded_size = self.batcher.put, self.batcher.padded_size
        visual = self.programs.visual_prompt(params, *put(arrays, padded_size(len(arrays[0]))))
        return take(visual, *put([index], padded_size(len(index))))
