"""Name tables: which tensor of a published checkpoint is which parameter here.

One table a family and format, used in both directions; see `rows`.
"""

from collections.abc import Iterable

from blip2_jax.weights.rows import Row, Table, join

Rows = Iterable[Row]


def _linear(ours: str, theirs: str, stack: int = 0, bias: bool = True, every: int = 1) -> list[Row]:
    rows = [Row(f"{theirs}.weight", (f"{ours}/kernel",), "linear", stack, every)]
    if bias:
        rows.append(Row(f"{theirs}.bias", (f"{ours}/bias",), "same", stack, every))
    return rows


def _norm(ours: str, theirs: str, stack: int = 0, bias: bool = True, every: int = 1) -> list[Row]:
    rows = [Row(f"{theirs}.weight", (f"{ours}/scale",), "same", stack, every)]
    if bias:
        rows.append(Row(f"{theirs}.bias", (f"{ours}/bias",), "same", stack, every))
    return rows


def _embedding(ours: str, theirs: str) -> Row:
    return Row(f"{theirs}.weight", (f"{ours}/embedding",))


def _qkv(ours: str, leaf: str, without: str = "") -> tuple[str | None, ...]:
    """The three parts of a fused projection."""
    return tuple(None if n in without else f"{ours}/{n}_proj/{leaf}" for n in "qkv")


# ----------------------------------------------------------------------------- language models


def opt(tied_head: bool = True, bias: bool = True) -> Table:
    """`OPTForCausalLM`."""
    ours, theirs = "layers/blocks", "model.decoder.layers.{i}"
    rows = [
        _embedding("embed_tokens", "model.decoder.embed_tokens"),
        _embedding("embed_positions", "model.decoder.embed_positions"),
        *_norm("final_layer_norm", "model.decoder.final_layer_norm"),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rows += _linear(f"{ours}/self_attn/{name}", f"{theirs}.self_attn.{name}", 1, bias)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        rows += _norm(f"{ours}/{name}", f"{theirs}.{name}", 1)
    for name in ("fc1", "fc2"):
        rows += _linear(f"{ours}/mlp/{name}", f"{theirs}.{name}", 1, bias)
    if tied_head:
        return Table(tuple(rows), {"lm_head.weight": "model.decoder.embed_tokens.weight"})
    return Table((*rows, *_linear("lm_head", "lm_head", bias=False)))


def llama(tied_head: bool = False) -> Table:
    """`LlamaForCausalLM`."""
    ours, theirs = "layers/blocks", "model.layers.{i}"
    rows = [
        _embedding("embed_tokens", "model.embed_tokens"),
        *_norm("norm", "model.norm", bias=False),
        *_norm(f"{ours}/input_norm", f"{theirs}.input_layernorm", 1, bias=False),
        *_norm(f"{ours}/post_attention_norm", f"{theirs}.post_attention_layernorm", 1, bias=False),
    ]
    for name, part in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
        attention = f"{theirs}.self_attn.{name}_proj"
        rows += _linear(f"{ours}/self_attn/{part}", attention, 1, bias=False)
    for name in ("gate", "up", "down"):
        rows += _linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}_proj", 1, bias=False)
    ignored = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    if tied_head:
        return Table(tuple(rows), {"lm_head.weight": "model.embed_tokens.weight"}, ignored)
    rows += _linear("lm_head", "lm_head", bias=False)
    return Table(tuple(rows), ignored=ignored)


