"""Every key that an evaluation has, with what it means.

An evaluation is a short file beside this one: it takes these defaults, names its tasks, and gives
each what is special about it. A task's keys are set from the command line by its name:
`--config.tasks.vqav2_val.decoding.num_beams=1`.
"""

from typing import Any

from ml_collections import ConfigDict

from blip2_jax.inference.defaults import DEFAULTS

DECODING = (
    "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty",
    "length_penalty_includes_prompt", "length_penalty_includes_eos",
    "repetition_penalty", "no_repeat_ngram_size", "penalties_include_prompt",
)  # fmt: skip
# Families of the published language models, by the first letters of their names in recipes.
FAMILIES = {"opt": "opt", "flant5": "t5", "vicuna": "llama"}


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "evaluate"
    config.title = ""  # of the page; "": made from the name
    config.seed = 0  # of which images the page shows
    config.distributed = False  # several hosts (or BLIP2_DISTRIBUTED=1): call jax.distributed

    # What is evaluated, unless a task names its own; --model=SRC goes before both. A run's
    # workdir (its newest checkpoint) or WORKDIR/checkpoints/STEP, a Hugging Face folder or hub
    # name, a native folder or a LAVIS .pth, for which the towers' own folders or files are named
    # too; those of a run where they are no longer where it found them.
    config.model = ""
    config.vit = ""
    config.llm = ""
    config.qformer_tokenizer = ""
    config.llm_tokenizer = ""
    config.dtype = ""  # what is computed in; "": as stored
    # The mesh over the devices of one host; -1 once: all that the others leave. Every host holds
    # the model and takes its share of the images.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    config.batch_size = 32  # images, questions or texts that are computed at once, on one host
    config.threads = 16  # that read and decode images, on one host

    config.tasks = ConfigDict()  # by name; see `task` below
    # Images with attention maps on the page; the maps are those of the last task's model.
    config.report = ConfigDict({"attention": 4})
    # What was published for this model: the table of the paper, its row, the scores in its scale
    # (by the names that metrics have here), and where the weights are public ("": nowhere).
    config.published = ConfigDict({"table": "", "row": "", "weights": "", "scores": ConfigDict()})
    return config


def task(kind: str, source: str, split: str, folder: str = "", **changes: Any) -> ConfigDict:
    """A task with its defaults.

    Args:
      kind: vqa, captioning, retrieval or ranking.
      source: "coco", "vqav2", ... (`data/datasets.py`), "files" or "tfds".
      split: as the data set calls it.
      folder: of the data; "": data/SOURCE.
      **changes: keys of this task, `decoding` as a dict of those that differ.
    """
    config = ConfigDict({"task": kind, "model": ""})
    config.data = ConfigDict(
        {
            "source": source,
            "dir": folder or f"data/{source}",
            "images": "",  # folder of the images that lists name; "": the list's own
            "split": split,
            "form": "image",  # a record an image, with all its captions and questions
            # What shows through transparent pixels; "drop": what lies under them (LAVIS).
            "alpha_background": "white",
            "fold_whitespace": True,  # one space for every run of spaces, tabs and line ends
            "columns": "",  # of lists: "image=filepath,caption=title", if not the usual names
            "index_dir": "",  # where indexes of tars are kept; "": beside them, or in the cache
            "first": 0,  # only so many records, from the first on; 0: all
            # Share of images that may be missing or unreadable; they are left out of the scores,
            # and reported. Published scores leave out none.
            "max_unreadable": 0.0,
        }
    )
    config.examples = 12  # of its images on the page
    if kind == "retrieval":
        config.update(
            {
                "rerank": 128,  # candidates per query that ITM reads (LAVIS: k_test)
                "captions": 0,  # of an image, from the first on; 0: all
                "clean_text": True,  # LAVIS's `blip_caption` on every text
                "truncate": 35,  # tokens of a text (LAVIS); 0: none, and too long is an error
                "group": 0,  # score within groups of so many images, and average; 0: all at once
            }
        )
    else:
        # What stands before the text, {} for the question; None: what is published for the model's
        # family (`blip2 generate --help`).
        config.prompt = None
    if kind in ("vqa", "captioning"):
        config.truncate = 0  # tokens of a prompt; 0: none. LAVIS cuts OPT's at 32
        config.blind = False  # the same without the image too, as a baseline
    if kind in ("vqa", "captioning"):
        # See `inference.options.Decoding`; None: what is published for the model's family.
        config.decoding = ConfigDict(dict.fromkeys(DECODING))
    if kind == "captioning":
        # Those that this machine cannot compute are left out, and the result says why.
        config.scores = ("cider", "bleu4", "meteor", "rouge_l", "spice")
        config.by = ""  # a field of the records to score by, too: "domain" of NoCaps
        config.tokenizer = "auto"  # ptb (Java), fallback, or auto: ptb where Java is
    if kind in ("vqa", "ranking"):
        config.update(
            {
                "clean_text": True,  # LAVIS's `blip_question` on every question
                "metric": "vqa",  # vqa: accuracy over ten annotators; exact: GQA's
                # Of the VQA accuracy (evals/vqa): the first is the score, others stand beside it.
                "forms": ("lavis", "official"),
                "lemmatize": False,  # predictions, with spaCy: OK-VQA's published scores
            }
        )
    if kind == "ranking":
        config.candidates = ()  # answers to choose from; (): each question's own `choices`
    config.lock()
    for name, value in changes.items():
        if isinstance(value, dict):
            config[name].update(value)
        else:
            config[name] = value
    return config


def published_decoding(llm: str, kind: str) -> dict[str, Any]:
    """How LAVIS evaluates a published language model, "opt2.7b" as an example, in a task.

    Captions are COCO's: at least 8 tokens, which counted those of "a photo of" and BOS in OPT's
    prompt, and T5's start token (see `inference.defaults`).
    """
    (family,) = (family for name, family in FAMILIES.items() if llm.startswith(name))
    task = "answer" if kind == "vqa" else "caption"
    decoding = {name: getattr(DEFAULTS[family, task].decoding, name) for name in DECODING}
    if kind == "captioning":
        decoding["min_new_tokens"] = {"opt": 8 - 4, "t5": 8 - 1, "llama": 8}[family]
    return decoding
