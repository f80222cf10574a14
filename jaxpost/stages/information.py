"""What a model's data say about its weights: what Fisher merging and RegMean weigh models by.

    from jaxpost.stages.information import fisher, moments

    folder = fisher("configs/sft.py", "OUT", model="FOLDER", data="FILE.jsonl")
    folder = moments("configs/sft.py", "OUT", model="FOLDER", data="FILE.jsonl")

The data is read and tokenised as a stage of the recipe that trains on it has it, one example a row. The result is an artefact
(storage/artefacts.py), OUT/information/<key> or OUT/moments/<key>, whose safetensors file has arrays by the names of the
model's tensors.
"""

import functools
import sys
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxpost import recipe, sharding
from jaxpost.data import source
from jaxpost.errors import UserError
from jaxpost.models import hf, layout, loading, tensors
from jaxpost.models.identity import identity
from jaxpost.objectives.logprobs import at_tokens, token_scores
from jaxpost.stages import datasets, train
from jaxpost.stages.run import Run
from jaxpost.storage import artefacts, cloud, compile_cache
from jaxpost.types import Batch, Output, Params

LABELS = ("model", "data")
# The linear layers of a block, and the site (models/sites.py) at which each has its input.
INPUTS = {f"layers/attention/{name}/kernel": "attn_input" for name in "qkv"}
INPUTS |= {f"layers/mlp/{name}/kernel": "mlp_input" for name in ("gate", "up", "router")}
INPUTS |= {"layers/attention/o/kernel": "head_out", "layers/mlp/down/kernel": "mlp_act"}


def fisher(config, out, *, labels: str = "model", **changes) -> str:
    """Makes the diagonal of the Fisher information of a recipe's model on its data, unless it is there; the folder with it.

    config and changes: as `jaxpost.train` takes them, of one stage whose objective learns from demonstrations. labels: "model"
    draws each learned token from the model's own distribution, which the Fisher information is of; "data" takes the data's, the
    empirical Fisher information. The file has the mean over examples, an array for each tensor. Raises UserError for what the
    recipe gets wrong, and for an adapted model.
    """
    if labels not in LABELS:
        raise UserError(f"labels={labels!r}: give 'model' or 'data'.")

    def make(plan, params: Params, mesh) -> dict[str, np.ndarray]:
        key, forward = jax.random.PRNGKey(plan.settings.seed), plan.spec.transformer.forward
        add = jax.jit(functools.partial(squared, forward, labels=labels), donate_argnums=0)
        zero = jax.tree.map(jnp.zeros_like, params)
        total = _over_data(plan, mesh, zero, lambda total, batch, first: add(total, params, batch, key, first))
        mean = jax.tree.map(lambda x: sharding.everywhere(x) / np.float32(_examples(plan)), total)
        return tensors.of_tree(mean, plan.spec.transformer.arch)

    return _stored(config, out, "information", {"labels": labels}, changes, make)


def moments(config, out, **changes) -> str:
    """Makes X^T X of the inputs X of the linear layers in a recipe's model on its data, unless it is there; the folder with it.

    config and changes: as `fisher` takes them. The inputs are those of all tokens of the data. The file has a float32 array
    [in, in] for each tensor of the layers' attention and feed-forward, but for experts. Raises UserError as `fisher` does.
    """

    def make(plan, params: Params, mesh) -> dict[str, np.ndarray]:
        model, arch = plan.spec.transformer, plan.spec.transformer.arch
        add = jax.jit(functools.partial(products, model.forward), donate_argnums=0)
        widths = {"attn_input": arch.width, "head_out": arch.heads * arch.head_width, "mlp_input": arch.width}
        widths |= {} if arch.experts else {"mlp_act": arch.mlp_width}
        zero = {site: jnp.zeros((arch.layers, width, width)) for site, width in widths.items()}
        total = _over_data(plan, mesh, zero, lambda total, batch, first: add(total, params, batch))
        return of_tensors({site: sharding.everywhere(x) for site, x in total.items()}, arch)

    return _stored(config, out, "moments", {}, changes, make)


