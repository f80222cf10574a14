"""Models that are made of others: several whose logits are combined, and one with patches. Each is a model like any other
(protocol.py), so it is scored, sampled, evaluated and learned from without a word elsewhere.

    model={"name": "fused", "of": ["LARGE", "TUNED", "SMALL"], "mix": {"name": "FILE.py:mine"}}
    model={"name": "patched", "of": "FOLDER", "patch": (("layers.3.resid_post", "FILE.py:steer"),)}
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpost.config.resolve import resolve
from jaxpost.errors import UserError, first_line
from jaxpost.models import heads, loading, sites
from jaxpost.models.protocol import Model
from jaxpost.types import Batch, Output, Params


class FusedHead(flax.struct.PyTreeNode):
    """The heads of several models, for their hidden states side by side."""

    heads: tuple
    widths: tuple[int, ...] = flax.struct.field(pytree_node=False)
    mix: Callable = flax.struct.field(pytree_node=False)

    @property
    def vocab(self) -> int:
        """The size of the vocabulary that all share."""
        return heads.vocab(self.heads[0])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [R, sum of the widths] -> [R,V] float32."""
        starts = [sum(self.widths[:i]) for i in range(len(self.widths))]
        parts = [hidden[:, start : start + width] for start, width in zip(starts, self.widths, strict=True)]
        return self.mix(*(heads.logits(part, head) for part, head in zip(parts, self.heads, strict=True)))


@dataclasses.dataclass(frozen=True)
class Fused:
    """Several models of one vocabulary as one: mix([R,V], ...) -> [R,V] of their logits, in the order of `models`.

    Its parameters are {"0": the first's, ...}, its sites those of the models with the number in front: "0.layers.3.resid_post".
    Its hidden states are the models', side by side.
    """

    models: tuple[Model, ...]
    mix: Callable
    names: tuple[str, ...] = ()  # the folders of their weights; none for fresh ones

    @property
    def dtype(self) -> Any:
        """The first model's."""
        return self.models[0].dtype

    @property
    def vocab(self) -> int:
        """The size of the vocabulary."""
        return self.models[0].vocab

    @property
    def width(self) -> int:
        """Of all hidden states together."""
        return sum(model.width for model in self.models)

    @property
    def max_positions(self) -> int:
        """As many as every model takes."""
        return min(model.max_positions for model in self.models)

    @property
    def parts(self) -> tuple[str, ...]:
        """The models that the weights are of."""
        return self.names

    @property
    def tokenizer(self) -> str:
        """The folder of the first model."""
        return self.names[0] if self.names else ""

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of each."""
        return {str(i): model.init(jax.random.fold_in(key, i)) for i, model in enumerate(self.models)}

    def weights(self, mesh, seed: int) -> Params:
        """Those of the folders, or fresh ones where there are none."""
        if not self.names:
            return self.init(jax.random.PRNGKey(seed))
        return {str(i): _weights(name, mesh, seed) for i, name in enumerate(self.names)}

    def forward(self, params: Params, batch: Batch, cache: Any = None, *, tap=(), patch=None) -> Output:
        """The models' outputs as one."""
        tap, outputs = [tap] if isinstance(tap, str) else tap, []
        self._check(tap, patch or {})
        for i, model in enumerate(self.models):
            own = {k: x[i] if k == "rotations" else x for k, x in batch.items()}
            first = f"{i}."
            options = {
                "tap": [name.removeprefix(first) for name in tap if name.startswith(first)],
                "patch": {k.removeprefix(first): x for k, x in (patch or {}).items() if k.startswith(first)},
            }
            outputs.append(model.forward(params[str(i)], own, None if cache is None else cache[i], **options))
        head = FusedHead(tuple(out.head for out in outputs), tuple(model.width for model in self.models), self.mix)
        taps = {f"{i}.{name}": x for i, out in enumerate(outputs) for name, x in (out.taps or {}).items()}
        kept = None if cache is None else tuple(out.cache for out in outputs)
        return Output(jnp.concatenate([out.hidden for out in outputs], axis=-1), head, kept, taps=taps or None)

    def _check(self, tap: Sequence[str], patch: Mapping) -> None:
        for name in (*tap, *patch):
            first, _, _ = name.partition(".")
            if not first.isdigit() or int(first) >= len(self.models):
                count = len(self.models)
                raise UserError(f"tap, patch: {name!r} names none of {count} models; begin with a number, as 0.{name}.")

    def make_cache(self, batch_size: int, length: int) -> tuple:
        """One of each."""
        return tuple(model.make_cache(batch_size, length) for model in self.models)

    def cache_axes(self) -> tuple:
        """Those of each."""
        return tuple(model.cache_axes() for model in self.models)

    def rotations(self, cache: Any) -> tuple:
        """Those of each."""
        return tuple(model.rotations(own) for model, own in zip(self.models, cache, strict=True))

    def prepared(self, params: Params) -> Params:
        """Each as its model's decoding reads it."""
        return {str(i): model.prepared(params[str(i)]) for i, model in enumerate(self.models)}

    def is_prepared(self, params: Params) -> bool:
        """Whether each is."""
        return all(model.is_prepared(params[str(i)]) for i, model in enumerate(self.models))


