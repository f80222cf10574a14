"""Compiles a recipe's programs for a machine that is not here: whether they fit, and how fast they would be.

    python -m jaxpost.fit --config=configs/sft.py --config.model=FOLDER --topology=v5e:2x4
    python -m jaxpost.fit --config=configs/tpu/sft.py:llama31_8b          the recipe names its topology
    python -m jaxpost.fit --config=... --search                           proposes the best mesh and microbatches
    python -m jaxpost.fit --config=... --json=PATH                        everything in the table as data; - is stdout

The exit status is 0 if every stage fits and 3 if one does not. For a stage that does not fit, remedies are compiled, cheapest
first, until one fits. From Python: `fit.report(config, "v5p:4x4x4")` gives the same data.

No weights are made and no data is read: a batch is taken to be full, one document a row, all of it learned. libtpu compiles
the programs, and memory is what it reports. Times are a model (`compiled/roofline.py`).
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxpost import recipe, sharding
from jaxpost.compiled import program, search, topology
from jaxpost.config import cli
from jaxpost.config.startup import captured_stderr
from jaxpost.errors import UserError
from jaxpost.reporting.progress import model_flops

MISFIT = 3  # the exit status where something does not fit
REMEDIES = 32  # the most remedies that are compiled; those that do not fit fail within seconds
TRIED = 4  # how many fitting candidates the search collects; it compiles twice as many at most


def report(
    config, where: str = "", *, remedy: bool = True, best: bool = False, progress: Callable[[str], None] = str, **changes
) -> dict[str, Any]:
    """The memory and time of every program of a recipe's stages on a topology, as data: bytes and FLOPs a device, seconds.

    config: as `jaxpost.train` takes it; where: a topology's name, else the recipe's own; remedy: whether to look for a change
    that makes a stage fit; best: whether to search for a better mesh; progress: called with a line before and after each
    program is compiled, which may take minutes; changes: settings that differ. Raises UserError for an invalid recipe and for
    an unknown topology.
    """
    config = recipe.opened(config, **changes)
    with captured_stderr():  # libtpu logs a lot as it starts
        machine = topology.find(_named(where or config.topology))
    mesh = sharding.make_mesh(**config.mesh, devices=machine.devices)
    figures = {"topology": machine.name, "devices": len(machine.devices), "mesh": dict(mesh.shape), "stages": []}
    for name, settings in recipe.stages(config):
        if settings.do not in ("train", "generate") or settings.endpoint:
            why = "its completions are an endpoint's" if settings.endpoint else f"do={settings.do!r}"
            progress(f"{name}: is not compiled ({why})")
            continue
        prepared = program.prepared(settings, mesh)
        stage = {
            "stage": name,
            **_stage(settings, mesh, machine, prepared, lambda line, name=name: progress(f"{name}: {line}")),
        }
        alone = name if config.stages else ""
        if remedy and not stage["fits"] and not any(map(_faulty, stage["programs"])):
            stage["remedy"] = _remedy(settings, mesh, machine, alone, progress)
        if best:
            stage["search"] = _best(settings, machine, alone, progress)
        figures["stages"].append(stage)
    return {**figures, "fits": all(stage["fits"] for stage in figures["stages"])}


def _faulty(one) -> bool:
    """Whether the compiler refuses a program for a reason other than memory; a smaller one would not help."""
    return "refused" in one and one["hbm"]["total"] < one["hbm"]["limit"]


def _named(where: str) -> str:
    if not where:
        raise UserError(f"--topology=... is required, since the recipe names none. {topology.choices()}")
    return where


def _stage(s, mesh, machine: topology.Topology, prepared: program.Prepared, progress: Callable) -> dict[str, Any]:
    """One stage's programs, compiled."""
    arch, trained = prepared.model.transformer.arch, prepared.trained
    rows, length = prepared.shape
    work = model_flops(
        arch, rows * length, rows * length, rows * length * (length + 1) / 2, max(0.0, 1 - trained / arch.parameters())
    )
    figures = {"parameters": arch.parameters(), "trained": trained, "rows": rows, "length": length}
    figures |= {k: s[k] for k in ("microbatches", "remat", "dtype")} | {"model_flops": work / mesh.size}
    figures |= {"state_bytes": prepared.state_bytes(), "programs": []}
    figures |= {"uncounted": "rollouts.processors"} if s.rollouts.processors else {}
    for number, traced in enumerate(prepared.programs, 1):
        progress(f"compiling {traced.name}, {number} of {len(prepared.programs)}")
        one = program.measured(s, mesh, machine, traced)
        seconds = one["lower_seconds"] + one["compile_seconds"]
        progress(
            f"{traced.name}: {_bytes(one['hbm']['total'])}{_outcome(one)}, in {seconds:.0f} s"
        )  # at once: a later program may hang
        if "seconds" in one and traced.tokens:
            best = {k: one["seconds"][k] for k in ("overlapped", "serial")}
            one["tokens_per_second"] = {k: traced.tokens / t for k, t in best.items()}
            if traced.name == "step":
                one["mfu"] = {k: figures["model_flops"] / t / machine.chip.peak for k, t in best.items()}
        figures["programs"].append(one)
    return {**figures, "fits": all(one["fits"] and not one["given_up"] for one in figures["programs"])}


