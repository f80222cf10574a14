"""How jax's devices start: without a word where the CPU is all that there is.

libtpu may be installed where no TPU is, for `jaxpost.fit` or because an image is shared. jax then asks it for a TPU all the
same, and libtpu writes what it lacks to file descriptor 2, which no setting of its own prevents. `start` swallows that, on
machines without any accelerator alone: elsewhere the same lines say why a device is missing.
"""

import contextlib
import glob
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

import jax

# Where the drivers of TPUs, NVIDIA's and AMD's GPUs put their devices.
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")


def start(distributed: bool = False) -> None:
    """Starts jax's devices, after jax.distributed if asked for.

    Every command calls it once, before anything asks for a device; a device that cannot start is jax's error, with libtpu's
    lines above it.
    """
    if distributed:
        jax.distributed.initialize()
    if importlib.util.find_spec("libtpu") is None or any(map(glob.glob, _ACCELERATORS)):
        return
    lines = []
    try:
        with captured_stderr() as lines:
            jax.devices()
    except RuntimeError:
        sys.stderr.write("".join(lines))
        raise


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Collects what is written to file descriptor 2, by C++ as well: yields a list that holds the text in the end."""
    texts, before = [], os.dup(2)
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield texts
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
