"""Machines that are not here: the devices of a topology by its name, and what one of them is.

    v5e:2x4      a slice of chips, by the shape of its torus: any that the installed libtpu compiles for, down to v5e:1x1
    v5e:4x4*2    two such slices, with the data centre's network between them
    v5p-64       a Cloud TPU accelerator type: chips of v5e and v6e, TensorCores (two a chip) of the others
    cpu:8        simulated devices of this process

Capitals are as good (V6E-8), and so are other names of a kind (v5litepod-8, v7x-8).

The devices can be compiled for and nothing else. Their facts are the makers' data sheets: peak bfloat16 FLOP/s, bandwidth of
the memory, speed of a link. The memory that a program may have is what libtpu itself allows, which is a little less than the
chip has. Links are counted at nine tenths of the data sheet's speed, which is about what collectives reach.
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

# What libtpu reads as it is loaded, so import this before jax starts: not to ask the machine's metadata server who it is, not
# to keep others from compiling, and to say its warnings, the partitioner's among them, where they can be heard.
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
    link, bytes/s each way to other slices; wrap: an axis of the torus that is a multiple of this long closes to a ring.
    """

    hbm: float
    peak: float
    bandwidth: float
    link: float
    dcn: float
    wrap: int


# A device is a chip, but half of one of v2, v3 and tpu7x, where each of the two cores has its own memory.
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
    """A named machine: its devices, what one of them is (None for a CPU, which has no data sheet), how many slices."""

    name: str
    devices: list
    chip: Chip | None
    slices: int = 1


def find(name: str) -> Topology:
    """The topology of a name. Raises UserError for one that there is none of, listing what there is, or without libtpu."""
    name = shaped(name)
    if found := re.fullmatch(r"cpu:(\d+)", name):
        return Topology(name, _cpus(int(found[1])), None)
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})(?:\*(\d+))?", name)
    if not found or found[1] not in CHIPS or found[3] == "0":
        raise UserError(f"--topology={name}: no such topology. {known()}")
    _check_compiler()
    kind, shape, slices = found[1], [int(n) for n in found[2].split("x")], int(found[3] or 1)
    options = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    sides = [*shape, 1][:3]
    if any(n % 2 for n in sides[:2]):  # smaller than the usual host, or not made of such
        options["chips_per_host_bounds"] = [1 if n % 2 else 2 for n in sides[:2]] + [1]
    try:
        devices = topologies.get_topology_desc(topology_name=f"{kind}:{found[2]}", platform="tpu", **options).devices
    except RuntimeError as error:
        if "libtpu" in str(error):
            raise UserError(
                f"--topology={name}: the TPU compiler is not installed; it needs no TPU: pip install 'jaxpost[fit]'."
            ) from error
        raise UserError(f"--topology={name}: libtpu says: {str(error).splitlines()[0]} {known()}") from error
    return Topology(name, list(devices), CHIPS[kind], slices)


def shaped(name: str) -> str:
    """KIND:SHAPE for an accelerator type (V5P-64 is v5p:2x4x4); any other name in our spelling of its kind.

    Raises UserError for a size that the kind does not come in.
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
    """Raises UserError if the installed libtpu is another than the installed jax asks for: its programs may not be readable."""
    package, library = importlib.util.find_spec("libtpu"), os.environ.get("TPU_LIBRARY_PATH")  # jax sets it to the package's
    folders = (package and package.submodule_search_locations) or ()
    if library and folders and not any(Path(library).resolve().is_relative_to(Path(folder).resolve()) for folder in folders):
        return  # a library of the user's own, whose version no package tells
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # looking for the topology says so
        return
    for text in importlib.metadata.requires("jax") or ():
        wanted = Requirement(text)
        if wanted.name != "libtpu" or not (wanted.marker is None or wanted.marker.evaluate({"extra": "tpu"})):
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            raise UserError(
                f"libtpu {version} is installed, and jax {importlib.metadata.version('jax')} works with "
                f"libtpu{wanted.specifier}: pip install 'libtpu{wanted.specifier}'"
            )


def known() -> str:
    """What to choose from, in a sentence or two."""
    flat, deep = (", ".join(k for k, shapes in SHAPES.items() if shapes is own) for own in (FLAT, DEEP))
    return (
        f"A name is KIND:SHAPE. Kinds {flat} have shapes {' '.join(FLAT)}; kinds {deep} have shapes {' '.join(DEEP)}; "
        "*N after it is N slices. Or an accelerator type, as v6e-8 or v5p-64; or cpu:N."
    )


def simulate(name: str) -> None:
    """Has this process simulate the devices of cpu:N, if that is the name; before jax starts, and with no other devices."""
    jax.config.update("jax_platforms", "cpu")
    if found := re.fullmatch(r"cpu:([1-9]\d*)", shaped(name)):
        jax.config.update("jax_num_cpu_devices", int(found[1]))


def _cpus(count: int) -> list:
    have = jax.devices("cpu")
    if not 0 < count <= len(have):
        raise UserError(f"--topology=cpu:{count}: this process was started with {len(have)} simulated devices; ask for fewer.")
    return have[:count]


def links(topology: Topology, devices: list) -> float:
    """How many links' worth of one direction each device of a group has into a collective over that group, within a slice.

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
    """In how many slices a group of devices lies."""
    return len({_slice(d) for d in devices})


def torus_axes(devices: list) -> int:
    """Along how many axes of the torus a group of devices extends."""
    places = np.array([_place(d) for d in devices if _slice(d) == _slice(devices[0])])
    return int(sum(len(np.unique(column)) > 1 for column in places.T[:3]))


def _place(device) -> tuple[int, ...]:
    coordinates = getattr(device, "coords", None)
    return (device.id, 0, 0, 0) if coordinates is None else (*coordinates, getattr(device, "core_on_chip", 0))


def _slice(device) -> int:
    return getattr(device, "slice_index", 0) or 0
