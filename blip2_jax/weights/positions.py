"""Position embeddings for images of another size than a checkpoint's (224 -> 364 or 490 pixels)."""

import math

import numpy as np

from blip2_jax.models.vit import ViTConfig
from blip2_jax.weights.files import Tensors

CUBIC = -0.75  # torch's coefficient of bicubic interpolation; other libraries take -0.5


def _weights(distance: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) at a distance from the sample, in samples."""
    x, a = np.abs(distance), CUBIC
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic_matrix(old: int, new: int, *, align_corners: bool) -> np.ndarray:
    """Bicubic resampling of `old` samples to `new`, as torch's `interpolate`: float64[new, old].

    Without antialiasing; samples beyond the border repeat the border's.
    """
    if align_corners:
        at = np.arange(new) * ((old - 1) / max(new - 1, 1))
    else:
        at = (np.arange(new) + 0.5) * (old / new) - 0.5
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        sample = np.floor(at).astype(int) + tap
        np.add.at(matrix, (np.arange(new), sample.clip(0, old - 1)), _weights(at - sample))
    return matrix


def resize(table: np.ndarray, num_tokens: int, *, align_corners: bool) -> np.ndarray:
    """Resamples position embeddings to another grid; the class token's stays.

    Args:
      table: float[..., 1 + g * g, D].
      num_tokens: 1 + G * G.
      align_corners: EVA-CLIP's are resampled without (LAVIS `eva_vit.py`, Hugging Face), CLIP's
        with (LAVIS `clip_vit.py`).

    Returns:
      float[..., 1 + G * G, D] in the table's dtype; computed in float32 or better.
    """
    old, new = (math.isqrt(n - 1) for n in (table.shape[-2], num_tokens))
    cls, grid = table[..., :1, :], table[..., 1:, :]
    matrix = bicubic_matrix(old, new, align_corners=align_corners)
    grid = grid.reshape(*grid.shape[:-2], old, old, -1).astype(np.float64)
    grid = np.einsum("Yy,Xx,...yxd->...YXd", matrix, matrix, grid, optimize=True)
    grid = grid.reshape(*table.shape[:-2], new * new, -1).astype(table.dtype)
    return np.concatenate([cls, grid], axis=-2)


class Resized:
    """Tensors of an encoder whose position embeddings fit a config's image size."""

    def __init__(self, tensors: Tensors, config: ViTConfig):
        self._tensors, self._config = tensors, config
        self.source = tensors.source
        self.dtypes = tensors.dtypes
        self.shapes = dict(tensors.shapes)
        self._resized: set[str] = set()
        for name, shape in tensors.shapes.items():
            if _is_positions(name) and len(shape) > 1:
                fits = shape[-2] == config.num_tokens
                square = math.isqrt(shape[-2] - 1) ** 2 == shape[-2] - 1
                if not fits and square and shape[-1] == config.hidden_size:
                    self._resized.add(name)
                    self.shapes[name] = (*shape[:-2], config.num_tokens, shape[-1])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """See `files.Tensors.read`; positions are resampled as they are read."""
        if name not in self._resized:
            return self._tensors.read(name, index)
        table = self._tensors.read(name)
        aligned = self._config.align_corners
        return resize(table, self._config.num_tokens, align_corners=aligned)[index]


def _is_positions(name: str) -> bool:
    """Whether a tensor is an image encoder's position embeddings, in any of the formats."""
    ends = (
        "embeddings.position_embedding",
        "embeddings.position_embedding.weight",
        "pos_embed",
        "positional_embedding",
    )
    return name.endswith(ends)
