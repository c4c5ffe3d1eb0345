"""Visual question answering (paper, table 8): 490 pixels, and the Q-Former reads the question.

    blip2 train --config=configs/finetune_vqa.py:vitg-flant5xl --workdir=DIR \\
        --config.init.checkpoint=runs/stage2

A stage-2 checkpoint has no text branch; it starts from BERT's. Whether the paper trained with the
prompt, and how it weighed ten answers, is not published: here both as in its evaluation and in
LAVIS's BLIP-1.
"""

from ml_collections import ConfigDict

from configs import published

DECAY = {"opt6.7b": 0.9}  # of the encoder's rates, by block; 0.95 for the others
QUESTIONS = 443_757 + 214_354 + 1_445_322  # VQAv2's training and validation sets, Visual Genome


def get_config(variant: str = "vitg-flant5xl") -> ConfigDict:
    vit, llm = published.words(variant, tuple(published.VITS), tuple(published.LLMS))
    config = published.get_config(vit, llm)
    config.name = f"vqa-{variant}"
    config.stage.name = "stage2"
    config.trainable = (*published.VISUAL, "language_projection")
    config.model.qformer_reads_prompt = True
    config.init.update({"checkpoint": "runs/stage2", "bert": "google-bert/bert-base-uncased"})
    published.finetune(config, batch_size=128, samples=QUESTIONS)
    config.model.vit.resolution = 490
    config.optim.vit_layer_decay = DECAY.get(llm, 0.95)
    config.data.mixture = ConfigDict(
        {
            "vqav2": {"source": "vqav2", "dir": "data/vqav2"},
            "vg_qa": {"source": "vg_qa", "dir": "data/vg"},
        }
    )
    config.data.mixture_by = "size"
    config.data.task = "answer"
    config.data.prompt = "Question: {} Answer:"
    config.data.text_length = config.data.max_prompt_length = 64  # room for 50 words
    return config