# ------------------------------------------------------------------------------------------------- Remedies and search


def _remedy(s, mesh, machine: topology.Topology, stage: str, progress: Callable) -> dict[str, Any]:
    """The cheapest change that makes a stage fit, compiled; `settings` is None where none does."""
    limit, tried, small = machine.chip.hbm if machine.chip else float("inf"), 0, []
    for way in search.remedies(s, mesh, machine.slices):
        settings = search.changed(s, way)
        if tried == REMEDIES or settings.mesh in small:
            continue
        try:
            other = sharding.make_mesh(**settings.mesh, devices=machine.devices)
            prepared = program.prepared(settings, other)
        except UserError:  # rows that do not divide, slices that a mesh does not follow
            continue
        if prepared.state_bytes() >= limit:
            small.append(settings.mesh)
            continue
        tried += 1
        text = search.flags(way, stage)
        outcome = _stage(settings, other, machine, prepared, lambda line, text=text: progress(f"{text}: {line}"))
        if outcome["fits"]:
            return {"settings": way, "flags": text, "tried": tried, "result": outcome}
    return {"settings": None, "tried": tried}


def _best(s, machine: topology.Topology, stage: str, progress: Callable) -> dict[str, Any]:
    """The best candidates, compiled, in order of their modelled time."""
    if machine.chip is None:
        raise UserError(f"--search: there is no model of the time on {machine.name}; give the topology of a TPU.")
    compiled = []
    for _, way in search.candidates(s, machine)[: 2 * TRIED]:
        settings = search.changed(s, way)
        mesh = sharding.make_mesh(**settings.mesh, devices=machine.devices)
        text = search.flags(way, stage)
        prepared = program.prepared(settings, mesh)
        outcome = _stage(settings, mesh, machine, prepared, lambda line, text=text: progress(f"{text}: {line}"))
        if outcome["fits"]:
            compiled.append({"settings": way, "flags": text, "result": outcome})
        if len(compiled) == TRIED:
            break
    unknown = {"overlapped": float("inf")}  # the time of a program whose text cannot be read
    compiled.sort(key=lambda c: sum(one.get("seconds", unknown)["overlapped"] for one in c["result"]["programs"]))
    return {"tried": compiled}


# ----------------------------------------------------------------------------------------------------------- The table


