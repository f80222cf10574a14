"""What the compiled step needs, against vocabulary, length and depth: `python benchmarks/memory.py [--rows=4]`.

Nothing runs: the step is compiled from shapes alone, and the compiler says how many bytes it takes beyond the state and the
batch. Three claims are held against it. The logits are never all there at a time, so the vocabulary costs its chunk and the
head's gradient. With remat a layer costs its input. Layers are scanned, so compilation takes as long for many as for few.
"""

import dataclasses
import time

import jax
from absl import app, flags
from ml_collections import ConfigDict

from jaxpost import optim, recipe, sharding
from jaxpost.data import source
from jaxpost.models.families import Architecture
from jaxpost.models.transformer import Transformer
from jaxpost.objectives import sft
from jaxpost.stages import state

BASE = Architecture(
    vocab=8192, width=256, mlp_width=704, layers=4, heads=4, kv_heads=2, head_width=64, max_positions=65536, qk_norm="head"
)
LENGTH = 512
MIB = 2**20


def measured(arch: Architecture, rows: int, length: int, remat: str) -> tuple[float, float]:
    """(temporary MiB, seconds of compilation) of the step on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    transformer, tx = Transformer(arch, remat=remat), optim.make(recipe.DEFAULTS["optimizer"], 100)
    held = state.shapes(transformer, mesh, tx, ".*")
    step = state.program(transformer, sft.nll, tx, held, mesh, ConfigDict(recipe.DEFAULTS))
    lowered = step.lower(held, sharding.batch_shapes(source.columns(rows, length), mesh))
    start = time.perf_counter()
    compiled = lowered.compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB, time.perf_counter() - start


def table(title: str, head: list[str], lines: list[list]) -> None:
    """Prints a table in markdown; numbers as they are, or to a tenth."""
    text = [[f"{x:,.1f}" if isinstance(x, float) else f"{x:,}" for x in line] for line in lines]
    print(f"\n{title}\n")
    for row in [head, ["---"] * len(head), *text]:
        print(f"| {' | '.join(row)} |", flush=True)


def main(_) -> None:
    """The command line; see the module's docstring."""
    rows = flags.FLAGS.rows
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is what is timed
    measured(dataclasses.replace(BASE, layers=1), 1, 8, "none")  # the compiler's own start

    lines = []
    for vocab in (8192, 32768, 131072):
        arch = dataclasses.replace(BASE, vocab=vocab)
        logits, gradient = rows * LENGTH * vocab * 4 / MIB, vocab * arch.width * 4 / MIB
        lines.append([vocab, measured(arch, rows, LENGTH, "none")[0], logits, gradient])
    head = ["vocabulary", "temporary MiB", "float32 logits would be", "gradients of embedding and head, each"]
    table(f"{rows} rows of {LENGTH} tokens, {BASE.layers} layers of {BASE.width}", head, lines)

    lines = []
    for length in (512, 1024, 2048, 4096):
        none, full = (measured(BASE, rows, length, remat)[0] for remat in ("none", "full"))
        lines.append([length, none, full, none / length / rows * 1024, full / length / rows * 1024])
    head = ["length", "remat none, MiB", "remat full, MiB", "none, KiB a token", "full, KiB a token"]
    table(f"{rows} rows, {BASE.layers} layers of {BASE.width}, vocabulary {BASE.vocab:,}", head, lines)

    lines = []
    for layers in (2, 8, 32):
        arch = dataclasses.replace(BASE, layers=layers)
        (none, seconds), (full, again) = (measured(arch, rows, LENGTH, remat) for remat in ("none", "full"))
        lines.append([layers, none, full, seconds, again])
    head = ["layers", "remat none, MiB", "remat full, MiB", "none compiles in, s", "full compiles in, s"]
    table(f"{rows} rows of {LENGTH} tokens, layers of {BASE.width}, vocabulary {BASE.vocab:,}", head, lines)


if __name__ == "__main__":
    flags.DEFINE_integer("rows", 4, "Rows of the batch.", lower_bound=1)
    app.run(main)
