"""Evaluation: tasks predict with a model, metrics score their predictions.

```
tasks         captioning, vqa, ranking, retrieval: what a model predicts, and how it is scored
metrics       the published scores, of texts and of similarities
submissions   files of evaluation servers
```
"""
