"""What every test relies on: eight simulated devices, a data cache of the run's own, compiled programs kept between runs."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where libtpu is installed and no TPU is, its search for one is loud
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAXPOST_CACHE", tempfile.mkdtemp())
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
# Tests compile much and compute little: without LLVM's expensive passes they take half the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest

SHARED = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def room_for_programs():
    """Lets compiled programs go before there are too many: Linux allows a process 65,530 mappings, each program holds several,
    and where none is left the process dies without a word."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and datasets beside the repository; tests that ask for it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real data and checkpoints are not beside this checkout")
    return SHARED
