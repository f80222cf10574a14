"""Weights that differ by row: a column [B,S] of the batch says which of E a document takes (adapters/routed.py).

Such a weight is a node with `column`, the name of that column, `count`, the number E, and `only(number)`, the node with one of
the E alone. One around a kernel also has `of_rows(batch)`, the kernel of this batch's rows, which the model's layers ask for
where they are computed. `params["prefix"]` may be one too (prefix.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.errors import UserError
from jaxpost.types import Batch, Params


def _is_routed(x: Any) -> bool:
    return bool(getattr(x, "column", ""))


def of_rows(layer: Params, batch: Batch) -> Params:
    """A layer's weights for the rows of a batch."""

    def bound(x):
        return x.of_rows(batch) if hasattr(x, "of_rows") else x

    return jax.tree.map(bound, layer, is_leaf=lambda x: hasattr(x, "of_rows"))


def numbers(batch: Batch, column: str) -> jax.Array:
    """[B,S] int32: each token's number in a column [B,S] or [B,1]. Raises UserError where the batch has no such column."""
    if column not in batch:
        raise UserError(
            f"the model's rows choose among its adapters by the column {column!r}, and this batch has none; give it, or take "
            "one adapter alone (docs/adapters.md)."
        )
    return jnp.broadcast_to(batch[column], batch["positions"].shape).astype(jnp.int32)


def columns(params: Params | None) -> dict[str, int]:
    """{column: E} of the weights that differ by row. Raises UserError where one column chooses among E and among another E."""
    counts: dict[str, int] = {}
    for x in jax.tree.leaves(params, is_leaf=_is_routed):
        if _is_routed(x) and counts.setdefault(x.column, x.count) != x.count:
            raise UserError(
                f"config.adapter: the column {x.column!r} chooses among {counts[x.column]} and among {x.count}; give all "
                "adapters of a column as many experts, or columns of their own."
            )
    return counts


def only(params: Params, number: int, column: str = "") -> Params:
    """The parameters with adapter `number` of a column, or of every column, for all rows. Raises UserError for no such one."""
    counts = {name: count for name, count in columns(params).items() if name == column or not column}
    if not counts or not 0 <= number < min(counts.values()):
        most = f"it has adapters 0 to {min(counts.values()) - 1}" if counts else "its rows do not choose among adapters"
        raise UserError(f"adapter {number} of the model: {most}.")

    def chosen(x):
        return x.only(number) if _is_routed(x) and x.column in counts else x

    return jax.tree.map(chosen, params, is_leaf=_is_routed)


def check(row: Mapping, counts: Mapping[str, int], place: str) -> None:
    """Raises UserError, with the place, for a row that does not say which of E it takes."""
    for column, count in counts.items():
        value = row.get(column)
        if not isinstance(value, int | float | np.number) or isinstance(value, bool) or value not in range(count):
            raise UserError(
                f"{place}: {column} is {value!r}; config.adapter has {count} adapters, and a row names one, 0 to {count - 1}."
            )


def of_records(records: Sequence[Mapping], counts: Mapping[str, int]) -> dict[str, list]:
    """{column: each record's number}. Raises UserError for a record that does not say which of E it takes."""
    for i, record in enumerate(records):
        check(record, counts, f"problem {i}")
    return {column: [record[column] for record in records] for column in counts}


def of_prompts(columns: Mapping[str, Any], counts: Mapping[str, int], prompts: int) -> dict[str, np.ndarray]:
    """{column: [P] int32} of numbers, one for each of so many prompts. Raises UserError for others than `counts` asks for."""
    if columns.keys() != counts.keys():
        asked = ", ".join(f"{name} (0 to {count - 1})" for name, count in counts.items()) or "none"
        raise UserError(
            f"columns: {', '.join(columns) or 'none'} given, and the model's rows choose among its adapters by {asked}; give "
            "these, or take one adapter alone (docs/adapters.md)."
        )
    numbers = {name: np.asarray(values) for name, values in columns.items()}
    for name, values in numbers.items():
        if values.shape != (prompts,) or not np.isin(values, np.arange(counts[name])).all():
            raise UserError(
                f"columns: {name} is {values.tolist()}; give {prompts} numbers of 0 to {counts[name] - 1}, one for each row."
            )
    return {name: values.astype(np.int32) for name, values in numbers.items()}
