"""Floating-point types by all their names; without jax, which takes a while to import.

`cli` needs them to parse a command line, which launchers do on machines that run nothing.
"""

from typing import Any

import ml_dtypes
import numpy as np

NAMES = {
    **dict.fromkeys(("float32", "fp32", "f32", "float", "single"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), "float16"),
}


def parse(dtype: Any, name: str = "dtype") -> np.dtype[Any]:
    """The type that is meant.

    Args:
      dtype: a name, as "bfloat16", "bf16" or "torch.bfloat16"; or a type of NumPy, JAX or PyTorch.
      name: of the option, for the message.

    Raises:
      ValueError: it is no type to compute in.
    """
    text = dtype if isinstance(dtype, str) else str(dtype)  # "torch.float16" of PyTorch's
    if not isinstance(dtype, str):
        try:
            text = np.dtype(dtype).name
        except TypeError:
            pass
    known = NAMES.get(text.lower().rpartition(".")[2])
    if known is None:
        raise ValueError(
            f"{name} is {dtype!r}; it must be float32 (fp32), bfloat16 (bf16) or float16 (fp16), "
            "by name or as a type of NumPy, JAX or PyTorch."
        )
    return np.dtype(ml_dtypes.bfloat16 if known == "bfloat16" else known)
