"""Surrogates: the loss of a sampled token, that is `stable_mask` and `reference_policy` of the policy-gradient estimator.

    grad = sum over tokens of  stable_mask * advantage / reference_policy * d policy

A surrogate maps a `PolicyBatch` to the loss of each token. A is the token's advantage, r the ratio of the policy to the policy
that sampled, n the number of tokens of its completion. At the sampling weights r is exactly 1, and each surrogate has the
gradient -A d log policy, up to the constant that its docstring states. A weighting maps a `PolicyBatch` to a factor for the
loss of each token. `estimator` makes objectives of both.

Ratios are clamped at e^20, and have no gradient beyond it: exp would overflow, and infinity times a zero advantage is nan.
Advantages, old log-probabilities and weightings have no gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.declare import part
from jaxpost.objectives import documents
from jaxpost.types import Batch, Output, Params

MAX_LOG_RATIO = 20.0  # nats


@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """A batch of completions with the current policy's log-probabilities and entropies [B,S], in nats, valid at the mask.

    entropy has a gradient only where a term asks for it.
    """

    params: Params
    output: Output
    columns: Batch
    logps: jax.Array
    entropy: jax.Array

    @property
    def mask(self) -> jax.Array:
        """The sampled tokens."""
        return self.columns["mask"]

    def constant(self, name: str) -> jax.Array:
        """A column at the learned tokens, zero elsewhere, without gradient."""
        return jnp.where(self.mask, jax.lax.stop_gradient(self.columns[name]), 0.0)

    @functools.cached_property
    def advantages(self) -> jax.Array:
        """A: how much better than expected each token turned out."""
        return self.constant("advantages")

    @functools.cached_property
    def log_ratio(self) -> jax.Array:
        """log r: the policy's log-probability minus that of the policy that sampled."""
        return jnp.where(self.mask, self.logps, 0.0) - self.constant("old_logps")

    @property
    def ratio(self) -> jax.Array:
        """r."""
        return _exp(self.log_ratio)

    @functools.cached_property
    def lengths(self) -> jax.Array:
        """[B,N] float32: n of each document, at least 1, to divide by."""
        return jnp.maximum(documents.lengths(self.columns), 1.0)

    def total(self, values: jax.Array) -> jax.Array:
        """The sum of values over each completion, at each of its tokens."""
        return self.spread(documents.sums(values, self.columns))

    def mean(self, values: jax.Array) -> jax.Array:
        """The mean of values over each completion, at each of its tokens."""
        return self.spread(documents.sums(values, self.columns) / self.lengths)

    def spread(self, numbers: jax.Array) -> jax.Array:
        """The documents' numbers [B,N] at each of their tokens."""
        return documents.over_tokens(numbers, self.columns)


class Surrogate(NamedTuple):
    """The loss of each token [B,S], and where it is clipped because its ratio is too low or too high; None: never."""

    loss: jax.Array
    low: jax.Array | None = None
    high: jax.Array | None = None


def _exp(x: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(x, MAX_LOG_RATIO))


def _clipped(ratio, advantages, low: float, high: float, dual: float | None = None, delta: float | None = None) -> Surrogate:
    capped = ratio if delta is None else jnp.minimum(ratio, delta)
    loss = -jnp.minimum(capped * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
    if dual is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual * advantages), loss)
    return Surrogate(loss, (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0))


# ---------------------------------------------------------------------------------------------------------- Surrogates


def reinforce(batch: PolicyBatch) -> Surrogate:
    """-A log policy: the reference is the current policy, so that stale rollouts count as fresh ones."""
    return Surrogate(-batch.advantages * batch.logps)


@part(off_policy=True)
def clip(
    batch: PolicyBatch, *, low: float = 0.2, high: float = 0.2, dual: float | None = None, delta: float | None = None
) -> Surrogate:
    """PPO's  -min(r A, clip(r, 1 - low, 1 + high) A).

    dual: where A < 0 the loss is at most -dual A (dual clip; verl's default is 3). delta: where A < 0 there is no gradient
    above r = delta (two-sided clipping). Both must be larger than 1 + high.
    """
    return _clipped(batch.ratio, batch.advantages, low, high, dual, delta)


@part(off_policy=True)
def gspo(batch: PolicyBatch, *, low: float = 3e-4, high: float = 4e-4) -> Surrogate:
    """clip with the sequence's ratio at every token, s = exp(mean over the completion of log r).

    The gradient goes through each token's own log-probability, weighted by s. Where A is constant, it equals the gradient of
    the sequence's loss. Advantages may also differ by token. low and high have the scale of a mean: 0.2 would never clip.
    """
    zero = batch.logps - jax.lax.stop_gradient(batch.logps)  # carries the gradient
    return _clipped(_exp(jax.lax.stop_gradient(batch.mean(batch.log_ratio)) + zero), batch.advantages, low, high)


