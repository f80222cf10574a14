"""Writers of figures: JSON lines always, TensorBoard and Weights & Biases where they are installed.

Everything else can be made from `metrics.jsonl`. Each line is one call of `write`:

    {"stage": "sft", "step": 20, "time": 31.4, "loss": 1.93, ...}

with `time` in seconds since the run began, continued through restarts, and null for a figure that is not finite (JSON has no
name for those). `samples.jsonl` holds some completions in the same way; where a run keeps all of them, completions/<stage> has
a Parquet file a step. TensorBoard's events are under tensorboard/<stage>, so that a metric of two stages is two curves. Only
one process of a run may hold a `MetricWriter`.

A run that stops between two checkpoints has written rows that it will write again when it is continued. So `cut_back` cuts all
files back to the restored step before the writer is opened: later rows go, and with them a torn last line. The other rows are
kept byte for byte. Event files are filtered event by event, since viewers treat restart records differently. A Weights & Biases
server cannot be cut back: the steps are logged there a second time.

Object stores cannot append. For a workdir such as gs://bucket/run the files are written to a local folder, and copied every 30
seconds, on `flush` and on `close`. Call `flush` before a checkpoint, so that no row before it can be lost.
"""

import contextlib
import json
import math
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from etils import epath

from jaxpost.errors import UserError
from jaxpost.reporting import table
from jaxpost.storage import cloud

METRICS, SAMPLES, EVENTS, COMPLETIONS = "metrics.jsonl", "samples.jsonl", "tensorboard", "completions"
_OWN_NAMES = ("stage", "step", "time")
_COPY_SECONDS = 30.0


def _plain(value):
    """`value` for JSON: NumPy and JAX scalars as numbers, non-finite ones as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _line(row):
    return (json.dumps(_plain(row), allow_nan=False) + "\n").encode()


def _are_figures(row):
    """Whether a row of metrics.jsonl has numbers or null only, and a time."""
    rest = {**row, "stage": 0}
    return isinstance(row.get("time"), (int, float)) and all(x is None or isinstance(x, (int, float)) for x in rest.values())


def _is_sample(row):
    """Whether a row of samples.jsonl has a valid kind and a prompt with it."""
    return "kind" not in row or (isinstance(row["kind"], str) and "prompt" in row)


_CHECKS = {METRICS: _are_figures, SAMPLES: _is_sample}


def _lines(path):
    """(line, row) for each row of a JSON-lines file, without a torn last line; empty if there is no file.

    Raises UserError at any other line that cannot be read.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)):
                raise ValueError("no object with a stage and a step")
            if path.name in _CHECKS and not _CHECKS[path.name](row):
                raise ValueError("no figures with their time" if path.name == METRICS else "no prompt of a kind")
            rows.append((line if line.endswith(b"\n") else line + b"\n", row))
        except (ValueError, RecursionError) as error:
            if number < len(lines) or line.endswith(b"\n"):
                raise UserError(f"{path}:{number}: not a JSON line ({error}); remove this line") from error
    return rows


def read_rows(path):
    """The rows of metrics.jsonl or samples.jsonl, a list of dicts; empty if there is no such file. A torn last line is left
    out.

    Raises UserError naming the file and line when another line is broken.
    """
    return [row for _, row in _lines(path)]


class MetricWriter:
    """Appends metrics and samples to those of the run in `workdir` (local or gs://).

    `config_dict` (JSON) and `stage_names` describe the run to Weights & Biases, which is used when `wandb` can be imported and
    WANDB_API_KEY or WANDB_MODE is set. TensorBoard is used when `tensorboard` can be imported.
    """

    def __init__(self, workdir, config_dict, stage_names):
        self._workdir = epath.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._staging = tempfile.mkdtemp() if cloud.is_remote(workdir) else None
        self._local = Path(self._staging or workdir)
        if self._staging:
            for name in (METRICS, SAMPLES):
                if (self._workdir / name).exists():
                    (self._workdir / name).copy(epath.Path(self._local / name))
        earlier = read_rows(self._local / METRICS)
        # By the monotonic clock: the wall clock is set back now and then.
        self._start = time.monotonic() - max((row.get("time") or 0.0 for row in earlier), default=0.0)
        self._copied, self._copied_sizes = time.monotonic(), {}
        self._files = {name: open(self._local / name, "ab") for name in (METRICS, SAMPLES)}  # noqa: SIM115 (closed in close)
        self._events = {}
        self._wandb = _start_wandb(self._workdir, config_dict, stage_names)

    def write(self, stage, step, values):
        """Records `values`, a dict of numbers by name, for a step of a stage.

        Raises UserError for the names stage, step and time, which are reserved.
        """
        clash = [name for name in values if name in _OWN_NAMES]
        if clash:
            raise UserError(f"metric {clash[0]!r} of stage {stage!r}: this name is taken by the log itself; rename the metric")
        values = {name: float(value) for name, value in values.items()}
        self._append(METRICS, {"stage": stage, "step": int(step), "time": round(time.monotonic() - self._start, 3), **values})
        self._write_events(stage, int(step), values)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/step": int(step), **{f"{stage}/{name}": value for name, value in values.items()}})

    def samples(self, stage, step, rows):
        """Records completions: `rows` is a list of dicts (prompt, completion, reward, ...); stage and step are added."""
        for row in rows:
            self._append(SAMPLES, {**row, "stage": stage, "step": int(step)})

    def completions(self, stage, step, rows):
        """Keeps `rows` (completions, see table.py) whole, in completions/<stage>/<step>.parquet; stage and step are added."""
        path = self._local / COMPLETIONS / stage / f"{step:08d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [{**row, "stage": stage, "step": int(step)} for row in rows])

    def flush(self):
        """Makes everything written so far survive the end of this process. Call it before a checkpoint is written."""
        if self._staging:
            for path in sorted(self._local.rglob("*")):
                # Files only grow, so a new size means new content.
                if path.is_file() and self._copied_sizes.get(path) != (size := path.stat().st_size):
                    target = self._workdir / path.relative_to(self._local)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    epath.Path(path).copy(target, overwrite=True)
                    self._copied_sizes[path] = size
        else:
            for file in self._files.values():
                os.fsync(file.fileno())
        self._copied = time.monotonic()

    def close(self):
        """Flushes and closes all files; the writer cannot be used afterwards."""
        for events in filter(None, self._events.values()):
            events.close()
        self.flush()
        for file in self._files.values():
            file.close()
        if self._staging:
            shutil.rmtree(self._staging)
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name, row):
        self._files[name].write(_line(row))
        self._files[name].flush()
        if self._staging and time.monotonic() - self._copied > _COPY_SECONDS:
            self.flush()

    def _write_events(self, stage, step, values):
        if stage not in self._events:
            self._events[stage] = _event_writer(self._local / EVENTS / stage)
        if self._events[stage] is None:
            return
        from tensorboard.compat.proto import event_pb2, summary_pb2

        scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = event_pb2.Event(step=step, wall_time=time.time(), summary=summary_pb2.Summary(value=scalars))
        self._events[stage].add_event(event)
        self._events[stage].flush()


