"""Weights go in and out of every format without losing a bit, and bad files are said to be bad."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.weights import checkpoint, huggingface, lavis, transfer
from blip2_jax.weights.files import WeightsError, open_folder
from tests.weights import models


@pytest.fixture(scope="module", params=models.FORMS)
def published(request, tmp_path_factory):
    """(form, transformers' model, its folder)."""
    theirs = models.FORMS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return request.param, theirs, folder


@pytest.fixture(scope="module")
def opt_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    models.generation("opt").save_pretrained(folder)
    return folder


def read(source, **beside):
    opened = checkpoint.open_checkpoint(str(source), **{k: str(v) for k, v in beside.items()})
    return opened, opened.load(opened.abstract())


def assert_same_files(one, other):
    a, b = open_folder(one), open_folder(other)
    assert a.shapes.keys() == b.shapes.keys()
    for name in a.shapes:
        assert a.dtypes[name] == b.dtypes[name]
        np.testing.assert_array_equal(a.read(name), b.read(name), err_msg=name)


def test_hugging_face_round_trip_is_bit_identical_and_loads(published, tmp_path):
    _, theirs, folder = published
    opened, params = read(folder)
    huggingface.save_blip2(tmp_path / "out", opened.config, params, companions=folder)
    assert_same_files(folder, tmp_path / "out")
    back, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    for (name, want), got in zip(theirs.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(want, got), name


def test_native_round_trip_is_bit_identical(published, tmp_path):
    _, _, folder = published
    opened, params = read(folder)
    checkpoint.save_native(tmp_path / "native", opened.config, params, companions=folder)
    native, back = read(tmp_path / "native")
    assert native.config == opened.config
    jax.tree.map(np.testing.assert_array_equal, params, back)


def test_through_lavis_and_back_is_bit_identical(published, tmp_path):
    """HF -> native -> LAVIS -> native -> HF."""
    form, _, folder = published
    opened, params = read(folder)
    lavis.save(tmp_path / "model.pth", opened.config, params, with_vit=True)
    beside = {} if form == "retrieval" else {"llm": folder}
    back, back_params = read(tmp_path / "model.pth", vit=folder, **beside)
    jax.tree.map(np.testing.assert_array_equal, params, back_params)
    huggingface.save_blip2(tmp_path / "out", back.config, back_params, companions=folder)
    assert_same_files(folder, tmp_path / "out")


def test_an_official_lavis_file_has_no_towers(published, tmp_path):
    form, _, folder = published
    opened, params = read(folder)
    lavis.save(tmp_path / "model.pth", opened.config, params, with_vit=False)
    names = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert not [n for n in names if n.startswith(("visual_encoder", "opt_model", "t5_model"))]
    beside = {} if form == "retrieval" else {"llm": folder}
    _, back = read(tmp_path / "model.pth", vit=folder, **beside)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    with pytest.raises(WeightsError, match="[-][-]vit"):  # asked for first
        read(tmp_path / "model.pth", **beside)
    if beside:
        with pytest.raises(WeightsError, match="[-][-]llm"):
            read(tmp_path / "model.pth", vit=folder)


def test_stage1_heads_survive_hugging_face(tmp_path):
    """The temperature and the ITG head, which transformers' classes have no place for."""
    theirs = models.retrieval()
    theirs.save_pretrained(tmp_path / "hf")
    opened, params = read(tmp_path / "hf")
    whole = checkpoint.abstract_params(opened.config)
    rng = np.random.default_rng(0)
    extra = {key: whole[key] for key in ("temp", "itg_head")}
    extra = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), extra)
    params = {**params, **extra}
    lavis.save(tmp_path / "one.pth", opened.config, params, with_vit=True)
    file, from_lavis = read(tmp_path / "one.pth", vit=tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, params, from_lavis)
    huggingface.save_blip2(tmp_path / "out", file.config, from_lavis)
    _, from_hf = read(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, from_hf)
    _, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


