"""From a config to what runs: model, abstract state, shardings, step.

`train`, `plan` and the benchmark all start here, so that what is planned is what is trained.
Nothing is allocated until `Recipe.init_state` or `Recipe.load_frozen` is called.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from blip2_jax import stages
from blip2_jax.data import language, tokenizers
from blip2_jax.data.batch_spec import example_spec, is_instruction
from blip2_jax.data.examples import llm_tokenizer
from blip2_jax.models import blip2, lora, opt, vit
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.runtime import dtypes, optim
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime import state as states
from blip2_jax.stages import Stage, stage1, step
from blip2_jax.stages.step import Params, Spec, State
from blip2_jax.weights import huggingface

# The smallest values that keys of a config may have.
MINIMUM = {
    "steps": 1,
    "data.batch_size": 1,
    "data.text_length": 2,  # [CLS] and [SEP]
    "data.llm_length": 1,
    "data.threads": 1,
    "data.workers": 0,
    "stage.accumulate": 1,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "log.every": 1,
    "eval.every": 0,
    "eval.batches": 0,
    "eval.batch_size": 1,
    "eval.tasks_every": 0,
    "eval.tasks_batch_size": 1,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A config, resolved.

    Attributes:
      config: what it was made from.
      stage: the module with the stage's loss.
      mesh: the devices.
      spec: what the steps close over.
      model_config: sizes (`Blip2Config`, or a tower's own config in its pre-training).
      abstract_state: shapes, dtypes and shardings of the train state.
      abstract_frozen: the same of the frozen parameters.
      train_step: compiled (state, frozen, batch, key) -> (state, metrics); donates `state`.
      eval_step: compiled (params, frozen, batch) -> metrics.
    """

    config: ConfigDict
    stage: Stage
    mesh: Mesh
    spec: Spec
    model_config: Any
    abstract_state: State
    abstract_frozen: Params
    init_params: Callable[[jax.Array], Params]
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels; 0 for a language model, which has none."""
        return getattr(getattr(self.model_config, "vit", self.model_config), "image_size", 0)

    @property
    def resample(self) -> str:
        """How images are resized; see `data.transforms.resize`."""
        return getattr(getattr(self.model_config, "vit", self.model_config), "resample", "bicubic")

    @property
    def llm(self) -> Any:
        """The language model's config; None without one."""
        return getattr(self.model_config, "llm", None)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch, as `data.batch_spec` has it, placed on the mesh."""
        examples = example_spec(self.config, self.image_size, self.llm)
        sharding = meshes.batch_sharding(self.mesh)
        size = self.config.data.batch_size
        return {
            name: jax.ShapeDtypeStruct((size, *array.shape), array.dtype, sharding=sharding)
            for name, array in examples.items()
        }

    def lower_step(self) -> jax.stages.Lowered:
        """The train step, traced for the mesh's devices, which need not be there."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return self.train_step.lower(
            self.abstract_state, self.abstract_frozen, self.abstract_batch, key
        )

    def init_state(self, key: jax.Array) -> State:
        """Fresh parameters and optimizer state, made on the devices that hold them."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        make = functools.partial(states.init_state, self.init_params, self.spec.optimizer)
        return jax.jit(make, out_shardings=shardings)(key)

    def load_trained_towers(self, state: State) -> State:
        """Towers that are trained start from their sources, where they have one."""
        params = dict(state["params"])
        for key in ("vit", "llm"):
            source = self.config.model[key].source
            if key in params and source:
                sizes = getattr(self.model_config, key)
                abstract = self.abstract_state["params"][key]
                params[key] = huggingface.load(source, sizes, abstract)
        return {**state, "params": params}

    def merge_params(self, frozen: Params, params: Params) -> Params:
        """All parameters of the model, with low-rank paths merged into the weights."""
        sizes = self.config.model.llm.lora
        return lora.merge({**frozen, **params}, rank=sizes.rank, alpha=sizes.alpha)

    def load_frozen(self) -> tuple[Params, dict[str, str]]:
        """Reads the frozen towers, and checks their fingerprints.

        Returns:
          The frozen parameters, and each tower's fingerprint.
        """
        frozen = self.read_frozen()
        return frozen, self.fingerprints(frozen)

    def read_frozen(self) -> Params:
        """The frozen parameters; nothing here waits for other processes."""
        frozen = {}
        for key, abstract in self.abstract_frozen.items():
            tower = self.config.model.get(key)
            if tower is None or not tower.get("source"):
                raise ValueError(
                    f"`{key}` is frozen and has no source. Set config.model.{key}.source to a "
                    f"folder with its weights, or add `{key}` to config.trainable."
                )
            frozen[key] = huggingface.load(tower.source, getattr(self.model_config, key), abstract)
        return frozen

    def fingerprints(self, frozen: Params) -> dict[str, str]:
        """Each frozen tower's fingerprint, which must be the config's, if that names one."""
        fingerprints = {}
        for key, params in frozen.items():
            tower = self.config.model[key]
            fingerprints[key] = states.fingerprint(params)
            if tower.fingerprint not in ("", fingerprints[key]):
                raise ValueError(
                    f"The weights of `{key}` in {tower.source} have the fingerprint "
                    f"{fingerprints[key]}, the config asks for {tower.fingerprint}. Install the "
                    f"weights it was written for, or set --config.model.{key}.fingerprint='' to "
                    "train on these."
                )
        return fingerprints


def _tower_config(
    section: ConfigDict, from_source: Callable[..., Any], kind: type[Any], **fixed: Any
) -> Any:
    """A tower's sizes: its source's where there is one, the config's otherwise."""
    if section.source:
        return from_source(section.source, remat=section.remat, **fixed)
    sizes = {f.name: section[f.name] for f in dataclasses.fields(kind) if f.name in section}
    return kind(**{**sizes, **fixed})


