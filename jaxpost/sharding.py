"""Where arrays live: the mesh, the path rules, and shard(x, axes). The only file that imports jax.sharding.

A mesh has three axes. `data` and `fsdp` both split the batch; `fsdp` splits the parameters and the optimizer state as well;
`tensor` splits heads, the feed-forward width and the vocabulary. Parameters get their layout by path, from RULES; activations
by their axis letters. A dimension that its mesh axes do not divide stays whole.

FSDP here means that weights travel and activations stay: `gather` is called on a layer's weights where they are used, so the
partitioner all-gathers them and reduce-scatters their gradients, since its transpose has the stored layout.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.errors import UserError

AXES = ("data", "fsdp", "tensor")

# The first pattern that matches a leaf's path gives the letters of its dimensions. The paths of optimizer moments end with
# their parameter's path, so the same rules apply. Other leaves are replicated.
RULES = (
    (r"(embed|head)/weight$", "VD"),
    (r"attention/(q|k|v)/kernel$", "LDN"),
    (r"attention/(q|k|v)/bias$", "LN"),
    (r"attention/o/kernel$", "LND"),
    (r"mlp/(gate|up)/kernel$", "LDF"),
    (r"mlp/(gate|up)/bias$", "LF"),
    (r"mlp/down/kernel$", "LFD"),
    (r"mlp/experts/(gate|up)/kernel$", "LEDF"),
    (r"mlp/experts/down/kernel$", "LEFD"),
    (r"mlp/router/kernel$", "LDE"),
)

STORED = {"E": "fsdp", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
USED = {letter: axis for letter, axis in STORED.items() if axis != "fsdp"}
COMPUTED = {"B": ("data", "fsdp"), "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """A mesh over all devices. One axis may be -1 and takes the remaining devices; the default data=-1 becomes 1 if another is.

    Raises UserError if the sizes do not fit.
    """
    if data == -1 and -1 in (fsdp, tensor):  # the default gives way to an explicit -1
        data = 1
    sizes = [data, fsdp, tensor]
    count = len(devices) if devices is not None else jax.device_count()
    named = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(
            f"config.mesh: {named}: sizes are positive, and at most one may be -1 (it takes what the others leave)."
        )
    fixed = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if int(np.prod(sizes)) != count:
        raise UserError(f"config.mesh: {named} does not fill {count} devices; set one axis to -1 to let it take what is left.")
    return Mesh(_arranged(sizes, jax.devices() if devices is None else devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(sizes: list[int], devices) -> np.ndarray:
    """The devices as an array of these sizes, with neighbours in the mesh near each other in the network.

    An axis of the torus may be split between axes of the mesh. Slices, which the data centre's network connects, lie along
    `data`. Raises UserError where their number does not divide it.
    """
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
    if sizes[0] % slices:
        raise UserError(f"config.mesh: data={sizes[0]} is no multiple of the {slices} slices, which lie along that axis.")
    near = [sizes[0] // slices, *sizes[1:]]
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(near, (slices, 1, 1), **options)
    return mesh_utils.create_device_mesh(sizes, **options)


def use(mesh: Mesh):
    """Context in which shard and gather use this mesh. Outside of any, both do nothing, so a forward runs anywhere."""
    return jax.set_mesh(mesh)


def _spec(letters: str, shape: tuple[int, ...], table: dict, mesh) -> P:
    """The partition of an array whose dimensions these letters name; an axis goes to the first dimension that it divides."""
    places = []
    for letter, size in zip(letters, shape, strict=True):
        axes = table.get(letter)
        ways = int(np.prod([mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes or ())]))
        places.append(axes if ways > 1 and size % ways == 0 and axes not in places else None)
    return P(*places)


def shard(x: jax.Array, letters: str) -> jax.Array:
    """Pins an activation's layout by its axis letters, e.g. shard(x, "BSD"). Does nothing outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, _spec(letters, x.shape, COMPUTED, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x, here: P, stored: P):
    return jax.lax.with_sharding_constraint(x, here)


_moved.defvjp(
    lambda x, here, stored: (jax.lax.with_sharding_constraint(x, here), None),
    lambda here, stored, _, g: (jax.lax.with_sharding_constraint(g, stored),),
)


