"""What a disk refuses ends in one message with the path and the remedy, and loses nothing that was there."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
from etils import epath

from jaxpost import recipe, train
from jaxpost.errors import UserError
from jaxpost.reporting import compare, report, writers
from jaxpost.rollouts import resume
from jaxpost.stages import records
from jaxpost.storage import checkpoint, host


@pytest.mark.parametrize("code", sorted(host._REMEDIES))
def test_every_fault_of_a_disk_is_one_message(tmp_path, code):
    file = str(tmp_path / "metrics.jsonl")
    with (
        pytest.raises(UserError, match="metrics.jsonl: .*; .*\\. What was saved before is whole: the same command continues"),
        host.disk_errors(tmp_path, host.CONTINUES),
    ):
        raise OSError(code, os.strerror(code), file)
    # A write that fails names no file.
    with pytest.raises(UserError, match=f"{tmp_path}: "), host.disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    # The same as the cause of a library's own error.
    with pytest.raises(UserError, match="metrics.jsonl: "), host.disk_errors(tmp_path):
        try:
            raise OSError(code, os.strerror(code), file)
        except OSError as error:
            raise RuntimeError("saving failed") from error
    # And as TensorStore tells it.
    with pytest.raises(UserError, match=f"{tmp_path}: "), host.disk_errors(tmp_path):
        raise ValueError(f"RESOURCE_EXHAUSTED: Failed to write 641180 bytes to file 11: [os_error_code='{code}']")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "an input/output error"), KeyError("x"), ValueError("os_error_code='5'")])
def test_other_errors_keep_their_traceback(tmp_path, error):
    with pytest.raises(type(error)) as kept, host.disk_errors(tmp_path):
        raise error
    assert kept.value is error


LIMITED = """
import resource, signal, sys
import jax.numpy as jnp
from jaxpost.storage import checkpoint, host
from jaxpost.errors import UserError
from jaxpost.types import TrainState
count = jnp.zeros((), jnp.int32)
def state(step):
    rest = {"opt_state": (), "ema": None, "key": jnp.zeros(2, jnp.uint32), "skipped": count, "streak": count}
    return TrainState(train={"w": jnp.arange(2**18, dtype=jnp.float32) * step}, frozen={"w": None}, step=count + step, **rest)
saved = checkpoint.Checkpoints(sys.argv[1])
saved.save(state(1), {"done": False})
saved.manager.wait_until_finished()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    with host.disk_errors(sys.argv[1]):
        saved.save(state(2), {"done": False})
        saved.close()
except UserError as error:
    print(error)
