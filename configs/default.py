"""Every key that a recipe has, with what it means. The values are the paper's stage 1 with ViT-g.

A recipe is a short file beside this one: it takes these defaults, changes what it must, and may
define `sweep(add)`. Keys that are not here are refused, in a recipe as on the command line
(`--config.optim.peak_lr=3e-4`).
"""

from ml_collections import ConfigDict

from blip2_jax.runtime.rules import RULES


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "stage1"  # of the recipe; a workdir belongs to one
    config.seed = 0  # of initialization, data order, dropout and negatives
    config.steps = 250_000
    config.dtype = "bfloat16"  # of activations; parameters that are trained are float32
    config.frozen_dtype = "bfloat16"  # of the frozen towers' parameters
    config.distributed = False  # several hosts (or BLIP2_DISTRIBUTED=1): call jax.distributed
    # When a run gives up on itself, and leaves with a message instead of waiting for ever.
    config.faults = ConfigDict(
        {
            # Steps with a loss or gradient that is not finite: each is left out and reported with
            # its records; one more than this in the whole run stops it, saved.
            "max_bad_steps": 0,
            "start_timeout": 300,  # seconds in which all processes must have come together
            "peer_timeout": 100,  # seconds without a sign of life from another process
            # Seconds without a sign of life of this process: a step, or a piece of what takes long
            # beside steps (an archive's record indexed, a tensor loaded, a batch evaluated).
            "step_timeout": 3600,
        }
    )

    # Top-level names of parameters to train; all others are frozen. A name that the model does
    # not have is an error. `ln_vision` is trained in every stage, as in LAVIS.
    config.trainable = (
        "ln_vision", "query_tokens", "qformer", "vision_proj", "text_proj",
        "itm_head", "itg_head", "temp",
    )  # fmt: skip

    # The device mesh; -1 once: all that the others leave. Only `data` crosses slices.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    # Which mesh axis (or None: replicated) the parameters' axes lie on.
    config.sharding = ConfigDict(RULES)  # embed: fsdp; heads, mlp, vocab: tensor

    config.stage = ConfigDict(
        {
            "name": "stage1",  # stage1, stage2, pretrain_vit or pretrain_lm
            # Stage 1's losses, summed with weight 1; fewer for ablations (the paper's table 6).
            "objectives": ("itc", "itm", "itg"),
            "label_smoothing": 0.1,  # of ITC and ITG
            # Parts that a batch is computed in, one after the other, to need less memory: stage 2
            # only, whose loss is a mean over tokens.
            "accumulate": 1,
            # True: ITC's gradient through both sides of the global batch. False: LAVIS on several
            # devices, where each direction trains its row side only.
            "itc_gather_grad": True,
            # Pairs of the same image are positives of each other. False: every pair is alone, as in
            # LAVIS where a part of the mixture has no image ids.
            "use_image_ids": True,
            # pretrain_vit: attribute of a patch -> classes, background last.
            "labels": ConfigDict(),
        }
    )

    config.model = ConfigDict()
    # Towers: with a `source` (a Hugging Face folder, or package:NAME), sizes come from its
    # config.json and those below are not used. `fingerprint`: refuse any other weights.
    config.model.vit = ConfigDict(
        {
            "source": "",
            "fingerprint": "",
            "layers": 0,  # blocks kept of the source's, from the first; 0: all (CLIP: 23 of 24)
            "resolution": 0,  # pixels, if not the source's; positions are resampled. 0: as it is
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 1408,
            "num_layers": 39,
            "num_heads": 16,
            "mlp_dim": 6144,
            "activation": "gelu",
            "layer_norm_eps": 1e-6,
            "attention_bias": "qvo",
            "patch_bias": True,
            "pre_norm": False,
            # How positions are resampled for another image_size than the source's; CLIP: True.
            "align_corners": False,
            "drop_path": 0.0,  # share of branches left out, growing to this in the last block
            "remat": "none",
            # How images become numbers; a source's preprocessor_config.json says its own. Mean and
            # deviation of RGB in 0..1 are CLIP's, as published for both of BLIP-2's encoders.
            "image_mean": (0.48145466, 0.4578275, 0.40821073),
            "image_std": (0.26862954, 0.26130258, 0.27577711),
            "resample": "bicubic",  # nearest, box, bilinear, hamming, bicubic or lanczos
        }
    )
    config.model.qformer_reads_prompt = False  # the question too: VQA fine-tuning, InstructBLIP
    config.model.qformer = ConfigDict(
        {
            "num_query_tokens": 32,
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "mlp_dim": 3072,
            "cross_attention_frequency": 2,
            "vocab_size": 30523,
            "bos_token_id": 30522,
            "max_position_embeddings": 512,
            "layer_norm_eps": 1e-12,
            "dropout": 0.1,
            "initializer_range": 0.02,
            "remat": "none",  # none, dots or full
        }
    )
    config.model.llm = ConfigDict(
        {
            "source": "",
            "fingerprint": "",
            "vocab_size": 50272,
            "hidden_size": 2560,
            "num_layers": 32,
            "num_heads": 32,
            "ffn_dim": 10240,
            "max_position_embeddings": 2048,
            "activation": "relu",
            # LAVIS leaves the frozen LLM in training mode, so its dropout (0.1) is on: so do the
            # -lavis recipes. The paper does not say; 0 here: a frozen model is a fixed function.
            "dropout": 0.0,
            # Low-rank paths beside the frozen weights, in the layers named; 0: none. They are the
            # part `llm_lora`, to be named in `trainable`.
            "lora": {"rank": 0, "alpha": 16.0, "targets": ("q_proj", "v_proj")},
            "sinusoid": 0.0,  # pretrain_lm: amplitude of sinusoidal positions at the start
            "remat": "none",
        }
    )
    config.model.projection_dim = 256
    config.model.initial_temperature = 0.07
    config.model.ln_vision_eps = 1e-5  # LAVIS; Hugging Face: 1e-6

    # Where trainable parameters start from ("": from scratch). `bert`: a folder, whose weights go
    # into stage 1's Q-Former (paper, section 3.1). `checkpoint`: a run's workdir (its
    # newest checkpoint) or WORKDIR/checkpoints/STEP, a Hugging Face or native folder or a LAVIS
    # .pth; all that this model has in common with it is taken: stage 2 takes stage 1's queries and
    # Q-Former.
    config.init = ConfigDict({"checkpoint": "", "bert": ""})

    config.data = ConfigDict(
        {
            # tfds: a folder that `blip2 prepare` or TFDS wrote. files: tars or lists as they are.
            # coco, vqav2, ... (`data/datasets.py`): a folder as the owners publish it. stories,
            # easy_stories: text of the embedded world, written as it is read.
            "source": "tfds",
            # The data: a folder, file, glob or {00000..00331}.tar, also remote (gs://...);
            # `{split}` in it stands for the split.
            "dir": "",
            "images": "",  # folder of the images that lists name; "": the list's own
            "form": "image",  # of lists: a record an `image`, or a `caption` (LAVIS's COCO)
            # Of lists whose columns have unusual names: "image=filepath,caption=title".
            "columns": "",
            "index_dir": "",  # where indexes of tars are kept; "": beside them, or in the cache
            "split": "train",
            "eval_split": "test",
            # Several sources: name -> {"dir": ..., "weight": 1.0, and "source", "images", "form",
            # "columns", "split" and "randaugment" where they differ from those here}. Empty: the
            # one above; a recipe's own is emptied by --config.data.mixture={}.
            "mixture": ConfigDict(),
            "mixture_by": "weight",  # weight, size or sqrt_size (of the parts, in records)
            "batch_size": 1680,  # global; the paper's for ViT-g
            # Tokens of what the Q-Former reads, [CLS] and [SEP] included. A caption loses its end,
            # an instruction its begin.
            "text_length": 32,
            # Tokens of a caption and its prompt, for the LLM; or of an answer. The end is cut off.
            "llm_length": 32,
            # Tokens of an answer's prompt; a longer one loses its begin. Also of a caption's, where
            # the Q-Former reads the prompt.
            "max_prompt_length": 64,
            "qformer_tokenizer": "bert-base-uncased",
            "llm_tokenizer": "",  # "": the LLM's source
            # {"bos_token": "</s>", ...}: special tokens that are others than the tokenizer's own.
            "llm_special_tokens": ConfigDict(),
            # Stage 2: stands before every text and is not learned; {} stands for the question.
            "prompt": "",
            # The token that ends what a decoder-only LLM is taught, and that it is stopped at; "":
            # the model's own, which is a newline for OPT and its end token for all others.
            "end_of_text": "",
            "task": "caption",  # stage 2: caption, or answer (records with questions)
            # Share of the training images that have the captions of another: noise as the web has
            # it, and at 1 a control that nothing about images can be learned from.
            "mismatched": 0.0,
            "clean_text": True,  # LAVIS's `blip_caption`: lower case, no punctuation, 50 words
            # One space for every run of spaces, tabs and line ends in a text: OPT's texts end with
            # a newline, and one inside a caption would teach it to stop there.
            "fold_whitespace": True,
            "first_captions": 0,  # draw from this many captions of an image; 0: all (LAION: 2)
            "crop_scale": (0.5, 1.0),  # random resized crop, share of the area; (1, 1): none
            "flip": True,
            # RandAugment's operations and magnitude; LAVIS's `blip_image_train`: (2, 5).
            "randaugment": (0, 0),
            "resize": "exact",  # Pillow's antialiased bicubic; or fast (docs/benchmarks.md)
            # What shows through transparent pixels: a color's name or #rrggbb; "drop": what lies
            # under them, as LAVIS and transformers have it.
            "alpha_background": "white",
            "threads": 16,  # that decode; with workers, of all of them together
            "workers": 0,  # processes that decode; 0: threads of this one, which scale as well
            "max_skipped": 0.1,  # share of records that may be unreadable before a run stops
            "story_warmup": 0.0,  # share of the stories, at first, that are easier still
        }
    )

    config.optim = ConfigDict(
        {
            "peak_lr": 1e-4,
            "warmup_start_lr": 1e-6,
            "end_lr": 1e-5,  # LAVIS; the paper states none for stage 1
            "warmup_steps": 2000,
            # per_step: warmup and cosine move every step. per_epoch: as LAVIS; the warmup ends with
            # the first epoch, wherever it is, and the cosine moves once an epoch.
            "schedule": "per_step",
            "steps_per_epoch": 0,  # of schedule=per_epoch
            "betas": (0.9, 0.98),
            "eps": 1e-8,
            "weight_decay": 0.05,
            "decay_biases": False,
            "decay_temperature": True,  # as LAVIS does
            "vit_layer_decay": 1.0,  # factor on the rate of a trained ViT, from block to block
            "clip_norm": 0.0,  # global norm; 0: no clipping, as in the paper
        }
    )

    config.checkpoint = ConfigDict({"every": 1000, "keep_last": 2, "keep_every": 0})
    config.log = ConfigDict({"every": 50})
    # A trace of so many steps in workdir/profile, after the first few of this start; 0: none.
    config.profile = ConfigDict({"after": 10, "steps": 0})
    config.eval = ConfigDict(
        {
            "every": 0,  # steps between losses on `data.eval_split`; 0: never
            "batches": 0,  # of these; 0: all of the split
            "batch_size": 64,  # global
            "tasks_every": 0,  # steps between the tasks of `evals`; 0: only at the end
            "tasks_batch_size": 32,  # images, questions or texts that are computed at once
        }
    )
    # Tasks that the trained parameters are scored on, by name, as `blip2 evaluate` does it; scores
    # go into metrics.jsonl as eval/NAME/SCORE. A recipe takes them from an evaluation's config
    # (`config.evals = caption.get_config("vitg-opt2.7b").tasks`) or makes its own, with `task` of
    # configs/eval/default.py. Their keys `model` and `examples` are not used.
    config.evals = ConfigDict()
    return config.lock()