def t5(tied_head: bool = False) -> Table:
    """`T5ForConditionalGeneration`, v1.1."""
    rows = [_embedding("embed_tokens", "shared")]
    copies = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}
    if tied_head:
        copies["lm_head.weight"] = "shared.weight"
    else:
        rows += _linear("lm_head", "lm_head", bias=False)
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    for side, feed_forward in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{side}/blocks", f"{side}.block.{{i}}.layer"
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
        rows += [
            _embedding(f"{side}_relative_bias", first),
            *_norm(f"{side}_norm", f"{side}.final_layer_norm", bias=False),
            *_norm(f"{ours}/self_attn_norm", f"{theirs}.0.layer_norm", 1, bias=False),
            *_norm(f"{ours}/mlp_norm", f"{theirs}.{feed_forward}.layer_norm", 1, bias=False),
        ]
        for name, part in zip("qkvo", parts, strict=True):
            attention = f"{theirs}.0.SelfAttention.{name}"
            rows += _linear(f"{ours}/self_attn/{part}", attention, 1, bias=False)
        for name, part in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            dense = f"{theirs}.{feed_forward}.DenseReluDense.{name}"
            rows += _linear(f"{ours}/mlp/{part}", dense, 1, bias=False)
    ours, theirs = "decoder/blocks", "decoder.block.{i}.layer.1"
    rows += _norm(f"{ours}/cross_attn_norm", f"{theirs}.layer_norm", 1, bias=False)
    for name, part in zip("qkvo", parts, strict=True):
        attention = f"{theirs}.EncDecAttention.{name}"
        rows += _linear(f"{ours}/cross_attn/{part}", attention, 1, bias=False)
    # Files of before 2022 hold an unused bias of the decoder's attention to the encoder.
    unused = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    return Table(tuple(rows), copies, (unused,))


# ------------------------------------------------------------------------------ image encoders


def clip_vision() -> Table:
    """`CLIPVisionModel`; its `post_layernorm` has no part in BLIP-2."""
    ours, theirs = "layers/blocks", "encoder.layers.{i}"
    rows = [
        Row("embeddings.class_embedding", ("cls_token",), "class"),
        Row("embeddings.position_embedding.weight", ("pos_embed",), "positions"),
        Row("embeddings.patch_embedding.weight", ("patch_embed/kernel",), "patches"),
        *_norm("ln_pre", "pre_layrnorm"),  # spelled so in the checkpoints
    ]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rows += _linear(f"{ours}/attn/{name}", f"{theirs}.self_attn.{name}", 1)
    for number in (1, 2):
        rows += _norm(f"{ours}/norm{number}", f"{theirs}.layer_norm{number}", 1)
        rows += _linear(f"{ours}/mlp/fc{number}", f"{theirs}.mlp.fc{number}", 1)
    return Table(tuple(rows), ignored=(r"post_layernorm\..*", r"embeddings\.position_ids"))


def lavis_clip() -> Table:
    """LAVIS's `clip_vit.py`: OpenAI's own names."""
    ours, theirs = "layers/blocks", "transformer.resblocks.{i}"
    rows = [
        Row("class_embedding", ("cls_token",), "class"),
        Row("positional_embedding", ("pos_embed",), "positions"),
        Row("conv1.weight", ("patch_embed/kernel",), "patches"),
        *_norm("ln_pre", "ln_pre"),
        Row(f"{theirs}.attn.in_proj_weight", _qkv(f"{ours}/attn", "kernel"), "linear", 1),
        Row(f"{theirs}.attn.in_proj_bias", _qkv(f"{ours}/attn", "bias"), "same", 1),
        *_linear(f"{ours}/attn/out_proj", f"{theirs}.attn.out_proj", 1),
        *_norm(f"{ours}/norm1", f"{theirs}.ln_1", 1),
        *_norm(f"{ours}/norm2", f"{theirs}.ln_2", 1),
        *_linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.c_fc", 1),
        *_linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.c_proj", 1),
    ]
    return Table(tuple(rows), ignored=(r"ln_post\..*", "proj"))


def eva() -> Table:
    """Hugging Face's `Blip2VisionModel` without its last norm, which is our `ln_vision`."""
    ours, theirs = "layers/blocks", "encoder.layers.{i}"
    rows = [
        Row("embeddings.class_embedding", ("cls_token",)),
        Row("embeddings.position_embedding", ("pos_embed",)),
        Row("embeddings.patch_embedding.weight", ("patch_embed/kernel",), "patches"),
        Row("embeddings.patch_embedding.bias", ("patch_embed/bias",)),
        Row(f"{theirs}.self_attn.qkv.weight", _qkv(f"{ours}/attn", "kernel"), "linear", 1),
        Row(f"{theirs}.self_attn.qkv.bias", _qkv(f"{ours}/attn", "bias", without="k"), stack=1),
        *_linear(f"{ours}/attn/out_proj", f"{theirs}.self_attn.projection", 1),
    ]
    for number in (1, 2):
        rows += _norm(f"{ours}/norm{number}", f"{theirs}.layer_norm{number}", 1)
        rows += _linear(f"{ours}/mlp/fc{number}", f"{theirs}.mlp.fc{number}", 1)
    return Table(tuple(rows), ignored=(r"post_layernorm\..*",))


