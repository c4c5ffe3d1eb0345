"""Losses and gradients of both stages equal a PyTorch computation on transformers' modules.

Stage 1 is written from the paper's section 3.2 and LAVIS's behavior, not from our code: ITG is one
pass over queries and text under the whole mask (ours continues from cached queries). Twice, two
pairs of the batch share an image, in two crops. Negatives are the most similar ones that are
allowed, in place of drawn ones, so that both sides must choose them from the right similarities.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import FrozenConfigDict
from safetensors.torch import save_file
from torch.nn import functional as F

from blip2_jax.models.blip2 import make_model
from blip2_jax.models.vit import normalize_images
from blip2_jax.runtime import mesh as meshes
from blip2_jax.stages import losses, stage1, stage2
from blip2_jax.stages.step import Spec
from blip2_jax.weights import checkpoint, files, huggingface, transfer
from tests.weights import models

pytestmark = pytest.mark.integration

QUERIES, BOS, PAD = 5, 60, 0
LENGTHS = np.array([[8], [6], [4], [7], [5]])
IMAGE_ID = np.array([0, 1, 0, 1, 4])
B = len(IMAGE_ID)
TRAINED = ("ln_vision", "query_tokens", "qformer", "vision_proj", "text_proj", "itm_head")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """transformers' model, our parameters, the heads it lacks, and a batch."""
    folder = tmp_path_factory.mktemp("retrieval")
    theirs = models.retrieval()
    theirs.save_pretrained(folder)
    opened = checkpoint.open_checkpoint(str(folder))
    params = opened.load(opened.abstract())
    whole = checkpoint.abstract_params(opened.config)
    rng = np.random.default_rng(0)

    def draw(x):
        return (0.2 * rng.normal(size=x.shape)).astype(np.float32)

    params["itg_head"] = jax.tree.map(draw, whole["itg_head"])
    params["temp"] = np.float32(0.2)
    mask = (np.arange(8) < LENGTHS).astype(np.int32)
    batch = {
        "image": rng.integers(0, 256, (B, 28, 28, 3)).astype(np.uint8),
        "text_ids": np.where(mask, rng.integers(3, BOS, (B, 8)), PAD).astype(np.int32),
        "text_mask": mask,
        "image_id": IMAGE_ID.astype(np.int32),
    }
    return theirs, opened.config, params, batch


def torch_losses(theirs, head, temperature, batch):
    """ITC, ITM and ITG in PyTorch, and what is logged beside them."""
    ids, mask = torch.tensor(batch["text_ids"]).long(), torch.tensor(batch["text_mask"]).long()
    pixels = torch.tensor(np.array(normalize_images(batch["image"]))).permute(0, 3, 1, 2)
    with torch.no_grad():  # the encoder is frozen; the norm after it is not
        stream = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
    image = theirs.vision_model.post_layernorm(stream)
    queries = theirs.query_tokens.expand(B, -1, -1)

    def qformer(embeds, count, mask=None, image=None):
        return theirs.qformer(
            query_embeds=embeds,
            query_length=count,
            attention_mask=mask,
            encoder_hidden_states=image,
        ).last_hidden_state

    # Contrast: the best of an image's queries against the text's first token, labels smoothed.
    seen = qformer(queries, QUERIES, image=image)
    looks = F.normalize(theirs.vision_projection(seen), dim=-1)
    alone = qformer(theirs.embeddings(input_ids=ids), 0, mask)[:, 0]
    text_features = F.normalize(theirs.text_projection(alone), dim=-1)
    similarity = torch.einsum("iqd,td->itq", looks, text_features).max(dim=-1).values / temperature
    same = torch.tensor(IMAGE_ID[:, None] == IMAGE_ID)
    targets = 0.9 * same / same.sum(dim=1, keepdim=True) + 0.1 / B
    itc = sum(F.cross_entropy(scores, targets) / 2 for scores in (similarity, similarity.T))

    # Matching: each text with its image and with another image; each image with another text.
    allowed = similarity.detach().masked_fill(same, -10000)
    other_text = allowed.argmax(dim=1)  # of each image, the text most like it
    other_image = allowed.argmax(dim=0)  # of each text, the image most like it
    assert (other_text != other_image).any()
    strangers = similarity.detach().masked_fill(torch.eye(B).bool(), -10000)
    for scores, other in ((strangers, other_text), (strangers.T, other_image)):
        assert (scores.argmax(dim=1) != other).any()  # but for its id, it would be a negative
    texts, masks = torch.cat([ids, ids, ids[other_text]]), torch.cat([mask, mask, mask[other_text]])
    images = torch.cat([image, image[other_image], image])
    embeds = theirs.embeddings(input_ids=texts, query_embeds=queries.repeat(3, 1, 1))
    whole = torch.cat([torch.ones(3 * B, QUERIES, dtype=torch.long), masks], dim=1)
    pairs = qformer(embeds, QUERIES, whole, images)[:, :QUERIES]
    logits = theirs.itm_head(pairs).mean(dim=1)
    belong = torch.tensor([1] * B + [0] * 2 * B)
    itm = F.cross_entropy(logits, belong)

    # Generation: [DEC] first; queries see queries, text sees queries and the text before it.
    begun = ids.clone()
    begun[:, 0] = BOS
    length = ids.shape[1]
    allowed = torch.ones(QUERIES + length, QUERIES + length).tril().bool()
    allowed[:QUERIES, :QUERIES] = True
    keys = torch.cat([torch.ones(B, QUERIES, dtype=torch.long), mask], dim=1).bool()
    allowed = (allowed[None] & keys[:, None])[:, None]
    embeds = theirs.embeddings(input_ids=begun, query_embeds=queries)
    text = qformer(embeds, QUERIES, allowed, image)[:, QUERIES:]
    x = F.gelu(F.linear(text, head["dense"]["kernel"].T, head["dense"]["bias"]))
    x = F.layer_norm(x, x.shape[-1:], head["norm"]["scale"], head["norm"]["bias"], 1e-12)
    embeddings = theirs.embeddings.word_embeddings.weight
    scores = F.linear(x, embeddings, head["bias"])[:, :-1]
    targets = begun.masked_fill(mask == 0, -100)[:, 1:]
    flat = scores.reshape(-1, scores.shape[-1]), targets.reshape(-1)
    itg = F.cross_entropy(*flat, label_smoothing=0.1)

    nearest = [scores.argmax(dim=1, keepdim=True) for scores in (similarity, similarity.T)]
    metrics = {
        "itc/accuracy": sum(same.gather(1, best).float().mean() / 2 for best in nearest),
        "itm/accuracy": (logits.argmax(dim=1) == belong).float().mean(),
        "itg/perplexity": F.cross_entropy(*flat).exp(),
    }
    return {"itc/loss": itc, "itm/loss": itm, "itg/loss": itg}, metrics


