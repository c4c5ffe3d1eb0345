"""The keys of a `config.json`, with their family's defaults, checked as they are read."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from blip2_jax.models.blip2 import LLMConfig
from blip2_jax.models.layers import ACTIVATIONS
from blip2_jax.weights.configs.defaults import DEFAULTS
from blip2_jax.weights.files import WeightsError

# Names of transformers' classes, old and new, with a family's weights and computation.
ARCHITECTURES = {
    "opt": r"OPT(Model|For\w+)",
    "llama": r"(Llama|LLaMA)(Model|For\w+)",
    "t5": r"T5(Model|For\w+|WithLMHeadModel)",
    "clip_vision_model": r"CLIP(Model|VisionModel\w*|For\w+)",
    "blip_2_vision_model": r"Blip2VisionModel",
    "instructblip_vision_model": r"InstructBlipVisionModel",
}

# Keys of related families that change the computation, with the value that does not.
FOREIGN: dict[str, Mapping[str, Any]] = {
    "llama": {
        "sliding_window": None,  # Mistral
        "embedding_multiplier": 1.0,  # Granite, and the three below
        "attention_multiplier": None,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "hidden_activation": None,  # Gemma, and the three below
        "query_pre_attn_scalar": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "clip_qkv": None,  # OLMo
        "no_rope_layers": None,  # SmolLM3
        "num_local_experts": None,  # Mixtral
        "use_qk_norm": False,
    },
    "t5": {"num_experts": None},  # Switch Transformers
}


SIZES = (  # integers whose default is derived from other keys
    "word_embed_proj_dim", "num_key_value_heads", "head_dim", "num_decoder_layers",
    "original_max_position_embeddings",
)  # fmt: skip


class Fields:
    """A parsed `config.json`, with its family's defaults for what it leaves out.

    Args:
      config: the JSON document.
      family: a `DEFAULTS` name.
      source: named in errors.

    Raises:
      WeightsError: `architectures`, or a key that this family does not have, says that the file is
        of another family; the weights are quantized.
    """

    def __init__(self, config: Mapping[str, Any], family: str, source: str):
        self.family, self.source = family, source
        self._config, self._defaults = config, DEFAULTS[family]
        pattern = ARCHITECTURES.get(family, r".*")
        for name in config.get("architectures") or ():
            if not re.fullmatch(pattern, name):
                raise self.error(
                    f"architectures names {name}, a class that computes something else. Leave the "
                    "file as it was published, and take another model"
                )
        for key, neutral in FOREIGN.get(family, {}).items():
            if config.get(key) not in (None, neutral):
                raise self.error(f"{key} is {config[key]!r}; a {family} has no such key")
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown")
            raise self.error(f"the weights are quantized ({method}); take the original")

    def error(self, problem: str) -> WeightsError:
        """An error that names the file."""
        return WeightsError(f"{self.source}: config.json of a {self.family}: {problem}.")

    def has(self, key: str) -> bool:
        """Whether the file itself has a value for a key."""
        return self._config.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        """A key's value, of the type that its default has."""
        default = self._defaults[key]
        value = self._config.get(key)
        if value is None:
            return default
        if default is None and key not in SIZES:
            return value
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        wanted = int if default is None else type(default)
        if type(value) is not wanted:
            raise self.error(f"{key} is {value!r}, which is no {wanted.__name__}")
        if isinstance(value, int) and value < 1 and not isinstance(value, bool):
            raise self.error(f"{key} is {value}; it must be at least 1")
        return value

    def activation(self, key: str) -> str:
        """The name of an activation that is known."""
        return self.known_activation(self[key], key)

    def known_activation(self, name: Any, key: str) -> str:
        """`name`, checked to be an activation that is known."""
        if name not in ACTIVATIONS:
            raise self.error(f"{key} is {name!r}; known: {', '.join(ACTIVATIONS)}")
        return str(name)

    def refuse(self, key: str, only: Any) -> None:
        """Raises if a key has another value than the only one that is supported."""
        if self[key] != only:
            raise self.error(f"{key} is {self[key]!r}; only {only!r} is supported")

    def heads(self, width: str, heads: str) -> int:
        """Width of a head, where the heads share the model's width."""
        size, rest = divmod(self[width], self[heads])
        if rest:
            raise self.error(f"{width} {self[width]} is not a multiple of {heads} {self[heads]}")
        return int(size)

    def side(self, key: str) -> int:
        """A side in pixels, which a file may give as a pair of equal ones."""
        value = self._config.get(key)
        if isinstance(value, list):
            if len(value) != 2 or value[0] != value[1]:
                raise self.error(f"{key} is {value}; images and patches are squares here")
            return Fields({key: value[0]}, self.family, self.source).side(key)
        return int(self[key])

    def token(self, key: str) -> int | None:
        """A token's id; None where there is none (files of 2023 say -1)."""
        value = self._config.get(key, self._defaults[key])
        if value is None or value == -1:
            return None
        return self._id(key, value)

    def tokens(self, key: str) -> tuple[int, ...]:
        """Token ids, given as one number or as a list."""
        value = self._config.get(key, self._defaults[key])
        several = value if isinstance(value, list) else [] if value in (None, -1) else [value]
        return tuple(self._id(key, item) for item in several)

    def _id(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(f"{key} is {value!r}, which is no token's id")
        return value


def family_of(config: Mapping[str, Any], known: Iterable[str], source: str) -> str:
    """The `model_type` of a parsed `config.json`, checked to be one of `known`."""
    family = config.get("model_type")
    names = tuple(known)
    if family not in names:
        raise WeightsError(f"{source}: model_type {family!r}; known: {', '.join(names)}.")
    return str(family)


def parse(
    config: Mapping[str, Any],
    known: Mapping[str, Callable[[Fields], Any]],
    source: str,
) -> Any:
    """Sizes of a parsed `config.json`.

    Args:
      config: the JSON document.
      known: model_type -> reader, `LLMS` or `VITS`.
      source: named in errors.
    """
    family = family_of(config, known, source)
    return known[family](Fields(config, family, source))


def write_tokens(sizes: LLMConfig) -> dict[str, Any]:
    """Begin, end and padding; what is not set is left to the class's default."""
    eos = sizes.eos_token_ids
    document: dict[str, Any] = {
        "bos_token_id": sizes.bos_token_id,
        "pad_token_id": sizes.pad_token_id,
    }
    if eos:
        document["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
    return document