def test_lavis_round_trip_is_bit_identical(tmp_path):
    """LAVIS -> native -> LAVIS, with the buffers and tied copies that LAVIS's files hold."""
    models.retrieval().save_pretrained(tmp_path / "hf")
    opened, params = read(tmp_path / "hf")
    whole = checkpoint.abstract_params(opened.config)
    rng = np.random.default_rng(1)

    def fresh(x):
        return rng.normal(size=x.shape).astype(np.float32)

    params |= jax.tree.map(fresh, {key: whole[key] for key in ("temp", "itg_head")})
    lavis.save(tmp_path / "first.pth", opened.config, params, with_vit=True)
    state = torch.load(tmp_path / "first.pth", weights_only=True)["model"]
    words = "Qformer.bert.embeddings.word_embeddings.weight"
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(20)[None]
    state["Qformer.cls.predictions.decoder.weight"] = state[words]
    state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]
    torch.save({"model": state, "epoch": 3}, tmp_path / "theirs.pth")
    file, back = read(tmp_path / "theirs.pth", vit=tmp_path / "hf")
    checkpoint.save_native(tmp_path / "native", file.config, back)
    native, back = read(tmp_path / "native")
    lavis.save(tmp_path / "second.pth", native.config, back, with_vit=True)
    again = torch.load(tmp_path / "second.pth", weights_only=True)["model"]
    for name, tensor in again.items():
        assert torch.equal(tensor, state.pop(name)), name
    assert all("position_ids" in n or "predictions.decoder" in n for n in state)


def test_both_generations_of_tied_tensors_are_read(opt_folder, tmp_path):
    """Older files repeat the embeddings as `lm_head.weight`; a repetition that differs is wrong."""
    shutil.copytree(opt_folder, tmp_path / "old")
    tensors = load_file(opt_folder / "model.safetensors")
    words = tensors["language_model.model.decoder.embed_tokens.weight"]
    for head in (words, words + 1):
        old = {**tensors, "language_model.lm_head.weight": head}
        save_file(old, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
        if head is words:
            jax.tree.map(
                np.testing.assert_array_equal, read(tmp_path / "old")[1], read(opt_folder)[1]
            )
        else:
            with pytest.raises(WeightsError, match="lm_head.weight .* differ"):
                read(tmp_path / "old")


def test_torch_bin_and_shards_hold_the_same(opt_folder, tmp_path):
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(opt_folder)
    want = read(opt_folder)[1]
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, want, read(tmp_path / "shards")[1])
    (tmp_path / "bin").mkdir()
    shutil.copy(opt_folder / "config.json", tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin/pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, want, read(tmp_path / "bin")[1])


def test_without_torch_its_files_are_refused_with_the_remedy(opt_folder, tmp_path, monkeypatch):
    opened, params = read(opt_folder)
    (tmp_path / "there.pth").touch()
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(WeightsError, match=r"new.pth is a torch file.*'blip2_jax\[convert\]'"):
        lavis.save(tmp_path / "new.pth", opened.config, params, with_vit=True)
    with pytest.raises(WeightsError, match=r"there.pth is a torch file.*'blip2_jax\[convert\]'"):
        checkpoint.open_checkpoint(str(tmp_path / "there.pth"))


def test_shards_are_written_with_an_index(opt_folder, tmp_path):
    opened, params = read(opt_folder)
    table = huggingface.blip2_table(opened.config)
    from blip2_jax.weights import files

    files.write_shards(tmp_path, transfer.tensors_of(table, params), shard_bytes=200_000)
    shutil.copy(opt_folder / "config.json", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, info = transformers.Blip2ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    jax.tree.map(np.testing.assert_array_equal, params, read(tmp_path)[1])


def test_weights_load_sharded_and_in_another_dtype(opt_folder):
    """Each of eight devices holds its part; the values are an unsharded load's, and PyTorch's."""
    from blip2_jax.models import blip2
    from blip2_jax.runtime import mesh as meshes

    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    opened = checkpoint.open_checkpoint(str(opt_folder))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jax.numpy.bfloat16), opened.abstract()
    )
    shardings = meshes.shardings(abstract, blip2.AXES, rules, mesh)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    loaded = opened.load(placed)
    jax.tree.map(
        lambda x, s: pytest.fail("misplaced") if x.sharding != s else None, loaded, shardings
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, opened.load(abstract))

    def rounded(x):
        return torch.tensor(np.asarray(x)).to(torch.bfloat16).float().numpy()

    jax.tree.map(
        lambda x, exact: np.testing.assert_array_equal(np.asarray(x, np.float32), rounded(exact)),
        loaded,
        opened.load(opened.abstract()),
    )