def lavis_eva() -> Table:
    """LAVIS's `eva_vit.py`."""
    ours, theirs = "layers/blocks", "blocks.{i}"
    rows = [
        Row("cls_token", ("cls_token",)),
        Row("pos_embed", ("pos_embed",)),
        Row("patch_embed.proj.weight", ("patch_embed/kernel",), "patches"),
        Row("patch_embed.proj.bias", ("patch_embed/bias",)),
        Row(f"{theirs}.attn.qkv.weight", _qkv(f"{ours}/attn", "kernel"), "linear", 1),
        Row(f"{theirs}.attn.q_bias", (f"{ours}/attn/q_proj/bias",), stack=1),
        Row(f"{theirs}.attn.v_bias", (f"{ours}/attn/v_proj/bias",), stack=1),
        *_linear(f"{ours}/attn/out_proj", f"{theirs}.attn.proj", 1),
    ]
    for number in (1, 2):
        rows += _norm(f"{ours}/norm{number}", f"{theirs}.norm{number}", 1)
        rows += _linear(f"{ours}/mlp/fc{number}", f"{theirs}.mlp.fc{number}", 1)
    # The encoder's own file has the head of its pre-training too.
    return Table(tuple(rows), ignored=(r"(norm|fc_norm|head)\..*",))


# ------------------------------------------------------------------------------------ Q-Former


def _qformer_layers(self_name: str, frequency: int, text: bool) -> Rows:
    """Layers of the Q-Former; `self_name` is what stands between attention and its projections."""
    group = "groups/blocks"
    layer, theirs = f"{group}/layers", "encoder.layer.{i}"
    rows: list[Row] = []

    def attention(ours: str, name: str, stack: int, every: int) -> None:
        for part in ("query", "key", "value"):
            projection = f"{ours}/attention/{part[0]}_proj"
            rows.extend(
                _linear(projection, f"{theirs}.{name}.{self_name}.{part}", stack, every=every)
            )
        output = f"{theirs}.{name}.output"
        rows.extend(_linear(f"{ours}/attention/out_proj", f"{output}.dense", stack, every=every))
        rows.extend(_norm(f"{ours}/norm", f"{output}.LayerNorm", stack, every=every))

    attention(f"{layer}/attention", "attention", 2, 1)
    attention(f"{group}/crossattention", "crossattention", 1, frequency)
    for ours, suffix in (("mlp_query", "_query"), *((("mlp_text", ""),) if text else ())):
        rows += _linear(f"{layer}/{ours}/mlp/fc1", f"{theirs}.intermediate{suffix}.dense", 2)
        rows += _linear(f"{layer}/{ours}/mlp/fc2", f"{theirs}.output{suffix}.dense", 2)
        rows += _norm(f"{layer}/{ours}/norm", f"{theirs}.output{suffix}.LayerNorm", 2)
    return rows


def _text_embeddings(theirs: str) -> Rows:
    return [
        _embedding("word_embeddings", f"{theirs}.word_embeddings"),
        _embedding("position_embeddings", f"{theirs}.position_embeddings"),
    ]


def qformer(frequency: int) -> Table:
    """`Blip2QFormerModel` without text, as in `Blip2ForConditionalGeneration`."""
    rows = [*_norm("norm", "layernorm"), *_qformer_layers("attention", frequency, text=False)]
    return Table(tuple(rows))


def qformer_with_text(frequency: int) -> Table:
    """`Blip2QFormerModel` of `Blip2ForImageTextRetrieval`; the embeddings stand outside it."""
    rows = [*_norm("norm", "layernorm"), *_qformer_layers("attention", frequency, text=True)]
    return Table(tuple(rows))


def instruct_qformer(frequency: int) -> Table:
    """`InstructBlipQFormerModel`."""
    rows = [
        *_text_embeddings("embeddings"),
        *_norm("norm", "embeddings.layernorm"),
        *_qformer_layers("attention", frequency, text=True),
    ]
    return Table(tuple(rows), ignored=(r"embeddings\.position_ids",))


def lavis_qformer(frequency: int, text: bool) -> Table:
    """LAVIS's `Qformer.bert`."""
    rows = [
        *_norm("norm", "embeddings.LayerNorm"),
        *_qformer_layers("self", frequency, text),
    ]
    if text:
        rows += _text_embeddings("embeddings")
    return Table(tuple(rows), ignored=(r"embeddings\.position_ids",))