@dataclasses.dataclass(frozen=True, eq=False)
class Patched:
    """A model whose forward always has these patches (sites.py): a steered model, one with heads cut out, one with another's
    activations. Further patches of a call come on top.

    A compiled program belongs to one object of this class, since a function cannot be compared; keep it to use it again.
    """

    model: Model
    patch: Mapping[str, sites.Patch]
    name: str = ""  # the folder of its weights; "" for fresh ones

    def forward(self, params: Params, batch: Batch, cache: Any = None, *, tap=(), patch=None) -> Output:
        """The model's, patched."""
        return self.model.forward(params, batch, cache, tap=tap, patch={**self.patch, **(patch or {})})

    def weights(self, mesh, seed: int) -> Params:
        """Those of the folder, or fresh ones where there is none."""
        return _weights(self.name, mesh, seed) if self.name else self.model.init(jax.random.PRNGKey(seed))

    @property
    def parts(self) -> tuple[str, ...]:
        """The model that the weights are of."""
        return (self.name,) if self.name else ()

    @property
    def tokenizer(self) -> str:
        """The model's folder."""
        return self.name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "arch":  # it is no architecture that could be written as a folder
            raise AttributeError(name)
        return getattr(self.model, name)


def _described(name: str, dtype: str, remat: str, attention: str) -> loading.ModelSpec:
    """The spec of a model that becomes part of one. Raises UserError for one with weights besides the model's own."""
    spec = loading.describe(name, dtype=dtype, remat=remat, attention=attention, text=False)
    if spec.adapter or spec.leaves:
        raise UserError(f"config.model.of: {name} has an adapter or a head of its own; make a folder of it by jaxpost.export.")
    return spec


def _weights(name: str, mesh, seed: int) -> Params:
    spec = loading.describe(name, text=False)
    loading.check(spec)
    return loading.weights(spec, mesh, seed)


def fused(
    *,
    of: Sequence[str],
    mix: Mapping | str | Callable,
    dtype: str = "float32",
    remat: str = "none",
    attention: str = "auto",
) -> Fused:
    """A model whose logits are mix(logits [R,V] of each model) -> [R,V].

    of: folders, workdirs or names on the hub, of one vocabulary. mix: a function, or its entry with keywords. dtype, remat,
    attention: as a recipe has them. Source: the form that "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits
    Fusion" and "Tuning Language Models by Proxy" share. Raises UserError for vocabularies that differ, and for a mix that does
    not take the logits of so many models or gives another shape.
    """
    if not of:
        raise UserError("config.model: fused: `of` names no model; give a list of folders, workdirs or names on the hub.")
    specs = [_described(name, dtype, remat, attention) for name in of]
    if len(sizes := dict.fromkeys(str(spec.transformer.vocab) for spec in specs)) != 1:
        raise UserError(f"config.model: fused: the vocabularies have {', '.join(sizes)} tokens; fuse models of one.")
    function = mix if callable(mix) else resolve(mix, "models")
    _check_mix(function, len(specs), specs[0].transformer.vocab)
    return Fused(tuple(spec.transformer for spec in specs), function, tuple(of))


def _check_mix(mix: Callable, count: int, vocab: int) -> None:
    """Traces a mix on logits of two rows."""
    logits = jax.ShapeDtypeStruct((2, vocab), jnp.float32)
    place = f"config.model: fused: mix {getattr(getattr(mix, 'func', mix), '__name__', mix)}"
    try:
        result = jax.eval_shape(mix, *[logits] * count)
    except UserError:
        raise
    except Exception as error:  # of somebody's function
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{place} fails on the logits [R,V] of {count} models, as `of` names them: {why}.") from error
    if getattr(result, "shape", None) != logits.shape:
        raise UserError(f"{place} gives {result} for logits {list(logits.shape)}; it gives logits of that shape.")


def patched(
    *,
    of: str,
    patch: Mapping[str, Any] | Sequence[tuple[str, Any]],
    dtype: str = "float32",
    remat: str = "none",
    attention: str = "auto",
) -> Patched:
    """A model with patches: {site: number, function (value, batch) -> value, or the function's name FILE.py:function}; in a
    recipe, whose keys take no dots, pairs (site, change). of: a folder, a workdir or a name on the hub. dtype, remat,
    attention: as a recipe has them. Raises UserError for a patch that is none.
    """
    changes = {k: resolve(change, "models") if isinstance(change, str) else change for k, change in dict(patch).items()}
    return Patched(_described(of, dtype, remat, attention).transformer, sites.checked(changes), of)
