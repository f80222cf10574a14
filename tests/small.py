"""The real transformer at its smallest, and its train step as the loop compiles it; as a script, that program's text.

    python tests/small.py 2,2,2 1,8,1/2 2,2,2:mixture

prints the compiled programs (the second in two microbatches, the third of a mixture of experts) to stdout; what the compiler
has to say goes to stderr. The sizes are chosen so that a shape in the program's text tells what it is: 7 divides the vocabulary
alone, 5 the length alone.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpost import sharding
from jaxpost.models.families import Architecture, Kind, Rope
from jaxpost.models.transformer import Transformer
from jaxpost.objectives import logprobs, sft
from jaxpost.step import make_step
from jaxpost.types import TrainState

VOCAB, LENGTH, ROWS = 112, 20, 16
ARCH = Architecture(vocab=VOCAB, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_width=8, max_positions=LENGTH)
MODEL = Transformer(ARCH)
MODELS = {
    "": MODEL,
    "mixture": Transformer(dataclasses.replace(ARCH, experts=4, chosen=2, qk_norm="head")),
    "kinds": Transformer(
        dataclasses.replace(
            ARCH,
            kinds=(Kind(), Kind(5, Rope(33.0))),
            pattern=(1, 0),
            norms="both",
            norm_offset=1.0,
            attention_cap=5.0,
            tied=True,
            qkv_bias=True,
            qk_norm="all",
        )  # fmt: skip
    ),
}


def state(tx, seed: int = 0, model=MODEL) -> TrainState:
    """A fresh state of the small model."""
    params, zero = model.init(jax.random.PRNGKey(seed)), jnp.zeros((), jnp.int32)
    nothing = jax.tree.map(lambda _: None, params)
    return TrainState(zero, params, nothing, tx.init(params), None, jax.random.PRNGKey(0), zero, zero)


def placed(mesh, tx, model=MODEL) -> TrainState:
    """The fresh state in its place on a mesh."""
    places = sharding.stored(mesh, jax.eval_shape(lambda: state(tx, model=model)))
    return jax.jit(lambda: state(tx, model=model), out_shardings=places)()


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Two documents a row and padding, half of each learned; the last row is padding."""
    rng = np.random.default_rng(seed)
    place = np.arange(LENGTH)
    cut = rng.integers(4, 10, (ROWS, 1))
    end = cut + rng.integers(4, 10, (ROWS, 1))
    end[-1] = cut[-1] = 0
    segments = np.where(place < cut, 1, 2) * (place < end)
    positions = np.where(place < cut, place, place - cut) * (place < end)
    return {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32) * (segments > 0),
        "segments": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "mask": (positions > 0) & (rng.random((ROWS, LENGTH)) < 0.5),
    }


def step(mesh, tx, microbatches: int = 1, model=MODEL):
    """The jitted step with its state's places pinned, as train has it."""
    places = sharding.stored(mesh, jax.eval_shape(lambda: state(tx, model=model)))
    made = make_step(model.forward, sft.nll, tx, microbatches=microbatches)
    return jax.jit(made, out_shardings=(places, sharding.replicated(mesh)), donate_argnums=0)


def program(sizes: tuple[int, ...], microbatches: int = 1, model=MODEL) -> str:
    """The step's compiled text on a mesh of these sizes, with a head in several chunks."""
    logprobs.CHUNK = 2 * ROWS * VOCAB // 8
    mesh, tx = sharding.make_mesh(*sizes), optax.adamw(1e-3)
    with sharding.use(mesh):
        columns = sharding.distribute(batch(), mesh, ROWS)
        return step(mesh, tx, microbatches, model).lower(placed(mesh, tx, model), columns).compile().as_text()


def provoked() -> str:
    """A lookup whose gradient is asked for in the stored layout at once, which the partitioner answers by undoing the split."""
    mesh = sharding.make_mesh(2, 2, 2)
    table = {"embed": {"weight": jnp.ones((VOCAB, 32))}}

    def total(table, tokens):
        x = jnp.take(sharding.gather(table)["embed"]["weight"], tokens, axis=0)
        return jnp.sum(sharding.shard(x, "BSD") ** 2)

    with sharding.use(mesh):
        given = (
            jax.device_put(table, sharding.stored(mesh, table)),
            sharding.distribute({"t": batch()["tokens"]}, mesh, ROWS)["t"],
        )
        return jax.jit(jax.grad(total), out_shardings=sharding.stored(mesh, table)).lower(*given).compile().as_text()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        # On both streams, so that a warning can be laid at its program's door.
        for stream in (sys.stdout, sys.stderr):
            print(f"PROGRAM {argument}", file=stream, flush=True)
        rest, _, kind = argument.partition(":")
        sizes, _, parts = rest.partition("/")
        if argument == "provoke":
            print(provoked(), flush=True)
        else:
            print(program(tuple(map(int, sizes.split(","))), int(parts or 1), MODELS[kind]), flush=True)