def bert_text(frequency: int) -> Table:
    """`BertModel`, for all that the Q-Former takes over from it."""
    kept = [
        row
        for row in lavis_qformer(frequency, text=True).rows
        if "crossattention" not in row.theirs and "_query" not in row.theirs
    ]
    ignored = (
        r"embeddings\.(token_type_embeddings\.weight|position_ids)",
        r"pooler\..*",
    )
    return Table(tuple(kept), ignored=ignored)


def lavis_itg_head() -> Table:
    """LAVIS's `Qformer.cls`, without its output matrix, which is the word embeddings'."""
    transform = "predictions.transform"
    rows = [
        *_linear("dense", f"{transform}.dense"),
        *_norm("norm", f"{transform}.LayerNorm"),
        Row("predictions.bias", ("bias",)),
    ]
    return Table(tuple(rows), {"predictions.decoder.bias": "predictions.bias"})


# --------------------------------------------------------------------------------- compositions


def _head(ours: str, theirs: str) -> Table:
    return Table(tuple(_linear(ours, theirs)))


_QUERIES = Table((Row("query_tokens", ("query_tokens",)),))


def blip2_hf(llm: Table, frequency: int) -> Table:
    """`Blip2ForConditionalGeneration`."""
    return join(
        eva().inside("vit/", "vision_model."),
        Table(tuple(_norm("ln_vision", "vision_model.post_layernorm"))),
        _QUERIES,
        qformer(frequency).inside("qformer/", "qformer."),
        _head("language_projection", "language_projection"),
        llm.inside("llm/", "language_model."),
    )


def instructblip_hf(llm: Table, frequency: int) -> Table:
    """`InstructBlipForConditionalGeneration`."""
    return join(
        eva().inside("vit/", "vision_model."),
        Table(tuple(_norm("ln_vision", "vision_model.post_layernorm"))),
        _QUERIES,
        instruct_qformer(frequency).inside("qformer/", "qformer."),
        _head("language_projection", "language_projection"),
        llm.inside("llm/", "language_model."),
    )


def retrieval_hf(frequency: int) -> Table:
    """`Blip2ForImageTextRetrieval`."""
    return join(
        eva().inside("vit/", "vision_model."),
        Table(tuple(_norm("ln_vision", "vision_model.post_layernorm"))),
        _QUERIES,
        Table(tuple(_text_embeddings("embeddings"))).inside("qformer/"),
        qformer_with_text(frequency).inside("qformer/", "qformer."),
        _head("vision_proj", "vision_projection"),
        _head("text_proj", "text_projection"),
        _head("itm_head", "itm_head"),
    )


# What `Blip2ForImageTextRetrieval` has no place for goes into a file of its own beside it.
RETRIEVAL_EXTRAS = join(
    Table((Row("temp", ("temp",)),)), lavis_itg_head().inside("itg_head/", "Qformer.cls.")
)


def lavis(vit: Table, frequency: int, *, text: bool, head: str) -> Table:
    """A LAVIS `.pth`.

    Args:
      vit: `lavis_eva()` or `lavis_clip()`.
      frequency: the Q-Former's cross-attention frequency.
      text: whether the Q-Former has its text branch.
      head: "opt", "t5" or "llm", whose projection a stage-2 model has; "" for stage 1.
    """
    parts = [
        vit.inside("vit/", "visual_encoder."),
        Table(tuple(_norm("ln_vision", "ln_vision"))),
        _QUERIES,
        lavis_qformer(frequency, text).inside("qformer/", "Qformer.bert."),
    ]
    if head:
        parts.append(_head("language_projection", f"{head}_proj"))
        # A file may hold the LLM too; here it comes from its own folder.
        parts.append(Table((), ignored=(rf"{head}_model\..*", r"Qformer\.cls\..*")))
        return join(*parts)
    embeddings = "Qformer.bert.embeddings.word_embeddings.weight"
    return join(
        *parts,
        *(_head(name, name) for name in ("vision_proj", "text_proj", "itm_head")),
        RETRIEVAL_EXTRAS,
        Table((), {"Qformer.cls.predictions.decoder.weight": embeddings}),
    )
