"""The train step of both stages beside the same step in PyTorch; see `benchmark.py train`.

PyTorch's step is written on transformers' modules, as its users would: AdamW (fused), the frozen
towers under `no_grad` and without gradients, scaled-dot-product attention, autocast on a GPU. ITG
takes one pass over queries and text there (transformers' Q-Former cannot go on from cached
queries), where LAVIS and this package read the queries of ITC's pass.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

STAGES = ("stage1", "stage2")
TEXT = 32  # tokens
# ViT-B and BERT-base on a CPU; ViT-g, BERT-base and OPT-2.7B on a GPU.
SIZES = {
    "cpu": {
        "vit": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072},
        "llm": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 3072},
        "qformer": {"num_layers": 12},
        "batch": {"stage1": 8, "stage2": 8},
        "dtype": "float32",
    },
    "gpu": {
        "vit": {"hidden_size": 1408, "num_layers": 39, "num_heads": 16, "mlp_dim": 6144},
        "llm": {"hidden_size": 2560, "num_layers": 32, "num_heads": 32, "ffn_dim": 10240},
        "qformer": {"num_layers": 12},
        "batch": {"stage1": 128, "stage2": 64},
        "dtype": "bfloat16",
    },
}


def make_batch(stage: str, size: int, vocabulary: int) -> dict:
    """Random images and full texts, so that no step is made shorter by padding."""
    import numpy as np

    rng = np.random.default_rng(0)
    ids = rng.integers(1000, vocabulary - 10, (size, TEXT)).astype(np.int32)
    images = rng.integers(0, 256, (size, 224, 224, 3)).astype(np.uint8)
    mask = np.ones_like(ids)
    if stage == "stage1":
        names = {"text_ids": ids, "text_mask": mask, "image_id": np.arange(size, dtype=np.int32)}
    else:
        names = {"llm_ids": ids, "llm_mask": mask, "llm_labels": ids}
    return {"image": images, **names}


def ours(stage: str, sizes: dict, batch_size: int):
    """A function that does one step, and the FLOPs of an example; through `recipe.build`."""
    import jax
    import jax.numpy as jnp
    from ml_collections import ConfigDict

    from blip2_jax import cli, recipe
    from blip2_jax.runtime import mesh as meshes
    from blip2_jax.stages.flops import flops_per_sample

    config = ConfigDict(cli.load_config("configs/default.py").to_dict())
    config.stage.name, config.dtype, config.frozen_dtype = stage, sizes["dtype"], sizes["dtype"]
    if stage == "stage2":
        config.trainable = ("ln_vision", "query_tokens", "qformer", "language_projection")
        config.model.llm.remat = "full" if sizes["dtype"] == "bfloat16" else "none"
    config.model.vit.update(sizes["vit"])
    config.model.llm.update(sizes["llm"])
    config.model.qformer.update(sizes["qformer"])
    config.data.batch_size = batch_size
    run = recipe.build(config, meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    vocabulary = run.model_config.qformer.vocab_size
    if stage == "stage2":
        vocabulary = run.model_config.llm.vocab_size

    def draw(abstract):
        leaves, tree = jax.tree.flatten(abstract)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        make = jax.jit(
            lambda key, like: (0.02 * jax.random.normal(key, like.shape)).astype(like.dtype),
            static_argnums=1,
        )
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        return tree.unflatten([make(k, x) for k, x in zip(keys, like, strict=True)])

    frozen = draw(run.abstract_frozen)
    batch = jax.tree.map(jnp.asarray, make_batch(stage, batch_size, vocabulary))
    held = {"state": run.init_state(jax.random.key(0))}
    key = jax.random.key(1)

    def step() -> float:
        held["state"], metrics = run.train_step(held["state"], frozen, batch, key)
        return float(metrics["loss"])

    flops = sum(part.total for part in flops_per_sample(config, run.model_config).values())
    return step, flops


def theirs(stage: str, sizes: dict, batch_size: int):
    """The same of PyTorch."""
    import torch
    import transformers

    device = "cuda" if sizes["dtype"] == "bfloat16" else "cpu"
    dtype = getattr(torch, sizes["dtype"])
    torch.manual_seed(0)
    vit, llm = sizes["vit"], sizes["llm"]
    vision = {
        "hidden_size": vit["hidden_size"],
        "intermediate_size": vit["mlp_dim"],
        "num_hidden_layers": vit["num_layers"],
        "num_attention_heads": vit["num_heads"],
        "image_size": 224,
        "patch_size": 14,
    }
    text = {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": llm["hidden_size"],
        "word_embed_proj_dim": llm["hidden_size"],
        "ffn_dim": llm["ffn_dim"],
        "num_hidden_layers": llm["num_layers"],
        "num_attention_heads": llm["num_heads"],
        "dropout": 0.0,
    }
    qformer = {
        "encoder_hidden_size": vit["hidden_size"],
        "vocab_size": 30523,
        "num_hidden_layers": sizes["qformer"]["num_layers"],
    }
    config = transformers.Blip2Config(
        vision_config=vision,
        qformer_config={**qformer, "use_qformer_text_input": stage == "stage1"},
        text_config=text,
        num_query_tokens=32,
        image_text_hidden_size=256,
        image_token_index=50271,
    )
    kind = (
        transformers.Blip2ForImageTextRetrieval
        if stage == "stage1"
        else transformers.Blip2ForConditionalGeneration
    )
    with torch.device(device):
        model = kind(config)
    frozen = [model.vision_model] + ([model.language_model] if stage == "stage2" else [])
    for tower in frozen:
        tower.requires_grad_(False).to(dtype)
    for parameter in model.vision_model.post_layernorm.parameters():  # BLIP-2's ln_vision
        parameter.requires_grad_(True)
    model.train()
    head = torch.nn.Sequential(
        torch.nn.Linear(768, 768), torch.nn.GELU(), torch.nn.LayerNorm(768, 1e-12)
    ).to(device)
    temperature = torch.nn.Parameter(torch.tensor(0.07, device=device))
    parameters = [p for p in model.parameters() if p.requires_grad]
    if stage == "stage1":
        parameters += [*head.parameters(), temperature]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.05, fused=True)
    vocabulary = 30523 if stage == "stage1" else 50272
    batch = {
        name: torch.tensor(x, device=device)
        for name, x in make_batch(stage, batch_size, vocabulary).items()
    }
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=device)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=device)

    def image_stream() -> torch.Tensor:
        pixels = ((batch["image"] / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)
        with torch.no_grad():
            out = model.vision_model(pixels, output_hidden_states=True)
        return model.vision_model.post_layernorm(out.hidden_states[-1])

    def stage1_loss() -> torch.Tensor:
        return torch_stage1(model, head, temperature, image_stream(), batch)

    def stage2_loss() -> torch.Tensor:
        image = image_stream()
        queries = model.query_tokens.expand(batch_size, -1, -1)
        seen = model.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        prompt = model.language_projection(seen)
        ids = batch["llm_ids"].long()
        words = model.get_input_embeddings()(ids)
        embeds = torch.cat([prompt.to(words.dtype), words], dim=1)
        labels = torch.cat([ids.new_full(prompt.shape[:2], -100), ids], dim=1)
        return model.language_model(inputs_embeds=embeds, labels=labels).loss

    loss_of = stage1_loss if stage == "stage1" else stage2_loss

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype, enabled=device == "cuda"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, 0.0


def torch_stage1(model, head, temperature, image, batch):
    """ITC, ITM and ITG on transformers' modules (as in tests/stages/test_parity.py, any batch)."""
    import torch
    from torch.nn import functional as F

    ids, mask = batch["text_ids"].long(), batch["text_mask"].long()
    size, length = ids.shape
    queries = model.query_tokens.expand(size, -1, -1)
    count = queries.shape[1]

    def qformer(embeds, query_length, mask=None, image=None):
        return model.qformer(
            query_embeds=embeds,
            query_length=query_length,
            attention_mask=mask,
            encoder_hidden_states=image,
        ).last_hidden_state

    image_features = F.normalize(
        model.vision_projection(qformer(queries, count, image=image)), dim=-1
    )
    alone = qformer(model.embeddings(input_ids=ids), 0, mask)[:, 0]
    text_features = F.normalize(model.text_projection(alone), dim=-1)
    scores = (
        torch.einsum("iqd,td->itq", image_features, text_features).max(dim=-1).values / temperature
    )
    right = torch.arange(size, device=ids.device)
    itc = sum(F.cross_entropy(s, right, label_smoothing=0.1) / 2 for s in (scores, scores.T))

    with torch.no_grad():
        own = torch.eye(size, dtype=torch.bool, device=ids.device)

        def chances(s):
            return torch.softmax(s.float().masked_fill(own, -1e4), dim=1)

        hard_text = torch.multinomial(chances(scores), 1)[:, 0]
        hard_image = torch.multinomial(chances(scores.T), 1)[:, 0]
    texts = torch.cat([ids, ids, ids[hard_text]])
    masks = torch.cat([mask, mask, mask[hard_text]])
    images = torch.cat([image, image[hard_image], image])
    embeds = model.embeddings(input_ids=texts, query_embeds=queries.repeat(3, 1, 1))
    whole = torch.cat([torch.ones_like(masks[:, :1]).expand(-1, count), masks], dim=1)
    logits = model.itm_head(qformer(embeds, count, whole, images)[:, :count]).mean(dim=1)
    itm = F.cross_entropy(logits, (torch.arange(3 * size, device=ids.device) < size).long())

    begun = ids.clone()
    begun[:, 0] = 30522
    allowed = torch.ones(count + length, count + length, device=ids.device).tril().bool()
    allowed[:count, :count] = True
    keys = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, count), mask], dim=1).bool()
    embeds = model.embeddings(input_ids=begun, query_embeds=queries)
    text = qformer(embeds, count, (allowed[None] & keys[:, None])[:, None], image)[:, count:]
    words = F.linear(head(text), model.embeddings.word_embeddings.weight)[:, :-1]
    itg = F.cross_entropy(words.flatten(0, 1), begun[:, 1:].flatten(), label_smoothing=0.1)
    return itc + itm + itg


