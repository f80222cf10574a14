"""The objective's own loss and metrics on data that it did not train on."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxpost import metrics, sharding


def loss(model: Any, batches: Iterable[dict], measure: Callable, *, batch_size: int) -> Iterator[tuple[str, float]]:
    """(metric, value) over all batches, the loss among them: sums and weights add up first, and are divided once.

    model: api.Model. batches: this process's rows of each; measure: what `step.make_evaluation` gives, jitted; batch_size: the
    rows of a whole batch.
    """
    parts, key = [], jax.random.PRNGKey(0)
    for batch in batches:
        parts.append(jax.device_get(measure(model.params, sharding.distribute(batch, model.mesh, batch_size), key)))
    yield from metrics.values(metrics.merge(jax.tree.map(lambda *x: np.stack(x), *parts))).items()
