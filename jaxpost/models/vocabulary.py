"""A larger vocabulary: tokens that are added to a tokenizer, and their rows of the embedding and the head.

The rows of old tokens keep their numbers, and so do their logits.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost import sharding, tokenizer
from jaxpost.errors import UserError
from jaxpost.models.transformer import Transformer
from jaxpost.storage import cloud
from jaxpost.types import Params


def grown(
    model: Transformer,
    params: Params,
    words: Any,
    config: Mapping,
    mesh,
    *,
    add: Sequence[str],
    by: str | Mapping | np.ndarray = "mean",
    multiple: int = 1,
    special: bool = False,
) -> tuple[Transformer, Params, Any, dict]:
    """(model, params, tokenizer, config.json's fields) with the tokens `add`, whose ids follow those of the tokenizer. Rows
    that the model has without a token are taken first.

    by: what the new rows are. "mean" is the mean of the rows of all tokens. "merged" is the mean of the rows of the tokens that
    the text of a new token was before. Else they are given: an array [n,D], or {"embed": [n,D], "head": [n,D]}, or the name of
    a .npy or .npz file with these; a head that is not given has means. multiple: the vocabulary is rounded up to one, by rows
    that are means, of no token and never drawn (`suppressed`). special: whether decoding for a reader leaves the tokens out.

    Raises UserError for tokens that are there already, repeat or are empty, for given rows of another shape, for a text that
    the tokenizer cannot encode, and for weights inside an adapter.
    """
    if not hasattr(model, "arch"):
        raise UserError(
            f"add: the model is made by {config.get('name')}, and its embedding is its own; add tokens to its parts."
        )
    if "head/bias" in (flat := flatten_dict(params, sep="/")):
        raise UserError(
            "add: the model's head has a bias a token, as encoders' have, and is not extended; add tokens to a decoder."
        )
    _check_new(add, words, multiple)
    adapted, ids = _with_tokens(words, add, special)
    vocab = max(model.arch.vocab, int(ids.max()) + 1)
    vocab += -vocab % multiple
    old, rows, pieces = np.array(sorted(i for i in words.get_vocab().values() if i < model.arch.vocab)), {}, None
    if isinstance(by, str) and by == "merged":
        pieces = [tokenizer.encode(words, token) for token in add]
        tokenizer.check_ids(np.concatenate(pieces), model.arch.vocab, words, "add")
    elif not isinstance(by, str) or by != "mean":
        rows = _given(by, len(add), model.arch.width)
    model = dataclasses.replace(model, arch=dataclasses.replace(model.arch, vocab=vocab))
    for name in ("embed", *["head"] * (not model.arch.tied)):
        if not isinstance(weight := flat.get(f"{name}/weight"), jax.Array):
            raise UserError(f"{name}/weight is inside an adapter; merge it first: python -m jaxpost.export.")
        shape = {name: {"weight": jax.ShapeDtypeStruct((vocab, weight.shape[1]), weight.dtype)}}
        (place,) = jax.tree.leaves(sharding.stored(mesh, shape))
        make = functools.partial(_with_rows, old=old, ids=ids, vocab=vocab, pieces=pieces, given=rows.get(name))
        flat[f"{name}/weight"] = jax.jit(make, out_shardings=place)(weight)
    return model, unflatten_dict(flat, sep="/"), adapted, {**config, "vocab_size": vocab}


def suppressed(before: Sequence[int], old: int, new: int, words: Any) -> tuple[int, ...]:
    """The ids that no completion has, of a vocabulary that grew from `old` to `new`: those of before and the new rows, unless
    the tokenizer has a token for them. `transformers` reads them as generation_config.json's suppress_tokens. A row that is a
    mean, as its `resize_token_embeddings(pad_to_multiple_of=...)` makes them too, has a probability like others.
    """
    return tuple(sorted({*before, *range(old, new)} - set(words.get_vocab().values())))


def _check_new(add: Sequence[str], words: Any, multiple: int) -> None:
    if isinstance(add, str) or not add or not all(isinstance(token, str) and token for token in add):
        raise UserError(f"add: {add!r}; give a list of one token or more, none of them empty.")
    known = words.get_vocab()
    for i, token in enumerate(add):
        if token in known or token in add[:i]:
            raise UserError(f"add: {token!r} is {'named twice' if token in add[:i] else 'a token already'}; leave it out.")
    if multiple < 1:
        raise UserError(f"multiple: {multiple}; it is 1 at least.")


def _with_tokens(words: Any, add: Sequence[str], special: bool) -> tuple[Any, np.ndarray]:
    """(a copy of the tokenizer with further tokens, their ids [n])."""
    from tokenizers import AddedToken

    adapted = copy.deepcopy(words)
    # Normalised, a token would get what the tokenizer puts in front of texts, and be found in none.
    adapted.add_tokens([AddedToken(token, normalized=False, special=special) for token in add], special_tokens=special)
    return adapted, np.array(adapted.convert_tokens_to_ids(list(add)))


def _with_rows(weight: jax.Array, *, old, ids, vocab: int, pieces: list | None, given: np.ndarray | None) -> jax.Array:
    """A weight [V,D] with `vocab` rows, of which those of the new `ids` [n] are given, or the mean of their pieces' rows, or
    like all others the mean of the rows `old`.
    """
    mean = jnp.mean(weight[old], axis=0)
    new = mean if given is None else given
    if pieces is not None:
        new = jnp.stack([jnp.mean(weight[np.array(one)], axis=0) for one in pieces])
    rows = jnp.concatenate([weight, jnp.broadcast_to(mean, (vocab - len(weight), len(mean)))])
    return rows.at[ids].set(new.astype(weight.dtype))


def _given(by: str | Mapping | np.ndarray, count: int, width: int) -> dict[str, np.ndarray]:
    """The new rows of the embedding, and of the head where they are given, [n,D] each."""
    place = "by"
    if isinstance(by, str):
        place, path = by, cloud.path(by)
        if not by.endswith((".npy", ".npz")) or not path.exists():
            raise UserError(f"by: {by!r} is neither 'mean', 'merged' nor a .npy or .npz file with the new tokens' rows.")
        by = _read(path)
    rows = dict(by) if isinstance(by, Mapping) else {"embed": by}
    if "embed" not in rows or rows.keys() - {"embed", "head"}:
        raise UserError(f"{place}: has the arrays {', '.join(rows)}; give `embed`, and maybe `head`.")
    for name, x in rows.items():
        if np.shape(x) != (count, width) or not np.isfinite(np.asarray(x, np.float32)).all():
            raise UserError(f"{place}: {name} is of shape {np.shape(x)}; give {count} rows of {width} finite numbers.")
    return {name: np.asarray(x, np.float32) for name, x in rows.items()}


def _read(path: epath.Path) -> Any:
    """The array of a .npy file, or those of a .npz file by name. Raises UserError for a file that is no such thing."""
    try:
        with path.open("rb") as stream:
            content = np.load(stream, allow_pickle=False)
            return {name: content[name] for name in content.files} if path.suffix == ".npz" else content
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as numpy's arrays ({error}).") from error