def table(figures: Mapping[str, Any]) -> str:
    """A report as text."""
    sizes = " ".join(f"{k}={v}" for k, v in figures["mesh"].items())
    lines = [verdict(figures), f"{figures['topology']}: {figures['devices']} devices, mesh {sizes}"]
    for stage in figures["stages"]:
        lines += ["", *_stage_lines(stage)]
        for one in stage["programs"]:
            lines += ["", *_program_lines(one)]
        if remedy := stage.get("remedy"):
            lines += ["", *_remedy_lines(stage, remedy)]
        if "search" in stage:
            lines += ["", *_search_lines(stage["search"])]
    return "\n".join(lines)


def verdict(figures: Mapping[str, Any]) -> str:
    """A report in one line: whether everything fits, and the memory of the largest program."""
    named = [(f"{stage['stage']}'s {one['program']}", one) for stage in figures["stages"] for one in stage["programs"]]
    if faults := [f"{name}: {one['refused']}" for name, one in named if _faulty(one)]:
        return f"DOES NOT COMPILE: {faults[0]}"
    name, largest = max(named, key=lambda pair: pair[1]["hbm"]["total"])
    hbm = largest["hbm"]
    failed = not figures["fits"] and all(one["fits"] for _, one in named)
    word = "FITS" if figures["fits"] else "FAILS, though it fits" if failed else "DOES NOT FIT"
    least = "at least " if "refused" in largest else ""
    return f"{word}: {name} takes most, {least}{_bytes(hbm['total'])}{_of(hbm['limit'])} a device"


def _stage_lines(stage) -> list[str]:
    learned = "" if stage["trained"] >= stage["parameters"] else f", {stage['trained']:,} learned"
    lines = [
        f"{stage['stage']}: {stage['parameters']:,} parameters{learned}; {stage['rows']} rows of {stage['length']} tokens in "
        f"{stage['microbatches']} microbatches, {stage['dtype']}, remat {stage['remat']}"
    ]
    return lines + (
        [f"  not counted: what {stage['uncounted']} cost while completions are drawn"] if "uncounted" in stage else []
    )


def _program_lines(one) -> list[str]:
    hbm = one["hbm"]
    lines = [f"{one['program']}, memory of a device"]
    lines += [f"  {kind:<28}{_bytes(hbm[kind]):>12}" for kind in hbm if kind not in ("total", "limit")]
    lines.append(f"  {'at least' if 'refused' in one else 'total':<28}{_bytes(hbm['total']):>12}{_outcome(one)}")
    if "refused" in one:
        lines.append(f"  the compiler refuses it: {one['refused']}")
    lines += [f"  FAILURE: the partitioner gives up a split and copies all of {where}" for where in one["given_up"]]
    if "unread" in one:
        lines.append(f"  work and time are not known: the compiled program cannot be read: {one['unread']}")
    if "traffic" in one:
        lines += _work_lines(one)
    return [*lines, f"traced in {one['lower_seconds']:.1f} s, compiled in {one['compile_seconds']:.1f} s"]


def _outcome(one) -> str:
    """The limit of a program's memory, and whether it fits."""
    word = "fits" if one["fits"] else "DOES NOT COMPILE" if _faulty(one) else "DOES NOT FIT"
    return f"{_of(one['hbm']['limit'])}: {word}"


