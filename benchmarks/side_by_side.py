"""Our step beside other frameworks': one command, one table.

    python benchmarks/side_by_side.py                                              ours alone
    python benchmarks/side_by_side.py --peer=trl=PYTHON --peer=tunix=PYTHON --peer=transformers=PYTHON

PYTHON is the interpreter of an environment that the peer is installed in; README.md, beside this file, says how to make one.

A workload is a folder here (`sft`; `grpo`, and with an argument `grpo:shared`), a competitor a file in it with
one function `run(job, clock)`, and `ours.py` has besides `prepare(job, folder)`, which makes what all of them share. Each
competitor runs as a process of its own, one after the other and round after round, since the speed of a shared machine wanders:
ratios are taken within a round, and the median is told.

A ratio is only printed beside the proof of equal work: losses of the first steps from the same weights on the same rows, no
further than 1e-4 from ours in any round; or, where each draws its own tokens, other figures that agree as well, which the
workload's `ours.py` names. A competitor that fails is left out, with its last words. Where something else took part of the
machine meanwhile, it is told; torch suffers from that more than XLA does.

The columns: seconds a step and tokens a second, the median of the rounds' medians; how many times faster ours is; the most
memory that the process held; seconds from the process's start to the end of the first step; the largest difference of what
proves that the work is equal; and the FLOP/s that the model's mathematics needs, as a share of those of a large plain product
in our process, in that round. Memory and first step are those of later rounds, whose programs ours finds compiled, and of the
first round in brackets. Below it stands how far whole curves are apart, of losses and of gradients' norms, for those
competitors that tell them.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import competitor
import jax
import model
import numpy as np
from absl import app, flags

HERE = Path(__file__).parent
EQUAL_STEPS, EQUAL = 6, 1e-4
WARMUP = 3  # steps whose time is not counted: compilation, and the allocator's first rounds
OTHERS = 0.05  # share of the machine that others may take during a round; with more it is no measurement


def others() -> float:
    """CPU seconds that the machine spent on anything but this process and its children, since it started; 0 where untold."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    own = sum(os.times()[:4])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK") - own


def turn(workload: str, name: str, python: str, job: dict, folder: Path) -> dict | None:
    """One competitor's figures of one round: seconds of each counted step, to the first step, losses, bytes at the most; None
    where it failed.

    folder: scratch; compiled programs and tokens of ours stay in its parent, so that the second round finds them.
    """
    folder.mkdir()
    job = {**job, "result": str(folder / "result.json")}
    (folder / "job.json").write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    if name == "ours":
        caches = folder.parent / "caches"
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(caches / "programs"), "JAXPOST_CACHE": str(caches / "tokens")}
    command = [python, "-P", str(HERE / "competitor.py"), str(HERE / workload / f"{name}.py"), str(folder / "job.json")]
    began, before = time.time(), others()
    with (folder / "output.txt").open("wb") as output:
        status = subprocess.run(command, env=environment, cwd=folder, stdout=output, stderr=output).returncode
    foreign = (others() - before) / (time.time() - began) / os.cpu_count()
    if status:
        tail = "\n".join((folder / "output.txt").read_text(errors="replace").splitlines()[-15:])
        print(f"{name} ended with status {status}; its last words:\n{tail}", file=sys.stderr)
        return None
    found = json.loads(Path(job["result"]).read_text())
    steps = [b - a for a, b in zip(found["ends"], found["ends"][1:], strict=False)]
    return {**found, "first": found["ends"][0] - began, "steps": steps[WARMUP - 1 :], "others": foreign}


def difference(one: dict, ours: dict) -> float | None:
    """The largest difference of a round's figures from ours, those that are the workload's proof or else the first losses; None
    where there are too few to tell.
    """
    if proof := ours.get("proof"):
        told = one.get("proof", {})
        pairs = [(told.get(name, np.nan), value) for name, value in proof.items()] if told else []
    elif min(len(one["losses"]), len(ours["losses"])) < EQUAL_STEPS:
        pairs = []
    else:
        pairs = list(zip(one["losses"][:EQUAL_STEPS], ours["losses"][:EQUAL_STEPS], strict=True))
    return float(np.abs(np.subtract(*zip(*pairs, strict=True))).max()) if pairs else None


def apart(name: str, rounds: list[dict], ours: list[dict]) -> str:
    """How far a competitor's curves are from ours, in a sentence; "" where it tells none."""
    told, count = [], 0
    for what, figure in (("loss", "losses"), ("gradient's norm", "norms")):
        pairs = [pair for a, b in zip(rounds, ours, strict=True) for pair in zip(a[figure], b[figure], strict=False)]
        if gaps := [abs(one - other) for one, other in pairs]:
            told.append(f"in {what} by {max(gaps):.1e} at most and {statistics.mean(gaps):.1e} in the mean")
            count = len(gaps)
    return f"Over {count} steps {name} differs from ours {', '.join(told)}." if told else ""


