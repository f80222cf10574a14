"""What a sampled token's loss is: the stabilisation and the reference policy of the policy-gradient estimator, as a table.

    grad = sum over tokens of  stable_mask * advantage / reference_policy * d policy

A surrogate is a function of the `Rollouts` of a batch that gives every token's loss; A is the token's advantage, r = policy /
policy that sampled, n the tokens of its completion. With the sampling weights themselves r = 1 exactly, and each surrogate has
the gradient -A d log policy, up to the constant its docstring states. A weighting is a function of the same that gives what
every token's loss is multiplied by. `estimator` makes objectives of both.

No ratio is larger than e^20, and beyond that it has no gradient: exp would overflow, and infinity times an advantage of zero is
no number. Advantages, old log-probabilities and weightings are constants.
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

MOST = 20.0  # nats


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """A batch of completions and what the policy says of them now; arrays are [B,S], in nats, and mean something at the mask.

    entropy has a gradient only where a term asks for it.
    """

    params: Params
    output: Output
    batch: Batch
    logps: jax.Array
    entropy: jax.Array

    @property
    def mask(self) -> jax.Array:
        """The sampled tokens."""
        return self.batch["mask"]

    def constant(self, name: str) -> jax.Array:
        """A column of the batch where the mask is, zero elsewhere; it has no gradient."""
        return jnp.where(self.mask, jax.lax.stop_gradient(self.batch[name]), 0.0)

    @functools.cached_property
    def advantages(self) -> jax.Array:
        """How much better than expected each token turned out."""
        return self.constant("advantages")

    @functools.cached_property
    def drift(self) -> jax.Array:
        """log r: the policy's log-probability less that of the policy that sampled."""
        return jnp.where(self.mask, self.logps, 0.0) - self.constant("old_logps")

    @property
    def ratio(self) -> jax.Array:
        """r."""
        return _exp(self.drift)

    @functools.cached_property
    def lengths(self) -> jax.Array:
        """[B,N] float32: n of every document; 1 where there is no completion, to divide by."""
        return jnp.maximum(documents.lengths(self.batch), 1.0)

    def total(self, values: jax.Array) -> jax.Array:
        """values summed over each completion, at each of its tokens."""
        return self.spread(documents.sums(values, self.batch))

    def mean(self, values: jax.Array) -> jax.Array:
        """The mean of values over each completion, at each of its tokens."""
        return self.spread(documents.sums(values, self.batch) / self.lengths)

    def spread(self, numbers: jax.Array) -> jax.Array:
        """Numbers [B,N] of documents, at each of their tokens."""
        return documents.over_tokens(numbers, self.batch)


class Surrogate(NamedTuple):
    """Every token's loss [B,S], and where the ratio was too low or too high for it to have a gradient; None: it always has."""

    loss: jax.Array
    low: jax.Array | None = None
    high: jax.Array | None = None


def _exp(x: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(x, MOST))


def _clipped(ratio, advantages, low: float, high: float, dual: float | None = None, delta: float | None = None) -> Surrogate:
    used = ratio if delta is None else jnp.minimum(ratio, delta)
    loss = -jnp.minimum(used * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
    if dual is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual * advantages), loss)
    return Surrogate(loss, (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0))


# ---------------------------------------------------------------------------------------------------------- Surrogates


def reinforce(seen: Rollouts) -> Surrogate:
    """-A log policy: the reference is the policy itself, so that old rollouts are taken for new ones."""
    return Surrogate(-seen.advantages * seen.logps)


@part(off_policy=True)
def clip(
    seen: Rollouts, *, low: float = 0.2, high: float = 0.2, dual: float | None = None, delta: float | None = None
) -> Surrogate:
    """PPO's  -min(r A, clip(r, 1 - low, 1 + high) A).

    dual: for A < 0 a loss of at most -dual A, above 1 + high (dual clip; verl's default is 3). delta: for A < 0 no gradient
    where r is above it (two-sided clipping; above 1 + high).
    """
    return _clipped(seen.ratio, seen.advantages, low, high, dual, delta)


@part(off_policy=True)
def gspo(seen: Rollouts, *, low: float = 3e-4, high: float = 4e-4) -> Surrogate:
    """clip with the sequence's ratio at every token, s = exp(mean over the completion of log r).

    Its gradient goes through each token's own log-probability, with the weight s: the same as that of the sequence's loss where
    A is constant, and it takes advantages of tokens too. low and high are of the scale of a mean: 0.2 would never clip.
    """
    own = seen.logps - jax.lax.stop_gradient(seen.logps)
    return _clipped(_exp(jax.lax.stop_gradient(seen.mean(seen.drift)) + own), seen.advantages, low, high)