def _event_writer(folder):
    """TensorBoard's writer of one event file in a local folder, or None when it is not installed."""
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    return EventFileWriter(str(folder))


def _start_wandb(workdir, config, stages):
    """A Weights & Biases run that a restart continues, or None when it is not installed or not enabled."""
    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")):
        return None
    try:
        import wandb
    except ImportError:
        return None
    id_file = workdir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    run = wandb.init(id=id_file.read_text().strip(), resume="allow", name=workdir.name, config=config)
    # Each stage counts its own steps; the server's own step could only grow.
    for stage in stages:
        run.define_metric(f"{stage}/step")
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return run


def cut_back(workdir, stage_order, stage, step):
    """Cuts the files in `workdir` back to `step` of `stage`: later records are removed, those at that step are kept.

    `stage_order` lists the stages' names as they run; rows of other stages are kept. A `step` of -1 drops the whole stage. Call
    it before a `MetricWriter` is opened. Raises UserError if `stage` is not in `stage_order`.
    """
    if stage not in stage_order:
        raise UserError(f"stage {stage!r}: not one of this run's stages ({', '.join(stage_order)})")
    workdir = epath.Path(workdir)
    later = stage_order[stage_order.index(stage) + 1 :]
    for name in (METRICS, SAMPLES):
        path = workdir / name
        if path.exists():
            earlier = [(line, row) for line, row in _lines(path) if row["stage"] not in later]
            replace(path, b"".join(line for line, row in earlier if row["stage"] != stage or row["step"] <= step))
    for folder in (workdir / kind / name for kind in (EVENTS, COMPLETIONS) for name in later):
        if folder.exists():
            folder.rmtree()
    for path in (workdir / COMPLETIONS / stage).glob("*.parquet"):
        if int(path.stem) > step:
            path.unlink()
    _cut_events(workdir / EVENTS / stage, step)


def write_parquet(path, rows):
    """Writes `rows` (dicts, see table.py) as the Parquet file at `path` (local or gs://), atomically.

    Raises UserError where pyarrow is not installed.
    """
    replace(path, table.parquet(rows))


def replace(path, content):
    """Writes `content` (bytes) to `path` (local or gs://) atomically: a stop leaves the old file or the new one."""
    path = epath.Path(path)
    if cloud.is_remote(path):
        path.write_bytes(content)
        return
    # Written beside the file and then renamed.
    beside = path.parent / (path.name + ".new")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)  # on a full disk the partial file only takes space
        raise


def _cut_events(folder, step):
    """Replaces the event files in `folder` by one with the events up to `step`."""
    old = sorted(folder.glob("events.out.tfevents.*")) if folder.exists() else []
    if not old:
        return
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    except ImportError:
        return
    # Through a local folder: TensorBoard's reader and writer cannot open every object store.
    with tempfile.TemporaryDirectory() as local:
        writer = _event_writer(Path(local) / "new")
        for path in old:
            copy = Path(local) / path.name
            path.copy(epath.Path(copy))
            for event in LegacyEventFileLoader(str(copy)).Load():
                if event.HasField("summary") and event.step <= step:
                    writer.add_event(event)
        writer.close()
        for path in old:
            path.unlink()
        for path in (Path(local) / "new").iterdir():
            epath.Path(path).copy(folder / path.name)
