"""What packing is worth on a file of one's own: `python benchmarks/packing.py --data=FILE`.

The same examples, once several to a row by the plan and once one to a row, by the real command line, in turns. Useful tokens
are those of examples; padding is work that nobody asked for. Beside it stands the share of a step's time that was spent waiting
for its batch, which is what the data pipeline costs.

The model has random weights (`model.py`), and a byte-pair tokenizer trained on the file itself.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import model
from absl import app, flags

from jaxpost import recipe
from jaxpost.reporting import writers

WARMUP = 3  # steps that are not counted


def run(folder: Path, workdir: Path, packing: bool) -> dict:
    """The figures of one run: useful tokens a second, the share of places that hold one, the share of time spent waiting."""
    given = flags.FLAGS
    settings = {"model": folder, "data": given.data, "packing": packing, "window": given.window, "too_long": "truncate"}
    settings |= {"batch_size": given.batch_size, "steps": given.steps + WARMUP, "held_out": 0.0, "log_every": 1}
    command = [sys.executable, "-m", "jaxpost.train", f"--config={recipe.located('configs/sft.py')}", f"--workdir={workdir}"]
    command += [f"--config.{k}={v}" for k, v in settings.items()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"the run failed:\n{done.stderr[-2000:]}")
    rows = [row for row in writers.read_rows(workdir / writers.METRICS) if row["step"] > WARMUP and "step_time" in row]
    seconds = sum(row["step_time"] for row in rows)
    tokens = sum(row["tokens_per_second"] * row["step_time"] for row in rows)
    places = len(rows) * given.batch_size * given.window
    return {"speed": tokens / seconds, "fill": tokens / places, "wait": sum(row["wait_time"] for row in rows) / seconds}


def main(_) -> None:
    """The command line; see the module's docstring."""
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # an accelerator is for the runs
    found = {True: [], False: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.make(folder, given.size, text=given.data)
        for i in range(given.rounds):
            for packing in found:
                found[packing].append(run(folder, Path(scratch) / f"{i}-{packing}", packing))
    median = {p: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for p, runs in found.items()}
    print("| | useful tokens/s | places that hold a token | waiting for a batch |\n| --- | --- | --- | --- |")
    for packing, name in ((True, "packed"), (False, "padded")):
        m = median[packing]
        print(f"| {name} | {m['speed']:.0f} | {m['fill']:.3f} | {m['wait']:.2%} |")
    ratio = statistics.median(a["speed"] / b["speed"] for a, b in zip(found[True], found[False], strict=True))
    shape = f"{given.batch_size} rows of {given.window}, {given.steps} steps, {given.rounds} rounds in turns"
    print(f"\n{Path(given.data).name}, {given.size}, {shape}: packing is worth {ratio:.2f} times.")


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "A local file, as config.data takes it.", required=True)
    flags.DEFINE_enum("size", "32m", sorted(model.SIZES), "The model's size.")
    flags.DEFINE_integer("window", 512, "Tokens a row.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 4, "Rows a step.", lower_bound=1)
    flags.DEFINE_integer("steps", 12, "Steps that are timed, after three that are not.", lower_bound=1)
    flags.DEFINE_integer("rounds", 2, "How often each is run.", lower_bound=1)
    app.run(main)