def test_losses_and_gradients_equal_pytorch(both, tmp_path, monkeypatch):
    def hardest(key, scores, same):
        return jnp.where(same, -10000, scores).argmax(axis=1)

    monkeypatch.setattr(losses, "hard_negatives", hardest)
    theirs, config, params, batch = both

    def leaf(x):
        return torch.tensor(np.asarray(x), requires_grad=True)

    head = jax.tree.map(leaf, params["itg_head"])
    temperature = leaf(params["temp"])
    theirs.zero_grad()
    want, logged = torch_losses(theirs, head, temperature, batch)
    sum(want.values()).backward()

    graph = nnx.graphdef(nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0))))
    options = FrozenConfigDict(
        {
            "objectives": stage1.OBJECTIVES,
            "label_smoothing": 0.1,
            "itc_gather_grad": True,
            "use_image_ids": True,
            "accumulate": 1,
        }
    )
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    spec = Spec(graph, None, None, options, mesh)
    frozen = {"vit": params["vit"]}
    trained = {name: part for name, part in params.items() if name != "vit"}
    arrays = jax.tree.map(jnp.asarray, batch)
    gradient = jax.jit(jax.grad(functools.partial(stage1.loss_fn, spec=spec), has_aux=True))
    got, metrics = gradient(trained, frozen, arrays, None)
    for name, loss in want.items():
        np.testing.assert_allclose(metrics[name], loss.item(), atol=1e-5, err_msg=name)
    for name, value in logged.items():
        np.testing.assert_allclose(metrics[name], value.item(), rtol=1e-5, err_msg=name)

    # The gradients travel through the name table as the weights do.
    grads = {n: p.grad.contiguous() for n, p in theirs.named_parameters() if p.grad is not None}
    save_file(grads, tmp_path / "model.safetensors")
    table = huggingface.blip2_table(config)
    rows = tuple(row for row in table.rows if row.ours[0] and row.ours[0].split("/")[0] in TRAINED)
    table = type(table)(rows, {}, (r"vision_model\..*",))
    abstract = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), got[name])
        for name in TRAINED
    }
    grads = transfer.load(table, abstract, files.open_folder(tmp_path))

    def as_numpy(x):
        return x.grad.numpy()

    grads |= {"itg_head": jax.tree.map(as_numpy, head), "temp": temperature.grad.numpy()}
    ours = transfer.leaves_of(jax.device_get(got))
    theirs_by_path = transfer.leaves_of(jax.device_get(grads))
    assert ours.keys() == theirs_by_path.keys()
    for path, expected in theirs_by_path.items():
        if path.endswith("k_proj/bias"):  # a bias of keys changes no softmax
            assert np.abs(expected).max() < 1e-6 and np.abs(ours[path]).max() < 1e-6, path
            continue
        scale = float(np.abs(expected).max())
        assert scale > 1e-5, path  # it is trained
        np.testing.assert_allclose(ours[path], expected, rtol=0, atol=1e-5 * scale, err_msg=path)


