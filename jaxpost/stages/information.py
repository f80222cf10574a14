"""The Fisher information of a model on data, elementwise: what Fisher merging weighs models by.

    from jaxpost.stages.information import fisher

    folder = fisher("configs/sft.py", "OUT", model="FOLDER", data="FILE.jsonl")

The data is read and tokenised as a stage of the recipe that trains on it has it, one example a row. The result is an artefact
(storage/artefacts.py), OUT/information/<key>, whose safetensors file has an array for each of the model's tensors.
"""

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxpost import recipe, sharding
from jaxpost.data import source
from jaxpost.errors import UserError
from jaxpost.models import hf, loading, tensors
from jaxpost.models.identity import identity
from jaxpost.objectives.logprobs import at_tokens, token_scores
from jaxpost.stages import datasets, train
from jaxpost.stages.run import Run
from jaxpost.storage import artefacts, cloud, compile_cache
from jaxpost.types import Batch, Output, Params

LABELS = ("model", "data")


def fisher(config, out, *, labels: str = "model", **changes) -> str:
    """Makes the information of a recipe's model on its data, unless it is there; the folder with it.

    config and changes: as `jaxpost.train` takes them, of one stage whose objective learns from demonstrations. labels: "model"
    draws each learned token from the model's own distribution, which the Fisher information is of; "data" takes the data's, the
    empirical Fisher information. Raises UserError for what the recipe gets wrong, and for an adapted model.
    """
    compile_cache.keep()
    if labels not in LABELS:
        raise UserError(f"labels={labels!r}: give 'model' or 'data'.")
    ((name, settings), *others) = recipe.stages(recipe.opened(config, **changes))
    if others:
        raise UserError(f"the recipe has {len(others) + 1} stages; give one with the data alone, such as configs/sft.py.")
    s = ConfigDict(recipe.plain(settings) | {"packing": False, "annotations": ""})
    mesh = sharding.make_mesh(**s.mesh)
    with sharding.use(mesh):
        plan = train.without_annotations(name, s, Run(cloud.path(out), cloud.path(out), mesh, None, {}, {}))
        spec = plan.spec
        if spec.adapter or spec.leaves:
            raise UserError(
                "information is of a plain model; merge its adapter first (jaxpost.export), and take objective='sft.nll'."
            )
        about = {"data": datasets.digest(plan.sets), "weights": identity(spec, s.seed), "labels": labels}
        artefact = artefacts.Artefact(out, "information", about | {"window": s.window, "seed": s.seed, "dtype": s.dtype})
        _, done = artefact.resume()
        if not done:
            _make(artefact, plan, loading.weights(spec, mesh, s.seed), labels, mesh)
    return str(artefact.folder)


def _make(artefact: artefacts.Artefact, plan, params: Params, labels: str, mesh) -> None:
    s, spec = plan.settings, plan.spec
    total, count, key = jax.tree.map(jnp.zeros_like, params), 0, jax.random.PRNGKey(s.seed)
    add = jax.jit(functools.partial(squared, spec.transformer.forward, labels=labels), donate_argnums=0)
    for one in (one for one in plan.sets if not one.held_out):
        local = sharding.local_rows(mesh, s.batch_size)
        batches = source.Batches(datasets.rows(one, s, {}), s.batch_size, seed=0, shuffle=False, epochs=1, local=local)
        for _ in range(len(batches)):
            total = add(total, params, sharding.distribute(batches(), mesh, s.batch_size), key, count)
            count += s.batch_size
    count = sum(len(one.encoded.learned) for one in plan.sets if not one.held_out)
    arrays = tensors.of_tree(jax.tree.map(lambda x: sharding.everywhere(x) / np.float32(count), total), spec.transformer.arch)
    if jax.process_index() == 0:
        artefact.folder.mkdir(parents=True, exist_ok=True)
        about = {name: (np.float32, x.shape) for name, x in arrays.items()}
        artefact.finish(hf.write_shards(artefact.folder, about, arrays.values()), examples=count)
        print(f"information of {count:,} examples: {artefact.folder}", file=sys.stderr)
    sharding.agree(0.0)  # nobody reads before all is written


def squared(forward: Callable, total: Params, params: Params, batch: Batch, key, first: int = 0, *, labels: str) -> Params:
    """total plus, for each row of a batch, the square of the gradient of the log-probability of its learned tokens.

    first: the number of the batch's first row, by which and by `key` labels are drawn. One row's gradient is in memory at a
    time.
    """

    def log_probability(params: Params, row: Batch, key) -> jax.Array:
        output = forward(params, row)
        if labels == "model":
            tokens = _drawn(jax.lax.stop_gradient(output), row, key)
            row = row | {"tokens": jnp.where(row["mask"], tokens, row["tokens"])}
        return jnp.sum(token_scores(output, row)["logps"])

    def add(total: Params, numbered) -> tuple[Params, None]:
        number, row = numbered
        row = {name: x[None] for name, x in row.items()}
        gradient = jax.grad(log_probability)(params, row, jax.random.fold_in(key, number))
        return jax.tree.map(lambda t, g: t + jnp.square(g), total, gradient), None

    rows = {name: x for name, x in batch.items() if x.ndim}
    numbers = first + jnp.arange(batch["mask"].shape[0])
    return jax.lax.scan(add, total, (numbers, rows))[0]


def _drawn(output: Output, row: Batch, key) -> jax.Array:
    """A token for each learned place [1,S] int32, from the model's distribution there."""
    places = jnp.arange(row["mask"].shape[1])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)[None]
    return at_tokens(_draw, output, columns={"keys": keys}, mask=row["mask"])["tokens"].astype(jnp.int32)


def _draw(logits: jax.Array, columns: dict) -> dict:
    return {"tokens": jax.vmap(jax.random.categorical)(columns["keys"], logits)}
