"""Policy gradients of given log-probabilities: the parameters are the tokens' log-probabilities, entropies and values.

So a test of what becomes of them needs no model, and has its gradient by each token.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import policy_gradient_cases as cases

from jaxpost.config.resolve import resolve
from jaxpost.objectives import estimator
from jaxpost.step import gradients
from jaxpost.types import Head, Output

# Three completions a row, each with one token of prompt.
ROWS, EACH, WIDTH = 2, 3, 3 * (cases.T + 1)
GIVEN = ("logps", "entropy", "now")  # now: the critic's values
CRITIC = {"value_head": {"kernel": np.array([[0.0], [0.0], [1.0]], np.float32)}}


def packed(case: dict, tokenwise: bool = False) -> dict:
    """The batch of a case, and `place` [N,T]: where each token lies in it (the flat index; -1 for none)."""
    columns = {k: v for k, v in case.items() if k not in ("mask", "advantages", "token_advantages", "old_values", "values")}
    columns |= {"values": case["old_values"], "now": case["values"]}
    columns["advantages"] = case["token_advantages"] if tokenwise else case["advantages"][:, None] * case["mask"]
    batch = {k: np.zeros((ROWS, WIDTH), np.float32) for k in columns}
    batch |= {k: np.zeros((ROWS, WIDTH), np.int32) for k in ("tokens", "segments", "positions")}
    batch["mask"], place = np.zeros((ROWS, WIDTH), bool), np.full((cases.N, cases.T), -1)
    for row in range(ROWS):
        start = 0
        for number in range(EACH):
            i = EACH * row + number
            n = case["mask"][i].sum()
            document, completion = slice(start, start + n + 1), slice(start + 1, start + n + 1)
            batch["segments"][row, document], batch["positions"][row, document] = number + 1, np.arange(n + 1)
            batch["mask"][row, completion] = True
            for k, v in columns.items():
                batch[k][row, completion] = v[i, :n]
            place[i, :n] = row * WIDTH + np.arange(start + 1, start + n + 1)
            start += n + 1
    return batch | {"place": place}


def _given(output, batch, mask=None):
    mask = batch["mask"] if mask is None else mask
    logps, entropy, _ = jnp.moveaxis(jnp.where(mask[..., None], output.hidden, 0.0), -1, 0)
    return {"logps": logps, "entropy": jax.lax.stop_gradient(entropy), "correct": entropy}


def _given_with_gradient(fn, output, *, columns, mask):
    logps, entropy, _ = jnp.moveaxis(jnp.where(mask[..., None], output.hidden, 0.0), -1, 0)
    return {"logps": logps, "entropy": entropy}


def rows(drifts, advantages, **columns) -> dict:
    """One row of completions of these log-ratios; each with one token of prompt."""
    whole = [[0.0, *d] for d in drifts]
    flat = np.array([sum(whole, [])], np.float32)
    numbers = np.array([sum(([i + 1] * len(r) for i, r in enumerate(whole)), [])], np.int32)
    mask = np.array([sum(([False] + [True] * (len(r) - 1) for r in whole), [])])
    own = np.where(mask, np.asarray(advantages, np.float32)[numbers - 1], 0.0).astype(np.float32)
    zeros = np.zeros_like(flat)
    batch = {"segments": numbers, "mask": mask, "logps": flat - 1.0 * mask, "old_logps": -1.0 * mask, "advantages": own}
    batch |= dict.fromkeys(("entropy", "now", "values", "returns", "ref_logps"), zeros)
    batch |= {"tokens": zeros.astype(np.int32), "positions": zeros.astype(np.int32)}
    return batch | {k: np.asarray(v) for k, v in columns.items()}


@contextlib.contextmanager
def scores():
    """Within it objectives take the log-probabilities and entropies that are given."""
    with mock.patch.multiple(estimator, token_scores=_given, at_tokens=_given_with_gradient):
        yield


def forward(params, batch) -> Output:
    """Hands the parameters on, as hidden states [B,S,3]."""
    # The critic's value of a token is read at the one before it.
    hidden = jnp.stack([params["logps"], params["entropy"], jnp.roll(params["now"], -1, axis=1)], axis=-1)
    return Output(hidden, Head(jnp.zeros((1, 3))))


GIVEN = ("logps", "entropy", "now")


def measured(entry, batch: dict):
    """(loss, {what is given: gradient [ROWS,WIDTH]}, metrics) on a batch from _packed; batches may be stacked in front."""
    objective = resolve(entry, "objectives")

    def one(batch):
        found = {k: v for k, v in batch.items() if k not in (*GIVEN, "place")}
        params = {k: batch[k] for k in GIVEN} | CRITIC
        frozen = jax.tree.map(lambda _: None, params)
        return gradients(forward, objective, params, frozen, found, jax.random.PRNGKey(0))

    with scores():
        return jax.device_get(jax.jit(jax.vmap(one) if batch["mask"].ndim == 3 else one)(batch))


def by_logps(entry, drifts, advantages, **columns):
    """(loss, its gradient by each learned token's log-probability) of what `rows` makes."""
    batch = rows(drifts, advantages, **columns)
    loss, found, _ = measured(entry, batch)
    return loss, found["logps"][batch["mask"]]