def model_config(config: ConfigDict) -> Any:
    """The model's sizes: a `Blip2Config`, or a tower's own config in its pre-training."""
    model = config.model
    own = {"image_size": model.vit.resolution} if model.vit.resolution else {}
    own |= {"num_layers": model.vit.layers} if model.vit.layers else {}
    own["drop_path"] = model.vit.drop_path
    vit_config = functools.partial(
        _tower_config, model.vit, huggingface.vit_config, vit.ViTConfig, **own
    )
    llm_config = functools.partial(
        _tower_config, model.llm, huggingface.llm_config, opt.OPTConfig, dropout=model.llm.dropout
    )
    tower = stages.load(config.stage.name).TOWER
    if tower:
        return {"vit": vit_config, "llm": llm_config}[tower]()
    encoder = vit_config()
    return blip2.Blip2Config(
        vit=encoder,
        qformer=QFormerConfig(encoder_width=encoder.hidden_size, **model.qformer),
        llm=llm_config() if config.stage.name == "stage2" else None,
        projection_dim=model.projection_dim,
        initial_temperature=model.initial_temperature,
        ln_vision_eps=model.ln_vision_eps,
        qformer_reads_prompt=model.qformer_reads_prompt,
        freeze_vit="vit" not in config.trainable,
    )


def _check_local_tokenizers(config: ConfigDict, sizes: Any) -> Any:
    """A BLIP-2's sizes, checked against those of its tokenizers that are on this machine.

    Those that must be fetched from the hub are checked when batches are made.
    """
    if not isinstance(sizes, blip2.Blip2Config):
        return sizes
    reads = sizes.llm is None or sizes.qformer_reads_prompt
    return with_tokenizers(
        config,
        sizes,
        tokenizers.at_hand(config.data.qformer_tokenizer) if reads else None,
        None if sizes.llm is None else llm_tokenizer(config, at_hand=True),
    )


def with_tokenizers(
    config: ConfigDict, sizes: blip2.Blip2Config, qformer_tokenizer: Any, llm_tokenizer: Any
) -> blip2.Blip2Config:
    """A BLIP-2's sizes with its end-of-text tokens, checked against the tokenizers that are given.

    Raises:
      ValueError: a tokenizer has more tokens than there are embeddings; an end that is no token.
    """
    if qformer_tokenizer is not None and (sizes.llm is None or sizes.qformer_reads_prompt):
        language.check_vocabulary(qformer_tokenizer, sizes.qformer.vocab_size, "Q-Former")
    if llm_tokenizer is None or sizes.llm is None:
        return sizes
    language.check_vocabulary(llm_tokenizer, sizes.llm.vocab_size, "language model")
    llm = language.with_end(llm_tokenizer, sizes.llm, config.data.end_of_text)
    return dataclasses.replace(sizes, llm=llm)


