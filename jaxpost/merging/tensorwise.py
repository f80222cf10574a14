"""Merges that look at one tensor at a time, which is nearly all of them.

A model's `params` are its tensors {name: array} as Hugging Face's files have them: each layer and each expert apart, kernels
[out, in], projections that the family fuses in one piece. A merge is `(params, *others, keywords) -> params`. One that computes
each tensor from the models' tensors of the same name is written as a function of those:

    @tensorwise(base=True, each=("weight",))
    def mine(base, *tuned, weight=1.0): ...      arrays in float32, all of one shape -> an array of that shape

The arrays are the function's own, so it may change them. The decorator makes a merge of it. Every keyword may go by the
tensor's name or depth (coefficients.py). So the same function serves a dict of arrays, a stage, and files that are read and
written one tensor after another.

A function that computes each element from those at its place is given pieces of a tensor, in threads. If it needs something of
the whole tensor besides, such as a norm or a threshold, a second function reads all pieces first: `summary`.
"""

import collections
import functools
import hashlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxpost.errors import UserError
from jaxpost.merging import coefficients
from jaxpost.models import tensors
from jaxpost.types import Params

BLOCK = 2**18  # numbers of a tensor that are read, computed with and rounded at a time: they stay in the processor's cache
AHEAD = 2  # tensors that are computed while an earlier one is written


class Tensorwise(NamedTuple):
    """What `tensorwise` declares; function: that of one tensor."""

    function: Callable
    base: bool
    each: tuple[str, ...]
    statistics: tuple[str, ...]
    elementwise: bool
    summary: Callable | None


class Piece(NamedTuple):
    """Rows of a tensor of every model; place: the number of the tensor's elements before them."""

    sources: Sequence[Any]
    rows: slice
    place: int

    def arrays(self, models: Sequence[int] | None = None, most: int | None = None) -> list[np.ndarray]:
        """The rows of the models (of all, if None) in float32, or the first `most` of them; the caller's own."""
        stop = self.rows.stop if most is None else min(self.rows.start + most, self.rows.stop)
        sources = self.sources if models is None else [self.sources[i] for i in models]
        return [widened(source[self.rows.start : stop]) for source in sources]


def tensorwise(
    *,
    base: bool = False,
    each: Sequence[str] = (),
    statistics: Sequence[str] = (),
    elementwise: bool = False,
    summary: Callable | None = None,
) -> Callable:
    """Makes a merge of a function (tensor, *others, keywords) -> tensor, whose arguments say how many models it takes.

    base: whether the first model is the one that the others were tuned from. each: keywords that every model (but the base)
    has its own value of; the function gets a list. statistics: keywords that are, for each such model, arrays by the tensors'
    names, or a folder with them; the function gets a list of arrays, or None for a tensor without. elementwise: whether each
    element depends only on those at its place, so that the function is given pieces. summary: of an elementwise merge, a
    function (pieces, keywords) -> an entry for each Piece, which the merge's function gets as its keyword `summary`.

    A keyword `seed` is a number of its own for each tensor, made of the setting and the tensor's name.
    """

    def declare(function: Callable) -> Callable:
        @functools.wraps(function)
        def merge(params: Params, *others: Params, **settings) -> Params:
            models, bound = [params, *others], functools.partial(merge, **settings)
            check_alike(models)
            layers = 1 + max((coefficients.layer_of(name) or 0 for name in params), default=0)
            check(bound, {name: tuple(x.shape) for name, x in params.items()}, len(models), layers)
            dtypes = {name: np.dtype(x.dtype) for name, x in params.items()}
            return {name: merged(bound, name, models, layers, dtypes[name]) for name in params}

        parameters = inspect.signature(function).parameters.values()
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and not (summary and p.name == "summary")]
        # Each may go by name and depth, so the function's hints are not what a recipe gives.
        keywords = [p.replace(annotation=Any) for p in keywords]
        models = [inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)]
        models += [inspect.Parameter("others", inspect.Parameter.VAR_POSITIONAL)]
        merge.__signature__ = inspect.Signature([*models, *keywords])
        merge.tensorwise = Tensorwise(function, base, tuple(each), tuple(statistics), elementwise, summary)
        return merge

    return declare


def declaration(merge: Callable) -> Tensorwise | None:
    """What a merge, with or without keywords bound, declares; None for one that takes whole models."""
    return getattr(getattr(merge, "func", merge), "tensorwise", None)