def _of(limit: float) -> str:
    return f" of {_bytes(limit)}" if limit < float("inf") else ""


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _si(value: float, unit: str) -> str:
    """A number with three digits or more and a unit's usual prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3)):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {prefix}{unit}" if value < 1000 * size else f"{value / size:,.0f} {prefix}{unit}"
    return f"{value * 1e6:.3g} u{unit}" if value else f"0 {unit}"


def _work_lines(one) -> list[str]:
    seconds = one.get("seconds", {})

    def line(what, runs, amount, time) -> str:
        return f"  {what:<42}{runs:>8}{amount:>14}{_si(time, 's') if seconds else '':>12}"

    lines = [f"{'work of a device':<44}{'runs':>8}{'':>14}{'at full speed' if seconds else '':>14}"]
    lines.append(line("arithmetic", "", _si(one["flops"], "FLOP"), seconds.get("compute")))
    lines.append(line("memory read and written", "", _si(one["traffic"], "B"), seconds.get("memory")))
    for c in one["collectives"]:
        time = c["links"] + c["network"]
        lines.append(line(f"{c['kind']} along {c['axes']}", f"{c['count']:,.0f}", _si(c["bytes"], "B"), time))
    padded = sum(c["bytes"] for c in one["collectives"] if c["kind"] == "all-gather as all-reduce")
    if padded > 0.1 * sum(c["bytes"] for c in one["collectives"]):
        lines.append(
            "  all-gathers come as sums of padded arrays, as over three axes of a torus: keep fsdp to two, data on the third"
        )
    return [*lines, *_time_lines(one)] if seconds else lines


def _time_lines(one) -> list[str]:
    mfu, speed, lines = one.get("mfu"), one.get("tokens_per_second"), []
    for key, when in (("overlapped", "if everything overlaps"), ("serial", "if no collective does")):
        rate = (f", {speed[key]:,.0f} tokens/s" if speed else "") + (f", MFU {mfu[key]:.0%}" if mfu else "")
        lines.append(f"modelled time {when}: {_si(one['seconds'][key], 's')}{rate}")
    return lines


def _remedy_lines(stage, remedy) -> list[str]:
    if remedy["settings"] is None:
        limit, tried = stage["programs"][0]["hbm"]["limit"], remedy["tried"]
        ways = f"none of the {tried} ways that were compiled makes it fit" if tried else "nothing makes it fit"
        return [
            f"{ways} here: weights and optimizer alone take {_bytes(stage['state_bytes'])}{_of(limit)}; take a larger "
            "topology, an adapter, or a quantised base."
        ]
    return ["it fits with", f"  {remedy['flags']}", *_short(remedy["result"])]


def _short(result) -> list[str]:
    lines = []
    for one in result["programs"]:
        best, worst = (_si(one["seconds"][k], "s") if "seconds" in one else "" for k in ("overlapped", "serial"))
        time = f", modelled {best} to {worst}" if best else ""
        lines.append(f"  {one['program']}: {_bytes(one['hbm']['total'])} of {_bytes(one['hbm']['limit'])}{time}")
    return lines


def _search_lines(searched) -> list[str]:
    if not searched["tried"]:
        return ["search: no mesh was found that fits."]
    lines = ["search: compiled, fastest first"]
    for one in searched["tried"]:
        lines += [f"  {one['flags']}", *_short(one["result"])]
    return lines


# ---------------------------------------------------------------------------------------------------------------- Main


def main(_) -> None:
    """The command line; see the module's docstring."""
    (config,) = cli.required("config")
    where = flags.FLAGS.topology or config.topology
    topology.simulate(where)  # nothing runs, so the devices of this machine stay free
    figures = report(config, where, best=flags.FLAGS.search, progress=lambda line: print(line, file=sys.stderr, flush=True))
    if flags.FLAGS.json:
        text = json.dumps(figures, indent=2) + "\n"
        if flags.FLAGS.json == "-":
            print(text, end="")
        else:
            Path(flags.FLAGS.json).write_text(text)
    if flags.FLAGS.json != "-":
        print(table(figures))
    sys.exit(0 if figures["fits"] else MISFIT)


if __name__ == "__main__":
    flags.DEFINE_string("topology", "", "The machine: v5e:2x4, v4:2x2x2, v6e:4x4*2 (two slices), cpu:8; else the recipe's.")
    flags.DEFINE_bool("search", False, "Look for the fastest mesh and microbatches.")
    flags.DEFINE_string("json", "", "Where to write everything as JSON; - is stdout, in place of the table.")
    cli.run(
        main,
        "Says whether a recipe fits a machine.\n\n    python -m jaxpost.fit --config=RECIPE --topology=v5e:2x4",
        config=True,
        devices=False,  # they are simulated
    )
