"""Where arrays live, and what the compiled step sends between devices because of it.

The second half reads the compiled program's text: fully sharded data parallelism means that weights are gathered and
gradients reduced, and that no activation crosses the fsdp axis. What a program of the partitioner's would look like if it
had misunderstood, and the warning it would give, is provoked once, so that the absence of both means something.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from jaxpost import metrics, sharding
from jaxpost.errors import UserError

ROUNDING = 1e-5


# ------------------------------------------------------------------------------------------------------ Meshes and rules


def test_one_size_may_be_left_open():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    # What is asked for beside the default, as by --config.mesh.fsdp=-1.
    assert dict(sharding.make_mesh(-1, -1, 2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert dict(sharding.make_mesh(1, 1, -1, devices=jax.devices()[:4]).shape) == {"data": 1, "fsdp": 1, "tensor": 4}


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ((1, -1, -1), "at most one may be -1"),
        ((0, 1, 1), "sizes are positive"),
        ((-2, 1, 1), "sizes are positive"),
        ((3, 1, 1), "data=3, fsdp=1, tensor=1 does not fill 8 devices"),
        ((-1, 3, 1), "does not fill 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, told):
    with pytest.raises(UserError, match=told):
        sharding.make_mesh(*sizes)


def _pieces(tree, mesh):
    """path -> shape of the piece that one device holds."""
    places = sharding.stored(mesh, tree)
    leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(places), strict=True)
    return {sharding.path_name(path): place.shard_shape(x.shape) for (path, x), place in leaves}


def test_parameters_find_their_layout_by_path_and_moments_follow():
    mesh = sharding.make_mesh(2, 2, 2)
    tree = jax.eval_shape(lambda: small.state(optax.adamw(1e-3)))
    found = _pieces({"train": tree.train, "opt_state": tree.opt_state}, mesh)
    expected = {
        "embed/weight": (56, 16),
        "head/weight": (56, 16),
        "norm/scale": (32,),
        "layers/norm1/scale": (2, 32),
        "layers/attention/q/kernel": (2, 16, 16),
        "layers/attention/k/kernel": (2, 16, 8),
        "layers/attention/o/kernel": (2, 16, 16),
        "layers/mlp/up/kernel": (2, 16, 24),
        "layers/mlp/down/kernel": (2, 24, 16),
    }
    for path, shape in expected.items():
        ours = {k: v for k, v in found.items() if k.endswith(path)}
        assert len(ours) == 3 and set(ours.values()) == {shape}, ours


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(1, 2, 4)
    tree = {
        "attention": {"q": {"kernel": jnp.zeros((3, 5, 6)), "bias": jnp.zeros((3, 8))}},
        "embed": {"weight": jnp.zeros((7, 4))},
    }
    found = _pieces(tree, mesh)
    assert found == {"attention/q/kernel": (3, 5, 6), "attention/q/bias": (3, 2), "embed/weight": (7, 2)}


def test_without_a_mesh_nothing_moves():
    x = jnp.ones((4, 3))
    assert sharding.shard(x, "BD") is x and sharding.gather({"w": x})["w"] is x and sharding.batch_ways() == 1


def test_gathered_weights_are_whole_along_fsdp_and_their_gradients_stored():
    mesh = sharding.make_mesh(1, 4, 2)
    tree = {"embed": {"weight": jnp.arange(32.0).reshape(4, 8)}}
    places = sharding.stored(mesh, tree)
    with sharding.use(mesh):
        assert sharding.batch_ways() == 4
        gathered = jax.jit(sharding.gather)(jax.device_put(tree, places))["embed"]["weight"]
        grad = jax.jit(jax.grad(lambda t: jnp.sum(sharding.gather(t)["embed"]["weight"] ** 2)))(jax.device_put(tree, places))
    assert gathered.addressable_shards[0].data.shape == (2, 8)
    assert grad["embed"]["weight"].addressable_shards[0].data.shape == (2, 2)
    assert np.array_equal(grad["embed"]["weight"], 2 * tree["embed"]["weight"])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_a_batch_goes_out_and_comes_back(sizes):
    mesh = sharding.make_mesh(*sizes)
    columns = {"x": np.arange(48, dtype=np.int32).reshape(16, 3), "row": np.arange(16) > 3, "scalar": np.float32(0.5)}
    placed = sharding.distribute(columns, mesh, 16)
    for k, v in columns.items():
        for back in (sharding.local(placed[k], mesh), sharding.everywhere(placed[k])):
            assert np.array_equal(back, v) and back.dtype == v.dtype
    assert placed["x"].addressable_shards[0].data.shape == (16 // (sizes[0] * sizes[1]), 3)
    assert placed["scalar"].is_fully_replicated


def test_rows_are_not_read_back_from_an_array_that_lies_otherwise():
    mesh = sharding.make_mesh(2, 2, 2)
    whole = jax.device_put(np.zeros((16, 3)), sharding.replicated(mesh))
    with pytest.raises(ValueError, match="its rows elsewhere than the batch"):
        sharding.local(whole, mesh)


def test_a_process_supplies_its_own_rows_alone():
    assert sharding.local_rows(sharding.make_mesh(2, 2, 2), 16) == (0, 16)
    with pytest.raises(UserError, match="6 rows do not divide over data x fsdp = 4; use a multiple of 4"):
        sharding.local_rows(sharding.make_mesh(2, 2, 2), 6)


def test_rows_in_several_pieces_are_supplied_from_the_first_to_the_last(monkeypatch):
    # As on a host whose four chips lie in two rows of the mesh.
    class Place:
        def addressable_devices_indices_map(self, shape):
            return {i: (slice(first, first + 2),) for i, first in enumerate((0, 4, 0, 4))}

    mesh = sharding.make_mesh(2, 2, 2)
    monkeypatch.setattr(sharding, "_row_sharding", lambda mesh, ndim: Place())
    assert sharding.local_rows(mesh, 8) == (0, 6)


# ------------------------------------------------------------------------------------------- The transformer on devices


def _two_steps(mesh, microbatches=1):
    """([metrics, gradients] of two steps), parameters; the trace keeps the gradients in the optimizer's state."""
    tx, seen = optax.chain(optax.trace(0.0), optax.scale(-0.1)), []
    with sharding.use(mesh):
        state = small.placed(mesh, tx)
        step = small.step(mesh, tx, microbatches)
        for seed in (1, 2):
            state, measured = step(state, sharding.distribute(small.batch(seed), mesh, small.ROWS))
            seen.append((metrics.values(measured), jax.device_get(state.opt_state[0].trace)))
    return seen, jax.device_get(state.train)