PROMPTS = np.array([3, 2, 4])  # tokens of each row
ANSWERS = np.array([3, 5, 1])


def decoder_only_batch(rng, with_prompt: bool) -> dict[str, np.ndarray]:
    """Prompt and answer in one row, padding behind; what is to be learned is the answer."""
    start = PROMPTS * with_prompt
    at = np.arange(10)
    mask = at < (start + ANSWERS)[:, None]
    ids = np.where(mask, rng.integers(3, 60, (3, 10)), 0)
    labels = np.where(mask & (at >= start[:, None]), ids, -100)
    return {"llm_ids": ids, "llm_mask": mask, "llm_labels": labels}


def encoder_decoder_batch(rng, with_prompt: bool) -> dict[str, np.ndarray]:
    """The prompt, or the first part of the text, to the encoder; the rest to the decoder."""
    mask = np.arange(5) < (PROMPTS if with_prompt else PROMPTS - 1)[:, None]
    ends = np.arange(6) < ANSWERS[:, None]
    return {
        "llm_ids": np.where(mask, rng.integers(3, 60, (3, 5)), 0),
        "llm_mask": mask,
        "llm_labels": np.where(ends, rng.integers(3, 60, (3, 6)), -100),
    }


@pytest.mark.parametrize("with_prompt", [False, True], ids=["caption", "prompt"])
@pytest.mark.parametrize("family", models.TEXT)
def test_stage_2_equals_transformers(family, with_prompt, tmp_path):
    """The loss of rows of unequal length, and the gradient that comes out of the frozen LLM."""
    theirs = models.generation(family)
    theirs.save_pretrained(tmp_path)
    opened = checkpoint.open_checkpoint(str(tmp_path))
    params = opened.load(opened.abstract())
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_model(opened.config, rngs=nnx.Rngs(0))))
    spec = Spec(graph, None, None, FrozenConfigDict({"accumulate": 1}), None)
    make = encoder_decoder_batch if family == "t5" else decoder_only_batch
    rng = np.random.default_rng(0)
    batch = {name: x.astype(np.int32) for name, x in make(rng, with_prompt).items()}
    batch["image"] = rng.integers(0, 256, (3, 28, 28, 3)).astype(np.uint8)

    image = torch.full((3, QUERIES), 69)  # where transformers puts the queries
    seen = torch.cat([torch.ones_like(image), torch.tensor(batch["llm_mask"])], dim=1).long()
    ids = torch.cat([image, torch.tensor(batch["llm_ids"])], dim=1).long()
    pixels = torch.tensor(np.array(normalize_images(batch["image"]))).permute(0, 3, 1, 2)
    before = 0 if family == "t5" else QUERIES  # positions in front of the labels

    def ask():
        labels = np.pad(batch["llm_labels"], ((0, 0), (before, 0)), constant_values=-100)
        inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": seen}
        return theirs(**inputs, labels=torch.tensor(labels).long())

    # Two rows end in the likeliest token, so that some tokens are hit.
    predicted = ask().logits.argmax(dim=-1).numpy()
    predicted = predicted[:, before - 1 : -1] if before else predicted
    for row in (0, 1):
        last = np.flatnonzero(batch["llm_labels"][row] >= 0)[-1]
        batch["llm_labels"][row, last] = predicted[row, last]
    want, learned = ask().loss, batch["llm_labels"] >= 0

    frozen = {name: params.pop(name) for name in ("vit", "llm")}
    gradient = jax.jit(
        jax.value_and_grad(functools.partial(stage2.loss_fn, spec=spec), has_aux=True)
    )
    (loss, metrics), got = gradient(params, frozen, batch, None)
    want.backward()
    np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
    assert metrics["tokens"] == learned.sum()
    hits = (predicted == batch["llm_labels"])[learned].mean()
    assert 2 / learned.sum() <= hits < 1
    np.testing.assert_allclose(metrics["lm/token_accuracy"], hits, rtol=1e-6)
    np.testing.assert_allclose(metrics["lm/perplexity"], np.exp(want.item()), rtol=1e-5)
    for ours, expected in (
        (got["query_tokens"], theirs.query_tokens.grad),
        (got["language_projection"]["kernel"], theirs.language_projection.weight.grad.T),
        (got["language_projection"]["bias"], theirs.language_projection.bias.grad),
    ):
        scale = float(expected.abs().max())
        assert scale > 1e-5
        np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-5 * scale)
