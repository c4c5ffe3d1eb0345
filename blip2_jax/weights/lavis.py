"""LAVIS's `.pth` files, which have no config: sizes are read off their tensors.

An official file has the trained part only. A stage-1 or stage-2 file lacks the image encoder, and
every file lacks the LLM; both come from files of their own, which the user names.
"""

from pathlib import Path
from typing import Any

from blip2_jax.models.blip2 import Blip2Config, LLMConfig
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.models.vit import ViTConfig
from blip2_jax.runtime import atomic
from blip2_jax.weights import configs, files, tables, transfer
from blip2_jax.weights.files import Tensors, TorchFiles, WeightsError
from blip2_jax.weights.positions import Resized
from blip2_jax.weights.rows import Table

LN_VISION_EPS = 1e-5  # torch's default; Hugging Face's port computes with its encoder's 1e-6
HEAD_DIM = 64  # of BERT-base, and so of every Q-Former that LAVIS trains
HEADS = ("opt", "t5", "llm")  # whose projection a file holds

# Special tokens of every Llama's tokenizer in LAVIS (`blip2_vicuna_instruct.py`). It also adds a
# random row for padding to the embedding; padding is masked, and has no row here.
LLAMA_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}

# The two encoders LAVIS has, by width (`eva_vit.py`, `clip_vit.py`).
EVA_G = ViTConfig()
CLIP_L = ViTConfig(
    hidden_size=1024,
    num_layers=23,
    mlp_dim=4096,
    activation="quick_gelu",
    layer_norm_eps=1e-5,
    attention_bias="qkvo",
    patch_bias=False,
    pre_norm=True,
    align_corners=True,
)


def is_file(source: str) -> bool:
    """Whether a source is a LAVIS file."""
    return Path(source).suffix == ".pth"


def open_file(source: str) -> Tensors:
    """The tensors of a LAVIS file."""
    if not Path(source).is_file():
        raise WeightsError(f"There is no file {source}.")
    return files.unwrapped(TorchFiles([Path(source)], source))


def _depth(names: Any, prefix: str) -> int:
    """Number of layers, from names such as `blocks.38.norm1.weight`."""
    numbers = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)


def has_vit(tensors: Tensors) -> bool:
    """Whether a file holds the image encoder (fine-tuned ones do)."""
    return any(name.startswith("visual_encoder.") for name in tensors.shapes)


def head_of(tensors: Tensors) -> str:
    """ "opt", "t5" or "llm" of a stage-2 file, "" of a stage-1 file."""
    for head in HEADS:
        if f"{head}_proj.weight" in tensors.shapes:
            return head
    if "vision_proj.weight" in tensors.shapes:
        return ""
    raise WeightsError(
        f"{tensors.source} is no BLIP-2: it has neither vision_proj (stage 1) nor one of "
        f"{', '.join(f'{h}_proj' for h in HEADS)} (stage 2)."
    )


def vit_config(tensors: Tensors, prefix: str = "visual_encoder.") -> ViTConfig:
    """The image encoder's sizes, from its tensors or, without them, from `ln_vision`'s width."""
    shapes = tensors.shapes
    if f"{prefix}pos_embed" in shapes:
        width = shapes[f"{prefix}pos_embed"][-1]
        base, tokens, depth = EVA_G, shapes[f"{prefix}pos_embed"][-2], f"{prefix}blocks."
        conv, hidden = "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"
    elif f"{prefix}positional_embedding" in shapes:
        width = shapes[f"{prefix}positional_embedding"][-1]
        base, tokens = CLIP_L, shapes[f"{prefix}positional_embedding"][-2]
        depth = f"{prefix}transformer.resblocks."
        conv, hidden = "conv1.weight", "transformer.resblocks.0.mlp.c_fc.weight"
    else:
        width = shapes["ln_vision.weight"][0]
        for known in (EVA_G, CLIP_L):
            if known.hidden_size == width:
                return known
        raise WeightsError(
            f"{tensors.source} holds no image encoder, and no published one is {width} wide; name "
            "its folder or file with --vit."
        )
    patch = shapes[prefix + conv][-1]
    return ViTConfig(
        **{
            **vars(base),
            "image_size": round((tokens - 1) ** 0.5) * patch,
            "patch_size": patch,
            "hidden_size": width,
            "num_layers": min(_depth(shapes, depth), base.num_layers),
            "num_heads": base.num_heads,
            "mlp_dim": shapes[prefix + hidden][0],
        }
    )


