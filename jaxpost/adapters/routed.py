"""Several adapters of a kind side by side, of which a column of the data says which one a row takes.

    adapter={"name": "routed.lora", "experts": 4, "column": "adapter", "rank": 8}
    adapter={"name": "routed.soft", "experts": 4}                              also routed.prefix
    adapter={"name": "routed.peft", "folders": ("A", "B")}                     two folders of peft's as one

A row of the data, or a problem of a task, has the number of its adapter under the column's name, from 0. All its tokens take
that one, whatever else is packed beside them, and the others get no gradient from them.

A low-rank product is computed for all E and kept for one: E times the cost of one adapter, in two products of plain matrices.
Of prompts every row has the keys of all E, and sees m of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.adapters import lora as low_rank
from jaxpost.adapters import peft as files
from jaxpost.adapters import prompts
from jaxpost.declare import adapter
from jaxpost.errors import UserError
from jaxpost.models import routes
from jaxpost.models.einsum import project
from jaxpost.models.prefix import KeysValues
from jaxpost.types import Batch, Params

COLUMN = "adapter"


class Routed(flax.struct.PyTreeNode):
    """W + scale * A_e B_e: base a kernel [..., I, O] or a quantised one, a [..., E, I, r], b [..., E, r, O]."""

    parts = {"a": "eIr", "b": "erO"}
    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    column: str = flax.struct.field(pytree_node=False)

    @property
    def count(self) -> int:
        """E."""
        return self.a.shape[-3]

    def of_rows(self, batch: Batch) -> "OfRows":
        """The kernel of a batch's rows."""
        return OfRows(self.base, self.a, self.b, routes.numbers(batch, self.column).reshape(-1), self.scale)

    def only(self, number: int) -> low_rank.Lora:
        """The adapter of a number."""
        return low_rank.Lora(self.base, self.a[..., number, :, :], self.b[..., number, :, :], self.scale)

    def project(self, x: jax.Array) -> jax.Array:
        """Raises UserError: the model is to ask `of_rows`."""
        raise UserError(
            "config.adapter: this model's layers do not say which row is which; take an adapter that is not routed."
        )


class OfRows(flax.struct.PyTreeNode):
    """`Routed` where the rows are known: which [T] is each token's number; no leading axes."""

    base: Any
    a: jax.Array
    b: jax.Array
    which: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def project(self, x: jax.Array) -> jax.Array:
        """x [T, I] -> [T, O], in x's dtype."""
        experts, inputs, rank = self.a.shape
        thin = project(x, self.a.swapaxes(0, 1).reshape(inputs, -1)).reshape(-1, experts, rank)
        own = self.which[:, None, None] == jnp.arange(experts)[:, None]
        thin = jnp.where(own, thin, 0).reshape(-1, experts * rank)
        return project(x, self.base) + self.scale * project(thin, self.b.reshape(experts * rank, -1))


class Soft(flax.struct.PyTreeNode):
    """Virtual tokens of each of E prompts: vectors [E,m,D]."""

    vectors: jax.Array
    column: str = flax.struct.field(pytree_node=False)

    @property
    def count(self) -> int:
        """E."""
        return self.vectors.shape[0]

    @property
    def length(self) -> int:
        """The number of places, m."""
        return self.vectors.shape[1]

    def keys_values(self, model: Any, params: Params) -> KeysValues:
        """[L,E,m,K,H] each; a prompt's are computed by the low-rank adapter of its number, if the same column chooses it."""
        return model.keys_values(params, self.vectors, self.column)

    def only(self, number: int) -> prompts.Soft:
        """The prompt of a number."""
        return prompts.Soft(self.vectors[number])


class Prefix(flax.struct.PyTreeNode):
    """Keys, as they are after rotation, and values of each of E prefixes: [L,E,m,K*H] each."""

    k: jax.Array
    v: jax.Array
    column: str = flax.struct.field(pytree_node=False)

    @property
    def count(self) -> int:
        """E."""
        return self.k.shape[1]

    @property
    def length(self) -> int:
        """The number of places, m."""
        return self.k.shape[2]

    def keys_values(self, model: Any, params: Params) -> KeysValues:
        """[L,E,m,K,H] each."""
        return KeysValues(*(x.reshape(*x.shape[:3], model.arch.kv_heads, -1) for x in (self.k, self.v)), self.column)

    def only(self, number: int) -> prompts.Prefix:
        """The prefix of a number."""
        return prompts.Prefix(self.k[:, number], self.v[:, number])


def _together(each: Sequence[Any], column: str) -> Any:
    """E nodes of one weight as one node."""
    if isinstance(first := each[0], low_rank.Lora):
        a, b = (jnp.stack([getattr(one, part) for one in each], axis=-3) for part in "ab")
        return Routed(first.base, a, b, first.scale, column)
    if isinstance(first, prompts.Soft):
        return Soft(jnp.stack([one.vectors for one in each]), column)
    return Prefix(*(jnp.stack([getattr(one, part) for one in each], axis=1) for part in "kv"), column)


