"""Load balancing for the router of a mixture of experts, added to any other objective.

Without it a router sends most tokens to few experts. The term is smallest when probability and load are even; it is a Term like
any other, with its own denominator.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from jaxpost.config.resolve import resolve
from jaxpost.declare import declared, objective
from jaxpost.errors import UserError
from jaxpost.types import Term


def _loads(forward, params, batch, key, *, of: Mapping | str = "sft.nll"):
    """The other objective's columns, and router_load [B,L,E]: f of the whole batch, in every row."""
    prepare = declared(resolve(of, "objectives"), "prepare")
    columns = prepare(forward, params, batch, key) if prepare else {}
    picks = _router(forward(params, batch))["picks"]
    tokens = jnp.maximum(jnp.sum((batch["segments"] > 0).astype(jnp.float32)), 1.0)
    load = jnp.broadcast_to(jnp.sum(picks, axis=0) / tokens, picks.shape)
    return {**columns, "router_load": load}


def _masks(of: Mapping | str = "sft.nll", **_):
    """The other objective's masks, and all real tokens, which the router learns from."""
    return *declared(resolve(of, "objectives"), "masks"), "segments"


@objective(prepare=_loads, masks=_masks)
def balanced(forward, params, batch, key, *, of: Mapping | str = "sft.nll", coefficient: float = 0.001):
    """Another objective plus a load-balancing term:

        L = L_of + coefficient * (1/L) sum_l E sum_e f_le P_le

    f_le: the share of real tokens that layer l sends to expert e; these add up to k, the number of experts a token. P_le: the
    mean probability of expert e. f is computed over the global batch by `prepare`, in one more forward pass, and has no
    gradient; P has. With an even load the term is k. of: the other objective, as a config entry.

    It differs from transformers' `router_aux_loss_coef` in balancing each layer by itself; with one layer the two are equal.
    Raises UserError for a model without experts. Source: "Switch Transformers: Scaling to Trillion Parameter Models with Simple
    and Efficient Sparsity", equations 4 to 6.
    """
    out = forward(params, batch)
    terms, metrics = resolve(of, "objectives")(lambda p, b: out if b is batch else forward(p, b), params, batch, key)
    probs = _router(out)["probs"]
    layers, experts = probs.shape[1:]
    share = jnp.sum(batch["router_load"] * probs) * experts / layers
    return {**terms, "balance": Term(share, jnp.sum((batch["segments"] > 0).astype(jnp.float32)), coefficient)}, metrics


def _router(out):
    if out.router is None:
        raise UserError("objective router.balanced: the model has no experts; use its `of` by itself.")
    return out.router
