"""Where the tensors of Hugging Face's files are in our trees.

In a tree the layers of a parameter are stacked along a leading axis, experts along a second, and kernels are [in, out]. In the
files each layer and expert has a tensor of its own, kernels are [out, in], and some families fuse several projections in one
tensor.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxpost.models import encoder
from jaxpost.models.einsum import dense
from jaxpost.models.families import Architecture, tensor_names
from jaxpost.types import Params


class Part(NamedTuple):
    """Rows [first, last) of a tensor: in a tree the leaf at `path`, at `place` of its leading axes."""

    path: str
    place: tuple[int, ...]
    transposed: bool
    first: int
    last: int


class Place(NamedTuple):
    """A tensor's shape in the files, and the parts of a tree that it is made of."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def places(arch: Architecture, leaves: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Place]:
    """{name: Place} of all tensors of a model; those of one parameter are side by side, in the order of layers and experts.

    leaves: parameters beside the model's own {path: shape}; each is a tensor under its path.
    """
    shapes = _shapes(arch)
    groups: dict[str, list] = {}
    for path, tensor in tensor_names(arch).items():
        groups.setdefault(tensor.name, []).append((path, tensor))
    out = {}
    for template, members in groups.items():
        first = members[0][1].first
        for place in itertools.product(*map(range, (arch.layers - first, arch.experts)[: template.count("{}")])):
            parts = []
            for path, tensor in members:
                inner = shapes[path][len(place) :]
                inner = inner[::-1] if tensor.transposed else inner
                begin, end, _ = tensor.rows or (0, inner[0], inner[0])
                parts.append(Part(path, place, tensor.transposed, begin, end))
            parts = sorted(parts, key=lambda part: part.first)
            number = (i + first * (axis == 0) for axis, i in enumerate(place))
            out[template.format(*number)] = Place((parts[-1].last, *inner[1:]), tuple(parts))
    return out | {path: Place(shape, (Part(path, (), False, 0, shape[0]),)) for path, shape in (leaves or {}).items()}


def in_files(params: Params, where: Mapping[str, Place]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of a tree's parameters, adapters merged. Only one is copied at a time. where: of `places`."""
    flat = flatten_dict(params, sep="/")
    for name, (_, parts) in where.items():
        pieces = []
        for path, place, transposed, *_ in parts:
            leaf = np.asarray(jax.device_get(dense(jax.tree.map(lambda x, place=place: x[place], flat[path]))))
            pieces.append(leaf.T if transposed else leaf)
        yield name, np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))


@functools.lru_cache(maxsize=8)
def _shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameters."""
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    return {path: x.shape for path, x in flatten_dict(jax.eval_shape(encoder.model(arch).init, key), sep="/").items()}