@part(off_policy=True, sequence_level=True)
def sequence_clip(batch: PolicyBatch, *, low: float = 0.2, high: float = 0.2) -> Surrogate:
    """clip of the completion as one action, r = exp(sum of log r); each token has 1/n of its loss.

    For aggregations that sum over the completion (sequence_sum, constant). A is constant over a completion.
    """
    advantages = documents.constants(batch.advantages, batch.columns)
    clipped = _clipped(_exp(documents.sums(batch.log_ratio, batch.columns)), advantages, low, high)
    return Surrogate(batch.spread(clipped.loss / batch.lengths), batch.spread(clipped.low), batch.spread(clipped.high))


@part(off_policy=True)
def cispo(batch: PolicyBatch, *, cap: float = 5.0) -> Surrogate:
    """-min(r, cap) A log policy, the weight without gradient: every token keeps its gradient.

    cap is an absolute ratio, as TRL's epsilon_high; others write 1 + high. There is no lower bound.
    """
    weight = jax.lax.stop_gradient(jnp.minimum(batch.ratio, cap))
    return Surrogate(-weight * batch.advantages * batch.logps)


@part(off_policy=True)
def sapo(batch: PolicyBatch, *, positive: float = 1.0, negative: float = 1.05) -> Surrogate:
    """-f(r) A,  f(r) = 4/t s(t (r - 1)),  t = positive where A > 0, else negative: a soft gate in place of the clip.

    f'(1) = 1 and f(1) = 2/t.
    """
    t = jnp.where(batch.advantages > 0, positive, negative)
    return Surrogate(-4 / t * jax.nn.sigmoid(t * (batch.ratio - 1)) * batch.advantages)


@part(off_policy=True)
def gmpo(batch: PolicyBatch, *, low: float = 0.4, high: float = 0.4) -> Surrogate:
    """-A times the geometric mean of the completion's ratios, each clipped to [e^-low, e^high] where that raises the loss.

    For an aggregation that averages over the completion (sequence_mean): each token has its completion's loss. A is averaged
    over the tokens. The gradient at r = 1 is that of -A mean of log policy.
    """
    advantages = batch.mean(batch.advantages)
    low_cut, high_cut = (batch.log_ratio < -low) & (advantages < 0), (batch.log_ratio > high) & (advantages > 0)
    stable = jnp.where(low_cut, -low, jnp.where(high_cut, high, batch.log_ratio))
    return Surrogate(-_exp(batch.mean(stable)) * advantages, low_cut, high_cut)


@part(off_policy=True)
def vespo(batch: PolicyBatch, *, positive: Sequence[float] = (2.0, 3.0), negative: Sequence[float] = (3.0, 2.0)) -> Surrogate:
    """-phi(w) A log policy,  phi(w) = w^k e^(l (1 - w)),  w the whole completion's ratio; phi(1) = 1, without gradient.

    positive, negative: k and l where A >= 0, and where A < 0. The weight falls off on both sides of 1. Log-ratios are clamped
    at 20 nats each and w at 1e-8, as in TRL. Source: "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable
    Off-Policy LLM Training".
    """
    k, decay = (jnp.where(batch.advantages >= 0, p, n) for p, n in zip(positive, negative, strict=True))
    log_w = jnp.clip(batch.total(jnp.clip(batch.log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)), math.log(1e-8), MAX_LOG_RATIO)
    phi = jax.lax.stop_gradient(jnp.exp(decay + k * log_w - decay * jnp.exp(log_w)))
    return Surrogate(-phi * batch.advantages * batch.logps)


# ---------------------------------------------------------------------------------------------------------- Weightings


def _undecided(batch: PolicyBatch, *, share: float = 0.2) -> dict:
    bound = jnp.nanquantile(jnp.where(batch.mask, batch.entropy, jnp.nan), 1 - share)
    return {"undecided": batch.mask & (batch.entropy >= bound)}


@part(prepare=_undecided)
def top_entropy(batch: PolicyBatch, *, share: float = 0.2) -> jax.Array:
    """1 for the share of the batch's tokens with the highest entropy, 0 for the others, which still count in the denominators.

    The threshold is a quantile over the global batch, which costs one more forward pass. Source: "Beyond the 80/20 Rule:
    High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning".
    """
    return batch.columns["undecided"].astype(jnp.float32)


def off_policy(batch: PolicyBatch, *, most: float = 0.1) -> jax.Array:
    """0 for a completion with A < 0 whose mean of -log r is above `most` nats, which the policy has already left; else 1.

    Source: "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models".
    """
    stale = jax.lax.stop_gradient(-batch.mean(batch.log_ratio)) > most
    return jnp.where((batch.advantages < 0) & stale, 0.0, 1.0)


SURROGATES = {f.__name__: f for f in (reinforce, clip, gspo, sequence_clip, cispo, sapo, gmpo, vespo)}
WEIGHTINGS = {f.__name__: f for f in (top_entropy, off_policy)}
