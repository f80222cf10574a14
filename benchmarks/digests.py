"""What noticing damage costs: `python benchmarks/digests.py [--megabytes=400] [--rounds=5] [--folder=DIR]`.

Saves a random train state of about that size several times, as the loop does, and times within every save how long the digests
of its files take; both in the background thread, for which the loop does not wait. Then restores each, and times the check that
comes before. Ratios are within one save and one restore, so a busy machine moves both sides. The files are in the page cache:
a restore from a cold disk waits for the disk once, in the check, and finds the files in memory after it.
"""

import statistics
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging

from jaxpost.storage import checkpoint, digests
from jaxpost.types import TrainState

_MEGABYTES = flags.DEFINE_integer("megabytes", 400, "About how large a checkpoint is.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How many checkpoints are saved.")
_FOLDER = flags.DEFINE_string("folder", None, "Where; a temporary folder if none is given.")


def state(step: int, megabytes: int) -> TrainState:
    """Random weights and AdamW's two moments, 24 leaves each."""
    random = np.random.default_rng(step)
    width = int((megabytes * 2**20 / (3 * 24 * 4)) ** 0.5)
    trees = [{f"layer{i}": random.random((width, width), np.float32) for i in range(24)} for _ in range(3)]
    params, *moments = jax.tree.map(jax.device_put, trees)
    count = jax.numpy.array(step)
    rest = {"key": jax.random.PRNGKey(0), "step": count, "skipped": count, "streak": count}
    return TrainState(train=params, frozen=dict.fromkeys(params), opt_state=tuple(moments), ema=None, **rest)


def main(_) -> None:
    logging.set_verbosity(logging.ERROR)
    spent, write = [], digests.write

    def timed(folder):
        start = time.perf_counter()
        write(folder)
        spent.append(time.perf_counter() - start)

    digests.write = timed
    shares = {"saving": [], "restoring": []}
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        kept = checkpoint.Checkpoints(folder, keep=1)
        for step in range(1, _ROUNDS.value + 1):
            saved = state(step, _MEGABYTES.value)
            start = time.perf_counter()
            kept.save(saved, {"position": step})
            kept.manager.wait_until_finished()
            whole = time.perf_counter() - start
            shares["saving"].append(spent[-1] / (whole - spent[-1]))
            start = time.perf_counter()
            digests._damage.cache_clear()
            checkpoint.check(f"{folder}/{step}")
            check = time.perf_counter() - start
            jax.block_until_ready(kept.restore(step, saved))
            restore = time.perf_counter() - start - check
            shares["restoring"].append(check / restore)
            size = sum(file.size for file in digests._files(checkpoint.absolute(f"{folder}/{step}")).values())
            print(
                f"{size / 1e6:.0f} MB: saved in {whole:.2f} s, digests {spent[-1]:.3f} s of it; "
                f"restored in {restore:.2f} s after a check of {check:.3f} s"
            )
        kept.close()
    for what, ratios in shares.items():
        print(f"{what}: {100 * statistics.median(ratios):.1f}% on top ({100 * min(ratios):.1f} to {100 * max(ratios):.1f}%)")


if __name__ == "__main__":
    app.run(main)