# -------------------------------------------------------------------------------- bad input


def test_a_truncated_file_is_named(opt_folder, tmp_path):
    shutil.copytree(opt_folder, tmp_path / "cut")
    path = tmp_path / "cut/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="model.safetensors is damaged"):
        read(tmp_path / "cut")


def test_an_index_that_names_a_missing_file_or_tensor(opt_folder, tmp_path):
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(opt_folder)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    files = sorted(set(document["weight_map"].values()))
    name = next(iter(document["weight_map"]))
    wrong = next(f for f in files if f != document["weight_map"][name])
    index.write_text(
        json.dumps({**document, "weight_map": {**document["weight_map"], name: wrong}})
    )
    with pytest.raises(WeightsError, match=f"{wrong} holds no tensor {name}"):
        read(tmp_path)
    (tmp_path / files[0]).unlink()
    with pytest.raises(WeightsError, match=f"not there: .*{files[0]}"):
        read(tmp_path)


def test_wrong_missing_and_unknown_tensors_are_reported_together(opt_folder, tmp_path):
    shutil.copytree(opt_folder, tmp_path / "odd")
    tensors = load_file(opt_folder / "model.safetensors")
    tensors["query_tokens"] = tensors["query_tokens"][:, :4]
    del tensors["language_projection.bias"]
    tensors["vision_model.head.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "odd/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as error:
        read(tmp_path / "odd")
    message = str(error.value)
    assert "query_tokens is [1, 4, 128], the model needs [1, 5, 128]" in message
    assert "no tensor language_projection.bias" in message
    assert "tensor vision_model.head.weight: the model has no parameter for it" in message


def test_an_unknown_architecture_is_named(opt_folder, tmp_path):
    document = json.loads((opt_folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "blip"}, "model_type 'blip'"),
        ({"architectures": ["Blip2ForSegmentation"]}, "architecture 'Blip2ForSegmentation'"),
        ({"text_config": {"model_type": "mamba"}}, "model_type 'mamba'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(WeightsError, match=message):
            read(tmp_path)


def test_a_pickle_is_never_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "harmed"), "w")

    torch.save({"model": {"query_tokens": Harm()}}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"bad\.pth cannot be read as plain tensors"):
        read(tmp_path / "bad.pth")
    assert not (tmp_path / "harmed").exists()


def test_a_full_disk_is_refused_before_and_survived_during(opt_folder, tmp_path, monkeypatch):
    opened, params = read(opt_folder)
    from blip2_jax.weights import files

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(WeightsError, match="needs .* GB, the disk has 0.00 GB free"):
            huggingface.save_blip2(tmp_path / "out", opened.config, params)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(WeightsError, match="could not be written.*No space left"):
        huggingface.save_blip2(tmp_path / "out", opened.config, params)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------- what belongs to a model


def test_a_clip_encoder_goes_through_lavis(tmp_path):
    """ViT-L's names, with q, k and v fused; transformers' BLIP-2 has no place for it."""
    encoder = dataclasses.replace(
        lavis.CLIP_L, image_size=28, hidden_size=64, num_layers=2, num_heads=16, mlp_dim=96
    )
    qformer = QFormerConfig(5, 64, 2, 1, 96, 2, 64, 61, 60, 20)
    config = Blip2Config(vit=encoder, qformer=qformer, projection_dim=24)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), checkpoint.abstract_params(config)
    )
    lavis.save(tmp_path / "whole.pth", config, params, with_vit=True)
    opened, back = read(tmp_path / "whole.pth")
    assert opened.config == config
    jax.tree.map(np.testing.assert_array_equal, params, back)
    tensors = torch.load(tmp_path / "whole.pth", weights_only=True)["model"]
    # The encoder alone, with the last block that BLIP-2 leaves out.
    alone = {
        n.removeprefix("visual_encoder."): t for n, t in tensors.items() if "visual_encoder." in n
    }
    torch.save(alone, tmp_path / "clip_vit_L.pth")
    lavis.save(tmp_path / "trained.pth", config, params, with_vit=False)
    _, back = read(tmp_path / "trained.pth", vit=tmp_path / "clip_vit_L.pth")
    jax.tree.map(np.testing.assert_array_equal, params, back)
    with pytest.raises(WeightsError, match="no CLIP image encoder"):
        huggingface.save_blip2(tmp_path / "hf", config, params)


