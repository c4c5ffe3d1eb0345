"""Losses of an evaluation are means over its batches, to the bit."""

import jax.numpy as jnp
import numpy as np

from blip2_jax.training.eval_losses import BatchAverage, averages_of, named


def test_means_are_those_of_floats_added_in_order():
    rng = np.random.default_rng(0)
    batches = [
        {"loss": jnp.float32(a), "itc/loss": jnp.bfloat16(b), "tokens": jnp.int32(8)}
        for a, b in rng.random((37, 2))
    ]
    collection = averages_of(batches[0])
    totals = {name: float(value) for name, value in batches[0].items()}
    for batch in batches[1:]:
        collection = collection.merge(averages_of(batch))
        for name, value in batch.items():
            totals[name] += float(value)
    means = {name: total / len(batches) for name, total in totals.items()}
    assert named(collection, list(means)) == means


def test_no_batch_changes_no_average():
    one = BatchAverage.from_model_output(jnp.float32(0.1))
    assert BatchAverage.empty().merge(one) == one == one.merge(BatchAverage.empty())
    assert one.compute() == float(np.float32(0.1))
