"""Other ways to run a stage, to make it fit or to make it fast.

A way is a dict of settings that differ. A cheap estimate orders the ways; `fit.py` compiles a way before it proposes it.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from jaxpost import sharding
from jaxpost.compiled import program, roofline
from jaxpost.compiled.hlo import Collective
from jaxpost.compiled.topology import Topology
from jaxpost.errors import UserError
from jaxpost.models.transformer import REMAT

REMATS = tuple(REMAT)  # from keeping everything to keeping least


def changed(s: ConfigDict, way: dict) -> ConfigDict:
    """The settings, changed by a way ({"remat": "full", "mesh.fsdp": 8})."""
    other = s.copy_and_resolve_references()
    with other.unlocked():
        for key, value in way.items():
            *inner, last = key.split(".")
            place = other[inner[0]] if inner else other
            place[last] = value
    return other


def flags(way: dict, stage: str = "") -> str:
    """A way as command-line flags."""
    return " ".join(f"--config.{f'{stage}.' if stage and not k.startswith('mesh.') else ''}{k}={v}" for k, v in way.items())


def remedies(s: ConfigDict, mesh, slices: int = 1) -> Iterator[dict]:
    """Ways that take less memory, cheapest first: less kept for the backward pass, smaller microbatches; the same in bfloat16;
    and all of these with the state split over all devices of a slice, by fsdp alone and with tensor. Ways whose rows do not
    divide are left out.
    """
    current = dict(mesh.shape)
    sides = [t for t in (1, 2, 4, 8) if t >= current["tensor"] and mesh.size % (slices * t) == 0]
    meshes = [current] + [{"data": slices, "fsdp": mesh.size // slices // t, "tensor": t} for t in sides]
    meshes = [m for i, m in enumerate(meshes) if m not in meshes[:i]]
    steps = [{"remat": r} for r in REMATS if REMATS.index(r) > REMATS.index(s.remat)]
    for other in meshes:
        for dtype in dict.fromkeys((s.dtype, "bfloat16")):
            rows, left = divmod(s.batch_size, other["data"] * other["fsdp"])
            parts = [] if left else [m for m in _powers(rows) if m > s.microbatches and rows % m == 0]
            ladder = [{}, *steps] if not left and rows % s.microbatches == 0 else []
            ladder += [{**(steps[-1] if steps else {}), "microbatches": m} for m in parts]
            moved = {} if other == current else {f"mesh.{k}": v for k, v in other.items()}
            cast = {} if dtype == s.dtype else {"dtype": dtype}
            yield from (way for rung in ladder if (way := {**rung, **moved, **cast}))


def _powers(most: int) -> list[int]:
    return [2**i for i in range(max(most, 1).bit_length())]


def _meshes(count: int) -> list[dict[str, int]]:
    """All meshes of `count` devices, tensor a power of two."""
    sides = [n for n in range(1, count + 1) if count % n == 0]
    return [
        {"data": count // f // t, "fsdp": f, "tensor": t}
        for t in sides
        for f in sides
        if count % (f * t) == 0 and t & (t - 1) == 0
    ]


def candidates(s: ConfigDict, topology: Topology) -> list[tuple[float, dict]]:
    """(estimated seconds, way) of every mesh and number of microbatches that is estimated to fit, fastest first."""
    fitting = []
    for sizes in _meshes(len(topology.devices)):
        try:
            mesh = sharding.make_mesh(**sizes, devices=topology.devices)
            model, _, _, trained = program.outline(changed(s, {"microbatches": 1}), mesh)
        except UserError:
            continue
        arch = model.transformer.arch
        if arch.kv_heads % sizes["tensor"]:
            continue
        rows = s.batch_size // (sizes["data"] * sizes["fsdp"])
        for parts in [m for m in _powers(rows) if rows % m == 0]:
            seconds, held = _estimate(s, arch, trained, topology, mesh, parts)
            if held < topology.chip.hbm:
                fitting.append((seconds, {"microbatches": parts, **{f"mesh.{k}": v for k, v in sizes.items()}}))
    return sorted(fitting, key=lambda x: x[0])


def _estimate(s, arch, trained: int, topology: Topology, mesh, parts: int) -> tuple[float, float]:
    """A rough estimate of (seconds a step, bytes a chip) for SFT on full rows. It only chooses what to compile."""
    sizes, chip = dict(mesh.shape), topology.chip
    split, width = sizes["fsdp"] * sizes["tensor"], 2 if s.dtype == "bfloat16" else 4
    tokens = s.batch_size * s.window / (sizes["data"] * sizes["fsdp"])
    weights = arch.parameters()
    compute = (8 if s.remat == "full" else 6) * arch.parameters(active=True) * tokens / sizes["tensor"] / chip.peak
    links = network = 0.0

    def send(axis: str, size: float, kind: str) -> None:
        nonlocal links, network
        row = [i for i, d in enumerate(mesh.devices.flat) if _along(mesh, d, axis)]
        if len(row) > 1:
            sent = size * (len(row) - 1) / len(row) * (2 if kind == "all-reduce" else 1)
            near, far = roofline.seconds(
                topology, list(mesh.devices.flat), Collective(kind, axis, tuple(row), size, sent, 1, "")
            )
            links, network = links + near, network + far

    send("fsdp", (3 if s.remat != "none" else 2) * parts * weights * width / sizes["tensor"], "all-gather")
    send("fsdp", 4 * parts * trained / sizes["tensor"], "reduce-scatter")
    send("data", 4 * trained / split * (parts if sizes["fsdp"] > 1 else 1), "all-reduce")
    send("tensor", 6 * arch.layers * tokens * arch.width * width, "all-reduce")
    kept = {"none": 34, "dots": 14}.get(s.remat, 3) * width / 2 * arch.width * arch.layers
    held = (4 * weights + 8 * trained + 4 * trained) / split + kept * tokens / parts + 3 * width * weights / arch.layers
    return max(compute, links + network), held + 0.05 * chip.hbm


def _along(mesh, device, axis: str) -> bool:
    """Whether a device differs from the mesh's first along this axis alone."""
    place = dict(zip(mesh.axis_names, [int(x[0]) for x in (mesh.devices == device).nonzero()], strict=True))
    return all(i == 0 for a, i in place.items() if a != axis)