def test_processor_and_tokenizer_go_along(opt_folder, tmp_path):
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    from blip2_jax.data import tokenizers

    shutil.copytree(opt_folder, tmp_path / "hf")
    processor = transformers.Blip2Processor(
        BlipImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizers.load("package:digits-opt"),
        num_query_tokens=5,
    )
    processor.save_pretrained(tmp_path / "hf")
    opened, params = read(tmp_path / "hf")
    checkpoint.save_native(tmp_path / "native", opened.config, params, companions=opened.companions)
    native, params = read(tmp_path / "native")
    huggingface.save_blip2(tmp_path / "out", native.config, params, companions=native.companions)
    back = transformers.Blip2Processor.from_pretrained(tmp_path / "out")
    assert back.num_query_tokens == 5
    assert back.tokenizer("a red 3")["input_ids"] == processor.tokenizer("a red 3")["input_ids"]


def test_a_processor_is_made_for_a_lavis_file(opt_folder, tmp_path):
    """And the language model gets a row for `<image>`, which its tokenizer did not have."""
    from blip2_jax.data import tokenizers
    from blip2_jax.models.opt import OPTConfig

    llm = OPTConfig(202, 160, 2, 2, 48, 60)
    opened, params = read(opt_folder)
    lavis.save(tmp_path / "model.pth", opened.config, params, with_vit=True)
    rng = np.random.default_rng(0)
    config = dataclasses.replace(opened.config, llm=llm)
    abstract = checkpoint.abstract_params(config)["llm"]
    tower = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract)
    huggingface.save(tmp_path / "opt", llm, tower)
    tokenizers.load("package:digits-opt").save_pretrained(tmp_path / "opt")
    back, params = read(tmp_path / "model.pth", vit=opt_folder, llm=tmp_path / "opt")
    huggingface.save_blip2(tmp_path / "out", back.config, params, companions=back.companions)
    model, info = transformers.Blip2ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    processor = transformers.Blip2Processor.from_pretrained(tmp_path / "out")
    assert model.config.image_token_index == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.get_input_embeddings().num_embeddings == 256  # 202 and <image>, to the next 64
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    inputs = processor(images=picture, text="a red 3", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 5 + 4, 256)


def test_a_llama_of_a_lavis_file_has_lavis_special_tokens(tmp_path):
    """Loaded or converted: texts begin with </s>, whatever the tokenizer's own folder says."""
    import tests.data.made as made
    from blip2_jax import convert, pretrained
    from blip2_jax.data import tokenizers

    models.instruct("llama", vocab_size=190).save_pretrained(tmp_path / "hf")
    opened, params = read(tmp_path / "hf")
    lavis.save(tmp_path / "model.pth", opened.config, params, with_vit=True)
    huggingface.save(tmp_path / "vicuna", opened.config.llm, params["llm"])
    made.llama_tokenizer("prepend").save_pretrained(tmp_path / "vicuna")
    folders = {"vit": str(tmp_path / "hf"), "llm": str(tmp_path / "vicuna")}
    opened = checkpoint.open_checkpoint(str(tmp_path / "model.pth"), **folders)
    bert = "package:digits-bert"
    loaded = pretrained._tokenizers(opened, folders["llm"], bert, "")["llm_tokenizer"]
    options = [f"--{name}={folder}" for name, folder in folders.items()]
    native = str(tmp_path / "native")
    assert convert.main([str(tmp_path / "model.pth"), native, "--to=native", *options]) == 0
    own = tokenizers.load(folders["llm"])
    for tokenizer in (loaded, tokenizers.load(native)):
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("</s>",) * 3
        assert tokenizer("blue 7")["input_ids"] == [2, *own("blue 7")["input_ids"][1:]]


