"""Two runs that want one workdir."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxpost.errors import UserError
from jaxpost.storage import cloud, lock

pytest.importorskip("gcp_storage_emulator")
import gcs_emulator

HOLDS = """
import sys, time
from jaxpost.storage import cloud, lock
with lock.held(cloud.path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_workdir_is_one_runs_and_a_dead_holder_does_not_keep_it(tmp_path):
    workdir = cloud.path(tmp_path / "w")
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(workdir)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on .*use another --workdir"), lock.held(workdir):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (workdir / lock.NAME).exists()
    with lock.held(workdir):
        # Neither by another name of the folder, nor from another thread or cell of this process.
        (tmp_path / "link").symlink_to(workdir)
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock.held(cloud.path(tmp_path / "link")):
            pass
    with lock.held(workdir):
        assert [path.name for path in workdir.iterdir()] == [lock.NAME]
    assert not list(workdir.iterdir())


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/nowhere/x", path)])
def test_what_is_no_file_in_the_locks_place_is_named(tmp_path, make):
    make(tmp_path / lock.NAME)
    with pytest.raises(UserError, match=f"{lock.NAME}: no file, .*remove it"), lock.held(cloud.path(tmp_path)):
        pass


def test_a_run_that_is_refused_leaves_no_folder_behind(tmp_path):
    with pytest.raises(UserError, match="settings"), lock.held(cloud.path(tmp_path / "a" / "b")):
        raise UserError("settings")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bucket():
    running = gcs_emulator.start("jaxpost-locks")
    yield cloud.path("gs://jaxpost-locks")
    running.stop()


def test_in_a_bucket_a_lock_is_kept_by_writing_it(bucket, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    workdir = bucket / "w"
    with lock.held(workdir):
        ours = lock._HELD.pop(str(workdir))  # what follows is as another process sees it
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock.held(workdir):
            pass
        lock._HELD[str(workdir)] = ours
    assert not (workdir / lock.NAME).exists()


def test_in_a_bucket_a_lock_is_lost_by_silence_and_then_nothing_is_saved(bucket, monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 0.3)
    monkeypatch.setattr(lock.time, "sleep", lambda _, sleep=time.sleep: sleep(0.05))
    workdir = bucket / "silent"
    with lock.held(workdir):
        asleep = lock._HELD.pop(str(workdir))
        with lock.held(workdir):
            asleep.beat()
        lock._HELD[str(workdir)] = asleep
        with pytest.raises(UserError, match="another one took the workdir over"):
            lock.check(workdir / "checkpoints" / "train")
        lock.check(bucket / "silent2")


def test_in_a_bucket_a_lock_whose_writing_was_answered_too_late_is_still_ours(bucket):
    with lock.held(bucket / "late"):
        ours = lock._HELD[str(bucket / "late")]
        ours.generation = 7  # of before a writing whose answer was lost
        ours.beat()
        assert not ours.lost and ours.generation == ours.blob.generation != 7
