"""Evaluation: tasks predict with a model, metrics score their predictions.

```
tasks         captioning, vqa, ranking, retrieval: what a model predicts, and how it is scored
metrics       the published scores, of texts and of similarities
predictions   what a task predicted, in memory and in files that a stopped evaluation goes on from
evaluator     runs the tasks of an evaluation
results       its scores, files and page
training      evaluations of a training run
submissions   files of evaluation servers
```
"""