def test_the_command_converts_and_says_what_went_where(opt_folder, tmp_path, capsys):
    from blip2_jax import convert

    arguments = [str(opt_folder), str(tmp_path / "native"), "--to=native"]
    assert convert.main([*arguments, "--dry_run"]) == 0
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert "qformer/groups" in shown and "84 tensors" in shown
    assert convert.main([*arguments, "--dtype=bfloat16"]) == 0
    _, params = read(tmp_path / "native")
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    with pytest.raises(SystemExit, match=r"No config\.json"):
        convert.main([str(tmp_path / "nowhere"), str(tmp_path / "x"), "--to=native"])


def test_training_starts_from_a_published_checkpoint(opt_folder):
    """What both have is taken, in the model's own dtype; the rest is reported as fresh."""
    opened, params = read(opt_folder)
    ours = {k: v for k, v in params.items() if k in ("query_tokens", "qformer", "ln_vision")}
    ours = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), ours)
    ours["itm_head"] = {"bias": jax.numpy.zeros(2)}
    got, taken, fresh = opened.load_into(ours)
    assert fresh == ["itm_head/bias"] and taken == len(jax.tree.leaves(ours)) - 1
    jax.tree.map(np.testing.assert_array_equal, got["qformer"], params["qformer"])


# ------------------------------------------------------------------ what people have on their disks


@pytest.mark.parametrize(
    "wrap",
    [
        lambda n: f"_orig_mod.{n}",
        lambda n: f"module.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: f"base_model.model.{n}",
        lambda n: n.replace("language_model.model", "language_model._orig_mod.model"),
    ],
)
def test_names_that_trainers_put_in_front_are_left_out_and_said(wrap, opt_folder, tmp_path, caplog):
    shutil.copy(opt_folder / "config.json", tmp_path)
    tensors = load_file(opt_folder / "model.safetensors")
    wrapped = {wrap(name): tensor for name, tensor in tensors.items()}
    save_file(wrapped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path)[1], read(opt_folder)[1])
    assert "read without" in caplog.text
    torch.save({"model": {k: torch.tensor(v) for k, v in wrapped.items()}}, tmp_path / "x.pth")
    assert set(lavis.open_file(str(tmp_path / "x.pth")).shapes) == set(tensors)


