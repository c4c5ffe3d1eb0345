"""The model as people use it: images and texts in, captions, answers and scores out.

Arrays are processed in batches of one fixed size, the last one padded, so that each method
compiles once and a result does not depend on how many images were asked for together.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from blip2_jax.data import tokenizers
from blip2_jax.inference.decode import greedy
from blip2_jax.models.blip2 import Blip2Stage1, Blip2Stage2

QUESTION_PROMPT = "Question: {} Answer:"  # zero-shot VQA with OPT (paper, section 4.1)


class Blip2:
    """A BLIP-2 model with its tokenizers.

    A stage-1 model embeds and matches; a stage-2 model captions and answers. A method that the
    model has no head for says so.

    Args:
      graph: the model without parameters.
      params: all parameters, trained and frozen.
      qformer_tokenizer, llm_tokenizer: see `data.tokenizers`; None where the model has no use.
      text_length: Q-Former tokens of a text; longer texts are cut.
      batch_size: images, texts or pairs that are computed at once.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: dict[str, Any],
        *,
        qformer_tokenizer: Any = None,
        llm_tokenizer: Any = None,
        text_length: int = 32,
        batch_size: int = 32,
    ):
        self.params = params
        self.qformer_tokenizer, self.llm_tokenizer = qformer_tokenizer, llm_tokenizer
        self.text_length, self.batch_size = text_length, batch_size
        model = nnx.eval_shape(lambda: nnx.merge(graph, params))
        self.config = model.config
        self._kind = type(model)

        def compiled(function, **static):
            def call(params, *arrays, **options):
                return function(nnx.merge(graph, params), *arrays, **options)

            return jax.jit(call, **static)

        self._embed_images = compiled(_embed_images)
        self._embed_texts = compiled(lambda model, ids, mask: model.embed_text(ids, mask))
        self._image_keys = compiled(_image_keys)
        self._match = compiled(lambda model, kv, ids, mask: model.match(kv, ids, mask))
        self._maps = compiled(lambda model, images: model.attention_maps(images))
        self._generate = compiled(_generate, static_argnames=("max_new_tokens", "eos_id", "pad_id"))

    def can(self, task: str) -> bool:
        """Whether this model has the heads for "retrieval", "captioning" or "vqa"."""
        return (self._kind is Blip2Stage1) == (task == "retrieval")

    # ------------------------------------------------------------------------------ stage 1

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """uint8[N, H, W, 3] -> float32[N, Q, P], each query's feature of unit length."""
        self._need(Blip2Stage1, "embed_images")
        return self._batched(self._embed_images, images)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """N texts -> float32[N, P], of unit length."""
        self._need(Blip2Stage1, "embed_texts")
        return self._batched(self._embed_texts, *self._encode(texts))

    def similarity(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """ITC cosine of every image with every text: float32[N, M]."""
        queries, features = self.embed_images(images), self.embed_texts(texts)
        return np.einsum("nqp,mp->nmq", queries, features).max(axis=-1)

    def match_logits(
        self, images: np.ndarray, texts: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> np.ndarray:
        """ITM logits of pairs (image index, text index): float32[P, 2]; column 1: they match."""
        scorer = self.pair_scorer(images, texts)
        image_index, text_index = np.asarray(pairs).T
        return np.concatenate(
            [
                scorer(*(x[i : i + self.batch_size] for x in (image_index, text_index)))
                for i in range(0, len(pairs), self.batch_size)
            ]
        )

    def pair_scorer(self, images: np.ndarray, texts: Sequence[str]):
        """A function (image indices, text indices) -> ITM logits, float32[B, 2].

        Each image is encoded once; what the Q-Former's cross-attention reads of it is kept.
        """
        self._need(Blip2Stage1, "match")
        keys = self._batched(self._image_keys, images)  # [N, ...]: batch first
        ids, mask = self._encode(texts)

        def score(image_index: np.ndarray, text_index: np.ndarray) -> np.ndarray:
            kv = jax.tree.map(lambda x: np.moveaxis(x[image_index], 0, 1), keys)
            return np.asarray(self._match(self.params, kv, ids[text_index], mask[text_index]))

        return score

    def match(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """ITM probability that image i and text i belong together: float32[N] in 0..1."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts; give as many of each.")
        logits = self.match_logits(images, texts, [(i, i) for i in range(len(texts))])
        return np.asarray(jax.nn.softmax(logits, axis=-1))[:, 1]

    # ------------------------------------------------------------------------------ stage 2

    def generate(
        self,
        images: np.ndarray | None,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 30,
    ) -> list[str]:
        """Continues each prompt, greedily, until the end token (a newline).

        Args:
          images: uint8[N, H, W, 3], one a prompt; None: the language model alone, blind.
          prompts: N texts, possibly empty.
          max_new_tokens: the most tokens to write.
        """
        self._need(Blip2Stage2, "generate")
        ids, mask = tokenizers.encode_prompts(self.llm_tokenizer, list(prompts))
        tokens = self._batched(
            self._generate,
            *([] if images is None else [images]),
            ids,
            mask,
            progress="generating",
            max_new_tokens=max_new_tokens,
            eos_id=tokenizers.newline_id(self.llm_tokenizer),
            pad_id=self.llm_tokenizer.pad_token_id,
        )
        texts = self.llm_tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def caption(self, images: np.ndarray, *, max_new_tokens: int = 30) -> list[str]:
        """One caption an image."""
        return self.generate(images, [""] * len(images), max_new_tokens=max_new_tokens)

    def answer(
        self, images: np.ndarray | None, questions: Sequence[str], *, max_new_tokens: int = 10
    ) -> list[str]:
        """One answer a question, zero-shot; `images` None answers blind."""
        prompts = [QUESTION_PROMPT.format(question) for question in questions]
        return self.generate(images, prompts, max_new_tokens=max_new_tokens)

    # --------------------------------------------------------------------------- both stages

    def attention_maps(self, images: np.ndarray) -> np.ndarray:
        """Where each query looks: float32[N, Q, G, G] over the image's patches."""
        return self._batched(self._maps, images)

    def _need(self, kind: type, method: str) -> None:
        if self._kind is not kind:
            other = "stage-1" if kind is Blip2Stage1 else "stage-2"
            raise ValueError(
                f"{method} needs a {other} model; this is a {self._kind.__name__}. "
                f"Load the {other} checkpoint."
            )

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return tokenizers.encode_qformer(self.qformer_tokenizer, list(texts), self.text_length)

    def _batched(self, function, *arrays: np.ndarray, progress: str = "", **static: Any) -> Any:
        """Applies a compiled function to batches of one size, and puts the results together."""
        results = []
        with tqdm(
            total=len(arrays[0]), desc=progress, leave=False, disable=not progress or None
        ) as bar:
            for batch, count in _batches(arrays, self.batch_size):
                result = function(self.params, *batch, **static)
                results.append(jax.tree.map(lambda x: np.asarray(x)[:count], result))  # noqa: B023
                bar.update(count)
        return jax.tree.map(lambda *xs: np.concatenate(xs), *results)


def _batches(arrays, size: int) -> Iterator[tuple[list[np.ndarray], int]]:
    """Slices of `size` rows, the last one filled up with its first row, and the real count."""
    for start in range(0, len(arrays[0]), size):
        batch = [x[start : start + size] for x in arrays]
        count = len(batch[0])
        fill = [np.repeat(x[:1], size - count, axis=0) for x in batch]
        yield [np.concatenate(pair) for pair in zip(batch, fill, strict=True)], count


def _embed_images(model: Blip2Stage1, images: jax.Array) -> jax.Array:
    image_kv = model.qformer.image_keys_values(model.encode_images(images))
    return model.project_image(model.query_image(image_kv)[0])


def _image_keys(model: Blip2Stage1, images: jax.Array) -> Any:
    """Cross-attention keys and values with the batch first: two of float[B, groups, H, N, K]."""
    image_kv = model.qformer.image_keys_values(model.encode_images(images))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), image_kv)


def _generate(model: Blip2Stage2, *inputs: jax.Array, max_new_tokens, eos_id, pad_id) -> jax.Array:
    *images, ids, mask = inputs
    embeds = model.llm.embed(ids)
    if images:
        prompt = model.visual_prompt(images[0])
        embeds = jnp.concatenate([prompt, embeds.astype(prompt.dtype)], axis=1)
        mask = jnp.pad(mask, ((0, 0), (prompt.shape[1], 0)), constant_values=1)
    return greedy(
        model.llm, embeds, mask, max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id
    )
