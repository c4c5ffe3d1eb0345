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
GPUS = 16  # of LAVIS's runs (paper, section 3.4); its YAMLs give the batch of one
VISUAL = ("ln_vision", "query_tokens", "qformer")  # what every stage trains


def words(argument: str, *known: tuple[str, ...]) -> list[str]:
    """Splits "vitg-opt2.7b" by hyphens, one of each of `known`; says what there is otherwise.

    A last group that holds "" may be left out.
    """
    parts = argument.split("-")
    if len(parts) == len(known) - 1 and "" in known[-1]:
        parts.append("")
    if len(parts) != len(known) or any(p not in k for p, k in zip(parts, known, strict=False)):
        groups = ["{" + ",".join(filter(None, k)) + "}" for k in known]
        choices = "-".join(groups)
        if "" in known[-1]:
            choices = f"{'-'.join(groups[:-1])}[-{groups[-1]}]"
        raise ConfigError(f"{argument!r}: this recipe takes FILE.py:{choices}.")
    return parts


def get_config(vit: str, llm: str = "") -> ConfigDict:
    """The defaults with published towers."""
    config = default()
    config.model.vit.update(VITS[vit])
    if llm:
        config.model.llm.source = LLMS[llm]
        config.model.llm.remat = "full"  # activations of a frozen LLM are cheap to make again
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


def lavis(config: ConfigDict, *, batch_size: int, samples: int, epochs: int) -> None:
    """What LAVIS's code does whatever its YAML says, on 16 GPUs.

    Each GPU reads a sixteenth of the samples and drops what fills no batch at an epoch's end. Its
    runner sets no second beta and moves the rate once an epoch; the rates by block are computed
    and never used; features are gathered without their gradient; the frozen language model is in
    training mode; images lose their transparency, and captions keep a line end within them.
    """
    config.data.batch_size = batch_size
    config.optim.steps_per_epoch = -(-samples // GPUS) // (batch_size // GPUS)
    config.steps = epochs * config.optim.steps_per_epoch
    config.optim.update({"schedule": "per_epoch", "betas": (0.9, 0.999), "vit_layer_decay": 1.0})
    config.stage.itc_gather_grad = False
    config.model.llm.dropout = 0.1
    config.data.fold_whitespace = False
    config.data.alpha_background = "drop"


def lavis_pretraining(config: ConfigDict, *, batch_size: int, warmup_steps: int) -> None:
    """LAVIS's `pretrain_stage1.yaml` and `pretrain_stage2.yaml`: COCO and VG, ten epochs.

    A record is a caption, and the captions of both are shuffled together. VG's have RandAugment
    and no image ids, so a batch with one of them has none, which is every batch.
    """
    config.data.mixture = ConfigDict(
        {
            "coco": {"source": "coco", "dir": "data/coco"},
            "vg": {
                "source": "files",
                "dir": "data/vg/annotations/vg_caption.json",
                "images": "data/vg/images",
                "randaugment": (2, 5),
            },
        }
    )
    config.data.mixture_by = "size"
    config.data.form = "caption"
    config.stage.use_image_ids = False
    lavis(config, batch_size=batch_size, samples=COCO_CAPTIONS + VG_CAPTIONS, epochs=10)
    config.optim.update({"warmup_steps": warmup_steps, "end_lr": 1e-5})


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