def blip2_config(tensors: Tensors, llm: LLMConfig | None, vit: ViTConfig | None) -> Blip2Config:
    """The sizes of a LAVIS file's model.

    Args:
      tensors: the file.
      llm: the language model's sizes; needed by a stage-2 file.
      vit: the image encoder's sizes where it stands in a file of its own.
    """
    shapes, head = tensors.shapes, head_of(tensors)
    bert = "Qformer.bert."
    _, num_queries, width = shapes["query_tokens"]
    text = f"{bert}embeddings.word_embeddings.weight" in shapes
    if head and llm is None:
        raise WeightsError(
            f"{tensors.source} is a stage-2 file, which holds no language model; name its folder "
            "with --llm."
        )
    encoder = vit or vit_config(tensors)
    vocab = shapes[f"{bert}embeddings.word_embeddings.weight"][0] if text else 30523
    positions = shapes[f"{bert}embeddings.position_embeddings.weight"][0] if text else 512
    crossed = [
        i
        for i in range(_depth(shapes, f"{bert}encoder.layer."))
        if f"{bert}encoder.layer.{i}.crossattention.self.query.weight" in shapes
    ]
    return Blip2Config(
        vit=encoder,
        qformer=QFormerConfig(
            num_query_tokens=num_queries,
            hidden_size=width,
            num_layers=_depth(shapes, f"{bert}encoder.layer."),
            num_heads=max(width // HEAD_DIM, 1),
            mlp_dim=shapes[f"{bert}encoder.layer.0.intermediate_query.dense.weight"][0],
            cross_attention_frequency=crossed[1] - crossed[0] if len(crossed) > 1 else 2,
            encoder_width=encoder.hidden_size,
            vocab_size=vocab,
            bos_token_id=vocab - 1,
            max_position_embeddings=positions,
        ),
        llm=llm if head else None,
        qformer_reads_prompt=bool(head) and text,
        projection_dim=256 if head else shapes["vision_proj.weight"][0],
        ln_vision_eps=LN_VISION_EPS,
    )


def _vit_table(config: ViTConfig) -> Table:
    return tables.lavis_clip() if configs.is_clip(config) else tables.lavis_eva()


def table(config: Blip2Config, head: str) -> Table:
    """The name table of a file with a model of this form."""
    text = config.llm is None or config.qformer_reads_prompt
    frequency = config.qformer.cross_attention_frequency
    return tables.lavis(_vit_table(config.vit), frequency, text=text, head=head)


def parts(tensors: Tensors, config: Blip2Config) -> list[tuple[Table, Tensors]]:
    """The table of a file, and its tensors."""
    return [(table(config, head_of(tensors)), Resized(tensors, config.vit))]


def vit_part(source: str, config: ViTConfig) -> tuple[Table, Tensors]:
    """The table and tensors of an encoder's own file (`eva_vit_g.pth`, `clip_vit_L.pth`)."""
    return _vit_table(config), Resized(open_file(source), config)


WRITER = "blip2 convert"  # in files that were written here, beside LAVIS's "model"


def check_target(path: Path, *, overwrite: bool = False) -> None:
    """Refuses to write over a file that was not written here.

    Args:
      path: the `.pth` file; need not be there.
      overwrite: whether one that was written here may be replaced.

    Raises:
      WeightsError: it holds something else, may not be replaced, or has another ending.
    """
    if path.suffix != ".pth":
        raise WeightsError(f"{path}: LAVIS's files end in .pth.")
    if not path.exists():
        return
    if not path.is_file():
        raise WeightsError(f"{path} is a folder, and a file is to be written; name another.")
    torch = files.import_torch(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        own = isinstance(loaded, dict) and "written_by" in loaded
    except Exception:  # not a file that was written here
        own = False
    if not own:
        raise WeightsError(f"{path} holds what this command did not write; name a new file.")
    if not overwrite:
        raise WeightsError(f"{path} was written before; name a new one, or give --overwrite.")


def save(
    path: Path,
    config: Blip2Config,
    params: Any,
    *,
    with_vit: bool,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes a file that LAVIS loads: all but the LLM, under the key "model".

    Args:
      path: the `.pth` file; see `check_target`.
      config: the model's sizes.
      params: its parameters.
      with_vit: whether to write the image encoder too, as in fine-tuned checkpoints.
      dtype: of the tensors; by default the parameters' own.
      overwrite: whether a file that was written here may be replaced.
    """
    torch = files.import_torch(path)
    check_target(path, overwrite=overwrite)
    kept = {k: v for k, v in params.items() if k != "llm" and (with_vit or k != "vit")}
    files.check_space(path, transfer.num_bytes(kept, dtype))
    state = {
        name: files.to_torch(array)
        for name, array in transfer.tensors_of(table(config, head_name(config)), kept, dtype)
    }
    try:
        with atomic.replacing(path) as draft:
            torch.save({"model": state, "written_by": WRITER}, draft)
    except OSError as error:
        raise WeightsError(f"{path} could not be written: {error}.") from error


def head_name(config: Blip2Config) -> str:
    """What LAVIS calls the projection into this model's LLM; "" without one."""
    names = {"opt": "opt", "t5": "t5", "llama": "llm"}
    return names[config.llm.family] if config.llm else ""