print(checkpoint.steps(saved.folder))
"""


@pytest.mark.slow
def test_a_disk_that_fills_while_a_checkpoint_is_written_keeps_the_one_before(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "w")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    message, steps = done.stdout.strip().splitlines()
    assert steps == "[1]" and "may not become this large" in message, done.stderr


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    writers.replace(tmp_path / "config.json", b"old")

    def fails(self, target):
        raise OSError(errno.ENOSPC, "full", str(self))

    monkeypatch.setattr(type(writers.epath.Path(tmp_path)), "replace", fails)
    with pytest.raises(UserError, match="the disk is full; free some space"), host.disk_errors(tmp_path):
        writers.replace(tmp_path / "config.json", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"] and (tmp_path / "config.json").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["file", "file/inside", "read-only/inside"])
def test_a_workdir_that_cannot_be_written_to_is_refused_before_data_is_read(tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "read-only").mkdir()
    # The superuser may write anywhere, so the system's answer is given here.
    monkeypatch.setattr(os, "access", lambda path, _: "read-only" not in str(path))
    with pytest.raises(UserError, match=f"{name.partition('/')[0]}: .*give (a folder on )?another"):
        train.run(recipe.make(**runs.settings(tmp_path, steps=1, data="not/there.jsonl")), tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept" and not list((tmp_path / "read-only").iterdir())


@pytest.mark.parametrize("content", ["", "[1]", "null", "{", "[" * 100_000, "9" * 5000])
def test_a_damaged_config_of_a_workdir_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "checkpoints").mkdir()
    for reader in (
        lambda: records.check(epath.Path(tmp_path), recipe.stages(recipe.make())),
        lambda: checkpoint.find_step(tmp_path),
        lambda: report.write(tmp_path),
        lambda: (tmp_path / "metrics.jsonl").touch() or compare.read([tmp_path]),
    ):
        with pytest.raises(UserError, match="config.json: "):
            reader()


@pytest.mark.parametrize("stages", [5, [5, None], "train"])
def test_stages_of_a_workdir_that_are_no_names_are_named(tmp_path, stages):
    (tmp_path / "config.json").write_text(json.dumps({"stages": stages}))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="config.json: `stages` is a list of names"):
        checkpoint.find_step(tmp_path)


@pytest.mark.parametrize("kind", [IsADirectoryError, NotADirectoryError, PermissionError, FileExistsError])
def test_a_fault_of_a_disk_without_its_number_is_one_message_too(kind):
    with pytest.raises(UserError, match="^here: .*(folder|rights)"), host.disk_errors("here"):
        raise kind("Cannot overwrite: environment.json")


@pytest.mark.parametrize("content", ['"loss": 1.0', '"time": "x"', '"time": 1.0, "acc": "x"', '"time": 1.0, "a": [1]'])
def test_a_row_of_figures_that_are_no_numbers_is_named(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(f'{{"stage": "sft", "step": 1, {content}}}\n')
    with pytest.raises(UserError, match="metrics.jsonl:1: .*no figures with their time"):
        writers.read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("content", ['"kind": 5, "prompt": "p"', '"kind": "greedy"'])
def test_a_sample_without_its_kind_and_prompt_is_named(tmp_path, content):
    (tmp_path / "samples.jsonl").write_text(f'{{"stage": "sft", "step": 1, {content}}}\n')
    with pytest.raises(UserError, match="samples.jsonl:1: .*no prompt of a kind"):
        writers.read_rows(tmp_path / "samples.jsonl")


@pytest.mark.parametrize("line", ["[" * 100_000, "[]", '{"stage": ["sft"], "step": 1}', '{"stage": "sft", "step": "1"}'])
def test_a_line_of_figures_that_is_none_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="metrics.jsonl:1: not a JSON line"):
        writers.read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_damaged_partial_completions_are_made_again_and_damaged_batches_named(tmp_path, damage):
    resume._store(tmp_path / resume.PARTIAL, {"key": np.array([1]), "places": np.array([0]), "found\tlengths": np.array([3])})
    path = tmp_path / resume.PARTIAL
    content = path.read_bytes()
    half = len(content) // 2
    flipped = content.replace(b"\x03\x00", b"\xff\xff")
    path.write_bytes({"empty": b"", "cut": content[:half], "flipped": flipped, "other": content}[damage])
    assert resume.read_partial(tmp_path, (1,)) == {}
    with pytest.raises(UserError, match="partial.npz: gone or damaged"):
        resume.read(path)


def test_an_archive_with_a_flipped_bit_is_whole_or_none(tmp_path):
    file, arrays = tmp_path / "x.npz", {"a": np.arange(6), "b": np.ones(3, np.int8)}
    np.savez(file, **arrays)
    whole = file.read_bytes()
    entry = 8 * whole.rindex(b"PK\x01\x02")
    locked, packed = entry + 64, entry + 80  # a bit of the flags asks for a password, the number after them for a compression
    for bit in (locked, packed, *range(0, 8 * len(whole), 61)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        for name, values in (host.read_arrays(file) or {}).items():  # a name may differ
            assert name not in arrays or np.array_equal(values, arrays[name])
    file.unlink()
    assert host.read_arrays(file) is None


def test_time_goes_on_when_the_clock_is_set_back(tmp_path, monkeypatch):
    hours = iter([9e9 - 3600 * i for i in range(100)])
    monkeypatch.setattr(writers.time, "time", lambda: next(hours))
    for _ in range(2):
        writer = writers.MetricWriter(tmp_path, {}, ["sft"])
        for step in range(2):
            writer.write("sft", step, {"loss": 1.0})
        writer.close()
    times = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times) and times[0] >= 0 and times[-1] < 60


def test_memory_is_no_more_than_the_machines():
    assert 0 < host.memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
