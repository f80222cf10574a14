"""A stage's programs, compiled for a machine that is not here, and their memory and time.

Nothing is initialised: the state and the batches are shapes. The programs are those of a run, made by the same code: the train
step, and for rollouts the sampler's programs and the reference's scoring, which run while the train state stays in memory.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxpost import optim, recipe, sharding
from jaxpost.compiled import hlo, roofline
from jaxpost.compiled.topology import Topology
from jaxpost.config.startup import captured_stderr
from jaxpost.config.unread import shares
from jaxpost.errors import UserError, first_line
from jaxpost.models import hub_configs, loading, prefix, routes
from jaxpost.models.attention import cache_axes
from jaxpost.sampling import decode, processors
from jaxpost.stages import annotations, datasets, plan, state
from jaxpost.step import combine

GIVEN_UP = re.compile(
    r"Involuntary full rematerialization\. The compiler cannot go from (.*?) efficiently for HLO operation (.*?)\. As"
)

# An amount of memory in the compiler's message about a program that takes more than a chip has.
AMOUNT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) ?([KMGT])(?:i?B)?\b")

# The trees that stay in memory between steps.
STATE = ("weights", "optimizer", "ema", "frozen", "reference")


class Traced(NamedTuple):
    """A program before it is compiled: a jitted function, its arguments as shapes, and the trees that its memory goes to."""

    name: str
    function: Callable
    arguments: tuple
    keywords: dict
    held: dict  # kind of memory -> tree of shapes
    waiting: tuple[str, ...] = ()  # the kinds that are in memory but are not its arguments
    tokens: int = 0  # how many it processes, all devices together


def outline(s, mesh) -> tuple[loading.ModelSpec, Callable, str, int]:
    """(model, objective, pattern of what trains, parameters that train) of a stage's settings, checked, without a tokenizer."""
    return plan.learned(_described(s, mesh), s, mesh)


def _described(s, mesh) -> loading.ModelSpec:
    """The model of a stage's settings, without a tokenizer."""
    named = (hub_configs.fields(s.model) or s.model) if isinstance(s.model, str) else s.model.to_dict()
    options = {"attention": s.attention, "attend": s.attend, "device": mesh.devices.flat[0], "text": False}
    spec = loading.describe(named, "", s.dtype, s.remat, recipe.plain(s.adapter), **options)
    if not hasattr(spec.transformer, "arch"):
        raise UserError("config.model: the work of a model that a function makes is not known; jaxpost.fit takes transformers.")
    return spec


class Prepared(NamedTuple):
    """A stage before it is compiled: its model, how many parameters train, and its programs."""

    model: loading.ModelSpec
    trained: int
    programs: list[Traced]
    shape: tuple[int, int]  # rows and tokens a row of a batch

    def state_bytes(self) -> float:
        """Bytes a device that stay in memory between steps. Only another mesh makes this smaller."""
        return sum(bytes_held(tree) for kind, tree in self.programs[0].held.items() if kind != "inputs")


def prepared(s, mesh) -> Prepared:
    """A stage with settings s on a mesh. Its programs are the step, and the sampler's where it draws completions."""
    if s.do == "generate":
        return _generating(s, mesh)
    spec, objective, trainable, trained = outline(s, mesh)
    tx = optim.make(s.optimizer, s.steps or 1000)
    held = state.shapes(spec.transformer, mesh, tx, trainable, adapter=spec.adapter, leaves=spec.leaves, ema=s.ema > 0)
    columns = plan.columns(s, objective, spec)
    batch = sharding.batch_shapes(columns, mesh)
    step = state.program(spec.transformer, objective, tx, held, mesh, s)
    kinds = {"weights": held.train, "optimizer": held.opt_state, "ema": held.ema, "frozen": held.frozen}
    named, references = shares(s.source), []
    if "rollouts" in named:
        chosen, _ = annotations.choose(s, objective, plan.own_columns(s, objective, spec), (), spec, annotations.models(s))
        references = [one for one in chosen if one.weights == "start"]
    if references:
        kinds["reference"] = held.train  # a copy of what trains, as it was at the start
    inputs = {"inputs": batch}
    programs = [Traced("step", step, (held, batch), {}, kinds | inputs, ("reference",), math.prod(batch["tokens"].shape))]
    if "rollouts" in named:
        alone = s.shared_prefix or datasets.row_type(objective).completions == 2  # a prompt gives one row
        prompts = round(s.batch_size * named["rollouts"]) * s.rollouts.minibatches // (1 if alone else s.rollouts.group)
        programs += _sampler(s, mesh, spec.transformer, combine(held.train, held.frozen), prompts, kinds)
    for one in references:
        score = jax.jit(one.program(spec.transformer.forward))
        first, few = combine(kinds["reference"], held.frozen), sharding.batch_shapes(_microbatch(s, columns), mesh)
        programs.append(Traced("reference", score, (first, few), {}, kinds | {"inputs": few}, ("weights", "optimizer", "ema")))
    return Prepared(spec, trained, programs, batch["tokens"].shape)


