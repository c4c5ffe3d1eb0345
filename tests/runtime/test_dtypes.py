"""Floating-point types by all their names."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from blip2_jax.runtime import dtypes


@pytest.mark.parametrize(
    "dtype, want",
    [
        *((name, "float16") for name in ("fp16", "float16", "half", "torch.float16", "FP16")),
        *((name, "bfloat16") for name in ("bf16", "bfloat16", "torch.bfloat16", "jnp.bfloat16")),
        *((name, "float32") for name in ("fp32", "float32", "float", "np.float32", "torch.float")),
        (torch.float16, "float16"),
        (torch.half, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float32, "float32"),
        (np.float16, "float16"),
        (np.dtype("float32"), "float32"),
        (jnp.bfloat16, "bfloat16"),
        (jnp.float16, "float16"),
        (jnp.dtype("bfloat16"), "bfloat16"),
    ],
    ids=str,
)
def test_a_type_has_many_names(dtype, want):
    assert dtypes.parse(dtype) == jnp.dtype(want)


@pytest.mark.parametrize(
    "dtype",
    ["int8", "fp8", "", "float64", torch.int8, np.int32, jnp.float8_e4m3fn, 16, [], object()],
)
def test_what_nothing_is_computed_in_is_refused(dtype):
    with pytest.raises(ValueError, match="config.dtype is .*; it must be float32 .fp32., bfloat16"):
        dtypes.parse(dtype, "config.dtype")
