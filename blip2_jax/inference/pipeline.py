"""The model as people use it: images and texts in, captions, answers, scores and features out.

Work goes in batches whose sizes and text lengths are powers of two, so that each method compiles a
handful of programs at most; and a row's result does not depend on what else is in its batch.
"""

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from blip2_jax.data import language, prompting, tokenizers, transforms
from blip2_jax.data.prompting import TextPrompt
from blip2_jax.inference import decode, images
from blip2_jax.inference.decode_state import (
    NEG_INF,
    NO_LOG_PROB,
    DecodeOutput,
    DecodeState,
    Prompt,
)
from blip2_jax.inference.defaults import DEFAULTS, GenerationSettings
from blip2_jax.inference.options import SYNONYMS, Decoding
from blip2_jax.models.blip2 import Blip2Config, Blip2Stage1, Blip2Stage2, LLMConfig, make_model
from blip2_jax.models.layers import unstack
from blip2_jax.runtime import dtypes
from blip2_jax.runtime.mesh import batch_sharding, replicated
from blip2_jax.runtime.values import did_you_mean
from blip2_jax.runtime.watchdog import alive

log = logging.getLogger(__name__)

SHORTEST = 8  # tokens that texts are padded to at least
MAX_RANKED = 512  # tokens of a prompt with one of its candidates
SEED = 0
SHARED = ("seed", "skip_unreadable", "truncate", "progress")  # options beside those of `Decoding`

# Arrays of rows start .. stop - 1, one for each argument of a compiled function.
Reader = Callable[[int, int], list[Any]]
Function = Callable[..., Any]


class ScoredText(NamedTuple):
    """A text with its log-probabilities.

    Attributes:
      text: as `Blip2.generate` gives it.
      log_prob: the sum of `token_log_probs`.
      token_ids: int32[T], without the end token.
      token_log_probs: float32[T] or, where the text has ended, float32[T + 1], the end token's
        last. Of the distribution that each was chosen from: after penalties and, in sampling,
        temperature, top-k and top-p. They are those of transformers' `compute_transition_scores`.
    """

    text: str
    log_prob: float
    token_ids: np.ndarray
    token_log_probs: np.ndarray