def summary(name: str, rounds: list[dict], ours: list[dict], tokens: int) -> dict:
    """A competitor's line of the table, from its rounds and ours."""
    seconds = [statistics.median(r["steps"]) for r in rounds]
    mine = [statistics.median(r["steps"]) for r in ours]
    gaps = [difference(a, b) for a, b in zip(rounds, ours, strict=True)]
    gap = None if None in gaps else float(np.max(gaps))  # nan, if one is
    roof = [o["flops"] / o["matmul"] / s for o, s in zip(ours, seconds, strict=True)]
    return {
        "name": name,
        "seconds_per_step": statistics.median(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "times_slower": statistics.median(s / m for s, m in zip(seconds, mine, strict=True)),
        "equal_work": gap is not None and gap <= EQUAL,
        "largest_loss_difference": gap,
        "others": max(r["others"] for r in rounds),
        "peak_gib_cold": rounds[0]["peak_bytes"] / 2**30,
        "peak_gib": max(r["peak_bytes"] for r in rounds[1:] or rounds) / 2**30,
        "first_step_cold": rounds[0]["first"],
        "first_step": statistics.median(r["first"] for r in rounds[1:] or rounds),
        "roofline": statistics.median(roof),
    }


def table(lines: list[dict]) -> str:
    """The lines as markdown; a ratio only where the work was equal."""
    head = ("", "s a step", "tokens/s", "ours is faster", "GiB (cold)", "first step (cold)", "work differs", "of a matmul")
    rows = [head, ("---",) * len(head)]
    for line in lines:
        gap = line["largest_loss_difference"]
        ratio = f"{line['times_slower']:.2f} times" if line["equal_work"] else "not equal work"
        rows.append(
            (
                line["name"],
                f"{line['seconds_per_step']:.3f}",
                f"{line['tokens_per_second']:.0f}",
                "" if line["name"] == "ours" else ratio,
                f"{line['peak_gib']:.2f} ({line['peak_gib_cold']:.2f})",
                f"{line['first_step']:.1f} ({line['first_step_cold']:.1f})",
                "" if line["name"] == "ours" else "unknown" if gap is None else f"{gap:.1e}",
                f"{line['roofline']:.2f}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def proved(ours: dict) -> str:
    """What of a round of ours the others must equal, in a sentence."""
    if "proof" in ours:
        return f"Of ours: {', '.join(f'{name} {value:.6g}' for name, value in ours['proof'].items())}."
    return f"Losses of ours: {', '.join(f'{x:.5f}' for x in ours['losses'][:EQUAL_STEPS])}."


def compete(workload: str, competitors: dict[str, str], job: dict, rounds: int, scratch: Path) -> dict[str, list[dict]]:
    """{name: its figures of each round}, of those competitors (name: interpreter) that came through all of them."""
    found = {name: [] for name in competitors}
    for i in range(rounds):
        for name in list(found):
            figures = turn(workload, name, competitors[name], job, scratch / f"{name}-{i}")
            if figures is None and name == "ours":
                sys.exit("ours failed, so there is nothing to compare with.")
            if figures is None:
                del found[name]
                continue
            found[name].append(figures)
            speed = statistics.median(figures["steps"])
            print(f"round {i + 1}, {name}: {speed:.3f} s a step, first {figures['first']:.1f} s", file=sys.stderr, flush=True)
    return found


def told(lines: list[dict], rounds: dict[str, list[dict]], job: dict) -> str:
    """The table, and below it what it was measured on and what to doubt."""
    peak = statistics.median(r["matmul"] for r in rounds["ours"])
    count, steps = len(rounds["ours"]), len(rounds["ours"][0]["steps"])
    notes = [
        f"{steps} steps of {job['tokens_per_step']} tokens, {count} rounds; a plain product runs at {peak / 1e9:.0f} GFLOP/s.",
        *(proved(found) for found in rounds["ours"][:1]),
    ]
    if "proof" not in rounds["ours"][0]:
        curves = [apart(name, found, rounds["ours"]) for name, found in rounds.items() if name != "ours"]
        notes += [curve for curve in curves if curve]
    if "compiled" in rounds["ours"][0]:
        late = max(after - before for before, after in (found["compiled"] for found in rounds["ours"]))
        notes.append(f"Ours compiled {late} programs after the second step.")
    if (foreign := max(line["others"] for line in lines)) > OTHERS:
        notes.append(f"Others took up to {foreign:.0%} of the machine during a round: measure again when it is quiet.")
    return "\n\n".join([table(lines), "\n".join(notes)])


def main(_) -> None:
    """The command line; see the module's docstring."""
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # an accelerator is the competitors', one at a time
    peers = dict(peer.partition("=")[::2] for peer in given.peer)
    workload, _, argument = given.workload.partition(":")
    known = sorted({p.stem for p in (HERE / workload).glob("*.py")} - {"ours"})
    for name, python in peers.items():
        if name not in known or not shutil.which(python):
            sys.exit(f"--peer={name}={python}: give NAME=PYTHON, one of {', '.join(known)} and an interpreter that has it.")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        ours = competitor.load(HERE / workload / "ours.py")
        model.make(scratch / "model", given.size, **getattr(ours, "MODEL", {}))
        job = {"model": str(scratch / "model"), "steps": given.steps + WARMUP, "argument": argument}
        job = ours.prepare(job, scratch)
        rounds = compete(workload, {"ours": sys.executable, **peers}, job, given.rounds, scratch)
    lines = [summary(name, found, rounds["ours"], job["tokens_per_step"]) for name, found in rounds.items()]
    print(f"{given.workload}, {given.size}:\n\n{told(lines, rounds, job)}")
    if given.json:
        Path(given.json).write_text(json.dumps({"lines": lines, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string(
        "workload", "sft", "Which folder of competitors, with its argument: sft, dpo, dpo:prefix, generate, grpo."
    )
    flags.DEFINE_multi_string("peer", [], "NAME=PYTHON, a competitor and its interpreter; for several, give it several times.")
    flags.DEFINE_enum("size", "32m", sorted(model.SIZES), "The model's size.")
    flags.DEFINE_integer("steps", 12, "Steps that are timed, after three that are not.", lower_bound=EQUAL_STEPS)
    flags.DEFINE_integer(
        "rounds", 3, "How often each competitor runs; from two on the first step is timed warm too.", lower_bound=1
    )
    flags.DEFINE_string("json", "", "A file for every figure.")
    app.run(main)
