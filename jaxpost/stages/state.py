"""The train state before there is one, and the step as one program.

Shapes alone are enough to restore a checkpoint into, and to compile the step for a machine that is not here. Both are made
here, so that what is compiled in advance is what runs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpost import optim, sharding
from jaxpost.models import loading
from jaxpost.step import make_step
from jaxpost.types import TrainState


def shapes(transformer, mesh, tx, trainable: str, *, adapter=None, leaves=None, ema: bool = False) -> TrainState:
    """The state of a model on a mesh as shapes, dtypes and shardings: no weights are made.

    tx: an optax transformation; trainable: the pattern of the paths that train; adapter, leaves: as
    `loading.abstract` takes them; ema: whether a running mean is kept.
    """
    train, frozen = optim.partition(loading.abstract(transformer, mesh, adapter, leaves), trainable)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    rest = {"opt_state": jax.eval_shape(tx.init, train), "ema": train if ema else None, "key": key}
    whole = TrainState(train=train, frozen=frozen, step=count, skipped=count, streak=count, **rest)
    return sharding.placed(whole, sharding.stored(mesh, whole))


def program(transformer, objective: Callable, tx, state: TrainState, mesh, s) -> Callable:
    """The train step, jitted: it takes the state's memory for the next state and leaves every leaf where it was.

    state: arrays or shapes; s: a stage's settings, of which microbatches, ema and term_norms are read.
    """
    options = {"microbatches": s.microbatches, "ema": s.ema or None, "term_norms": s.term_norms}
    step = make_step(transformer.forward, objective, tx, **options)
    return jax.jit(step, out_shardings=(sharding.stored(mesh, state), sharding.replicated(mesh)), donate_argnums=0)