def gather(params: Any, dtype: Any = None) -> Any:
    """Weights laid out for use: whole along fsdp, still split along tensor; their gradients go back to the stored layout.

    Matrices are cast to `dtype` first, so that weights and gradients travel in it. Call it on the smallest tree that is about
    to be used (one layer inside the scan), since all of it is in memory at once.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def move(name, x, letters):
        if letters is None:
            return x
        if dtype is not None and x.dtype == np.float32 and re.search("(weight|kernel|base)$", name):
            x = x.astype(dtype)
        if mesh.empty:
            return x
        return _moved(x, _spec(letters, x.shape, USED, mesh), _spec(letters, x.shape, STORED, mesh))

    return _with_letters(move, params)


def lookup(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Rows of an embedding [V,D] for tokens [B,S] -> [B,S,D] of dtype.

    Each device looks up its own channels for all rows of its fsdp group, and exchanges them for all channels of its own rows.
    So activations travel, which are much smaller than the table, in the backward pass too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    spread = _spec("BSD", (*tokens.shape, table.shape[1]), {"B": "data", "D": "fsdp"}, mesh)
    tokens = jax.lax.with_sharding_constraint(tokens, P(*spread[:2]))
    rows = jnp.take(table, tokens, axis=0).astype(dtype)
    return shard(jax.lax.with_sharding_constraint(rows, spread), "BSD")


def lookup_whole(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """`lookup` in a table that `gather` has laid out: every device looks up its own rows, and nothing travels along fsdp."""
    table = gather({"embed": {"weight": table}}, dtype)["embed"]["weight"]
    return shard(jnp.take(table, tokens, axis=0).astype(dtype), "BSD")


def summed(parts: jax.Array, letters: str) -> jax.Array:
    """The sum of a gradient's parts [W, ...], one from each batch shard, in the stored layout of a parameter with these
    letters. It is reduce-scattered along fsdp first, so that only a shard is all-reduced along data.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or parts.shape[0] == 1:
        return parts.sum(0)
    place = _spec(letters, parts.shape[1:], STORED, mesh)
    parts = parts.reshape(ways("data"), ways("fsdp"), *parts.shape[1:])
    scattered = jax.lax.with_sharding_constraint(parts.sum(1), P("data", *place))
    return jax.lax.with_sharding_constraint(scattered.sum(0), place)


def locally(fn, arrays: tuple, letters: tuple[str, ...]) -> jax.Array:
    """fn(*arrays) where every device works on its own rows and heads; the result has the first array's layout."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(*arrays)
    places = tuple(_spec(c, x.shape, COMPUTED, mesh) for c, x in zip(letters, arrays, strict=True))
    return jax.shard_map(fn, mesh=mesh, in_specs=places, out_specs=places[0], check_vma=False)(*arrays)


def by_rows(fn, rows: tuple, weights: list, letters: tuple[str, ...]) -> jax.Array:
    """fn(*rows, *weights) where every batch shard works on its own rows: all rows are [B, ...], and so is the result.

    letters: of each weight's dimensions. Where one is split along `tensor` (a dimension that fn sums over), the results are
    summed. Outside of a mesh it is a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(*rows, *weights)
    places = [_spec(c, w.shape, USED, mesh) for c, w in zip(letters, weights, strict=True)]
    split = any("tensor" in place for place in places)
    batch = P(_spec("B", rows[0].shape[:1], COMPUTED, mesh)[0])

    def local(*arguments):
        out = fn(*arguments)
        return jax.lax.psum(out, "tensor") if split else out

    return jax.shard_map(local, mesh=mesh, in_specs=(*[batch] * len(rows), *places), out_specs=batch, check_vma=False)(
        *rows, *weights
    )


def path_name(path) -> str:
    """A key path as text: layers/attention/q/kernel."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _with_letters(function, tree: Any) -> Any:
    """The tree with function(path, leaf, letters of its dimensions by its path, or None) for each leaf.

    A node that stands for a weight (models/einsum.py) is laid out like the weight. For a field it may declare in `parts` the
    letters of the last dimensions, where I and O are the weight's last two and others are never split; other fields have the
    weight's own.
    """

    def leaf(path, x, letters):
        if hasattr(x, "project"):
            return jax.tree_util.tree_map_with_path(
                lambda inner, y: leaf((*path, *inner), y, of_part(x, inner, y, letters)), x, is_leaf=lambda y: is_node(y, x)
            )
        ndim = len(x.shape)
        letters = letters.lstrip("L") if ndim == len(letters) - 1 else letters  # inside the scan over layers
        return function(path_name(path), x, letters if letters and len(letters) == ndim else None)

    def of_part(node, inner, y, letters):
        own = getattr(node, "parts", {}).get(path_name(inner[:1]))
        if own is None or not letters or is_node(y, node):
            return letters
        return letters[:-2] + own.replace("I", letters[-2]).replace("O", letters[-1])

    def is_node(y, around=None):
        return y is not around and hasattr(y, "project")

    def rule(name):
        return next((letters for pattern, letters in RULES if re.search(pattern, name)), "")

    return jax.tree_util.tree_map_with_path(lambda path, x: leaf(path, x, rule(path_name(path))), tree, is_leaf=is_node)


def stored(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf (array or ShapeDtypeStruct) of parameters or of a whole train state, by its path."""
    return _placed_by_path(mesh, tree, STORED)