def of_tensors(by_site: Mapping[str, np.ndarray], arch) -> dict[str, np.ndarray]:
    """{name of a linear layer's tensor: what by_site, {site: [L,...]}, has of its input}."""
    parts = {name: place.parts[0] for name, place in layout.places(arch).items()}
    return {name: by_site[INPUTS[part.path]][part.place[0]] for name, part in parts.items() if part.path in INPUTS}


def _stored(config, out, kind: str, about: dict, changes: dict, make: Callable) -> str:
    """The folder of an artefact whose arrays are make(plan, params, mesh)."""
    compile_cache.keep()
    ((name, settings), *others) = recipe.stages(recipe.opened(config, **changes))
    if others:
        raise UserError(f"the recipe has {len(others) + 1} stages; give one with the data alone, such as configs/sft.py.")
    s = ConfigDict(recipe.plain(settings) | {"packing": False, "annotations": ""})
    mesh = sharding.make_mesh(**s.mesh)
    with sharding.use(mesh):
        plan = train.without_annotations(name, s, Run(cloud.path(out), cloud.path(out), mesh, None, {}, {}))
        spec = plan.spec
        if spec.adapter or spec.leaves or not hasattr(spec.transformer, "arch"):
            raise UserError(
                f"{kind}: of a plain model; merge its adapter first (jaxpost.export), and take objective='sft.nll'."
            )
        about |= {"data": datasets.digest(plan.sets), "weights": identity(spec, s.seed)}
        artefact = artefacts.Artefact(out, kind, about | {"window": s.window, "seed": s.seed, "dtype": s.dtype})
        _, done = artefact.resume()
        if not done:
            arrays, count = make(plan, loading.weights(spec, mesh, s.seed), mesh), _examples(plan)
            if jax.process_index() == 0:
                artefact.folder.mkdir(parents=True, exist_ok=True)
                shapes = {name: (np.float32, x.shape) for name, x in arrays.items()}
                artefact.finish(hf.write_shards(artefact.folder, shapes, arrays.values()), examples=count)
                print(f"{kind} of {count:,} examples: {artefact.folder}", file=sys.stderr)
            sharding.agree(0.0)  # nobody reads before all is written
    return str(artefact.folder)


def _over_data(plan, mesh, total, add: Callable):
    """add(total, batch, number of its first row) over the batches of a stage's data."""
    s, count = plan.settings, 0
    for one in (one for one in plan.sets if not one.held_out):
        local = sharding.local_rows(mesh, s.batch_size)
        batches = source.Batches(datasets.rows(one, s, {}), s.batch_size, seed=0, shuffle=False, epochs=1, local=local)
        for _ in range(len(batches)):
            total = add(total, sharding.distribute(batches(), mesh, s.batch_size), count)
            count += s.batch_size
    return total


def _examples(plan) -> int:
    return sum(len(one.encoded.learned) for one in plan.sets if not one.held_out)


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


def products(forward: Callable, total: Mapping[str, jax.Array], params: Params, batch: Batch) -> dict[str, jax.Array]:
    """total {site: [L,I,I]} plus X^T X of what the batch's tokens have at each site. One row's activations are in memory at a
    time.
    """

    def add(total: Mapping, row: Batch) -> tuple[dict, None]:
        row, sums = {name: x[None] for name, x in row.items()}, {}
        taps = forward(params, row, tap=[f"layers.*.{site}" for site in total]).taps
        for site, held in total.items():
            x = taps[f"layers.*.{site}"].astype(jnp.float32).reshape(len(held), -1, held.shape[-1])
            x = jnp.where((row["segments"][0] > 0)[:, None], x, 0.0)
            sums[site] = held + jnp.einsum("lsi,lsj->lij", x, x, precision="highest")
        return sums, None

    return jax.lax.scan(add, dict(total), {name: x for name, x in batch.items() if x.ndim})[0]


def _drawn(output: Output, row: Batch, key) -> jax.Array:
    """A token for each learned place [1,S] int32, from the model's distribution there."""
    places = jnp.arange(row["mask"].shape[1])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)[None]
    return at_tokens(_draw, output, columns={"keys": keys}, mask=row["mask"])["tokens"].astype(jnp.int32)


def _draw(logits: jax.Array, columns: dict) -> dict:
    return {"tokens": jax.vmap(jax.random.categorical)(columns["keys"], logits)}