@pytest.mark.slow
def test_the_transformer_learns_the_same_on_one_device_and_on_eight():
    one = _two_steps(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    eight = _two_steps(sharding.make_mesh(2, 2, 2), microbatches=2)

    # Sums in another order, float32: 1e-5 of a leaf's norm.
    def same(path, a, b):
        assert np.linalg.norm(a - b) <= ROUNDING * np.linalg.norm(b), sharding.path_name(path)

    for (measured, grads), (expected, wanted) in zip(eight[0], one[0], strict=True):
        assert measured == pytest.approx(expected, rel=ROUNDING)
        jax.tree_util.tree_map_with_path(same, grads, wanted)
    jax.tree_util.tree_map_with_path(same, eight[1], one[1])


# ---------------------------------------------------------------------------------------------- The compiled program


@pytest.fixture(scope="module")
def programs():
    """argument -> (program text, what the compiler said), compiled in a process of its own whose stderr can be read."""
    # From a cache the programs would come without a word.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent), "TF_CPP_MIN_LOG_LEVEL": "0", "JAX_PLATFORMS": "cpu"}
    # What comes after the partitioner, machine code, is not looked at.
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    arguments = ["2,2,2", "2,2,2/2", "1,8,1", "2,2,2:mixture", "2,2,2:kinds", "provoke"]
    command = [sys.executable, str(Path(__file__).parent / "small.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    texts, said = (re.split(r"PROGRAM \S+\n", stream)[1:] for stream in (done.stdout, done.stderr))
    return dict(zip(arguments, zip(texts, said, strict=True), strict=True))


def _ids(dims, turned):
    dims = [int(n) for n in dims.split(",")]
    ids = np.arange(np.prod(dims)).reshape(dims)
    return ids.transpose([int(n) for n in turned.split(",")]) if turned else ids


def _groups(text):
    """The device groups of a collective, as rows: listed, as an iota reshaped and turned, or as axes of a mesh."""
    if found := re.match(r"\{\{(.*?)\}\}", text):
        return np.array([[int(n) for n in group.split(",")] for group in found[1].split("},{")])
    if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _ids(found[2], found[3]).reshape([int(n) for n in found[1].split(",")])
    found = re.match(r"mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", text)
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
    ids = (_ids(found[2], found[3]) if found[2] else np.arange(8)).reshape(list(sizes.values()))
    within = [i for i, name in enumerate(sizes) if f"'{name}'" in found[4]]
    return np.moveaxis(ids, within, range(-len(within), 0)).reshape(-1, np.prod([ids.shape[i] for i in within]))


def _collectives(text):
    """(kind, shapes, device groups or None, name of the operation) of each but those of token numbers, which are small."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for line in text.splitlines():
        if found := re.search(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", line):
            shapes = [tuple(int(n) for n in s.split(",") if n) for s in re.findall(r"f32\[([\d,]*)\]", found[1])]
            if not shapes:
                continue
            groups = re.search(r"replica_groups=(.*)", line)
            name = re.search(r'op_name="([^"]*)"', line)
            yield found[2], shapes, _groups(groups[1]) if groups else None, name[1] if name else ""


def _divides(prime, shape):
    return any(n % prime == 0 for n in shape if n)


@pytest.mark.slow
def test_the_partitioner_never_gives_up_a_split(programs):
    assert "Involuntary full rematerialization" in programs["provoke"][1]
    for argument, (_, said) in programs.items():
        assert argument == "provoke" or "rematerialization" not in said, (argument, said)


def _lookups(found):
    """(the exchanges of looked-up embeddings, the others): there, each once on the way and once back; no other activations move
    along fsdp.
    """

    def of_the_lookup(kind, shapes, groups, name):
        return kind == "all-to-all" and name.endswith(("jvp()/sharding_constraint", "jvp())/sharding_constraint"))

    return [c for c in found if of_the_lookup(*c)], [c for c in found if not of_the_lookup(*c)]


@pytest.mark.slow
def test_experts_are_gathered_and_their_tokens_stay(programs):
    gathered = set()
    for kind, shapes, _, name in _lookups(list(_collectives(programs["2,2,2:mixture"][0])))[1]:
        # Of the activations, whose length 5 divides, nothing changes hands; the router's small gradient may be turned around.
        assert kind not in ("all-to-all", "collective-permute") or not any(_divides(5, s) for s in shapes), (shapes, name)
        gathered |= {s[-3:] for s in shapes if kind == "all-gather" and len(s) >= 3}
    # Four experts of 32 x 48, split along tensor, whole along fsdp.
    assert {(4, 32, 24), (4, 24, 32)} <= gathered, gathered


@pytest.mark.parametrize("argument", ["2,2,2", "2,2,2/2", "1,8,1"])
@pytest.mark.slow
def test_weights_travel_and_activations_stay(programs, argument):
    lookups, found = _lookups(list(_collectives(programs[argument][0])))
    assert len(lookups) == 2 and len(found) > 10
    pairs = {(0, 1), (2, 3), (4, 5), (6, 7)}  # neighbours along tensor
    across = []
    for kind, shapes, groups, name in found:
        assert kind not in ("all-to-all", "collective-permute"), (shapes, name)
        if any(len(s) > 1 and _divides(5, s) for s in shapes):
            across.append(shapes)
            assert argument != "1,8,1" and {tuple(sorted(g)) for g in groups} == pairs, (kind, shapes, name)
    assert bool(across) == (argument != "1,8,1")  # tensor parallelism does sum activations, over its own pairs

    # Each kernel of a layer is gathered to its full width of 32 (up to the tensor split), and its gradient reduced.
    layers = [s for kind, shapes, _, name in found if kind == "all-gather" and "while/body" in name for s in shapes]
    assert sum(32 in s for s in layers) >= 7, layers
    head = [s for kind, shapes, _, _ in found if kind == "all-gather" for s in shapes if _divides(7, s) and s[-1] == 32]
    assert len(head) == 1, head  # the head, and not the embedding
    reduced = {s for kind, shapes, _, _ in found if kind in ("all-reduce", "reduce-scatter") for s in shapes}
    assert any(_divides(7, s) for s in reduced) and any({32, 48} <= set(s) or {32, 24} <= set(s) for s in reduced)


@pytest.mark.parametrize("argument", ["2,2,2", "1,8,1"])
@pytest.mark.slow
def test_the_heads_loop_neither_gathers_the_head_nor_reduces_its_gradient(programs, argument):
    inside = [
        (kind, s) for kind, shapes, _, name in _collectives(programs[argument][0]) if "while/body" in name for s in shapes
    ]
    assert inside and not [x for x in inside if _divides(7, x[1])]
