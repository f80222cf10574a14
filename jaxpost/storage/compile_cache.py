"""Compiled programs, kept on disk, so that the second start of a run compiles nothing.

Compilation takes most of the time to a first step. jax caches its result under a key of the program, the compiler and the
machine (a CPU's instruction set too, so different machines may share a home folder), but only where a folder is named, and only
for programs that took a second to compile. Here the cache is on by default, from a tenth of a second on: below that, reading is
no faster than compiling.

A user who names a folder (JAX_COMPILATION_CACHE_DIR, or jax's own settings) decides on it and its size; otherwise it is
`programs` in jaxpost's cache folder. JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

import contextlib
import os

import jax
from etils import epath

from jaxpost.storage import cloud

SECONDS = 0.1  # of compilation above which a program is kept
MOST = 2 * 2**30  # bytes of programs; a train step takes about a quarter of a MiB


def keep() -> None:
    """Makes jax keep what it compiles from here on. Every entry point calls it. Idempotent."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = cloud.cache_folder() / "programs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _trim(folder, MOST)
        except OSError:  # a home that cannot be written to: compile every time
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def _trim(folder: epath.Path, most: int) -> None:
    """Deletes the least recently used programs until at most `most` bytes are left.

    jax's own limit is not used: it keeps the time of use in a second file, and a process killed between the two writes leaves a
    cache that accepts nothing more. A bucket has a lifecycle for this.
    """
    if cloud.is_remote(folder):
        return
    programs = []
    for file in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may delete it first
            programs.append((file.stat(), file.path))
    programs.sort(key=lambda x: x[0].st_atime)
    held = sum(status.st_size for status, _ in programs)
    for status, path in programs:
        if held <= most:
            break
        epath.Path(path).unlink(missing_ok=True)
        held -= status.st_size