MAKERS = {"blip2_jax": ours, "pytorch": theirs}


def measure(args: argparse.Namespace) -> None:
    """One side of one stage in this process; prints its figures as JSON."""
    sizes = SIZES[args.device]
    if args.layers:
        models = ("vit", "qformer", "llm")
        sizes = {**sizes, **{name: {**sizes[name], "num_layers": args.layers} for name in models}}
    size = args.batch_size or sizes["batch"][args.stage]
    step, flops = MAKERS[args.only](args.stage, sizes, size)
    losses = [step(), step()]  # compiled, allocated
    seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
    found = {"seconds": statistics.median(seconds), "batch": size, "flops": flops}
    if args.only == "blip2_jax":
        import jax

        found["kind"] = jax.devices()[0].device_kind
    assert all(loss == loss for loss in losses), losses
    print(json.dumps(found))


def train(args: argparse.Namespace) -> None:
    """Both stages on both sides, each in a process of its own, in turn."""
    from blip2_jax.planning import chips

    print(f"{'':<8}{'batch':>6}{'blip2_jax':>22}{'PyTorch':>22}{'ratio':>9}{'MFU':>8}")
    for stage in args.stages.split(","):
        found = {}
        for name in MAKERS:
            words = ["--stage", stage, "--only", name, "--steps", str(args.steps)]
            words += ["--device", args.device, "--batch_size", str(args.batch_size)]
            words += ["--layers", str(args.layers)]
            command = [sys.executable, sys.argv[0], "train", *words]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name] = json.loads(output.splitlines()[-1])
        mine, other = found["blip2_jax"], found["pytorch"]
        chip = chips.of_device_kind(mine["kind"])
        per_second = {name: f["batch"] / f["seconds"] for name, f in found.items()}
        mfu = per_second["blip2_jax"] * mine["flops"] / chip.peak_flops if chip else None
        print(
            f"{stage:<8}{mine['batch']:>6}"
            + "".join(f"{rate:>12.2f} samples/s" for rate in per_second.values())
            + f"{other['seconds'] / mine['seconds']:>7.2f} x"
            + (f"{mfu:>8.1%}" if mfu else f"{'-':>8}")
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=list(SIZES), default="cpu", help="gpu: full size")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, separated by commas")
    parser.add_argument("--batch_size", type=int, default=0, help="0: 8 (cpu), 128 and 64 (gpu)")
    parser.add_argument("--layers", type=int, default=0, help="of each model; 0: all it has")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=list(MAKERS), help=argparse.SUPPRESS)
    parser.set_defaults(run=lambda args: measure(args) if args.only else train(args))