def check_alike(models: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError, naming the tensor, where a model has other tensors or shapes than the first, or is quantised."""
    first = models[0]
    for number, model in enumerate(models, start=1):
        if inner := [name for name, x in model.items() if not hasattr(x, "shape")]:
            raise UserError(
                f"merge: {inner[0]} is no array; jaxpost.models.tensors.of_tree makes the {{name: array}} that a merge takes."
            )
        if lacking := [*(first.keys() - model.keys()), *(model.keys() - first.keys())]:
            holder = number if min(lacking) in model else 1
            raise UserError(
                f"merge: only model {holder} has {min(lacking)}; merge models of one architecture, adapters merged."
            )
        for name, x in model.items():
            if tuple(x.shape) != tuple(first[name].shape):
                shapes = f"{tuple(first[name].shape)} in model 1 and {tuple(x.shape)} in model {number}"
                raise UserError(f"merge: {name} is {shapes}; merge models of one architecture.")
            if np.dtype(x.dtype).name not in ("float64", "float32", "float16", "bfloat16"):
                raise UserError(
                    f"merge: {name} is quantised, and what is merged are full weights; take the models unquantised."
                )


def check(merge: Callable, shapes: Mapping[str, tuple[int, ...]], count: int, layers: int) -> None:
    """Tries a merge on random numbers: of all tensors for which its settings are the same, on the smallest of as many axes.
    Raises UserError where the settings or the number of models do not suit it.
    """
    takes = declaration(merge)
    parameters = inspect.signature(takes.function if takes else merge).parameters.values()
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    most = math.inf if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(placed)
    if not len(placed) <= count <= most:
        wanted = f"{len(placed)} models" if most == len(placed) else f"{len(placed)} or more models"
        wanted += ", the base first" if takes and takes.base else ""
        raise UserError(f"{_name(merge)}: it takes {wanted}; {count} given.")
    if takes is None:
        return
    _check_patterns(merge, shapes)
    rng, tried = np.random.default_rng(0), set()
    for name, shape in sorted(shapes.items(), key=lambda item: math.prod(item[1])):
        settings = _settings(merge, name, count, layers)
        statistics = {key: _statistics(merge, key, name, count) for key in takes.statistics}
        about = {key: value for key, value in settings.items() if key != "seed"}
        kind = repr((len(shape), about, {key: of is None for key, of in statistics.items()}))
        if kind not in tried:
            ones = {key: of and [_ones(x.shape) for x in of] for key, of in statistics.items()}
            _computed(merge, name, [rng.normal(size=shape).astype(np.float32) for _ in range(count)], settings, ones)
            tried.add(kind)


def _ones(shape: tuple[int, ...]) -> np.ndarray:
    """Positive numbers; a square matrix of them has an inverse."""
    return np.ones(shape, np.float32) + (np.eye(*shape, dtype=np.float32) if len(shape) == 2 else 0)


def merged(merge: Callable, name: str, models: Sequence[Mapping[str, Any]], layers: int, dtype: Any = np.float32) -> np.ndarray:
    """One tensor of a merge, computed in float32 and rounded once to dtype.

    models: of each {name: array}, or what is read when it is sliced (`models.tensors`). Raises UserError for a result with NaN
    or infinity.
    """
    sources, count = [model[name] for model in models], len(models)
    statistics = {key: _statistics(merge, key, name, count) for key in declaration(merge).statistics}
    return _computed(merge, name, sources, _settings(merge, name, count, layers), statistics, dtype)


def _computed(
    merge: Callable, name: str, sources: Sequence[Any], settings: dict, statistics: dict, dtype: Any = np.float32
) -> np.ndarray:
    """`merged` of the models' tensors, with the keywords for them."""
    takes, shape = declaration(merge), tuple(sources[0].shape)
    if takes.summary:  # what is far away is read once
        sources = [source[:] if getattr(source, "remote", False) else source for source in sources]
    pieces, out = _pieces(sources), np.empty(shape, dtype)
    if takes.elementwise:
        summary = _called(merge, name, lambda: takes.summary(pieces, **settings)) if takes.summary else None

        def part(number: int) -> np.ndarray:
            piece = pieces[number]
            keywords = {key: of and [widened(x[piece.rows]) for x in of] for key, of in statistics.items()}
            keywords |= {"summary": summary[number]} if takes.summary else {}
            return _apply(merge, name, piece.arrays(), settings | keywords)
    else:
        keywords = {key: of and [_whole_array(x) for x in of] for key, of in statistics.items()}
        whole = _apply(merge, name, [_whole_array(source) for source in sources], settings | keywords)

        def part(number: int) -> np.ndarray:
            return whole[pieces[number].rows]

    def finish(number: int) -> None:
        out[pieces[number].rows] = rounded(part(number), dtype, name)

    each_of(range(len(pieces)), finish)
    return out


_POOL = ThreadPoolExecutor(2 * os.cpu_count())  # some compute while others wait for the disk


def each_of(items: Iterable, function: Callable) -> list:
    """function(item) of every item, in order, in threads."""
    return list(_POOL.map(function, items))


def _pieces(sources: Sequence[Any]) -> list[Piece]:
    """The tensors of one shape in pieces."""
    first, *inner = sources[0].shape
    size = math.prod(inner)
    length = max(1, BLOCK // max(1, size))
    return [Piece(sources, slice(at, min(at + length, first)), at * size) for at in range(0, first, length)]


def widened(array: Any) -> np.ndarray:
    """A copy in float32, in the order of the files."""
    return np.array(array, np.float32, order="C")


def _whole_array(source: Any) -> np.ndarray:
    """A copy in float32 of what gives rows when it is sliced."""
    out = np.empty(source.shape, np.float32)

    def copy(piece: Piece) -> None:
        out[piece.rows] = source[piece.rows]

    each_of(_pieces([source]), copy)
    return out


def stream(
    merge: Callable, models: Sequence[Mapping[str, Any]], names: Iterable[str], layers: int, dtype: Any = np.float32
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of a merge, in the order of the names; the next ones are computed while the last is used.

    A merge without `tensorwise` gets all tensors of all models at once.
    """
    check_alike(models)
    if declaration(merge) is None:
        result = _whole(merge, models)
        yield from ((name, rounded(result[name], dtype, name)) for name in names)
        return
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = collections.deque()
        for name in names:
            waiting.append((name, pool.submit(merged, merge, name, models, layers, dtype)))
            if len(waiting) > AHEAD:
                name, result = waiting.popleft()
                yield name, result.result()
        for name, result in waiting:
            yield name, result.result()


def _whole(merge: Callable, models: Sequence[Mapping[str, Any]]) -> Params:
    """The tensors of a merge that takes whole models. Raises UserError where it gives other names or shapes."""
    arrays = [{name: _whole_array(source) for name, source in model.items()} for model in models]
    shapes = {name: x.shape for name, x in arrays[0].items()}
    result = _called(merge, "the merge", lambda: merge(*arrays))
    if not isinstance(result, Mapping) or {name: np.shape(x) for name, x in result.items()} != shapes:
        raise UserError(f"{_name(merge)}: it gives other names or shapes than the first model has.")
    return result


def rounded(array: Any, dtype: Any, name: str) -> np.ndarray:
    """The numbers in a format for files. Raises UserError where they are not finite or beyond the format's."""
    array, finite = np.asarray(array), bool(np.isfinite(array).all())
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype, copy=False)
    if finite and (np.dtype(dtype) != np.float16 or np.isfinite(result).all()):
        return result
    beyond = "has values beyond float16's; take bfloat16 or float32" if finite else "has NaN or infinity in it"
    raise UserError(f"merge: {name} {beyond}.")


def _settings(merge: Callable, name: str, count: int, layers: int) -> dict[str, Any]:
    """The keywords of a merge for one tensor, but for statistics."""
    takes, keywords = declaration(merge), getattr(merge, "keywords", {})
    depth, out = coefficients.depth_of(name, layers), {}
    for parameter in inspect.signature(takes.function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY or (key := parameter.name) in takes.statistics:
            continue
        if takes.summary and key == "summary":
            continue
        setting, place = keywords.get(key, parameter.default), f"{_name(merge)}: {key}"
        if key in takes.each:
            out[key] = coefficients.each_at(setting, count - takes.base, name, depth, place)
        else:
            out[key] = coefficients.at(setting, name, depth, place)
    if "seed" in out:
        out["seed"] = int.from_bytes(hashlib.sha256(f"{out['seed']} {name}".encode()).digest()[:8])
    return out


def _check_patterns(merge: Callable, names: Iterable[str]) -> None:
    """Raises UserError for a pattern of a setting that no tensor's name has."""
    takes = declaration(merge)
    for key, setting in getattr(merge, "keywords", {}).items():
        if key not in takes.statistics:
            coefficients.check_patterns(setting, names, f"{_name(merge)}: {key}")


def _statistics(merge: Callable, key: str, name: str, count: int) -> list | None:
    """A statistic of one tensor for each model; None where no model has it."""
    takes, each = declaration(merge), merge.keywords[key]
    if isinstance(each, (str, Mapping)) or len(each) != count - takes.base:
        raise UserError(f"{_name(merge)}: {key} is a list of {count - takes.base}, one folder (or dict of arrays) a model.")
    sources = [tensors.in_folder(one) if isinstance(one, str) else one for one in each]
    having = [name in source for source in sources]
    if any(having) and not all(having):
        raise UserError(f"{_name(merge)}: {key} number {having.index(False) + 1} has nothing of {name}, and others do.")
    return [source[name] for source in sources] if all(having) else None


def _apply(merge: Callable, name: str, arrays: list, settings: dict) -> np.ndarray:
    takes = declaration(merge)
    shape = arrays[0].shape
    result = _called(merge, name, lambda: np.asarray(takes.function(*arrays, **settings)))
    if result.shape != shape:
        raise UserError(f"{_name(merge)}: {name} of shape {shape} comes out as {result.shape}.")
    return result


def _called(merge: Callable, name: str, call: Callable) -> Any:
    """The result of a user's function; its mistakes become a UserError that names the merge and the tensor."""
    try:
        return call()
    except UserError as error:
        raise UserError(f"{_name(merge)}: {error}") from error
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{_name(merge)}: {name} failed with {type(error).__name__}: {error}") from error


def _name(merge: Callable) -> str:
    return getattr(getattr(merge, "func", merge), "__name__", "merge")
