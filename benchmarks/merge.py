"""What a merge costs beside copying: `python benchmarks/merge.py [--layers=16] [--width=2048] [--method=ties]`.

Writes two random Llama folders in bfloat16 (the defaults are a model of 1.2 billion parameters) and, for each method, merges
them into a third and in turn moves the same bytes: it reads both folders and writes one. Each is a process of its own that
begins with nothing of the folders in the page cache and ends when the disk has everything. Prints the median of the ratios, and
the most memory that the merging process held beside what it had after its imports. Pages of the files that are mapped do not
count, since the system takes them back at will.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags

from jaxpost import merge
from jaxpost.models import families, hf, layout

KEYWORDS = {"slerp": {"t": 0.5}}
BASED = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "slerp")


def config(layers: int, width: int, vocab: int) -> dict:
    """A Llama with the proportions of one of a billion parameters."""
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256), "tie_word_embeddings": True}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "vocab_size": vocab}
    return {"model_type": "llama", "dtype": "bfloat16", **heads, **sizes}


def write(folder: Path, fields: dict, change: float) -> None:
    """A folder of random weights; change: by how much they differ from those of change 0."""
    arch = families.architecture(fields)
    numbers = np.random.default_rng(0).normal(size=(2, 2**20)).astype(np.float32)
    block = (0.02 * (numbers[0] + change * numbers[1])).astype(ml_dtypes.bfloat16)
    hf.save_config(folder, arch, fields)
    about = {name: (block.dtype, shape) for name, (shape, _) in layout.places(arch).items()}
    hf.write_shards(folder, about, (np.resize(block, shape) for _, shape in about.values()))


def settle(*folders: Path) -> None:
    """Has the disk write the folders' files, and the page cache forget them."""
    for file in (file for folder in folders for file in folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(first: Path, second: Path, out: Path) -> None:
    """Reads both folders' weights and writes those of the first."""
    out.mkdir()
    for source, kept in ((first, True), (second, False)):
        for file in sorted(source.glob("*.safetensors")):
            with file.open("rb", 0) as stream, (out / file.name if kept else Path(os.devnull)).open("wb", 0) as target:
                while piece := stream.read(2**24):
                    target.write(piece)


def own_memory() -> int:
    """Bytes of this process that are no mapped file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def child(job: dict) -> None:
    """Does one job, timed, and prints the figures as JSON."""
    first, second, out = (Path(job[name]) for name in ("first", "second", "out"))
    start, peak, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    if job["method"] == "copy":
        copied(first, second, out)
    else:
        what = {"name": job["method"], **KEYWORDS.get(job["method"], {})}
        of, base = ([str(second)], str(first)) if job["method"] in BASED else ([str(first), str(second)], "")
        merge.merge(what, of, str(out), base=base)
    settle(out)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "memory": peak[0] - start}))


def timed(folder: Path, method: str) -> dict:
    """The figures of one job in a process of its own."""
    first, second, out = folder / "first", folder / "second", folder / "out"
    settle(first, second)
    job = {"first": str(first), "second": str(second), "out": str(out), "method": method}
    done = subprocess.run([sys.executable, __file__, json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    if argv[1:]:
        return child(json.loads(argv[1]))
    fields = config(flags.FLAGS.layers, flags.FLAGS.width, flags.FLAGS.vocab)
    shapes = [shape for shape, _ in layout.places(families.architecture(fields)).values()]
    largest, total = max(map(np.prod, shapes)), sum(map(np.prod, shapes))
    with tempfile.TemporaryDirectory(dir=flags.FLAGS.folder) as folder:
        for name, change in (("first", 0.0), ("second", 0.1)):
            write(Path(folder) / name, fields, change)
        print(f"two folders of {total / 1e9:.2f} billion parameters, {2 * total / 2**30:.2f} GiB each; the largest tensor "
              f"has {2 * largest / 2**20:.0f} MiB")  # fmt: skip
        print("| method | merging | copying | ratio | memory | over the largest tensor |\n|---|---|---|---|---|---|")
        for method in flags.FLAGS.method:
            rounds = [(timed(Path(folder), method), timed(Path(folder), "copy")) for _ in range(flags.FLAGS.rounds)]
            ours, copy = (statistics.median(pair[i]["seconds"] for pair in rounds) for i in (0, 1))
            ratio = statistics.median(one["seconds"] / other["seconds"] for one, other in rounds)
            memory = max(one["memory"] for one, _ in rounds)
            print(f"| {method} | {ours:.1f} s | {copy:.1f} s | {ratio:.2f} | {memory / 2**20:.0f} MiB | "
                  f"{memory / largest / 2:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    flags.DEFINE_integer("layers", 16, "Layers of the models.")
    flags.DEFINE_integer("width", 2048, "Their width.")
    flags.DEFINE_integer("vocab", 128256, "Their vocabulary.")
    flags.DEFINE_integer("rounds", 3, "How often each is timed.")
    flags.DEFINE_multi_string("method", ["linear", "task_arithmetic", "slerp", "dare_linear", "ties"], "Methods of merging/.")
    flags.DEFINE_string("folder", None, "Where to put the models; the system's folder for temporary files if not given.")
    app.run(main)