def _generating(s, mesh) -> Prepared:
    """A stage that generates: the sampler's programs, and the weights alone."""
    spec = _described(s, mesh)
    params = loading.abstract(spec.transformer, mesh, spec.adapter, spec.leaves)  # shapes with their places
    programs = _sampler(s, mesh, spec.transformer, params, max(1, s.eval_rows // s.rollouts.group), {"weights": params})
    return Prepared(spec, 0, programs, (s.eval_rows, s.rollouts.prompt_window + s.rollouts.new))


def _microbatch(s, columns: dict) -> dict:
    """The columns of a microbatch: so many rows are scored at a time."""
    rows = s.batch_size // s.microbatches
    return {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) if x.shape else x for k, x in columns.items()}


def _sampler(s, mesh, transformer, params, prompts: int, kinds: dict) -> list[Traced]:
    """The sampler's programs: weight layout, prefill and decoding, while the train state (if there is one) waits in memory.
    Decoding runs for as many turns as the longest completion has, in one segment or several.
    """
    options, whole = s.rollouts, sharding.replicated(mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    prompts, jobs = (ways * n for n in decode.spread(prompts, options.group, ways))
    room = prefix.length(params) + options.prompt_window + options.new
    slots = min(options.slots + -options.slots % ways, jobs) or jobs

    def output(function, *arguments, **keywords):
        with sharding.use(mesh):
            shapes = jax.eval_shape(lambda *a: function(transformer, *a, **keywords), *arguments)
            letters = {1: "B", 2: "BS", 4: cache_axes()["v"]}  # for keys too: only B and K are split, at the same place in both
        if function is decode.prepare:
            return sharding.placed(shapes, sharding.gathered(mesh, shapes))
        return sharding.placed(shapes, sharding.by_letters(mesh, shapes, letters))

    def rows(*shape, dtype=jnp.int32):
        return sharding.batch_shapes(jax.ShapeDtypeStruct(shape, dtype), mesh)

    chosen = {name: rows(prompts) for name in routes.columns(params)}
    inputs = rows(prompts, options.prompt_window), rows(prompts), chosen
    weights = output(decode.prepare, params)
    bank = output(decode.prefill, weights, *inputs, room=room)
    queue, halted = decode.Queue(rows(jobs), rows(jobs), rows(ways)), rows(jobs, dtype=bool)
    begun = output(decode.begin, halted, slots=slots, room=room, new=options.new)
    noise = stop = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    amounts = {k: jax.ShapeDtypeStruct((), x.dtype, sharding=whole) for k, x in processors.controls().items()}
    weighed = {**kinds, "sampler's weights": weights}
    prefilling, decoding = {**weighed, "inputs": inputs}, {**weighed, "bank": (bank, queue), "cache": begun}
    first, then = (transformer, weights, *inputs), (transformer, weights, bank, queue, begun, noise, stop, amounts, halted)
    return [
        Traced("prepare", decode.prepare, (transformer, params), {}, kinds, ("optimizer", "ema", "reference")),
        Traced("prefill", decode.prefill, first, {"room": room}, prefilling, STATE, prompts * options.prompt_window),
        Traced(
            "decode", decode.segment, then, {"turns": min(options.segment, options.new)}, decoding, STATE, slots * options.new
        ),
    ]


# ------------------------------------------------------------------------------------------------------------ Compiling


@contextlib.contextmanager
def _uncached():
    """Turns off the cache of compiled programs: a cached program comes without the compiler's warnings."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def measured(s, mesh, topology: Topology, traced: Traced) -> dict[str, Any]:
    """Compiles a program and returns its figures. Bytes and FLOPs are a device's.

    Where the compiler refuses the program and names no bytes of HBM, `refused` is the first line of its message.
    """
    with sharding.use(mesh), _uncached():
        start = time.perf_counter()
        trace = traced.function.trace(*traced.arguments, **traced.keywords)
        lowered = trace.lower()
        begun = time.perf_counter()
        output, refusal = [""], None
        try:
            with captured_stderr() as output:
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            compiled, refusal = None, error
    figures = {"program": traced.name, "lower_seconds": begun - start, "compile_seconds": time.perf_counter() - begun}
    figures["flops"] = roofline.flops(trace.jaxpr) / mesh.size
    figures["given_up"] = given_up(output[0])
    if refusal is not None:
        amount = refused_bytes(str(refusal))
        figures |= {"fits": False, "hbm": _refused_memory(amount, traced, topology)}
        return figures if amount else {**figures, "refused": first_line(refusal)}
    hbm = _memory(compiled, traced, topology)
    figures |= {"fits": hbm["total"] <= hbm["limit"], "hbm": hbm}
    try:
        return {**figures, **_cost(mesh, topology, compiled, figures["flops"])}
    except Exception as error:  # a libtpu may print programs differently, or fail to print them: the memory figures still hold
        return {**figures, "unread": first_line(error)}


def refused_bytes(message: str) -> float | None:
    """Bytes of HBM that a refused program wants, read from the compiler's message; None if the message is not about HBM, and 0
    if it names no amount.

    The wording differs between versions of libtpu. The total comes in the first lines and is the largest amount there.
    """
    head = message[:1000]
    if "RESOURCE_EXHAUSTED" not in head or not re.search(r"\bHBM\b", head, re.IGNORECASE):
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return max((float(amount) * units[unit] for amount, unit in AMOUNT.findall(head)), default=0.0)


def given_up(text: str) -> list[str]:
    """The partitioner's warnings about arrays that it copies whole to every device because it cannot keep their split."""
    if "Involuntary full rematerialization" not in text:
        return []
    arrays = [f"{operation.partition('), ')[0]}: from {change}" for change, operation in GIVEN_UP.findall(text)]
    return list(dict.fromkeys(arrays)) or ["(the compiler does not say which)"]


def _memory(compiled, traced: Traced, topology: Topology) -> dict[str, float]:
    """Bytes a device of a compiled program by kind, the waiting kinds included; `limit` is what a program may have."""
    held, waiting = _held(traced)
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # Peak memory counts arguments and results; the rest is temporaries.
    peak = stats.peak_memory_in_bytes or stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes
    temporaries = max(peak - stats.argument_size_in_bytes - outputs, 0)
    return {**held, "outputs": outputs, "temporaries": temporaries, "total": peak + waiting, "limit": _limit(topology)}


def _refused_memory(amount: float | None, traced: Traced, topology: Topology) -> dict[str, float]:
    """The same for a program that the compiler refuses; amount: what `refused_bytes` gives.

    Without an amount `total` is a lower bound: the bytes held, and at least the limit where HBM is what the program lacks. A
    program below the limit was refused for another reason: a kernel's own memory, or a fault of the compiler.
    """
    held, waiting = _held(traced)
    least, limit = sum(held.values()), _limit(topology)
    if amount:
        total = max(amount + waiting, least)
        return {**held, "temporaries": total - least, "total": total, "limit": limit}
    return {**held, "total": least if amount is None else max(least, limit), "limit": limit}


def _held(traced: Traced) -> tuple[dict[str, float], float]:
    """(bytes a device of each kind in memory while a program runs, the sum of those that only wait)."""
    held = {kind: bytes_held(tree) for kind, tree in traced.held.items() if jax.tree.leaves(tree)}
    return held, sum(held.get(kind, 0.0) for kind in traced.waiting)


def _limit(topology: Topology) -> float:
    return topology.chip.hbm if topology.chip else float("inf")


def bytes_held(tree) -> float:
    """Bytes of a tree of shapes on one device."""
    return float(sum(np.prod(_shard(x), dtype=np.int64) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _shard(x) -> tuple[int, ...]:
    return x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape


def _cost(mesh, topology: Topology, compiled, flops: float) -> dict[str, Any]:
    """Bytes, collectives and times of a compiled program."""
    program, devices = hlo.parse(compiled.as_text()), list(mesh.devices.flat)
    merged: dict[tuple[str, str], dict] = {}
    for c in hlo.collectives(program, dict(mesh.shape)):
        links, network = roofline.seconds(topology, devices, c) if topology.chip else (0.0, 0.0)
        entry = merged.setdefault((c.kind, c.axes), {"kind": c.kind, "axes": c.axes, "largest": c.name})
        for key, more in (("count", c.times), ("bytes", c.sent * c.times), ("links", links), ("network", network)):
            entry[key] = entry.get(key, 0) + more
    figures = {"traffic": hlo.traffic(program), "collectives": sorted(merged.values(), key=lambda e: -e["bytes"])}
    if topology.chip:
        totals = (sum(e[key] for e in figures["collectives"]) for key in ("links", "network"))
        figures["seconds"] = roofline.times(topology, flops, figures["traffic"], *totals)
    return figures
