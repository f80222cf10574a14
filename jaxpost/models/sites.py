"""Sites: the activations of a forward pass that `tap` returns and `patch` changes.

    layers.3.head_out        one layer's, counted from 0
    layers.*.resid_post      every layer's, with a leading axis L
    embed, final             before the first layer, and after the last norm

    out = model.forward(params, batch, tap=("layers.*.resid_post",), patch={"layers.3.mlp_out": 0.0})
    out.taps["layers.*.resid_post"]          [L,B,S,D]

A patch is a value, or a function (value, batch) -> value of the same shape; a value is broadcast to the site's shape, and that
of `layers.*` begins with the axis L. A function finds its tokens by the batch: `jnp.where(batch["positions"] == 5, new, x)`
with the axes that x has besides. A tap returns what the model goes on with, the patch included. `docs/analysis.md`
has examples.

Both work in the loop over stacked layers, under rematerialisation, with a cache, and are differentiable. Without them nothing
is computed and nothing kept: the compiled program is the same as without this file.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.config.resolve import nearest
from jaxpost.errors import UserError

# The sites of a layer, in the order in which it computes them, and those around the layers, with the letters of types.py; T is
# the keys: of the row, or of the cache.
LAYER = {
    "resid_pre": "BSD",  # the residual stream before the layer
    "attn_input": "BSD",  # what the projections of q, k and v read: the stream, normed where a norm stands before them
    "q": "BSNH",  # queries and keys as they meet, normed and rotated
    "k": "BSKH",
    "v": "BSKH",
    "pattern": "BNST",  # the attention weights after the softmax
    "head_out": "BSNH",  # what each head reads, before the output projection
    "attn_out": "BSD",  # what attention adds to the stream
    "resid_mid": "BSD",  # the stream between attention and feed-forward
    "mlp_input": "BSD",  # what the feed-forward reads
    "mlp_act": "BSF",  # act(gate) * up; a mixture of experts has none
    "mlp_out": "BSD",  # what the feed-forward adds to the stream
    "resid_post": "BSD",  # the stream after the layer
}
AROUND = {"embed": "BSD", "final": "BSD"}

Patch = Any  # a number, an array, or a function (value, batch) -> value


class Layer:
    """The sites of one layer while it is computed: called with each value, it returns what the layer goes on with.

    index: the layer's number, traced in the loop over stacked layers. `taken` holds the values of tapped sites; a traced index
    may be that of a layer that is not tapped, so the caller chooses among them.
    """

    def __init__(self, patches: Mapping[str, list], tapped: Mapping[str, Sequence[int]], index: Any, batch: Mapping):
        self.patches, self.tapped, self.index, self.batch = patches, tapped, index, batch
        self.taken: dict[str, jax.Array] = {}

    def wants(self, name: str) -> bool:
        """Whether a layer must have this site as an array at all: some kernels never do."""
        return name in self.patches or name in self.tapped

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        for layer, patch in self.patches.get(name, ()):
            x = self._patched(name, x, layer, patch)
        if name in self.tapped and not (isinstance(self.index, int) and self.index not in self.tapped[name]):
            self.taken[name] = x
        return x

    def _patched(self, name: str, x: jax.Array, layer: int | None, patch: Patch) -> jax.Array:
        if layer is None:
            patch = patch if callable(patch) or np.ndim(patch) == 0 else jnp.asarray(patch)[self.index]
            return changed(f"layers.*.{name}", x, patch, self.batch)
        place = f"layers.{layer}.{name}"
        if isinstance(self.index, int):
            return changed(place, x, patch, self.batch) if self.index == layer else x
        return jax.lax.cond(self.index == layer, lambda x: changed(place, x, patch, self.batch), lambda x: x, x)


UNTOUCHED = Layer({}, {}, 0, {})


class Sites:
    """What a forward pass taps and patches, checked against the model's layers; false where that is nothing.

    Raises UserError for a site that the model does not have.
    """

    def __init__(self, tap: Sequence[str], patch: Mapping[str, Patch] | None, layers: int, batch: Mapping, dense: bool = True):
        self.tap, self.batch, self.layers = tuple([tap] if isinstance(tap, str) else tap), batch, layers
        self.patches: dict[str, list] = {}
        self.tapped: dict[str, list[int]] = {}
        self.around = {name: change for name, change in (patch or {}).items() if name in AROUND}
        self.taken: dict[str, jax.Array] = {}
        for name, change in (patch or {}).items():
            if name not in AROUND:
                layer, site = parsed(name, layers, dense)
                if layer is None and not callable(change) and np.ndim(change) and len(change) != layers:
                    raise UserError(f"patch: {name} has a value of {len(change)} layers, and the model has {layers}.")
                self.patches.setdefault(site, []).append((layer, change))
        for name in self.tap:
            if name not in AROUND:
                layer, site = parsed(name, layers, dense)
                wanted = range(layers) if layer is None else [layer]
                self.tapped[site] = sorted({*self.tapped.get(site, ()), *wanted})

    def __bool__(self) -> bool:
        return bool(self.tap or self.around or self.patches)

    def outside(self, name: str, x: jax.Array) -> jax.Array:
        """A value of `embed` or `final`, as the model goes on with it."""
        if name in self.around:
            x = changed(name, x, self.around[name], self.batch)
        if name in self.tap:
            self.taken[name] = x
        return x

    def layer(self, index: Any) -> Layer:
        """The sites of layer `index`, a number or a traced one."""
        return Layer(self.patches, self.tapped, index, self.batch)

    def slots(self, index: jax.Array) -> dict[str, jax.Array]:
        """{site: the place of layer `index` among those tapped}; past the last for a layer that is not."""
        places = {name: np.full(self.layers, len(held)) for name, held in self.tapped.items()}
        for name, held in self.tapped.items():
            places[name][held] = np.arange(len(held))
        return {name: jnp.asarray(of)[index] for name, of in places.items()}

    def taps(self, values: Mapping[str, Any]) -> dict[str, jax.Array] | None:
        """Output.taps of {site: one value for each tapped layer, in their order}."""
        if not self.tap:
            return None
        result = dict(self.taken)
        for name in self.tap:
            if name not in AROUND:
                layer, site = parsed(name, self.layers)
                held = values[site]
                result[name] = jnp.stack(list(held)) if layer is None else held[self.tapped[site].index(layer)]
        return result


def checked(patch: Any) -> dict[str, Patch]:
    """A patch as a dict. Raises UserError where it is none, or a change in it is no number, array or function."""
    if not isinstance(patch, Mapping) or not all(isinstance(name, str) for name in patch):
        raise UserError(f"patch: {str(patch)[:80]!r}; give {{site: number, array or function (value, batch) -> value}}.")
    for name, change in patch.items():
        if not (callable(change) or hasattr(change, "dtype") or _is_numeric(change)):
            raise UserError(f"patch: {name}: {change!r} is no number, no array and no function (value, batch) -> value.")
    return dict(patch)


def _is_numeric(value: Any) -> bool:
    try:
        return np.asarray(value).dtype.kind in "biuf"
    except ValueError:  # lists of several lengths
        return False


def parsed(name: str, layers: int, dense: bool = True) -> tuple[int | None, str]:
    """(layer, or None for every layer, and its site) of a name. Raises UserError where the model has no such site."""
    match = re.fullmatch(r"layers\.(\*|\d+)\.(\w+)", name)
    if match is None or match[2] not in LAYER:
        word, choices = (match[2], LAYER) if match else (name, [*AROUND, *(f"layers.0.{site}" for site in LAYER)])
        raise UserError(f"tap, patch: no site {name!r}.{nearest(word, choices)}")
    if match[2] == "mlp_act" and not dense:
        raise UserError(f"tap, patch: {name}: a mixture of experts has no mlp_act; take mlp_out.")
    if match[1] == "*":
        return None, match[2]
    if int(match[1]) >= layers:
        raise UserError(f"tap, patch: {name}: the model has layers 0 to {layers - 1}.")
    return int(match[1]), match[2]


def changed(place: str, x: jax.Array, patch: Patch, batch: Mapping) -> jax.Array:
    """A site's value x under a patch. Raises UserError for a patch of another shape."""
    value = patch(x, batch) if callable(patch) else patch
    try:
        return jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape)
    except ValueError as error:
        raise UserError(f"patch: {place} has the shape {x.shape}, and its patch gives {jnp.shape(value)}.") from error