def make_module(config: ConfigDict, sizes: Any, *, rngs: nnx.Rngs) -> nnx.Module:
    """The model of a config, with freshly initialized parameters."""
    dtype = dtypes.parse(config.dtype, "config.dtype")
    return stages.load(config.stage.name).make_module(config, sizes, dtype=dtype, rngs=rngs)


def build(config: ConfigDict, mesh: Mesh | None = None) -> Recipe:
    """Resolves a config; allocates nothing.

    Args:
      config: a recipe's config.
      mesh: the devices; None makes the config's mesh of all there are.

    Raises:
      ValueError: what does not fit together, naming the key and the remedy.
    """
    stage = stages.load(config.stage.name)
    _check_minimum(config)
    _check_objectives(config)
    mesh = meshes.make_mesh(config.mesh) if mesh is None else mesh
    _check_batch_size(config, mesh)
    sizes = _check_local_tokenizers(config, model_config(config))
    _check_lora(config)

    def init_all(key: jax.Array) -> Params:
        module = make_module(config, sizes, rngs=nnx.Rngs(key))
        return lora.partition(nnx.to_pure_dict(nnx.state(module)))

    def init_trainable(key: jax.Array) -> Params:
        return states.split_by_keys(init_all(key), config.trainable)[0]

    graph = nnx.graphdef(nnx.eval_shape(lambda: make_module(config, sizes, rngs=nnx.Rngs(0))))
    key = jax.eval_shape(lambda: jax.random.key(0))
    trainable, frozen = states.split_by_keys(jax.eval_shape(init_all, key), config.trainable)
    frozen_dtype = dtypes.parse(config.frozen_dtype, "config.frozen_dtype")
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, frozen_dtype), frozen)
    optimizer, schedule = _make_optimizer(config, sizes, trainable)

    shardings_of = functools.partial(
        meshes.shardings,
        axes_table=getattr(stage, "AXES", blip2.AXES),
        rules=config.sharding,
        mesh=mesh,
    )
    abstract = states.abstract_state(init_trainable, optimizer)
    shardings = states.state_shardings(abstract, shardings_of(abstract["params"]), optimizer, mesh)
    frozen = states.with_shardings(frozen, shardings_of(frozen))
    spec = Spec(graph, optimizer, schedule, FrozenConfigDict(config.stage), mesh)
    train_step, eval_step = _jit_steps(stage, spec, shardings, frozen)
    recipe = Recipe(
        config=config,
        stage=stage,
        mesh=mesh,
        spec=spec,
        model_config=sizes,
        abstract_state=states.with_shardings(abstract, shardings),
        abstract_frozen=frozen,
        init_params=init_trainable,
        train_step=train_step,
        eval_step=eval_step,
    )
    _check_lengths(recipe)
    return recipe