def test_adapters_that_are_not_merged_are_named(opt_folder, tmp_path):
    shutil.copy(opt_folder / "config.json", tmp_path)
    tensors = load_file(opt_folder / "model.safetensors")
    tensors["language_model.model.decoder.layers.0.fc1.lora_A.default.weight"] = np.zeros((2, 2))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"low-rank adapters .*merge_and_unload"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("adapter_config.json", '{"base_model_name_or_path": "a/b"}', "a PEFT adapter of a/b"),
        ("model_index.json", "{}", "a pipeline of diffusers"),
        ("model.Q4.gguf", "", "GGUF files are quantized"),
        ("zero_to_fp32.py", "", "DeepSpeed"),
        ("pytorch_model.bin", "", "weights but no config.json"),
        ("snapshots/0a1b/config.json", "{}", r"the model is in .*snapshots/0a1b"),
    ],
)
def test_a_folder_that_is_no_model_is_called_what_it_is(file, text, message, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(WeightsError, match=f"No config.json in .*{message}"):
        checkpoint.open_checkpoint(str(tmp_path))


def test_a_pointer_of_git_lfs_is_called_one(opt_folder, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name in ("model.safetensors", "pytorch_model.bin", "config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        shutil.copy(opt_folder / "config.json", folder)
        (folder / name).write_text(pointer)
        with pytest.raises(WeightsError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            read(folder)
    (tmp_path / "x.pth").write_text(pointer)
    with pytest.raises(WeightsError, match="Git LFS pointer"):
        checkpoint.open_checkpoint(str(tmp_path / "x.pth"))


def test_quantized_tensors_are_refused_in_either_kind_of_file(opt_folder, tmp_path):
    shutil.copy(opt_folder / "config.json", tmp_path)
    tensors = load_file(opt_folder / "model.safetensors")
    name = "language_model.model.decoder.layers.0.fc1.weight"
    eight = {**tensors, name: tensors[name].astype(np.int8)}  # without scales
    save_file(eight, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"fc1.weight is int8; quantized weights are not read"):
        read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {key: torch.tensor(value) for key, value in tensors.items()}
    state[name] = state[name].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"fc1.weight .* of type float8_e4m3fn; known: "):
        read(tmp_path)


def test_what_lacks_in_every_layer_is_one_line_a_kind(opt_folder, tmp_path):
    shutil.copy(opt_folder / "config.json", tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document["text_config"]["num_hidden_layers"] = 34
    (tmp_path / "config.json").write_text(json.dumps(document))
    shutil.copy(opt_folder / "model.safetensors", tmp_path)
    with pytest.raises(WeightsError) as error:
        read(tmp_path)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 16
    assert any(
        line.endswith("no tensor language_model.model.decoder.layers.*.fc1.weight (32 tensors)")
        for line in lines
    )


def test_an_image_encoder_saved_alone_is_one(tmp_path):
    """`Blip2VisionModel`, with the last norm that is `ln_vision` inside BLIP-2."""
    theirs = models.randomize(
        transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**models.VISION))
    )
    theirs.save_pretrained(tmp_path)
    sizes = huggingface.vit_config(str(tmp_path))
    abstract = checkpoint.abstract_params(Blip2Config(vit=sizes))["vit"]
    params = huggingface.load(str(tmp_path), sizes, abstract)
    want = theirs.embeddings.position_embedding.detach().numpy()
    np.testing.assert_array_equal(params["pos_embed"], want)


# -------------------------------------------------------------------------------- destinations


def convert(*words):
    from blip2_jax import convert

    return convert.main([str(word) for word in words])


def test_conversion_replaces_what_it_wrote_when_asked_and_nothing_else(opt_folder, tmp_path):
    for to, name in (("huggingface", "hf"), ("native", "native"), ("lavis", "x.pth")):
        target = tmp_path / name
        assert convert(opt_folder, target, f"--to={to}") == 0
        with pytest.raises(SystemExit, match="--overwrite"):
            convert(opt_folder, target, f"--to={to}")
        assert convert(opt_folder, target, f"--to={to}", "--overwrite") == 0
    (tmp_path / "hf/README.md").write_text("mine")
    with pytest.raises(SystemExit, match=r"did not write \(README.md\)"):
        convert(opt_folder, tmp_path / "hf", "--to=huggingface", "--overwrite")
    opened = checkpoint.open_checkpoint(str(tmp_path / "hf"))
    jax.tree.map(np.testing.assert_array_equal, opened.load(opened.abstract()), read(opt_folder)[1])


def test_conversion_leaves_other_files_and_its_source_alone(opt_folder, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    save_file({"x": np.zeros(1)}, tmp_path / "other/other.safetensors")
    torch.save({"model": {}}, tmp_path / "other/theirs.pth")
    source = shutil.copytree(opt_folder, tmp_path / "source")
    monkeypatch.chdir(tmp_path / "other")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target, to, message in (
        (tmp_path / "other", "huggingface", "did not write|command runs"),
        (tmp_path / "other/theirs.pth", "lavis", "did not write"),
        (tmp_path / "other/theirs.pth", "native", "is a file"),
        (tmp_path / "source", "native", "is, holds or lies in"),
        (tmp_path / "source/inside", "native", "is, holds or lies in"),
        (tmp_path, "huggingface", "is, holds or lies in"),
        (".", "native", "where this command runs"),
        (tmp_path / "folder.pth", "lavis", "is a folder"),
        (tmp_path / "file.bin", "lavis", "end in .pth"),
    ):
        if to == "lavis" and target.name == "folder.pth":
            target.mkdir()
        for words in ([], ["--overwrite"], ["--dry_run"]):
            with pytest.raises(SystemExit, match=message):
                convert(source, target, f"--to={to}", *words)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


# ------------------------------------------------------------- what a language model is, and says


def edited(folder, target, **documents):
    """A copy of a folder's JSON files, some of them changed; None removes one."""
    target.mkdir()
    for path in folder.glob("*.json"):
        shutil.copy(path, target)
    for name, change in documents.items():
        path = target / f"{name}.json"
        if change is None:
            path.unlink(missing_ok=True)
        else:
            before = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps({**before, **change}))
    return str(target)


def test_the_end_of_texts_is_read_from_the_folder(opt_folder, tmp_path):
    """generation_config.json, then text_config; nothing said is nothing said."""
    text = json.loads((opt_folder / "config.json").read_text())["text_config"]
    silent = {key: value for key, value in text.items() if key != "eos_token_id"}
    cases = {
        "both": ({"eos_token_id": [5, 7]}, {**text, "eos_token_id": 9}, (5, 7)),
        "config": ({"eos_token_id": None}, {**text, "eos_token_id": 9}, (9,)),
        "alone": (None, {**text, "eos_token_id": [9, 8]}, (9, 8)),
        "neither": (None, silent, ()),
    }
    for name, (generation, text_config, ends) in cases.items():
        source = edited(
            opt_folder, tmp_path / name,
            generation_config=generation, config={"text_config": text_config},
        )  # fmt: skip
        assert huggingface.blip2_config(source).llm.eos_token_ids == ends, name
        assert huggingface.llm_config(source).eos_token_ids == ends, name
    source = edited(opt_folder, tmp_path / "bad", generation_config={"eos_token_id": "</s>"})
    with pytest.raises(WeightsError, match=r"generation_config.json.*eos_token_id is '</s>'"):
        huggingface.blip2_config(source)


def test_a_language_models_own_folder_follows_the_rules_of_blip2(tmp_path):
    """LAVIS: an OPT ends by a newline, a T5 computes the exact GELU; a BLIP-2 speaks for itself."""
    flan = {
        **models.T5,
        "dense_act_fn": "gelu_new",
        "architectures": ["T5ForConditionalGeneration"],
    }
    opt, llama = {**models.OPT, "eos_token_id": 2}, {**models.LLAMA, "eos_token_id": 2}
    for name, document in (("t5", flan), ("opt", opt), ("llama", llama)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(document))
    (tmp_path / "llama/generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert huggingface.llm_config(str(tmp_path / "t5")).activation == "gelu"
    by_name = huggingface.llm_config("google/flan-t5-xl")
    assert by_name.activation == "gelu"
    assert huggingface.llm_config(str(tmp_path / "opt")).eos_token_ids == ()
    assert huggingface.llm_config(str(tmp_path / "llama")).eos_token_ids == (2, 9)
    whole = {"model_type": "blip-2", "vision_config": models.VISION,
             "qformer_config": models.QFORMER, "text_config": flan}  # fmt: skip
    (tmp_path / "blip2").mkdir()
    (tmp_path / "blip2/config.json").write_text(json.dumps(whole))
    assert huggingface.llm_config(str(tmp_path / "blip2")).activation == "gelu_new"
    assert huggingface.blip2_config(str(tmp_path / "blip2")).llm.activation == "gelu_new"


def test_an_exported_model_says_what_ends_its_texts(opt_folder, tmp_path):
    from blip2_jax.data import language, tokenizers

    words = tokenizers.load("package:digits-opt")
    opened, params = read(opt_folder)
    for ends, expected in (((), language.token_of(words, "\n")), ((5, 7), [5, 7])):
        llm = dataclasses.replace(opened.config.llm, eos_token_ids=ends)
        config = dataclasses.replace(opened.config, llm=llm)
        folder = tmp_path / f"out{len(ends)}"
        huggingface.save_blip2(
            folder, config, params, companions=huggingface.find("package:digits-opt")
        )
        text = json.loads((folder / "config.json").read_text())["text_config"]
        assert text["eos_token_id"] == expected