@part(off_policy=True, sequence_level=True)
def sequence_clip(seen: Rollouts, *, low: float = 0.2, high: float = 0.2) -> Surrogate:
    """clip of the completion as one action, r = exp(sum of log r); the tokens share its loss, a part of 1/n each.

    For sums over the completion (sequence_sum, constant), whose loss is then the completion's. A is constant over it.
    """
    advantages = documents.constants(seen.advantages, seen.batch)
    found = _clipped(_exp(documents.sums(seen.drift, seen.batch)), advantages, low, high)
    return Surrogate(seen.spread(found.loss / seen.lengths), seen.spread(found.low), seen.spread(found.high))


@part(off_policy=True)
def cispo(seen: Rollouts, *, cap: float = 5.0) -> Surrogate:
    """-min(r, cap) A log policy, the weight a constant: no token loses its gradient.

    cap is an absolute ratio, as TRL's epsilon_high is; elsewhere it is written 1 + high. There is no lower bound.
    """
    weight = jax.lax.stop_gradient(jnp.minimum(seen.ratio, cap))
    return Surrogate(-weight * seen.advantages * seen.logps)


@part(off_policy=True)
def sapo(seen: Rollouts, *, positive: float = 1.0, negative: float = 1.05) -> Surrogate:
    """-f(r) A,  f(r) = 4/t s(t (r - 1)),  t = positive where A > 0, else negative: a soft gate where clip has an edge.

    f'(1) = 1, while f(1) = 2/t.
    """
    t = jnp.where(seen.advantages > 0, positive, negative)
    return Surrogate(-4 / t * jax.nn.sigmoid(t * (seen.ratio - 1)) * seen.advantages)


@part(off_policy=True)
def gmpo(seen: Rollouts, *, low: float = 0.4, high: float = 0.4) -> Surrogate:
    """-A times the geometric mean of the completion's ratios, each within e^-low and e^high where that makes the loss larger.

    For means over the completion (sequence_mean): every token has its completion's loss. A is its mean over the tokens. The
    gradient at r = 1 is that of -A mean of log policy.
    """
    advantages = seen.mean(seen.advantages)
    low_cut, high_cut = (seen.drift < -low) & (advantages < 0), (seen.drift > high) & (advantages > 0)
    stable = jnp.where(low_cut, -low, jnp.where(high_cut, high, seen.drift))
    return Surrogate(-_exp(seen.mean(stable)) * advantages, low_cut, high_cut)


@part(off_policy=True)
def vespo(seen: Rollouts, *, positive: Sequence[float] = (2.0, 3.0), negative: Sequence[float] = (3.0, 2.0)) -> Surrogate:
    """-phi(w) A log policy,  phi(w) = w^k e^(l (1 - w)),  w the whole completion's ratio, phi a constant with phi(1) = 1.

    positive, negative: k and l where A >= 0, and where A < 0. A weight that fades on both sides of 1. Log-ratios are held
    within 20 nats each and w above 1e-8, as TRL does. Source: "VESPO: Variational Sequence-Level Soft Policy Optimization for
    Stable Off-Policy LLM Training".
    """
    k, decay = (jnp.where(seen.advantages >= 0, p, n) for p, n in zip(positive, negative, strict=True))
    log_w = jnp.clip(seen.total(jnp.clip(seen.drift, -MOST, MOST)), math.log(1e-8), MOST)
    phi = jax.lax.stop_gradient(jnp.exp(decay + k * log_w - decay * jnp.exp(log_w)))
    return Surrogate(-phi * seen.advantages * seen.logps)


# ---------------------------------------------------------------------------------------------------------- Weightings


def _undecided(seen: Rollouts, *, share: float = 0.2) -> dict:
    bound = jnp.nanquantile(jnp.where(seen.mask, seen.entropy, jnp.nan), 1 - share)
    return {"undecided": seen.mask & (seen.entropy >= bound)}


@part(prepare=_undecided)
def top_entropy(seen: Rollouts, *, share: float = 0.2) -> jax.Array:
    """1 for the tokens of the batch where the policy is least decided, a share of them, and 0 for the others.

    They stay in the denominators. The bound is a quantile of the whole global batch, which costs a forward pass more. Source:
    "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning".
    """
    return seen.batch["undecided"].astype(jnp.float32)


def off_policy(seen: Rollouts, *, most: float = 0.1) -> jax.Array:
    """0 for a completion with A < 0 whose mean of -log r is above `most` nats, else 1: what the policy has left behind already
    is not pushed further. Source: "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models".
    """
    gone = jax.lax.stop_gradient(-seen.mean(seen.drift)) > most
    return jnp.where((seen.advantages < 0) & gone, 0.0, 1.0)


SURROGATES = {f.__name__: f for f in (reinforce, clip, gspo, sequence_clip, cispo, sapo, gmpo, vespo)}
WEIGHTINGS = {f.__name__: f for f in (top_entropy, off_policy)}
