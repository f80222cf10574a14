"""Compiled programs, kept on disk, so that the second start of a run compiles nothing.

Compilation takes most of the time to a first step, and its result is a function of the program, the compiler and the machine.
jax keeps such results under a key of all three (a CPU's instruction set too, so unlike machines may share a home folder), but
only where a folder is named, and only of what took a second to compile. Here it is the default, from a tenth of a second on:
below that, reading is no faster than compiling.

Who names a folder (JAX_COMPILATION_CACHE_DIR, or jax's own settings) has the last word on it, and on its size; otherwise
it is `programs` in jaxpost's cache folder. JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

import contextlib
import os

import jax
from etils import epath

from jaxpost.storage import cloud

SECONDS = 0.1  # of compilation, from which on a program is kept
MOST = 2 * 2**30  # bytes of programs; a step of ours takes about a quarter of a MiB


def keep() -> None:
    """Has jax keep what it compiles from here on. Every entry point calls it; once is as good as twice."""
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
    """Deletes the programs that were not used for longest until no more than so many bytes are left.

    Not jax's own limit: that keeps the time of use in a second file, and a process killed between the two writes would
    leave a cache that takes nothing more. A bucket has a lifecycle for this.
    """
    if cloud.is_remote(folder):
        return
    found = []
    for file in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may be at it too
            found.append((file.stat(), file.path))
    found.sort(key=lambda x: x[0].st_atime)
    held = sum(status.st_size for status, _ in found)
    for status, path in found:
        if held <= most:
            break
        epath.Path(path).unlink(missing_ok=True)
        held -= status.st_size
