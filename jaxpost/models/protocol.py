"""What the rest of the package asks of a model. `transformer.Transformer` is one; a file of yours may make another.

    def make(*, width: int = 64) -> Model: ...          model={"name": "FILE.py:make", "width": 128}

A model is a frozen dataclass, so that compiled programs know it again. Its parameters are a tree of dicts, whose paths the
sharding rules read (`sharding.py`): a weight with a name of the transformer's lies as that one does, any other is whole on each
device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from jaxpost.errors import UserError
from jaxpost.types import Batch, Output, Params


@runtime_checkable
class Model(Protocol):
    """What training, scoring and evaluation ask.

    Three more are read where a model has them: `weights(mesh, seed) -> params`, in place of `init`, for weights that come from
    files; `parts`, the names of the models that they are of, so that what is stored of this one is made again when one of them
    changes; and `tokenizer`, a folder, which counts where the recipe names none.
    """

    @property
    def dtype(self) -> Any:
        """Of the computation."""

    @property
    def vocab(self) -> int:
        """V: ids are below it."""

    @property
    def width(self) -> int:
        """D, of the hidden states."""

    @property
    def max_positions(self) -> int:
        """The most tokens of a document."""

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""

    def forward(
        self, params: Params, batch: Batch, cache: Any = None, *, tap: Sequence[str] = (), patch: Mapping | None = None
    ) -> Output:
        """Hidden states [B,S,D], the head that turns them into logits, the new cache if there is one, and the taps (sites.py).

        Each row, and each document of a row, is by itself. With a cache the batch may have `lengths` [B], after which a row is
        padding, and `rotations`, which are what the method of that name gave.
        """


@runtime_checkable
class Sampled(Model, Protocol):
    """What the sampler asks besides."""

    def make_cache(self, batch_size: int, length: int) -> Any:
        """An empty cache for rows of up to `length` tokens."""

    def cache_axes(self) -> Any:
        """The cache's tree with axis letters in place of arrays: B first, and T where each token has a slot, that of its
        position. An array without T is a row's state, as a recurrent model has.
        """

    def rotations(self, cache: Any) -> Any:
        """What a loop over tokens computes once for a cache of this size; may be empty."""

    def prepared(self, params: Params) -> Params:
        """The weights as decoding reads them best; `forward` takes both."""

    def is_prepared(self, params: Params) -> bool:
        """Whether `prepared` made these."""


def functions(entry: Mapping) -> list:
    """The functions that a function-made model's entry names: its own, and those that composed.py's models take."""
    patch = entry.get("patch", {})
    changes = patch.values() if isinstance(patch, Mapping) else [one[-1] for one in patch if isinstance(one, (list, tuple))]
    named = [*changes, entry.get("mix")]
    return [entry, *(one for one in named if isinstance(one, (str, Mapping)) or callable(one))]


def check(model: Any, place: str, kind: type = Model) -> None:
    """Raises UserError, naming what it lacks, for something that is no model, or none that can be sampled."""
    asked = [name for one in kind.__mro__ if one in (Model, Sampled) for name in vars(one) if not name.startswith("_")]
    lacking = sorted(name for name in asked if not hasattr(model, name))
    if lacking:
        what = "be sampled" if kind is Sampled and isinstance(model, Model) else "be a model"
        raise UserError(f"{place} {type(model).__name__} lacks {', '.join(lacking)} and cannot {what} (models/protocol.py).")
    if kind is Sampled and getattr(getattr(model, "arch", None), "attend", "causal") == "whole":
        raise UserError(f"{place} each token of the model sees those behind it (attend), so it cannot be sampled.")
