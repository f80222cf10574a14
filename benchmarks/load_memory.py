"""Peak memory of loading a checkpoint, against what must be held: `python benchmarks/load_memory.py [--megabytes=400]`.

Writes a random Llama folder of about that size (float32, in several files), loads it in a process of its own, and prints the
growth of the peak resident set over the parameters' own bytes, with the largest parameter beside it. On a CPU the host owns the
parameters too, so the growth cannot be below their size; what is above it is the loader's.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from jaxpost import sharding
from jaxpost.models import families, hf, loading
from jaxpost.models.transformer import Transformer


def config(megabytes: int) -> dict:
    """A Llama of about so many MiB: width and layers grow together."""
    width, layers, vocab = 512, max(1, megabytes // 13), 8000
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "vocab_size": vocab}
    return {"model_type": "llama", "num_attention_heads": 8, "tie_word_embeddings": True, **sizes}


def peak() -> int:
    """The most bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(folder: str) -> None:
    """Loads, and prints the figures as JSON."""
    mesh = sharding.make_mesh()
    jax.block_until_ready(jax.numpy.ones(8) @ jax.numpy.ones(8))
    found = loading.describe(folder)
    before = peak()
    params = jax.block_until_ready(loading.weights(found, mesh))
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    print(json.dumps({"grew": peak() - before, "parameters": sum(sizes), "largest": max(sizes)}))


def main(argv: list[str]) -> None:
    if argv[1:]:
        return load(argv[1])
    hf.SHARD_BYTES = 64 * 2**20
    with tempfile.TemporaryDirectory() as folder:
        fields = config(flags.FLAGS.megabytes)
        arch = families.architecture(fields)
        shapes = jax.eval_shape(lambda: Transformer(arch).init(jax.random.PRNGKey(0)))
        params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
        hf.save(Path(folder), params, arch, fields)
        del params
        out = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=True)
        seen = {k: v / 2**20 for k, v in json.loads(out.stdout).items()}
    print(
        f"parameters {seen['parameters']:.0f} MiB, the largest {seen['largest']:.0f}; peak grew by {seen['grew']:.0f} MiB: "
        f"{seen['grew'] - seen['parameters']:+.0f} beyond the parameters"
    )


if __name__ == "__main__":
    flags.DEFINE_integer("megabytes", 400, "About how large the checkpoint is.")
    app.run(main)
