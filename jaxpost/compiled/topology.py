"""Machines that are not here: the devices of a topology by its name, and the data sheet of one device.

    v5e:2x4      a slice of chips by the shape of its torus: any that the installed libtpu compiles for, down to v5e:1x1
    v5e:4x4*2    two such slices, with the data centre's network between them
    v5p-64       a Cloud TPU accelerator type: it counts chips of v5e and v6e, TensorCores (two a chip) of the others
    cpu:8        simulated devices of this process

Names are case-insensitive (V6E-8), and a kind's other names work too (v5litepod-8, v7x-8).

The devices can only be compiled for. Their figures are the makers' data sheets: peak bfloat16 FLOP/s, bandwidth of the memory,
speed of a link. The memory that a program may have is what libtpu allows, a little less than the chip has. Links count at nine
tenths of the data sheet's speed, which is about what collectives reach.
"""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from packaging.requirements import Requirement

from jaxpost.errors import UserError

GIB = 2**30

# libtpu reads these as it is loaded, so import this before jax starts. They stop its queries of the metadata server, let
# several processes compile, and send its warnings, the partitioner's among them, to standard error.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
}
for _key, _value in LIBTPU.items():
    os.environ.setdefault(_key, _value)


class Chip(NamedTuple):
    """One device: bytes of HBM that a program may have, dense bfloat16 FLOP/s, bytes/s of HBM, bytes/s in one direction of one
    link, bytes/s each way to other slices; wrap: a torus axis whose length is a multiple of this closes to a ring.
    """

    hbm: float
    peak: float
    bandwidth: float
    link: float
    dcn: float
    wrap: int


# A device is a chip, except for v2, v3 and tpu7x: there it is one of the chip's two cores, which have memory of their own.
CHIPS = {
    "v2": Chip(7.48 * GIB, 23e12, 350e9, 28e9, 1.5e9, 16),
    "v3": Chip(15.48 * GIB, 61e12, 450e9, 37e9, 1.5e9, 16),
    "v4": Chip(30.75 * GIB, 275e12, 1228e9, 45e9, 6.25e9, 4),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 45e9, 3.125e9, 16),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 90e9, 6.25e9, 4),
    "v6e": Chip(31.25 * GIB, 918e12, 1640e9, 90e9, 12.5e9, 16),
    "tpu7x": Chip(94.75 * GIB, 1153e12, 3690e9, 45e9, 6.25e9, 4),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
SHAPES = {name: DEEP if name in ("v4", "v5p", "tpu7x") else FLAT for name in CHIPS}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}  # other names of a kind -> ours

# Accelerator type -> shape: Google counts chips of v5e and v6e, and of the others TensorCores, two a chip.
SIZES = {k: {int(np.prod([int(n) for n in shape.split("x")])): shape for shape in shapes} for k, shapes in SHAPES.items()}
SIZES |= {k: {2 * chips: shape for chips, shape in sizes.items()} for k, sizes in SIZES.items() if k not in ("v5e", "v6e")}


class Topology(NamedTuple):
    """A named machine: its devices, the data sheet of one (None for a CPU), the number of slices."""

    name: str
    devices: list
    chip: Chip | None
    slices: int = 1


def find(name: str) -> Topology:
    """The topology of a name. Raises UserError for an unknown one, listing the choices, and where libtpu is missing."""
    name = shaped(name)
    if match := re.fullmatch(r"cpu:(\d+)", name):
        return Topology(name, _cpus(int(match[1])), None)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})(?:\*(\d+))?", name)
    if not match or match[1] not in CHIPS or match[3] == "0":
        raise UserError(f"--topology={name}: no such topology. {choices()}")
    _check_compiler()
    kind, shape, slices = match[1], [int(n) for n in match[2].split("x")], int(match[3] or 1)
    options = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    sides = [*shape, 1][:3]
    if any(n % 2 for n in sides[:2]):  # smaller than the usual host, or no multiple of it
        options["chips_per_host_bounds"] = [1 if n % 2 else 2 for n in sides[:2]] + [1]
    try:
        devices = topologies.get_topology_desc(topology_name=f"{kind}:{match[2]}", platform="tpu", **options).devices
    except RuntimeError as error:
        if "libtpu" in str(error):
            raise UserError(
                f"--topology={name}: the TPU compiler is not installed; it needs no TPU: pip install 'jaxpost[fit]'."
            ) from error
        raise UserError(f"--topology={name}: libtpu says: {str(error).splitlines()[0]} {choices()}") from error
    return Topology(name, list(devices), CHIPS[kind], slices)