def _make_optimizer(
    config: ConfigDict, sizes: Any, trainable: Params
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of the trained parameters, and its learning rate as a function of the step."""
    scales = None
    if config.optim.vit_layer_decay != 1.0:
        if "vit" not in trainable:
            raise ValueError(
                "config.optim.vit_layer_decay is for a trained ViT, and `vit` is not in "
                "config.trainable. Set --config.optim.vit_layer_decay=1.0, or "
                f"--config.trainable={_trainable(config, 'vit')}."
            )
        scales = jax.tree.map(lambda _: np.float32(1.0), trainable)
        scales["vit"] = vit.layer_scales(trainable["vit"], config.optim.vit_layer_decay)
    vectors: tuple[str, ...] = ()
    if isinstance(sizes, blip2.Blip2Config):
        vectors = tuple(f"vit/{name}" for name in vit.vectors(sizes.vit))
    options = {**config.optim, "total_steps": config.steps}
    return optim.make_optimizer(options, trainable, scales, vectors)


def _jit_steps(
    stage: Stage, spec: Spec, shardings: Any, frozen: Params
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """The train and the eval step of a stage, for states and batches placed on the mesh."""
    frozen_shardings = jax.tree.map(lambda x: x.sharding, frozen)
    batch, replicated = meshes.batch_sharding(spec.mesh), meshes.replicated(spec.mesh)
    train_step = jax.jit(
        _on_mesh(step.train_step, stage, spec),
        in_shardings=(shardings, frozen_shardings, batch, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    eval_step = jax.jit(
        _on_mesh(step.eval_step, stage, spec),
        in_shardings=(shardings["params"], frozen_shardings, batch),
        out_shardings=replicated,
    )
    return train_step, eval_step


def _on_mesh(step: Callable[..., Any], stage: Stage, spec: Spec) -> Callable[..., Any]:
    """A step of a stage's loss, traced with the mesh in context, which models' activations need."""

    @functools.wraps(step)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(spec.mesh.abstract_mesh):
            return step(stage.loss_fn, *args, spec=spec)

    return traced


# --------------------------------------------------------------------------------------- checks


def _check_minimum(config: ConfigDict) -> None:
    for key, minimum in MINIMUM.items():
        value: Any = functools.reduce(lambda section, name: section[name], key.split("."), config)
        if value < minimum:
            raise ValueError(
                f"config.{key} is {value}, and at least {minimum} is needed: "
                f"--config.{key}={minimum}."
            )


def _check_objectives(config: ConfigDict) -> None:
    objectives = set(config.stage.objectives)
    if not objectives or not objectives <= set(stage1.OBJECTIVES):
        raise ValueError(
            f"config.stage.objectives is {tuple(config.stage.objectives)}; it names one or more "
            f"of {', '.join(stage1.OBJECTIVES)}."
        )


def _check_batch_size(config: ConfigDict, mesh: Mesh) -> None:
    devices, parts = meshes.num_batch_shards(mesh), config.stage.accumulate
    if config.data.batch_size % (devices * parts):
        in_parts = f" in {parts} parts (config.stage.accumulate)" if parts > 1 else ""
        raise ValueError(
            f"config.data.batch_size {config.data.batch_size} does not divide over the "
            f"{devices} devices of the mesh's data and fsdp axes{in_parts}; take a multiple of "
            f"{devices * parts}: --config.data.batch_size={_nearest(config, devices * parts)}."
        )


def _check_lora(config: ConfigDict) -> None:
    rank = config.model.llm.lora.rank
    if (lora.PART in config.trainable) != bool(rank):
        raise ValueError(
            f"Low-rank adaptation takes both: `{lora.PART}` in config.trainable and a rank "
            f"in config.model.llm.lora.rank, which is {rank}. Set "
            f"--config.model.llm.lora.rank={0 if rank else 16}, or "
            f"--config.trainable={_trainable(config, lora.PART)}."
        )


def _nearest(config: ConfigDict, multiple: int) -> int:
    """A batch size like the config's that is a multiple of this."""
    return max(1, round(config.data.batch_size / multiple)) * multiple


def _trainable(config: ConfigDict, part: str) -> str:
    """`config.trainable` as a flag takes it, with a part that is not in it, or without it."""
    names = tuple(config.trainable)
    other = tuple(n for n in names if n != part) if part in names else (*names, part)
    return '"' + repr(other).replace(" ", "") + '"'


def _check_lengths(recipe: Recipe) -> None:
    """Refuses texts longer than the tables of positions; JAX would repeat the last position."""
    sizes, batch = recipe.model_config, recipe.abstract_batch
    qformer, llm = getattr(sizes, "qformer", None), getattr(sizes, "llm", sizes)
    queries = qformer.num_query_tokens if qformer else 0
    for name, before, tower in (("text", 0, qformer), ("llm", queries, llm)):
        limit = getattr(tower, "max_position_embeddings", None)  # of those that have such a table
        if limit is None or f"{name}_ids" not in batch:
            continue
        length = batch[f"{name}_ids"].shape[1]  # with a prompt, where that has its own
        key = f"{name}_length"
        if name == "llm" and is_instruction(recipe.config):  # then prompts have their own
            key = max(key, "max_prompt_length", key=recipe.config.data.get)
        given = recipe.config.data[key]
        if before + length > limit:
            what = f", after {before} queries," if before else ""
            raise ValueError(
                f"Texts are {length} tokens long{what} and the model has positions for {limit}: "
                f"--config.data.{key}={given - (before + length - limit)}, or less "
                f"(it is {given})."
            )
