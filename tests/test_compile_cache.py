"""Compiled programs are kept on disk by default, wherever one starts; who has settings of his own keeps them."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from jaxpost import train
from jaxpost.errors import UserError
from jaxpost.storage import compile_cache

ROOT = Path(__file__).parent.parent
FIELDS = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LOAD = f"""
import jax
counts = dict.fromkeys(("cache_hits", "cache_misses"), 0)
def count(event, **_):
    name = event.rpartition("/")[2]
    if name in counts:
        counts[name] += 1
jax.monitoring.register_event_listener(count)
jax.jit(lambda x: x + 1)(1)  # as in a notebook that has computed before
import jaxpost
model = jaxpost.load(dict(model_type="llama", max_position_embeddings=32, **{FIELDS}))
print(*counts.values())
"""
FLAGS = """
import jax
from jaxpost.config import cli
cli.run(lambda _: print(jax.config.jax_compilation_cache_dir), "about")
"""


def process(code: str, cache: Path) -> subprocess.CompletedProcess:
    """A process without settings of jax's cache, on one device."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "XLA_FLAGS"))}
    environment = {**kept, "JAXPOST_CACHE": str(cache), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)


def test_a_second_process_compiles_nothing_of_ours_again(tmp_path):
    first, second = process(LOAD, tmp_path), process(LOAD, tmp_path)
    kept = [path.name for path in (tmp_path / "programs").iterdir()]
    assert any(name.startswith("jit_init") for name in kept), kept
    (hits, misses), (hits_again, misses_again) = (map(int, p.stdout.split()) for p in (first, second))
    assert (hits, misses_again) == (0, misses - len(kept)) and hits_again == len(kept)
    # What the loader thinks of the machine's features is not for the user to read at every start.
    assert "machine" not in second.stderr.lower()


def test_entry_points_keep_programs(tmp_path, monkeypatch):
    assert process(FLAGS, tmp_path).stdout.strip() == str(tmp_path / "programs")
    asked = []
    monkeypatch.setattr(compile_cache, "keep", lambda: asked.append(True))
    with pytest.raises(UserError, match=r"config\.model"):
        train.run({}, tmp_path / "run")
    assert asked


class Config:
    """As much of jax's configuration as is looked at."""

    def __init__(self, folder):
        self.jax_compilation_cache_dir = folder
        self.changed = {}

    def update(self, name, value):
        self.changed[name] = value


def changes(monkeypatch, folder=None) -> dict:
    config = Config(folder)
    monkeypatch.setattr(compile_cache, "jax", types.SimpleNamespace(config=config))
    compile_cache.keep()
    return config.changed


def test_settings_of_ones_own_stay(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    compile_cache.keep()  # the tests' environment has both
    assert before == (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path))
    assert changes(monkeypatch, "mine") == {"jax_persistent_cache_min_compile_time_secs": compile_cache.SECONDS}
    assert not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_to_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "file"))
    assert changes(monkeypatch) == {}


def test_what_was_not_used_for_longest_goes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path))
    monkeypatch.setattr(compile_cache, "MOST", 250)
    (tmp_path / "programs").mkdir()
    for name, used in (("b", 2), ("a", 3), ("c", 1), ("d", 4)):
        path = tmp_path / "programs" / name
        path.write_bytes(bytes(100))
        os.utime(path, (used, 9 - used))  # read at, written at
    changes(monkeypatch)
    assert sorted(path.name for path in (tmp_path / "programs").iterdir()) == ["a", "d"]