def shaped(name: str) -> str:
    """KIND:SHAPE for an accelerator type (V5P-64 is v5p:2x4x4); any other name with its kind spelled as in CHIPS.

    Raises UserError for a size that the kind does not have.
    """
    kind, mark, rest = re.fullmatch(r"(\w*)(\W?)(.*)", name.strip().lower(), re.DOTALL).groups()
    kind = ALIASES.get(kind, kind)
    parts = re.fullmatch(r"(\d+)((?:\*\d+)?)", rest)
    if mark != "-" or not parts or kind not in SIZES:
        return kind + mark + rest
    size, sizes = int(parts[1]), SIZES[kind]
    if size not in sizes:
        near = sorted(sorted(sizes, key=lambda n: abs(n - size))[:3])
        counted = "chips" if kind in ("v5e", "v6e") else "TensorCores, two a chip"
        raise UserError(
            f"--topology={name}: {kind} comes in no slice of {size} {counted}. The nearest: "
            f"{', '.join(f'{kind}-{n} ({kind}:{sizes[n]})' for n in near)}."
        )
    return f"{kind}:{sizes[size]}{parts[2]}"


def _check_compiler() -> None:
    """Raises UserError if the installed libtpu is not the version that jax requires: its programs may not be readable."""
    package, library = importlib.util.find_spec("libtpu"), os.environ.get("TPU_LIBRARY_PATH")  # jax sets it to the package's
    folders = (package and package.submodule_search_locations) or ()
    if library and folders and not any(Path(library).resolve().is_relative_to(Path(folder).resolve()) for folder in folders):
        return  # a library of the user's own, whose version is unknown
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # `find` reports it
        return
    for text in importlib.metadata.requires("jax") or ():
        requirement = Requirement(text)
        if requirement.name != "libtpu" or not (requirement.marker is None or requirement.marker.evaluate({"extra": "tpu"})):
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            raise UserError(
                f"libtpu {version} is installed, and jax {importlib.metadata.version('jax')} works with "
                f"libtpu{requirement.specifier}: pip install 'libtpu{requirement.specifier}'"
            )


def choices() -> str:
    """The names that there are, in a sentence or two."""
    flat, deep = (", ".join(k for k, shapes in SHAPES.items() if shapes is group) for group in (FLAT, DEEP))
    return (
        f"A name is KIND:SHAPE. Kinds {flat} have shapes {' '.join(FLAT)}; kinds {deep} have shapes {' '.join(DEEP)}; "
        "*N after it is N slices. Or an accelerator type, as v6e-8 or v5p-64; or cpu:N."
    )


def simulate(name: str) -> None:
    """Makes jax use CPU devices only, N of them if the name is cpu:N. Call it before jax starts."""
    jax.config.update("jax_platforms", "cpu")
    if match := re.fullmatch(r"cpu:([1-9]\d*)", shaped(name)):
        jax.config.update("jax_num_cpu_devices", int(match[1]))


def _cpus(count: int) -> list:
    devices = jax.devices("cpu")
    if not 0 < count <= len(devices):
        raise UserError(
            f"--topology=cpu:{count}: this process was started with {len(devices)} simulated devices; ask for fewer."
        )
    return devices[:count]


def links(topology: Topology, devices: list) -> float:
    """How many links, counted in one direction, each device has for a collective over its group within a slice.

    All axes of the torus that the group spans are used at once: two links where the axis is whole and closes to a ring, one
    where it is a line, and less where other groups lie between the devices and share the links.
    """
    places = np.array([_place(d) for d in devices if _slice(d) == _slice(devices[0])])
    whole = np.array([_place(d) for d in topology.devices if _slice(d) == _slice(devices[0])])
    sizes, count = [len(np.unique(column)) for column in whole.T], 0.0
    wrap = topology.chip.wrap if topology.chip else len(whole) + 1
    closed = wrap > 4 or all(size % 4 == 0 for size in sizes[:3])  # a cube of 4 x 4 x 4 closes along all axes or none
    for column, size in zip(places.T, sizes, strict=True):
        used = np.unique(column)
        if len(used) > 1:
            ring = closed and len(used) == size and size % wrap == 0
            count += 2.0 if ring else (len(used) - 1) / (used[-1] - used[0])
    return max(count, 1.0)


def slices_of(devices: list) -> int:
    """The number of slices that a group of devices spans."""
    return len({_slice(d) for d in devices})


def torus_axes(devices: list) -> int:
    """The number of torus axes that a group of devices spans."""
    places = np.array([_place(d) for d in devices if _slice(d) == _slice(devices[0])])
    return int(sum(len(np.unique(column)) > 1 for column in places.T[:3]))


def _place(device) -> tuple[int, ...]:
    coordinates = getattr(device, "coords", None)
    return (device.id, 0, 0, 0) if coordinates is None else (*coordinates, getattr(device, "core_on_chip", 0))


def _slice(device) -> int:
    return getattr(device, "slice_index", 0) or 0
