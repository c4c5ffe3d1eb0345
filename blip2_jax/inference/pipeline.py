"""The model as people use it: images and texts in, captions, answers, scores and features out."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from blip2_jax.inference.batching import Batcher, BatchReader, check_batch_size, fetch
from blip2_jax.inference.defaults import GenerationSettings
from blip2_jax.inference.generation import TextGenerator
from blip2_jax.inference.images import as_list
from blip2_jax.inference.inputs import Inputs, as_texts, need_some
from blip2_jax.inference.programs import Programs
from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.models.layers import unstack
from blip2_jax.runtime import dtypes
from blip2_jax.runtime.mesh import replicated


class Blip2:
    """A BLIP-2 model with its tokenizers; `blip2_jax.load` makes one.

    A stage-1 model embeds and matches; a stage-2 model captions and answers. A method that the
    model has no head for is an error. Images may be paths, encoded bytes, `PIL.Image`s or arrays,
    of any size and mode (`inference.images`); they are resized as in the published evaluations. An
    image stands before its prompt, where transformers' placeholder `<image>` may mark it.

    Arguments that several methods have, beside their own:

    - `skip_unreadable`: give None (NaN in arrays) for an image that cannot be read, and go on,
      instead of an error that names it.
    - `truncate`: cut texts to this many tokens; without it, one too long for the model is an error.
      Of a prompt the question is cut; the text around it ("Question: ... Answer:") is kept.
    - `progress`: title of a progress bar, "" for none.

    Args:
      config: the model's sizes.
      params: all its parameters, nested dicts of arrays. The language model's are
        unstacked layer by layer, as decoding reads them; do not use them afterwards.
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
        self._programs = Programs(config, self.dtype, mesh, params.keys())
        self._inputs = Inputs(config, qformer_tokenizer, llm_tokenizer, source)
        self._batcher = Batcher(mesh, self.batch_size)
        self._generator = TextGenerator(self._programs, self._inputs, self._batcher)

    def set_params(self, params: dict[str, Any] | None) -> None:
        """Takes other parameters of the same shapes, as those of a run that goes on; None: none.

        Compiled programs stay. The language model's are unstacked, as in `Blip2`.
        """
        if params is not None and self.config.llm is not None:
            params = {**params, "llm": unstack(params["llm"])}
        self.params = params

    def supports(self, task: str) -> bool:
        """Whether this model has the heads for "retrieval", "captioning", "vqa" or "ranking"."""
        if task == "retrieval":
            return self.config.llm is None and self._programs.has_stage1_heads
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
        return self._generator.settings(task, prompt=prompt, **changes)

    # ------------------------------------------------------------------- stage 1: understanding

    def embed_images(
        self, images: Any, *, skip_unreadable: bool = False, progress: str = ""
    ) -> np.ndarray:
        """N images -> float32[N, Q, P], each query's ITC feature, of unit length."""
        self._need_stage1("embed_images")
        return self._map_images(self._programs.embed_images, images, skip_unreadable, progress)

    def embed_texts(
        self, texts: Sequence[str] | str, *, truncate: int | None = None, progress: str = ""
    ) -> np.ndarray:
        """N texts -> float32[N, P], their ITC features, of unit length."""
        self._need_stage1("embed_texts")
        texts = need_some(as_texts(texts))
        read = self._inputs.texts(texts, truncate)
        return self._map_batches(self._programs.embed_texts, len(texts), read, progress)

    def embed_multimodal(
        self,
        images: Any,
        texts: Sequence[str] | str,
        *,
        skip_unreadable: bool = False,
        truncate: int | None = None,
    ) -> np.ndarray:
        """The queries' output where they see image i and text i: float32[N, Q, D]."""
        self._need_stage1("embed_multimodal")
        program = self._programs.embed_multimodal
        return self._map_pairs(program, images, texts, skip_unreadable, truncate)

    def similarity(
        self,
        images: Any,
        texts: Sequence[str] | str | np.ndarray | jax.Array,
        *,
        skip_unreadable: bool = False,
        truncate: int | None = None,
        progress: str = "",
    ) -> np.ndarray:
        """ITC: cosine of every image's best query with every text, float32[N, M].

        Args:
          images: N images.
          texts: M texts, or what `embed_texts` made of them.
          skip_unreadable, truncate, progress: see `Blip2`.
        """
        self._need_stage1("similarity")
        images = need_some(as_list(images))
        if getattr(texts, "ndim", 1) != 2:
            texts = self.embed_texts(cast(Sequence[str], texts), truncate=truncate)
        everywhere = None if self.mesh is None else replicated(self.mesh)
        features = jax.device_put(np.asarray(texts), everywhere)

        def similarity(params: Any, pixels: jax.Array) -> jax.Array:
            return self._programs.similarity(params, pixels, features)

        return self._map_images(similarity, images, skip_unreadable, progress)

    def match(
        self,
        images: Any,
        texts: Sequence[str] | str,
        *,
        skip_unreadable: bool = False,
        truncate: int | None = None,
    ) -> np.ndarray:
        """ITM: probability that image i and text i belong together, float32[N] in 0..1."""
        logits = self.match_logits(
            images, texts, skip_unreadable=skip_unreadable, truncate=truncate
        )
        return np.asarray(jax.nn.softmax(logits, axis=-1))[:, 1]

    def match_logits(
        self,
        images: Any,
        texts: Sequence[str] | str,
        *,
        skip_unreadable: bool = False,
        truncate: int | None = None,
    ) -> np.ndarray:
        """ITM logits of image i and text i: float32[N, 2]; column 1: they match."""
        self._need_stage1("match")
        return self._map_pairs(self._programs.match, images, texts, skip_unreadable, truncate)

    def tokenize(
        self, texts: Sequence[str], *, truncate: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Texts as the Q-Former reads them, of one length: ids and mask, int32[N, T]."""
        ids, mask = self._inputs.texts(need_some(as_texts(texts)), truncate)(0, len(texts))
        return ids, mask

    def match_candidates(
        self,
        images: Any,
        text_tokens: tuple[np.ndarray, np.ndarray],
        image_index: np.ndarray,
        text_index: np.ndarray,
    ) -> np.ndarray:
        """ITM logits of class "match" of some pairs: float32[P].

        Each image is encoded once; its keys and values for the Q-Former's cross-attention stay on
        the devices until its pairs are scored, of no more images at once than `batch_size`.

        Args:
          images: N images.
          text_tokens: of M texts, from `tokenize`.
          image_index, text_index: int[P], which image and which text each pair is made of;
            `image_index` in ascending order.
        """
        self._need_stage1("match")
        images = as_list(images)
        if (np.diff(image_index) < 0).any():
            raise ValueError("Pairs must come in the order of their images.")
        (ids, mask), batcher = text_tokens, self._batcher
        max_pairs = 4 * self.batch_size  # they share images, and are cheaper
        logits = np.empty(len(image_index), np.float32)
        for first in range(0, len(images), self.batch_size):
            batch = images[first : first + self.batch_size]
            pixels = self._inputs.images(batch)(0, len(batch))
            pixels = batcher.put(pixels, batcher.padded_size(len(batch)))
            image_kv = self._programs.image_keys_values(self.params, *pixels)
            begin, end = np.searchsorted(image_index, [first, first + len(batch)])
            for start in range(begin, end, max_pairs):
                pairs = slice(start, min(start + max_pairs, end))
                texts = text_index[pairs]
                arrays = [(image_index[pairs] - first).astype(np.int32), ids[texts], mask[texts]]
                arrays = batcher.put(arrays, batcher.divisible(max_pairs))
                output = self._programs.match_candidates(self.params, image_kv, *arrays)
                logits[pairs] = fetch(output)[: len(texts), 1]
        return logits

    # ----------------------------------------------------------------------- stage 2: generation

    def caption(self, images: Any, *, prompt: str | None = None, **options: Any) -> list[Any]:
        """One caption an image.

        Args:
          images: N images.
          prompt: what every caption begins with; the model family's published one when None.
          **options: as `generate` takes.
        """
        self._need_llm("caption")
        images = as_list(images)
        prompts = self._generator.parse_prompts(self.settings("caption", prompt=prompt).prompt)
        return self._generator.generate_texts(self.params, "caption", images, prompts, **options)

    def answer(
        self,
        images: Any | None,
        questions: Sequence[str] | str,
        *,
        prompt: str | None = None,
        **options: Any,
    ) -> list[Any]:
        """One answer a question, zero-shot.

        An image that is given several times, as the same object, is encoded once a batch.

        Args:
          images: N images, or one for all questions; None answers blind.
          questions: N questions.
          prompt: with {} in place of the question; the family's published one when None.
          **options: as `generate` takes.
        """
        self._need_llm("answer")
        prompts = self._generator.format_questions(questions, prompt)
        return self._generator.generate_texts(self.params, "answer", images, prompts, **options)

    def rank(
        self,
        images: Any,
        questions: Sequence[str] | str,
        candidates: Sequence[Sequence[str]],
        *,
        prompt: str | None = None,
        progress: str = "",
    ) -> list[np.ndarray]:
        """How likely each candidate answer is, as InstructBLIP ranks them (LAVIS `predict_class`).

        Args:
          images: N images, or one for all questions.
          questions: N questions.
          candidates: of each question, one or more answers.
          prompt, progress: see `answer`.

        Returns:
          N of float32[C_i]: log-probability of each candidate, summed over its tokens; of an
          encoder-decoder, over its end token too.
        """
        self._need_llm("rank")
        prompts = self._generator.format_questions(questions, prompt)
        return self._generator.rank(self.params, images, prompts, candidates, progress)

    def generate(
        self, images: Any | None, prompts: Sequence[str] | str = "", **options: Any
    ) -> list[Any]:
        """Continues prompts.

        Args:
          images: N images, or one for all prompts; None: the language model alone, blind.
          prompts: N texts, or one for all images; "" just lets the model begin.
          **options: fields of `Decoding`, instead of the family's published ones (`defaults`);
            `seed` of sampling; `return_scores`; and `skip_unreadable`, `truncate`, `progress`.

        Returns:
          N texts, or `ScoredText`s with `return_scores`; lists of them where num_return_sequences
          is above 1.
        """
        self._need_llm("generate")
        return self._generator.generate_texts(
            self.params, "generate", images, self._generator.parse_prompts(prompts), **options
        )

    def stream(
        self, image: Any, prompt: str = "", *, question: str | None = None, **options: Any
    ) -> Iterator[str]:
        """Yields a text piece by piece as it is generated, greedily.

        Args:
          image: one image; None: the language model alone, blind.
          prompt: what to continue.
          question: instead, asked in the family's published form, as by `answer`.
          **options: fields of `Decoding` that are not about beams or sampling; `truncate`.
        """
        self._need_llm("stream")
        if question is None:
            prompts = self._generator.parse_prompts(prompt)
        else:
            prompts = self._generator.format_questions(question, None)
        yield from self._generator.stream_text(self.params, image, prompts, **options)

    @property
    def family(self) -> str:
        """Row of `defaults.DEFAULTS`."""
        return self._generator.family

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, as the model's config says; see `language.end_ids`."""
        return self._generator.eos_ids

    @property
    def pad_id(self) -> int:
        """What stands after a text's end."""
        return self._generator.pad_id

    # --------------------------------------------------------------------------- both stages

    def attention_maps(
        self, images: Any, *, skip_unreadable: bool = False, progress: str = ""
    ) -> np.ndarray:
        """Each query's attention to the image: float32[N, Q, G, G] over its patches."""
        return self._map_images(self._programs.attention_maps, images, skip_unreadable, progress)

    # ------------------------------------------------------------------------------- inside

    def _need_stage1(self, method: str) -> None:
        if not self.supports("retrieval"):
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

    def _map_batches(
        self,
        program: Any,
        count: int,
        read: BatchReader,
        progress: str = "",
        skipped: dict[int, str] | None = None,
    ) -> Any:
        return self._batcher.map_batches(
            program, self.params, count, read, progress=progress, skipped=skipped
        )

    def _map_images(
        self, program: Any, images: Any, skip_unreadable: bool, progress: str
    ) -> np.ndarray:
        images = need_some(as_list(images))
        skipped: dict[int, str] | None = {} if skip_unreadable else None
        read = self._inputs.images(images, skipped)
        return self._map_batches(program, len(images), read, progress, skipped)

    def _map_pairs(
        self,
        program: Any,
        images: Any,
        texts: Sequence[str] | str,
        skip_unreadable: bool,
        truncate: int | None,
    ) -> np.ndarray:
        images, texts = as_list(images), as_texts(texts)
        skipped: dict[int, str] | None = {} if skip_unreadable else None
        read = self._inputs.pairs(images, texts, truncate, skipped)
        return self._map_batches(program, len(texts), read, skipped=skipped)
