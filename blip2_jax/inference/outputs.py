"""From generated tokens to texts."""

from typing import Any, NamedTuple

import numpy as np

from blip2_jax.inference.decode_state import NEG_INF, NO_LOG_PROB, DecodeOutput


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


def texts_of(
    output: DecodeOutput, tokenizer: Any, pad_id: int, *, return_scores: bool, source: str
) -> list[Any]:
    """Texts of each prompt: a str or `ScoredText`, or a list of them where there are several.

    Args:
      output: NumPy arrays.
      tokenizer: the language model's.
      pad_id: what stands after a text's end.
      return_scores: give `ScoredText`s.
      source: where the model is from, for the message.

    Raises:
      FloatingPointError: scores are not numbers.
    """
    if not (output.scores > NEG_INF / 2).all():
        raise FloatingPointError(
            f"{source}: the scores of its tokens are not numbers. The weights hold NaN, or "
            "overflow in float16: load with dtype='bfloat16' or 'float32'."
        )
    count, length = output.tokens.shape[1:]
    tokens = np.asarray(output.tokens).reshape(-1, length)
    decoded = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    texts: list[Any] = [text.strip() for text in decoded]
    if return_scores:
        log_probs = np.asarray(output.log_probs).reshape(tokens.shape)
        texts = [
            _scored(text, ids, scores, pad_id)
            for text, ids, scores in zip(texts, tokens, log_probs, strict=True)
        ]
    by_prompt = [texts[i : i + count] for i in range(0, len(texts), count)]
    return [several[0] for several in by_prompt] if count == 1 else by_prompt


def _scored(text: str, tokens: np.ndarray, log_probs: np.ndarray, pad_id: int) -> ScoredText:
    log_probs = log_probs[log_probs != NO_LOG_PROB]
    count = len(log_probs)
    ended = count < len(tokens) or tokens[-1] == pad_id
    total = float(log_probs.sum(dtype=np.float64))
    return ScoredText(text, total, tokens[: count - ended], log_probs)
