"""The FLOPs of a program, and the shortest time that a step can take.

FLOPs come from the traced program: the compiler counts a loop's body once and hides its kernels. A matrix product is 2 x (size
of the result) x (size of the sum), times the lengths of the loops around it. Unused results are removed first, as the compiler
does. A hand-written kernel counts by its own cost estimate, or by the products in its body at every point of its grid; splash
attention counts only the blocks that a causal mask leaves.

The time is a model: arithmetic at the data sheet's bfloat16 peak, memory at its bandwidth, collectives at the speed of the
links that they span. If all three overlap, the step takes as long as the longest; if no collective does, they come on top.
"""

import math

from jax.interpreters import partial_eval

from jaxpost.compiled import topology as machines
from jaxpost.compiled.hlo import SCOPE, Collective


def flops(traced) -> float:
    """FLOPs of a traced program (a closed jaxpr) over all devices."""
    used, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _of(used, 1)


def _of(jaxpr, shards: int) -> float:
    return sum(_equation(eqn, shards) for eqn in jaxpr.eqns)


def _equation(eqn, shards: int) -> float:
    """FLOPs of one equation; shards: how many devices run it, each with its own part."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (left, _), (rows, _) = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return shards * 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in left)
    if name in ("ragged_dot", "ragged_dot_general"):
        return shards * _ragged(eqn)
    if name == "conv_general_dilated":
        kernel, places = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        return shards * 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[places[0]]
    if name == "scan":
        return params["length"] * _of(params["jaxpr"].jaxpr, shards)
    if name == "while":
        return _turns(eqn) * _of(params["body_jaxpr"].jaxpr, shards)
    if name == "cond":
        return max(_of(branch.jaxpr, shards) for branch in params["branches"])
    if name == "pallas_call":
        return shards * _kernel(params)
    if name == "shard_map":
        axes = params.get("manual_axes") or params["mesh"].axis_names
        shards *= math.prod(params["mesh"].shape[a] for a in axes)
    return sum(_of(inner, shards) for inner in _inner(params))


def _inner(params: dict) -> list:
    """The programs that an equation calls; for a differentiable call only the forward one."""
    jaxprs = []
    for key, value in params.items():
        if key in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun", "transpose_jaxpr_fun"):
            continue
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            jaxprs.append(inner)
    return jaxprs


def _ragged(eqn) -> float:
    """FLOPs of [m,k] x [g,k,n], a group for each row; or, for the groups' gradients, of [k,m] x [k,n] in groups of k."""
    left, right = (v.aval.shape for v in eqn.invars[:2])
    out = eqn.outvars[0].aval.shape
    contracted = eqn.params.get("ragged_dot_dimension_numbers")
    if contracted is None:
        return 2.0 * math.prod(out) * left[-1]
    (over, _), _ = contracted.dot_dimension_numbers
    if set(over) & set(contracted.lhs_ragged_dimensions):  # each row is summed into its own group
        return 2.0 * math.prod(left) * math.prod(right) / math.prod(left[i] for i in over)
    return 2.0 * math.prod(out) * math.prod(left[i] for i in over)


def _turns(eqn) -> int:
    """An upper bound of a loop's turns: from a scope around it, or the limit in its condition."""
    if scoped := SCOPE.findall(str(eqn.source_info.name_stack)):
        return int(scoped[-1])
    condition = eqn.params["cond_jaxpr"].jaxpr
    limits = [int(v.val) for e in condition.eqns if e.primitive.name == "lt" for v in e.invars[1:] if hasattr(v, "val")]
    return max(limits, default=1)


def _kernel(params: dict) -> float:
    if (estimate := params.get("cost_estimate")) is not None:
        return float(estimate.flops)
    grid = [n for n in params["grid_mapping"].grid if isinstance(n, int)]
    total = math.prod(grid) * _of(params["jaxpr"], 1)
    if "splash" in str(params.get("name")):
        # Causal attention by blocks, at most m of n for each row of blocks: the first rows have fewer and skip the rest.
        n, m = max(grid[-2:]), min(grid[-2:])
        total *= 1 - (m - 1) / (2 * n)
    return total


# ---------------------------------------------------------------------------------------------------------------- Time


def seconds(topology: machines.Topology, devices: list, collective: Collective) -> tuple[float, float]:
    """(time on the links within a slice, time on the network between slices) of all runs of a collective, without overlap.

    devices: the mesh's, in its order. Where a group spans several slices, the links carry the whole array and the network each
    chip's share of it.
    """
    chip, group = topology.chip, [devices[i] for i in collective.group]
    if collective.kind.endswith("between slices"):
        return 0.0, collective.times * collective.sent / chip.dcn
    within = collective.sent / (chip.link * machines.links(topology, group))
    slices = machines.slices_of(group)
    if slices == 1:
        if collective.kind in ("all-to-all", "ragged-all-to-all"):  # most of it passes through other chips
            within *= max(1.0, len(group) / 4)
        return collective.times * within, 0.0
    each = len(group) // slices
    if each == 1:
        within = 0.0
    across = collective.sent * (slices - 1) / slices / max(each, 1) / chip.dcn
    return collective.times * within, collective.times * across


def times(topology: machines.Topology, work: float, traffic: float, links: float, network: float) -> dict[str, float]:
    """Seconds of a device for FLOPs, memory and collectives, and for the whole step: `overlapped` and `serial`."""
    chip = topology.chip
    parts = {"compute": work / chip.peak, "memory": traffic / chip.bandwidth, "links": links, "network": network}
    # Arithmetic and memory always overlap in hardware; collectives overlap as far as the compiler hides them.
    alone = max(parts["compute"], parts["memory"])
    return {**parts, "overlapped": max(parts.values()), "serial": alone + links + network}
