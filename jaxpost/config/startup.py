"""Starts jax's devices, without noise on a machine that only has a CPU.

libtpu may be installed on a machine without a TPU, for `jaxpost.fit` or because an image is shared. jax then asks it for a TPU,
and libtpu writes its complaints to file descriptor 2, which no setting prevents. `start` hides them, but only on machines
without an accelerator: elsewhere they explain why a device is missing.
"""

import contextlib
import glob
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

import jax

# Device files of the drivers of TPUs, NVIDIA GPUs and AMD GPUs.
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")


def start(distributed: bool = False) -> None:
    """Starts jax's devices. distributed: whether to start jax.distributed first.

    Every command calls it once, before anything asks for a device. Where a device cannot start, jax's error is raised, with
    libtpu's lines above it.
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
    """Captures file descriptor 2, C++ code included. Yields a list that holds the text when the block ends."""
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