def _side_by_side(params: Params, key: jax.Array, make: Sequence[Callable], column: str) -> Params:
    """The tree with the adapters of E functions (params, key) -> params, each of a key of its own, as one."""
    if not isinstance(column, str) or not column.isidentifier():
        raise UserError(f"config.adapter.column: {column!r}; give the name under which rows have their adapter's number.")
    before = flatten_dict(params, sep="/")
    each = [flatten_dict(one(params, jax.random.fold_in(key, i)), sep="/") for i, one in enumerate(make)]

    def leaf(path: str, x: Any) -> Any:
        return x if x is before.get(path) else _together([tree[path] for tree in each], column)

    return unflatten_dict({path: leaf(path, x) for path, x in each[0].items()}, sep="/")


def _several(make: Callable, experts: int, options: dict) -> list[Callable]:
    """The function with its options, once for each adapter."""
    if not isinstance(experts, int) or isinstance(experts, bool) or experts < 1:
        raise UserError(f"config.adapter.experts: {experts!r}; it is a whole number of at least 1.")
    return [lambda params, key: make(params, key, **options)] * experts


@adapter(adds=("a", "b"), merges=False, one="lora.lora")
def lora(
    params: Params,
    key: jax.Array,
    *,
    experts: int = 2,
    column: str = COLUMN,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = low_rank.TARGETS,
    base: str = "",
) -> Params:
    """`experts` LoRA adapters: W + (alpha / rank) A_e B_e, where e is the row's number in the column ("LoRA: Low-Rank
    Adaptation of Large Language Models"). The other keywords are `lora.lora`'s, and so are the errors. Raises UserError for no
    experts.
    """
    options = {"rank": rank, "alpha": alpha, "targets": targets, "base": base}
    return _side_by_side(params, key, _several(low_rank.lora, experts, options), column)


@adapter(adds=("prefix/vectors",), neutral=False, merges=False, one="prompts.soft", completed=prompts.COMPLETED)
def soft(
    params: Params,
    key: jax.Array,
    *,
    experts: int = 2,
    column: str = COLUMN,
    length: int = 20,
    text: str = "",
    ids: Sequence[int] = (),
    scale: float = 1.0,
) -> Params:
    """`experts` soft prompts, of which a row's documents see that of its number in the column ("The Power of Scale for
    Parameter-Efficient Prompt Tuning"). The other keywords are `prompts.soft`'s, and so are the errors. Raises UserError for no
    experts.
    """
    options = {"length": length, "text": text, "ids": ids, "scale": scale}
    return _side_by_side(params, key, _several(prompts.soft, experts, options), column)


@adapter(adds=("prefix/k", "prefix/v"), neutral=False, merges=False, one="prompts.prefix")
def prefix(
    params: Params, key: jax.Array, *, experts: int = 2, column: str = COLUMN, length: int = 20, std: float = 0.02
) -> Params:
    """`experts` prefixes, of which a row's documents see that of its number in the column ("Prefix-Tuning: Optimizing
    Continuous Prompts for Generation"). The other keywords are `prompts.prefix`'s, without its perceptron, and so are the
    errors. Raises UserError for no experts.
    """
    options = {"length": length, "std": std}
    return _side_by_side(params, key, _several(prompts.prefix, experts, options), column)


def recorded(*, folders: Sequence[str], column: str = COLUMN, base: str = "") -> dict:
    """The entry of the adapters that folders hold. Raises UserError for those that differ in more than their numbers."""
    if isinstance(folders, str) or not folders:
        raise UserError(f"config.adapter.folders: {folders!r}; give a list of folders that peft saved.")
    first, *others = [files.recorded(folder=folder, base=base) for folder in folders]
    for folder, entry in zip(folders[1:], others, strict=True):
        if differ := [name for name in {**first, **entry} if first.get(name) != entry.get(name)]:
            name = differ[0]
            raise UserError(
                f"config.adapter.folders: {name} is {first.get(name)!r} in {folders[0]} and {entry.get(name)!r} in {folder}; "
                "adapters that lie side by side are alike in all but their weights."
            )
    kinds = {"lora.lora": "routed.lora", "prompts.soft": "routed.soft", "prompts.prefix": "routed.prefix"}
    if first["name"] not in kinds:
        raise UserError(f"config.adapter.folders: {folders[0]} holds {first['name']}, of which rows cannot choose one.")
    return {**first, "name": kinds[first["name"]], "experts": len(folders), "column": column}


@adapter(recorded=recorded, reads=("folders",))
def peft(params: Params, key: jax.Array, *, folders: Sequence[str], column: str = COLUMN, base: str = "") -> Params:
    """The adapters of several `peft` folders with their weights, numbered in this order; base: as in adapters/lora.py.

    Raises UserError for folders that differ in more than their weights, and what `peft.peft` raises.
    """
    recorded(folders=folders, column=column, base=base)
    make = [lambda params, key, folder=folder: files.peft(params, key, folder=folder, base=base) for folder in folders]
    return _side_by_side(params, key, make, column)
