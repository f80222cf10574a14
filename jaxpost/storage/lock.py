"""One run at a time in a workdir.

Two runs in one workdir would delete each other's checkpoints and mix their figures. So process 0 of a run holds the workdir's
`run.lock` until it ends, whichever way. The file says who holds it: host, process, command, since when.

On a disk the lock is the kernel's (`fcntl`), which releases it when the process dies; a file that is left behind means nothing.
A network disk must support such locks: NFS 4 does, between hosts too. Where a disk does not, a message says so and the run goes
on without a lock. Two containers that see one folder under different names share one lock.

In a bucket the lock is an object that only one process can create (`if_generation_match=0`), and that its holder rewrites every
20 seconds. A holder that died leaves it behind: the next run watches it for 90 seconds and takes it over if nobody writes it,
or at once if it was last written 15 minutes ago. A holder that is suspended or has no network for that long loses the lock
while it lives. It notices when it writes again, and saves nothing from then on.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from jaxpost.errors import UserError
from jaxpost.storage import cloud

NAME = "run.lock"
BEAT, WATCH, OLD = 20.0, 90.0, 900.0  # seconds
_HELD: dict[str, Any] = {}  # the locks of this process, which the kernel would grant it a second time


class Occupied(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
    """Locks a workdir for the length of the block; creates it if needed. Raises Occupied if another process holds it,
    and UserError if this one does.
    """
    if jax.process_index() != 0:
        yield
        return
    created = [] if cloud.is_remote(workdir) else [p for p in (workdir, *workdir.parents) if not p.exists()]
    lock = (_Object if cloud.is_remote(workdir) else _File)(workdir)
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # removes a folder that stayed empty because the run's settings were refused
            for folder in created:
                os.rmdir(folder)


def check(workdir) -> None:
    """Raises UserError if another process has taken over this process's lock of the workdir."""
    for name, lock in _HELD.items():
        if f"{workdir}/".startswith(f"{name}/") and lock.lost:
            raise UserError(
                f"{name}: this run stood still for so long that another one took the workdir over. Nothing more is saved here; "
                "the other run goes on from the last checkpoint."
            )


def _description() -> str:
    started = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    where = {"host": socket.gethostname(), "process": os.getpid(), "since": started, "command": " ".join(sys.argv)[:200]}
    return json.dumps(where | {"id": uuid.uuid4().hex})


def _refusal(workdir, content: str, kind: type[UserError] = Occupied) -> UserError:
    try:
        holder = json.loads(content)
        who = f"process {holder['process']} on {holder['host']}, since {holder['since']} ({holder['command']})"
    except (ValueError, KeyError, TypeError):  # just locked and not written yet
        who = "another process"
    return kind(f"{workdir}: another run is at work here: {who}. Wait for it, stop it, or use another --workdir.")


class _File:
    """The lock of a workdir on a disk."""

    lost = False  # the kernel keeps the lock while the process lives

    def __init__(self, workdir: epath.Path):
        workdir.mkdir(parents=True, exist_ok=True)
        self.name = os.path.realpath(workdir)
        if self.name in _HELD:
            raise _refusal(workdir, _HELD[self.name].description, UserError)
        self.path, self.description = os.path.join(self.name, NAME), _description()
        while not self._locked(workdir):
            pass
        _HELD[self.name] = self

    def _locked(self, workdir) -> bool:
        """Opens and locks the file; False where its holder just removed it. Raises UserError if another run has the lock."""
        if os.path.lexists(self.path) and not os.path.isfile(self.path):
            raise UserError(f"{self.path}: no file, where the lock of a run is one; remove it.")
        self.file = open(self.path, "a+")  # noqa: SIM115 (closed in release)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self.file.seek(0)
            content = self.file.read()
            self.file.close()
            if e.errno in (errno.EAGAIN, errno.EACCES):
                raise _refusal(workdir, content) from None
            print(f"{self.path}: this disk has no locks ({e.strerror}); see that no other run uses it.", file=sys.stderr)
            self.file = None
            return True
        if os.path.exists(self.path) and os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
            self.file.truncate(0)
            self.file.write(self.description)
            self.file.flush()
            return True
        self.file.close()
        return False

    def release(self) -> None:
        del _HELD[self.name]
        if self.file is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            self.file.close()


class _Object:
    """The lock of a workdir in a bucket."""

    def __init__(self, workdir: epath.Path):
        from google.api_core import exceptions
        from google.cloud import storage

        self.name, self.lost, self.description = str(workdir), False, _description()
        if self.name in _HELD:
            raise _refusal(workdir, _HELD[self.name].description, UserError)
        self.refused = (exceptions.PreconditionFailed, exceptions.NotFound)
        bucket, _, folder = self.name.removeprefix("gs://").partition("/")
        self.blob = storage.Client().bucket(bucket).blob(f"{folder}/{NAME}")
        self.generation = 0
        while not self._write():
            self.generation = self._abandoned(workdir)
        self.over = threading.Event()
        self.beating = threading.Thread(target=self._beats, name="jaxpost lock", daemon=True)
        self.beating.start()
        _HELD[self.name] = self

    def _write(self) -> bool:
        """Writes the object, if nobody else has written it since we last saw it."""
        try:
            self.blob.upload_from_string(self.description, if_generation_match=self.generation)
        except self.refused:
            if not self._is_ours():
                return False
        self.generation = self.blob.generation
        return True

    def _is_ours(self) -> bool:
        """Whether the object is our own write, whose response was lost."""
        try:
            self.blob.reload()
            return self.blob.download_as_text() == self.description
        except self.refused:
            return False

    def _abandoned(self, workdir) -> int:
        """The generation of an abandoned lock object; 0 if there is none. Raises UserError if its holder still writes it."""
        first, end = None, time.monotonic() + WATCH
        while True:
            try:
                self.blob.reload()
                content = self.blob.download_as_text()
            except self.refused:
                return 0
            age = (datetime.datetime.now(datetime.UTC) - self.blob.updated).total_seconds()
            if age > OLD or (first == self.blob.generation and time.monotonic() > end):
                return self.blob.generation
            if first is None:
                print(f"{workdir}: has a lock; looking for {WATCH:.0f} s whether its run is alive.", file=sys.stderr)
                first = self.blob.generation
            elif first != self.blob.generation:
                raise _refusal(workdir, content)
            time.sleep(BEAT / 10)

    def _beats(self) -> None:
        while not self.lost and not self.over.wait(BEAT):
            self.beat()

    def beat(self) -> None:
        """Rewrites the object; sets `lost` if another run has taken the lock."""
        try:
            self.lost = not self._write()
        except Exception as e:  # a network error: the next write may succeed
            print(f"{self.name}/{NAME}: could not be written ({type(e).__name__}).", file=sys.stderr)

    def release(self) -> None:
        del _HELD[self.name]
        self.over.set()
        self.beating.join()
        if not self.lost:
            with contextlib.suppress(*self.refused):
                self.blob.delete(if_generation_match=self.generation)