def _placed_by_path(mesh: Mesh, tree: Any, table: dict) -> Any:
    def place(name, x, letters):
        return NamedSharding(mesh, P() if letters is None else _spec(letters, x.shape, table, mesh))

    return _with_letters(place, tree)


def gathered(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf of parameters as `gather` lays them out, by its path."""
    return _placed_by_path(mesh, tree, USED)


def by_letters(mesh: Mesh, tree: Any, letters: dict[int, str]) -> Any:
    """The sharding of each leaf as `shard` lays out an activation, by the letters for its number of axes."""
    return jax.tree.map(lambda x: NamedSharding(mesh, _spec(letters[len(x.shape)], x.shape, COMPUTED, mesh)), tree)


def placed(shapes: Any, places: Any) -> Any:
    """Shapes (anything with shape and dtype) with a sharding each; programs can be compiled for them without arrays."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def batch_shapes(columns: Any, mesh: Mesh) -> Any:
    """A batch's columns as shapes with the shardings that `distribute` gives arrays."""
    return placed(columns, jax.tree.map(lambda x: _row_sharding(mesh, len(x.shape)), columns))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def _row_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    return NamedSharding(mesh, P(COMPUTED["B"]) if ndim else P())


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """[start, stop) of the rows of a global batch that this process must supply. Raises UserError if the rows do not divide."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise UserError(
            f"config.batch_size: {batch_size} rows do not divide over data x fsdp = {ways}; use a multiple of {ways}."
        )
    spans = _row_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    spans = [(s.start or 0, s.stop if s.stop is not None else batch_size) for (s,) in spans]
    return min(a for a, _ in spans), max(b for _, b in spans)


def distribute(columns: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """This process's rows of a batch, as global arrays split over data and fsdp; scalar columns are replicated."""
    start, _ = local_rows(mesh, batch_size)

    def place(x):
        x = np.asarray(x)
        if x.ndim == 0:
            return jax.make_array_from_callback((), _row_sharding(mesh, 0), lambda _: x)

        def rows(index):
            a, b = index[0].start or 0, index[0].stop if index[0].stop is not None else batch_size
            return x[a - start : b - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), _row_sharding(mesh, x.ndim), rows)

    return {k: place(v) for k, v in columns.items()}


def local(x: jax.Array, mesh: Mesh) -> np.ndarray:
    """This process's rows of a global array, in order: the inverse of distribute.

    Raises ValueError for an array that is not split as distribute splits it: this process would hold other rows.
    """
    if not x.sharding.is_equivalent_to(_row_sharding(mesh, x.ndim), x.ndim):
        raise ValueError(f"an array {x.shape} has its rows elsewhere than the batch: {x.sharding}; pin it with shard first")
    pieces = {s.index[0].start or 0: s.data for s in x.addressable_shards} if x.ndim else {0: x.addressable_shards[0].data}
    return np.concatenate([np.asarray(pieces[k]) for k in sorted(pieces)]) if x.ndim else np.asarray(pieces[0])


def assembled(shape: tuple[int, ...], place, piece) -> jax.Array:
    """An array of this sharding, built from piece(index) for each of this process's devices, one after the other.

    A piece that several devices hold is computed once.
    """
    holders = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        bounds = tuple((s.start, s.stop) for s in index)
        holders.setdefault(bounds, (index, []))[1].append(device)
    parts = []
    for index, devices in holders.values():
        data = piece(index)
        parts += [jax.device_put(data, device) for device in devices]
        del data
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def single():
    """The sharding of an array that is only on this process's first device."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def ways(axis: str) -> int:
    """The size of an axis of the mesh in use; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def batch_ways() -> int:
    """The number of parts into which the mesh in use splits the batch; 1 outside of a mesh."""
    return ways("data") * ways("fsdp")


def platform() -> str:
    """The platform of the mesh in use, which need not be this process's own; outside of a mesh, the default."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def everywhere(x: jax.Array) -> np.ndarray:
    """A global array as a whole on every process; all of them must call this."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def agree(value: float) -> float:
    """The first process's value, on every process; all of them must call this."""
    return value if jax.process_count() == 1 else float(multihost_utils.broadcast_one_to_all(np.float64(value)))


def each_text(text: str) -> list[str]:
    """Every process's text, in the order of the processes; all of them must call this."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content))))
    rows = multihost_utils.process_allgather(np.pad(content, (0, sizes.max() - len(content))))
    return [bytes(row[:size]).decode() for row, size in zip(np.asarray(rows), sizes, strict=True)]