class Blip2:
    """A BLIP-2 model with its tokenizers; `blip2_jax.load` makes one.

    A stage-1 model embeds and matches; a stage-2 model captions and answers. A method that the
    model has no head for says so. Images may be paths, encoded bytes, `PIL.Image`s or arrays, of
    any size and mode (`inference.images`); they are resized as in the published evaluations. An
    image stands before its prompt, where transformers' placeholder `<image>` may mark it.

    Arguments that several methods have, beside their own:

    - `skip_unreadable`: give None (NaN in arrays) for an image that cannot be read, and go on,
      instead of an error that names it.
    - `truncate`: cut texts to this many tokens; without it, one too long for the model is an error.
      Of a prompt the question gives way: what stands around it ("Question: ... Answer:") is kept.
    - `progress`: title of a progress bar, "" for none.

    Args:
      config: the model's sizes.
      params: all its parameters, nested dicts of arrays. The language model's are taken apart
        layer by layer, as decoding reads them; do not use them afterwards.
      dtype: what is computed in; None: what the queries are in.
      mesh: the devices that hold `params`; None: those they are on, one batch on all of them. Of
        a mesh over several processes all must call the same methods with the same arguments.
      qformer_tokenizer, llm_tokenizer: see `data.tokenizers`; None where the model has no use.
      batch_size: images, texts or pairs that are computed at once, at most.
      source: where the model is from, for messages.
    """

    def __init__(
        self,
        config: Blip2Config,
        params: dict[str, Any],
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        qformer_tokenizer: Any = None,
        llm_tokenizer: Any = None,
        batch_size: int = 32,
        source: str = "this model",
    ):
        if config.llm is not None:
            config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, scan=False))
        self.config, self.mesh, self.source = config, mesh, source
        self.set_params(params)
        self.qformer_tokenizer, self.llm_tokenizer = qformer_tokenizer, llm_tokenizer
        self.batch_size = check_batch_size(batch_size)
        self.dtype = dtypes.parse(params["query_tokens"].dtype if dtype is None else dtype)
        make = lambda: make_model(config, dtype=self.dtype, rngs=nnx.Rngs(0))  # noqa: E731
        graph, abstract = nnx.split(nnx.eval_shape(make))
        missing = nnx.to_pure_dict(abstract).keys() - params.keys()
        self._has_match = not missing & {"itm_head", "vision_proj", "text_proj"}

        everywhere = None if mesh is None else replicated(mesh)

        def compiled(function: Function, **static: Any) -> Function:
            def call(params: dict[str, Any], *arrays: Any, **options: Any) -> Any:
                whole = params | {name: nnx.to_pure_dict(abstract)[name] for name in missing}
                return function(nnx.merge(graph, whole), *arrays, **options)

            return jax.jit(call, **static)

        self._embed_images = compiled(_embed_images)
        self._embed_texts = compiled(lambda model, ids, mask: model.embed_text(ids, mask))
        self._embed_pairs = compiled(_embed_pairs)
        self._match_pairs = compiled(_match_pairs)
        self._similarities = compiled(_similarities)
        self._image_keys = compiled(_image_keys, out_shardings=everywhere)
        self._match = compiled(_match)
        self._maps = compiled(lambda model, pixels: model.attention_maps(pixels))
        self._see = compiled(lambda model, pixels, *text: model.visual_prompt(pixels, text or None))
        self._loglikelihood = compiled(_loglikelihood)
        static = {"static_argnames": ("decoding", "eos_ids", "pad_id")}
        self._generate = compiled(_generate, **static)
        self._begin = compiled(_begin, **static)
        self._advance = compiled(_advance, **static)

    def set_params(self, params: dict[str, Any] | None) -> None:
        """Takes other parameters of the same shapes, as those of a run that goes on; None: none.

        What was compiled stays. The language model's are taken apart, as in `Blip2`.
        """
        if params is not None and self.config.llm is not None:
            params = {**params, "llm": unstack(params["llm"])}
        self.params = params

    def supports(self, task: str) -> bool:
        """Whether this model has the heads for "retrieval", "captioning", "vqa" or "ranking"."""
        if task == "retrieval":
            return self.config.llm is None and self._has_match
        return self.config.llm is not None

    def settings(
        self, task: str, *, prompt: str | None = None, **changes: Any
    ) -> GenerationSettings:
        """The prompt and the decoding that a call with these options has.

        Args:
          task: "caption", "answer" or "generate".
          prompt: instead of the family's published one.
          **changes: fields of `Decoding`, instead of the family's published ones.

        Raises:
          ValueError, TypeError: options that do not exist or do not go together.
        """
        default = DEFAULTS[self.family, task]
        prompt = default.prompt if prompt is None else self._without_image_token(prompt)
        return GenerationSettings(prompt, _changed(default.decoding, changes))

    # ------------------------------------------------------------------- stage 1: understanding

    def embed_images(
        self, pictures: Any, *, skip_unreadable: bool = False, progress: str = ""
    ) -> np.ndarray:
        """N images -> float32[N, Q, P], each query's ITC feature, of unit length."""
        self._need_stage1("embed_images")
        pictures = _need_some(images.as_list(pictures))
        skipped: dict[int, str] | None = {} if skip_unreadable else None
        read = self._pixels(pictures, skipped)
        return self._over(self._embed_images, len(pictures), read, progress, skipped)

    def embed_texts(
        self, texts: Sequence[str] | str, *, truncate: int | None = None, progress: str = ""
    ) -> np.ndarray:
        """N texts -> float32[N, P], their ITC features, of unit length."""
        self._need_stage1("embed_texts")
        texts = _need_some(_texts(texts))
        return self._over(self._embed_texts, len(texts), self._words(texts, truncate), progress)

    def embed_multimodal(
        self,
        pictures: Any,
        texts: Sequence[str] | str,
        *,
        skip_unreadable: bool = False,
        truncate: int | None = None,
    ) -> np.ndarray:
        """What the queries make of image i and text i together: float32[N, Q, D]."""
        self._need_stage1("embed_multimodal")
        return self._over_pairs(self._embed_pairs, pictures, texts, skip_unreadable, truncate)

    def similarity(
        self,
        pictures: Any,
        texts: Sequence[str] | str | np.ndarray | jax.Array,
        *,
        skip_unreadable: bool = False,
        truncate: int | None = None,
        progress: str = "",
    ) -> np.ndarray:
        """ITC: cosine of every image's best query with every text, float32[N, M].

        Args:
          pictures: N images.
          texts: M texts, or what `embed_texts` made of them.
          skip_unreadable, truncate, progress: see `Blip2`.
        """
        self._need_stage1("similarity")
        pictures = _need_some(images.as_list(pictures))
        if getattr(texts, "ndim", 1) != 2:
            texts = self.embed_texts(cast(Sequence[str], texts), truncate=truncate)
        everywhere = None if self.mesh is None else replicated(self.mesh)
        features = jax.device_put(np.asarray(texts), everywhere)
        run = lambda params, pixels: self._similarities(params, pixels, features)  # noqa: E731
        skipped: dict[int, str] | None = {} if skip_unreadable else None
        read = self._pixels(pictures, skipped)
        return self._over(run, len(pictures), read, progress, skipped)

    def match(
        self,
        pictures: Any,
        texts: Sequence[str] | str,
        *,
        skip_unreadable: bool = False,
        truncate: int | None = None,
    ) -> np.ndarray:
        """ITM: probability that image i and text i belong together, float32[N] in 0..1."""
        logits = self.match_logits(
            pictures, texts, skip_unreadable=skip_unreadable, truncate=truncate
        )
        return np.asarray(jax.nn.softmax(logits, axis=-1))[:, 1]

    def match_logits(
        self,
        pictures: Any,
        texts: Sequence[str] | str,
        *,
        skip_unreadable: bool = False,
        truncate: int | None = None,
    ) -> np.ndarray:
        """ITM logits of image i and text i: float32[N, 2]; column 1: they match."""
        self._need_stage1("match")
        return self._over_pairs(self._match_pairs, pictures, texts, skip_unreadable, truncate)

    def tokenize(
        self, texts: Sequence[str], *, truncate: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Texts as the Q-Former reads them, of one length: ids and mask, int32[N, T]."""
        ids, mask = self._words(_need_some(_texts(texts)), truncate)(0, len(texts))
        return ids, mask

    def match_candidates(
        self,
        pictures: Any,
        words: tuple[np.ndarray, np.ndarray],
        image_index: np.ndarray,
        text_index: np.ndarray,
    ) -> np.ndarray:
        """ITM logits of class "match" of some pairs: float32[P].

        Each image is encoded once, and what the Q-Former's cross-attention reads of it stays on
        the devices until its pairs are scored, for no more images at once than `batch_size`.

        Args:
          pictures: N images.
          words: of M texts, from `tokenize`.
          image_index, text_index: int[P], which image and which text each pair is made of;
            `image_index` in ascending order.
        """
        self._need_stage1("match")
        pictures = images.as_list(pictures)
        if (np.diff(image_index) < 0).any():
            raise ValueError("Pairs must come in the order of their images.")
        ids, mask = words
        size = 4 * self.batch_size  # of pairs: they share images, and are cheaper
        logits = np.empty(len(image_index), np.float32)
        for first in range(0, len(pictures), self.batch_size):
            some = pictures[first : first + self.batch_size]
            pixels = self._pixels(some)(0, len(some))
            keys = self._image_keys(self.params, *self._placed(pixels, self._bucket(len(some))))
            start, stop = np.searchsorted(image_index, [first, first + len(some)])
            for at in range(start, stop, size):
                rows = slice(at, min(at + size, stop))
                texts = text_index[rows]
                arrays = [(image_index[rows] - first).astype(np.int32), ids[texts], mask[texts]]
                found = self._match(self.params, keys, *self._placed(arrays, self._rows(size)))
                logits[rows] = _fetch(found)[: len(texts), 1]
        return logits

    # ----------------------------------------------------------------------- stage 2: generation

    def caption(self, pictures: Any, *, prompt: str | None = None, **options: Any) -> list[Any]:
        """One caption an image.

        Args:
          pictures: N images.
          prompt: what every caption begins with; the model family's published one when None.
          **options: as `generate` takes.
        """
        self._need_llm("caption")
        pictures = images.as_list(pictures)
        prompts = self._free_prompts(self.settings("caption", prompt=prompt).prompt)
        return self._write("caption", pictures, prompts, **options)

    def answer(
        self,
        pictures: Any | None,
        questions: Sequence[str] | str,
        *,
        prompt: str | None = None,
        **options: Any,
    ) -> list[Any]:
        """One answer a question, zero-shot.

        An image that is given several times, as the same object, is encoded once a batch.

        Args:
          pictures: N images, or one for all questions; None answers blind.
          questions: N questions.
          prompt: with {} in place of the question; the family's published one when None.
          **options: as `generate` takes.
        """
        self._need_llm("answer")
        return self._write("answer", pictures, self._asked(questions, prompt), **options)

    def rank(
        self,
        pictures: Any,
        questions: Sequence[str] | str,
        candidates: Sequence[Sequence[str]],
        *,
        prompt: str | None = None,
        progress: str = "",
    ) -> list[np.ndarray]:
        """How likely each candidate answer is, as InstructBLIP ranks them (LAVIS `predict_class`).

        Args:
          pictures: N images, or one for all questions.
          questions: N questions.
          candidates: of each question, one or more answers.
          prompt, progress: see `answer`.

        Returns:
          N of float32[C_i]: log-probability of each candidate, summed over its tokens; of an
          encoder-decoder, over its end token too.
        """
        self._need_llm("rank")
        prompts = self._asked(questions, prompt)
        pictures, prompts = _paired(pictures, prompts)
        if len(candidates) != len(prompts) or not all(map(len, candidates)):
            raise ValueError(
                f"{len(candidates)} lists of candidates for {len(prompts)} questions; give as "
                "many, none of them empty."
            )
        owner = np.repeat(np.arange(len(prompts)), [len(some) for some in candidates])
        answers = [answer for some in candidates for answer in some]
        arrays = self._answer_arrays(
            [pictures[i] for i in owner], [prompts[i] for i in owner], answers
        )
        scores = self._over(self._loglikelihood, len(owner), arrays, progress)
        return np.split(scores, np.cumsum([len(some) for some in candidates])[:-1])

    def _asked(self, questions: Sequence[str] | str, prompt: str | None) -> list[TextPrompt]:
        """Questions in their prompt."""
        questions = [self._without_image_token(question) for question in _texts(questions)]
        empty = [i for i, question in enumerate(questions) if not question.strip()]
        if empty:
            raise ValueError(f"Question {empty[0]} is empty.")
        prompt = self.settings("answer", prompt=prompt).prompt
        if "{}" not in prompt:
            raise ValueError(f"The prompt {prompt!r} has no {{}} for the question.")
        return [prompting.fill(prompt, question) for question in questions]

    def _free_prompts(self, prompts: Sequence[str] | str) -> list[TextPrompt]:
        """Prompts as the user wrote them."""
        return [prompting.parse(self._without_image_token(prompt)) for prompt in _texts(prompts)]

    def _without_image_token(self, prompt: str) -> str:
        return prompting.strip_image_token(prompt, self.config.qformer.num_query_tokens)

    def generate(
        self, pictures: Any | None, prompts: Sequence[str] | str = "", **options: Any
    ) -> list[Any]:
        """Continues prompts.

        Args:
          pictures: N images, or one for all prompts; None: the language model alone, blind.
          prompts: N texts, or one for all images; "" just lets the model begin.
          **options: fields of `Decoding`, instead of the family's published ones (`defaults`);
            `seed` of sampling; `return_scores`; and `skip_unreadable`, `truncate`, `progress`.

        Returns:
          N texts, or `ScoredText`s with `return_scores`; lists of them where num_return_sequences
          is above 1.
        """
        self._need_llm("generate")
        return self._write("generate", pictures, self._free_prompts(prompts), **options)

    def stream(
        self, picture: Any, prompt: str = "", *, question: str | None = None, **options: Any
    ) -> Iterator[str]:
        """Yields a text piece by piece as it is written, greedily.

        Args:
          picture: one image; None: the language model alone, blind.
          prompt: what to continue.
          question: instead, asked in the family's published form, as by `answer`.
          **options: fields of `Decoding` that are not about beams or sampling; `truncate`.
        """
        self._need_llm("stream")
        truncate = options.pop("truncate", None)
        default = dataclasses.replace(DEFAULTS[self.family, "generate"].decoding, num_beams=1)
        decoding = _changed(default, options)
        if decoding.num_sequences > 1 or decoding.do_sample:
            raise ValueError("A stream is greedy; leave num_beams and do_sample out.")
        prompts = self._free_prompts(prompt) if question is None else self._asked(question, None)
        pictures = None if picture is None else [picture]
        arrays = self._prompt_arrays(pictures, prompts, decoding, truncate, None)(0, 1)
        arrays = self._placed(arrays, self._bucket(1))
        fixed = {"decoding": decoding, "eos_ids": self.eos_ids, "pad_id": self.pad_id}
        state = self._begin(self.params, *arrays, jax.random.key(SEED), **fixed)
        said = ""
        while True:
            ended = bool(state.done[0, 0]) or int(state.step) >= decoding.max_new_tokens
            tokens = np.asarray(state.tokens[0, 0, : int(state.step)])
            text = self.llm_tokenizer.decode(tokens, skip_special_tokens=True)
            text = text.rstrip() if ended else text
            # A token may be part of a letter: wait until it is whole.
            if len(text) > len(said) and (ended or not text.endswith("\ufffd")):
                yield text[len(said) :]
                said = text
            if ended:
                return
            state = self._advance(self.params, state, jax.random.key(SEED), **fixed)

    @property
    def family(self) -> str:
        """Row of `defaults.DEFAULTS`."""
        if self.config.qformer_reads_prompt:
            return "instruct-t5" if self._language.is_encoder_decoder else "instruct"
        return self._language.family

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, as the model's config says; see `language.end_ids`."""
        return language.end_ids(self.llm_tokenizer, self._language)

    @property
    def pad_id(self) -> int:
        """What stands after a text's end."""
        return language.pad_id(self.llm_tokenizer, self._language)

    # --------------------------------------------------------------------------- both stages

    def attention_maps(
        self, pictures: Any, *, skip_unreadable: bool = False, progress: str = ""
    ) -> np.ndarray:
        """Where each query looks: float32[N, Q, G, G] over the image's patches."""
        pictures = _need_some(images.as_list(pictures))
        skipped: dict[int, str] | None = {} if skip_unreadable else None
        read = self._pixels(pictures, skipped)
        return self._over(self._maps, len(pictures), read, progress, skipped)

    # ------------------------------------------------------------------------------- inside

    @property
    def _language(self) -> LLMConfig:
        """The language model's config, where `_need_llm` found one."""
        if self.config.llm is None:
            raise ValueError(f"{self.source} has no language model.")
        return self.config.llm

    @property
    def _resizing(self) -> dict[str, Any]:
        return transforms.resizing_of(self.config.vit)

    def _need_stage1(self, method: str) -> None:
        if self.config.llm is not None or not self._has_match:
            raise ValueError(
                f"{method} needs the heads of stage 1; {self.source} is a stage-2 model. Load a "
                "stage-1 run, LAVIS's blip2_pretrained.pth or Salesforce/blip2-itm-vit-g."
            )

    def _need_llm(self, method: str) -> None:
        if self.config.llm is None:
            raise ValueError(
                f"{method} needs a language model; {self.source} is a stage-1 model. Load a "
                "stage-2 run or, for example, Salesforce/blip2-opt-2.7b."
            )

    def _write(
        self,
        task: str,
        pictures: Any | None,
        prompts: Sequence[TextPrompt],
        *,
        seed: int = SEED,
        skip_unreadable: bool = False,
        truncate: int | None = None,
        progress: str = "",
        return_scores: bool = False,
        **changes: Any,
    ) -> list[Any]:
        known = [field.name for field in dataclasses.fields(Decoding)]
        _check_options(changes, [*known, "prompt", "return_scores", *SHARED])
        decoding = self.settings(task, **changes).decoding
        pictures, prompts = _paired(pictures, prompts)
        _need_some(prompts)
        skipped: dict[int, str] | None = {} if skip_unreadable else None
        arrays = self._prompt_arrays(pictures, prompts, decoding, truncate, skipped)
        run = functools.partial(
            self._generate,
            key=jax.random.key(seed),
            decoding=decoding,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
        )
        found = self._over(run, len(prompts), arrays, progress)
        if not (found.scores > NEG_INF / 2).all():
            raise FloatingPointError(
                f"{self.source}: the scores of its tokens are not numbers. The weights hold NaN, "
                "or overflow in float16: load with dtype='bfloat16' or 'float32'."
            )
        _report(skipped)
        flat = found.tokens.reshape(-1, decoding.max_new_tokens)
        decoded = self.llm_tokenizer.batch_decode(flat, skip_special_tokens=True)
        texts: list[Any] = [text.strip() for text in decoded]
        if return_scores:
            log_probs = found.log_probs.reshape(flat.shape)
            texts = [self._scored(*each) for each in zip(texts, flat, log_probs, strict=True)]
        number = decoding.num_return_sequences
        rows = [texts[i : i + number] for i in range(0, len(texts), number)]
        results: list[Any] = [row[0] for row in rows] if number == 1 else rows
        return [None if skipped and i in skipped else text for i, text in enumerate(results)]

    def _scored(self, text: str, tokens: np.ndarray, log_probs: np.ndarray) -> ScoredText:
        log_probs = log_probs[log_probs != NO_LOG_PROB]
        count = len(log_probs)
        ended = count < len(tokens) or tokens[-1] == self.pad_id
        total = float(log_probs.sum(dtype=np.float64))
        return ScoredText(text, total, tokens[: count - ended], log_probs)

    def _prompt_arrays(
        self,
        pictures: Sequence[Any] | None,
        prompts: Sequence[TextPrompt],
        decoding: Decoding,
        truncate: int | None,
        skipped: dict[int, str] | None,
    ) -> Reader:
        """Reader of rows of a generation: row numbers, prompts, what is seen."""
        tokenizer = self.llm_tokenizer
        llm = self._language
        rows = prompting.tokenize(tokenizer, prompts, _check_truncate(truncate), llm=llm)
        queries = self.config.qformer.num_query_tokens
        room = llm.max_length
        for number, row in enumerate(rows):
            needed = queries + len(row) + decoding.max_new_tokens
            if room is not None and needed > room:
                raise ValueError(
                    f"Prompt {number} has {len(row)} tokens; with {queries} visual ones and "
                    f"{decoding.max_new_tokens} to generate that makes {needed}, and the language "
                    f"model has {room} positions. Shorten it, or pass truncate=N."
                )
        seen = None
        if pictures is not None:
            seen = self._visual_prompts(pictures, prompts, truncate, skipped)

        def read(start: int, stop: int) -> list[Any]:
            length = _power_of_two(max(map(len, rows[start:stop])), SHORTEST)
            ids, mask = tokenizers.pad_rows(
                tokenizer, rows[start:stop], length, side=llm.padding_side, llm=llm
            )
            arrays = [np.arange(start, stop, dtype=np.int32), ids, mask]
            return arrays if seen is None else [*arrays, seen(start, stop)]

        return read

    def _answer_arrays(
        self, pictures: Sequence[Any], prompts: Sequence[TextPrompt], answers: Sequence[str]
    ) -> Reader:
        """Reader of rows of a ranking: ids, mask and labels as in training, and what is seen."""
        seen = self._visual_prompts(pictures, prompts, None, None)
        tokenizer = self.llm_tokenizer
        llm = self._language
        room = llm.max_length or MAX_RANKED
        room = min(room - self.config.qformer.num_query_tokens, MAX_RANKED)

        def encode(row: int) -> tuple[np.ndarray, ...]:
            prompt, answer = str(prompts[row]), answers[row]
            if llm.is_encoder_decoder:
                return tokenizers.encode_prefix(tokenizer, [prompt], [answer], room, room)
            return tokenizers.encode_answers(
                tokenizer, llm, [prompt], [answer], room, room, end=False
            )

        def read(start: int, stop: int) -> list[Any]:
            rows = [encode(row) for row in range(start, stop)]
            ids, mask, labels = map(np.concatenate, zip(*rows, strict=True))
            longest = int(max(mask.sum(axis=1).max(), (labels >= 0).sum(axis=1).max()))
            if longest >= room:
                raise ValueError(
                    f"A prompt with one of its candidates has {room} tokens or more, which is all "
                    "there is room for. Shorten it."
                )
            length = min(_power_of_two(longest, SHORTEST), room)
            return [ids[:, :length], mask[:, :length], labels[:, :length], seen(start, stop)]

        return read

    def _visual_prompts(
        self,
        pictures: Sequence[Any],
        prompts: Sequence[TextPrompt],
        truncate: int | None,
        skipped: dict[int, str] | None,
    ) -> Callable[[int, int], jax.Array]:
        """Reader of what the language model sees: float[rows of the program, Q, D].

        Rows that show the same image (and, where the Q-Former reads the prompt, say the same) are
        computed once. Images that cannot be read go into `skipped`, if that is given.
        """
        words = self._words(prompts, truncate) if self.config.qformer_reads_prompt else None

        def read(start: int, stop: int) -> jax.Array:
            some = list(pictures[start:stop])  # held, so that each has an identity of its own
            first: dict[Any, int] = {}
            keys = [
                (id(picture), prompts[start + i] if words else None)
                for i, picture in enumerate(some)
            ]
            for i, key in enumerate(keys):
                first.setdefault(key, i)
            size = self.config.vit.image_size
            faults: dict[int, str] | None = None if skipped is None else {}
            shown = [
                images.load_batch([some[i]], size, first=start + i, skip=faults, **self._resizing)
                for i in first.values()
            ]
            if faults and skipped is not None:
                for i, key in enumerate(keys):
                    if start + first[key] in faults:
                        skipped[start + i] = faults[start + first[key]]
            arrays = [np.concatenate(shown)]
            if words:
                arrays += [array[list(first.values())] for array in words(start, stop)]
            seen = self._see(self.params, *self._placed(arrays, self._bucket(len(first))))
            place = {key: row for row, key in enumerate(first)}
            index = np.array([place[key] for key in keys], np.int32)
            return _take(seen, *self._placed([index], self._bucket(stop - start)))

        return read

    def _pixels(self, pictures: Sequence[Any], skipped: dict[int, str] | None = None) -> Reader:
        """Reader of images: uint8[N, H, W, 3]; those that cannot be read go into `skipped`."""
        size = self.config.vit.image_size

        def read(start: int, stop: int) -> list[np.ndarray]:
            some = pictures[start:stop]
            return [images.load_batch(some, size, first=start, skip=skipped, **self._resizing)]

        return read

    def _words(self, texts: Sequence[str] | Sequence[TextPrompt], truncate: int | None) -> Reader:
        """Reader of texts or prompts for the Q-Former: ids and mask, int32[N, T]."""
        if self.qformer_tokenizer is None:
            raise ValueError(
                f"{self.source} came without the Q-Former's tokenizer; pass load(..., "
                "qformer_tokenizer=FOLDER), BERT's with [DEC] added."
            )
        room = self.config.qformer.max_position_embeddings
        rows = prompting.tokenize(self.qformer_tokenizer, texts, _check_truncate(truncate))
        for number, row in enumerate(rows):
            if len(row) > room:
                raise ValueError(
                    f"Text {number} has {len(row)} tokens, the Q-Former reads {room} at most. "
                    f"Shorten it, or pass truncate={room}."
                )

        def read(start: int, stop: int) -> list[np.ndarray]:
            length = min(_power_of_two(max(map(len, rows[start:stop])), SHORTEST), room)
            arrays = tokenizers.pad_rows(
                self.qformer_tokenizer, rows[start:stop], length, side="right"
            )
            return list(arrays)

        return read

    def _over_pairs(
        self,
        function: Function,
        pictures: Any,
        texts: Sequence[str] | str,
        skip_unreadable: bool,
        truncate: int | None,
    ) -> np.ndarray:
        pictures, texts = images.as_list(pictures), _texts(texts)
        if len(pictures) != len(texts):
            raise ValueError(
                f"{len(pictures)} images and {len(texts)} texts; give as many of each."
            )
        _need_some(texts)
        skipped: dict[int, str] | None = {} if skip_unreadable else None
        words, pixels = self._words(texts, truncate), self._pixels(pictures, skipped)

        def read(start: int, stop: int) -> list[np.ndarray]:
            return [*pixels(start, stop), *words(start, stop)]

        return self._over(function, len(texts), read, skipped=skipped)

    def _over(
        self,
        function: Function,
        count: int,
        read: Reader,
        progress: str = "",
        skipped: dict[int, str] | None = None,
    ) -> Any:
        """Applies a compiled function batch by batch, and puts the results together.

        Rows that `read` has put into `skipped` become NaN.
        """
        results = []
        with tqdm(total=count, desc=progress, leave=False, disable=not progress or None) as bar:
            for start in range(0, count, self.batch_size):
                stop = min(start + self.batch_size, count)
                arrays = self._placed(read(start, stop), self._bucket(stop - start))
                result = _fetch(function(self.params, *arrays))
                results.append(jax.tree.map(lambda x: x[: stop - start], result))  # noqa: B023
                alive()
                bar.update(stop - start)
        whole = jax.tree.map(lambda *xs: np.concatenate(xs), *results)
        if skipped:
            _report(skipped)
            whole[list(skipped)] = np.nan
        return whole

    def _bucket(self, count: int) -> int:
        """Rows of the program that computes `count` rows."""
        return self._rows(min(_power_of_two(count), self.batch_size))

    def _rows(self, size: int) -> int:
        """The next number of rows that divides over the devices."""
        if self.mesh is None:
            return size
        share = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-size // share) * share

    def _placed(self, arrays: Sequence[Any], size: int) -> list[jax.Array]:
        """Rows filled up to `size` by repeating the first, on the devices."""
        filled = [
            np.concatenate([x, np.repeat(x[:1], size - len(x), axis=0)]) if len(x) < size else x
            for x in arrays
        ]
        if self.mesh is None:
            return jax.device_put(filled)
        place = batch_sharding(self.mesh)
        if place.is_fully_addressable:
            return jax.device_put(filled, place)
        return [  # of a mesh over several processes, each puts its own part
            x
            if isinstance(x, jax.Array)
            else jax.make_array_from_callback(x.shape, place, x.__getitem__)
            for x in filled
        ]


def _fetch(result: Any) -> Any:
    """Arrays of the devices as NumPy's, whole on every process."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(result)):
        return jax.device_get(result)
    return multihost_utils.process_allgather(result, tiled=True)


def _report(skipped: dict[int, str] | None) -> None:
    for number, reason in (skipped or {}).items():
        log.warning("Image %d was skipped: %s.", number, reason)


def _changed(default: Decoding, changes: dict[str, Any]) -> Decoding:
    """The default decoding with some of its fields changed; None leaves one as it is."""
    known = [field.name for field in dataclasses.fields(Decoding)]
    _check_options(changes, known)
    changes = {
        name: Decoding.typed(name, value) for name, value in changes.items() if value is not None
    }
    if changes.get("do_sample"):
        changes = {"num_beams": 1, **changes}
    if changes.get("max_new_tokens", default.max_new_tokens) < default.min_new_tokens:
        changes = {"min_new_tokens": 0, **changes}
    return dataclasses.replace(default, **changes)


def _check_options(given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = did_you_mean(name, known, SYNONYMS)
            raise TypeError(f"No option {name}.{near} There are {', '.join(known)}.")


def _need_some(items: Any) -> Any:
    if not len(items):
        raise ValueError("There is nothing to do: no images, no texts.")
    return items


def _texts(texts: Sequence[str] | str) -> list[str]:
    """One text or several as a list.

    Raises:
      ValueError: there is something else among them.
    """
    if texts is None or isinstance(texts, (bytes, Mapping)):
        raise ValueError(f"Here is a {type(texts).__name__} where a text or a list of texts goes.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"Text {number} is {text!r}; it must be a str.")
    return texts


def check_batch_size(batch_size: Any) -> int:
    """The batch size as an int, which it must be, from 1 on; ValueError if not."""
    whole = isinstance(batch_size, float) and batch_size.is_integer()
    try:
        size = int(batch_size) if whole else operator.index(batch_size)
    except TypeError:
        size = 0
    if size < 1 or isinstance(batch_size, bool):
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number from 1 on.")
    return size


def _check_truncate(truncate: Any) -> int | None:
    """The number of tokens as an int, or None for no limit; ValueError if it is neither."""
    if truncate is None:
        return None
    try:
        tokens = operator.index(truncate)
    except TypeError:
        tokens = 0
    if tokens < 1 or isinstance(truncate, bool):
        raise ValueError(f"truncate is {truncate!r}; it must be a whole number of tokens, or None.")
    return tokens


def _paired(pictures: Any | None, prompts: Sequence[TextPrompt]) -> tuple[Any, list[TextPrompt]]:
    """As many images as prompts: one image, or one prompt, serves all."""
    prompts = list(prompts)
    if pictures is None:
        return None, prompts
    pictures = images.as_list(pictures)
    if len(prompts) == 1:
        prompts = prompts * len(pictures)
    if len(pictures) == 1:
        pictures = list(pictures) * len(prompts)
    if len(pictures) != len(prompts):
        raise ValueError(
            f"{len(pictures)} images and {len(prompts)} prompts; give as many of each, or one of "
            "either."
        )
    return pictures, prompts


def _power_of_two(count: int, least: int = 1) -> int:
    return max(least, 1 << (count - 1).bit_length())


# ---------------------------------------------------------------------------- compiled functions


def _embed_images(model: Blip2Stage1, pixels: jax.Array) -> jax.Array:
    image_kv = model.qformer.image_keys_values(model.encode_images(pixels))
    return model.project_image(model.query_image(image_kv)[0])


def _embed_pairs(
    model: Blip2Stage1, pixels: jax.Array, ids: jax.Array, mask: jax.Array
) -> jax.Array:
    image_kv = model.qformer.image_keys_values(model.encode_images(pixels))
    return model.query_image_and_text(image_kv, ids, mask).astype(jnp.float32)


def _match_pairs(
    model: Blip2Stage1, pixels: jax.Array, ids: jax.Array, mask: jax.Array
) -> jax.Array:
    image_kv = model.qformer.image_keys_values(model.encode_images(pixels))
    return model.match(image_kv, ids, mask)


def _similarities(model: Blip2Stage1, pixels: jax.Array, features: jax.Array) -> jax.Array:
    """Cosines of B images, by their best queries, with M texts: float32[B, M]."""
    queries = _embed_images(model, pixels)
    return jnp.einsum("bqp,mp->bqm", queries, features, precision="highest").max(axis=1)


def _image_keys(model: Blip2Stage1, pixels: jax.Array) -> Any:
    """What cross-attention reads of images: two of float[groups, B, H, N, K]."""
    return model.qformer.image_keys_values(model.encode_images(pixels))


def _match(
    model: Blip2Stage1, image_kv: Any, image_index: jax.Array, ids: jax.Array, mask: jax.Array
) -> jax.Array:
    """ITM logits of pairs, float32[P, 2]; `image_index` int32[P] into `image_kv`."""
    return model.match(jax.tree.map(lambda x: x[:, image_index], image_kv), ids, mask)


@jax.jit
def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    return rows[index]


def _prompt(
    model: Blip2Stage2,
    row: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    seen: Sequence[jax.Array],
) -> Prompt:
    """Image, float[B, Q, D] or nothing, and text, as the language model reads them."""
    embeds, whole = model.llm.embed(ids), mask
    for visual in seen:
        embeds = jnp.concatenate([visual, embeds.astype(visual.dtype)], axis=1)
        whole = jnp.pad(mask, ((0, 0), (visual.shape[1], 0)), constant_values=1)
    start = getattr(model.config.llm, "decoder_start_id", None)
    if start is not None:
        ids, mask = jnp.full_like(ids[:, :1], start), jnp.ones_like(mask[:, :1])
    return Prompt(embeds, whole, ids, mask, row)


def _generate(
    model: Blip2Stage2,
    row: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    *seen: jax.Array,
    key: jax.Array,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> DecodeOutput:
    prompt = _prompt(model, row, ids, mask, seen)
    return decode.decode(model.llm, prompt, decoding, eos_ids=eos_ids, pad_id=pad_id, key=key)


def _begin(
    model: Blip2Stage2,
    row: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    *arrays: jax.Array,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> DecodeState:
    *seen, key = arrays
    prompt = _prompt(model, row, ids, mask, seen)
    return decode.prefill(model.llm, prompt, decoding, eos_ids=eos_ids, pad_id=pad_id, key=key)


def _advance(
    model: Blip2Stage2,
    state: DecodeState,
    key: jax.Array,
    *,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> DecodeState:
    return decode.decode_step(model.llm, state, decoding, eos_ids=eos_ids, pad_id=pad_id, key=key)


def _loglikelihood(
    model: Blip2Stage2,
    ids: jax.Array,
    mask: jax.Array,
    labels: jax.Array,
    visual: jax.Array,
) -> jax.Array:
    """Sum over the labels' tokens of their log-probability, float32[B]; arrays as in training."""
    learned = labels >= 0
    targets = jnp.where(learned, labels, 0)
    if model.language_config.is_encoder_decoder:
        real = learned.astype(mask.dtype)
        logits = model.language_logits(visual, targets, real, prefix=(ids, mask))
    else:
        logits = model.language_logits(visual, ids, mask)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.where(learned, each, 0.0).sum(axis=1)
