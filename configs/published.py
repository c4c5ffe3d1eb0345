"""What the recipes of the published models share: towers, data, optimizer variants."""

from typing import Any

from ml_collections import ConfigDict

from blip2_jax.cli import ConfigError
from blip2_jax.weights.lavis import LLAMA_TOKENS
from configs.default import get_config as default

VITS: dict[str, dict[str, Any]] = {
    # EVA-CLIP ViT-g/14 and CLIP ViT-L/14 (paper, section 3.4), the last block left out of both.
    "vitg": {"source": "Salesforce/blip2-itm-vit-g"},
    "vitl": {"source": "openai/clip-vit-large-patch14", "layers": 23},
}
LLMS = {
    "opt2.7b": "facebook/opt-2.7b",
    "opt6.7b": "facebook/opt-6.7b",
    "flant5xl": "google/flan-t5-xl",
    "flant5xxl": "google/flan-t5-xxl",
    "vicuna7b": "lmsys/vicuna-7b-v1.1",
    "vicuna13b": "lmsys/vicuna-13b-v1.1",
}
COCO_CAPTIONS = 566_747  # of Karpathy's training split, five of most images
VG_CAPTIONS = 821_774
VISUAL = ("ln_vision", "query_tokens", "qformer")  # what every stage trains


def words(argument: str, *known: tuple[str, ...]) -> list[str]:
    """Splits "vitg-opt2.7b" by hyphens, one of each of `known`; says what there is otherwise."""
    parts = argument.split("-")
    if len(parts) != len(known) or any(p not in k for p, k in zip(parts, known, strict=False)):
        choices = "-".join("{" + ",".join(k) + "}" for k in known)
        raise ConfigError(f"{argument!r}: this recipe takes FILE.py:{choices}.")
    return parts


def get_config(vit: str, llm: str = "") -> ConfigDict:
    """The defaults with published towers."""
    config = default()
    config.model.vit.update(VITS[vit])
    if llm:
        config.model.llm.source = LLMS[llm]
        config.model.llm.remat = "full"  # activations of a frozen LLM are cheap to make again
        config.data.end_of_text = "\n" if llm.startswith("opt") else ""
        if llm.startswith("vicuna"):  # LAVIS alone has published BLIP-2 with it
            config.data.llm_special_tokens = ConfigDict(LLAMA_TOKENS)
    return config


def web_mixture(config: ConfigDict) -> None:
    """The 129M images of pre-training (paper, section 3.4); how they were mixed is not published.

    Parts are weighed by size here. CapFilt keeps two captions of each web image, of which one is
    drawn. Give the folders as --config.data.mixture.NAME.dir=...
    """
    config.data.mixture_by = "size"
    config.data.mixture = ConfigDict(
        {name: {"dir": f"data/{name}"} for name in ("coco", "vg", "cc3m", "cc12m", "sbu", "laion")}
    )


def lavis(config: ConfigDict, *, batch_size: int, warmup_steps: int) -> None:
    """LAVIS's own pre-training YAMLs: COCO and VG, ten epochs, the default second beta."""
    config.data.mixture = ConfigDict({name: {"dir": f"data/{name}"} for name in ("coco", "vg")})
    config.data.batch_size = batch_size
    config.steps = 10 * (COCO_CAPTIONS + VG_CAPTIONS) // batch_size
    config.optim.update({"betas": (0.9, 0.999), "warmup_steps": warmup_steps, "end_lr": 1e-5})


def finetune(config: ConfigDict, *, batch_size: int, samples: int) -> None:
    """What all of the paper's fine-tuning has in common (tables 7 to 9): five epochs."""
    config.trainable = ("vit", *config.trainable)
    config.model.vit.remat = "full"
    config.data.batch_size = batch_size
    config.steps = 5 * samples // batch_size
    small_rates(config)


def small_rates(config: ConfigDict) -> None:
    """Rates of all that starts from a trained Q-Former: fine-tuning and instruction tuning."""
    config.optim.update(
        {
            "peak_lr": 1e-5,
            "warmup_start_lr": 1e-8,
            "end_lr": 0.0,
            "warmup_steps": 1000,
            "betas": (0.9, 0.999),
        }
    )
