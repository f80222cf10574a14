"""Terms that a policy gradient may add to the policy's loss: a KL to a reference, entropy, imitation, a critic.

A term is a function of a `PolicyBatch`. It returns a number for each token [B,S], which the objective aggregates like the
policy's loss, or a Term with its own denominator. `coefficient` multiplies it; 0 leaves it out, and its columns are not read.

**KL(policy || reference): the name says what is differentiated.** d = log reference - log policy of the sampled token. The
estimates k1 = -d, k2 = d^2/2, k3 = e^d - d - 1 have the KL as their expectation, exactly or nearly. Their gradients differ. The
expected gradient of a token, given its prefix:

    kl_k1_ratio, kl_k3_ratio   r k1, r k3, r differentiated       d KL(policy || reference), on-policy and off-policy
    kl_k2                      r k2, r a constant                 d KL(policy || reference), on-policy and off-policy
    k1_in_loss                 k1                                 0, on-policy
    k3_in_loss                 k3                                 d KL(reference || policy), on-policy

Summed over a completion (sequence_sum, constant), the first three have the gradient of the sum of the tokens' KL with the text
held fixed: they ignore that an early token changes the KL of later ones. The KL of whole completions includes that effect, and
kl_k1_return has its exact gradient on-policy. For completions of one token all four are equal. Aggregations that average over
tokens weigh completions by length, and have neither gradient.
"""

import jax
import jax.numpy as jnp

from jaxpost.declare import Column, part
from jaxpost.metrics import Explained, Mean, Std
from jaxpost.models import heads
from jaxpost.objectives import documents
from jaxpost.objectives.logprobs import REFERENCE
from jaxpost.objectives.surrogates import MAX_LOG_RATIO, PolicyBatch
from jaxpost.types import Term

# The critic: a scalar head on the hidden states, whose values are 0 at first.
CRITIC = {"value_head/kernel": ("D1", 0.0)}


# --------------------------------------------------------------------------------------------------- KL to a reference


def _k1(batch: PolicyBatch) -> jax.Array:
    return jnp.where(batch.mask, batch.logps, 0.0) - batch.constant("ref_logps")


def k3(batch: PolicyBatch) -> jax.Array:
    """[B,S]: e^d - d - 1, never negative. Its expectation is KL(policy || reference)."""
    d = -_k1(batch)
    return jnp.exp(jnp.minimum(d, MAX_LOG_RATIO)) - d - 1


def _sloped(value: jax.Array, slope: jax.Array, batch: PolicyBatch) -> jax.Array:
    """The value, with `slope` as its derivative by each token's log-probability.

    Exponents are clamped at MAX_LOG_RATIO. Differentiating a clamped one loses a summand, and the rest may point away from the
    reference. The explicit derivative keeps its sign however far the policy is from the reference.
    """
    value, slope = jax.lax.stop_gradient((value, slope))
    return value + slope * (batch.logps - jax.lax.stop_gradient(batch.logps))


@part(columns=REFERENCE)
def kl_k1_ratio(batch: PolicyBatch, *, coefficient: float) -> jax.Array:
    """r k1, with the slope r (1 + k1): the plainest form with the KL's gradient. Its values may be negative."""
    k1 = _k1(batch)
    return _sloped(batch.ratio * k1, batch.ratio * (1 + k1), batch)


@part(columns=REFERENCE)
def kl_k2(batch: PolicyBatch, *, coefficient: float) -> jax.Array:
    """r k2, r a constant: the KL's gradient, and a value that exceeds the KL in the third order of d."""
    return jax.lax.stop_gradient(batch.ratio) * _k1(batch) ** 2 / 2


@part(columns=REFERENCE)
def kl_k3_ratio(batch: PolicyBatch, *, coefficient: float) -> jax.Array:
    """r k3, with the slope r k1: value and gradient are the KL's. TRL's default.

    Source: "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models".
    """
    return _sloped(batch.ratio * k3(batch), batch.ratio * _k1(batch), batch)


@part(columns=REFERENCE)
def kl_k1_return(batch: PolicyBatch, *, coefficient: float) -> jax.Array:
    """k1 in value, and in gradient  (sum of k1 from this token to the end) d log policy,  that of the KL of whole completions.

    Equivalent to k1 in the reward, but the advantages are unchanged.
    """
    k1 = jax.lax.stop_gradient(_k1(batch))
    before = jnp.cumsum(k1, axis=1)
    rest = batch.spread(documents.last(before, batch.columns)) - before + k1
    return k1 + rest * (batch.logps - jax.lax.stop_gradient(batch.logps))


@part(columns=REFERENCE)
def k1_in_loss(batch: PolicyBatch, *, coefficient: float) -> jax.Array:
    """k1, differentiated as it stands. Its value is the KL's; its expected gradient is 0: it adds noise and no pull."""
    return _k1(batch)


@part(columns=REFERENCE)
def k3_in_loss(batch: PolicyBatch, *, coefficient: float) -> jax.Array:
    """k3, differentiated as it stands. Its value is the KL's, its expected gradient that of KL(reference || policy).

    It pulls hardest where the reference is likelier than the policy. GRPO's.
    """
    return _sloped(k3(batch), 1 - jnp.exp(jnp.minimum(-_k1(batch), MAX_LOG_RATIO)), batch)


# ------------------------------------------------------------------------------------------------- Entropy and imitation


def _weighted_tokens(batch: PolicyBatch) -> jax.Array:
    """[B,S] bool: the sampled tokens, or those that top_entropy keeps."""
    return batch.mask & batch.columns.get("undecided", True)


@part(differentiates_entropy=True)
def entropy(batch: PolicyBatch, *, coefficient: float) -> Term:
    """Minus the mean entropy over tokens: a bonus of `coefficient` a nat, differentiated through the whole distribution."""
    kept = _weighted_tokens(batch)
    return Term(-jnp.sum(jnp.where(kept, batch.entropy, 0.0)), jnp.sum(kept.astype(jnp.float32)))


def _mean_entropy(batch: PolicyBatch, **_) -> dict:
    return {"mean_entropy": jnp.sum(jnp.where(batch.mask, batch.entropy, 0.0)) / jnp.maximum(jnp.sum(batch.mask), 1)}


@part(differentiates_entropy=True, prepare=_mean_entropy)
def entropy_target(batch: PolicyBatch, *, target: float = 0.2, gain: float = 1.0, most: float = 1.0) -> Term:
    """The entropy bonus with a coefficient from the batch's mean entropy H:  gain (target - H), clipped to [0, most].

    TRL's adaptive coefficient changes in steps of 0.005 and is state; this one is a function of the batch alone. It costs one
    more forward pass.
    """
    share = jnp.clip(gain * (target - batch.columns["mean_entropy"]), 0.0, most)
    return entropy(batch, coefficient=1.0)._replace(coefficient=share)


@part(columns={"demonstrations": Column("BS", "bool")}, masks=("demonstrations",))
def sft(batch: PolicyBatch, *, coefficient: float = 1.0) -> Term:
    """-log policy, a mean over the tokens that the column `demonstrations` [B,S] bool marks.

    The policy did not draw them, so they are not in the mask: rows of data beside rollouts (sources.py), a demonstration in
    place of a completion, or a hint at its start (rollouts/steps.py, rollouts/given.py). They are scored at the batch's
    temperature.
    """
    demonstrated = batch.columns["demonstrations"]
    return Term(-jnp.sum(jnp.where(demonstrated, batch.logps, 0.0)), jnp.sum(demonstrated.astype(jnp.float32)))


# ------------------------------------------------------------------------------------------------- A critic


def values(forward, params, batch) -> dict:
    """{"values": [B,S] float32}: the critic's value before each token, from the hidden state that predicts it."""
    return {"values": _values(params, forward(params, batch))}


def _values(params, output) -> jax.Array:
    return jnp.roll(heads.scalar(output.hidden, params["value_head"]["kernel"]), 1, axis=1)


def _critic_metrics(batch: PolicyBatch, **options) -> dict:
    loss, returns = value(batch, **options), batch.constant("returns")
    errors = jnp.where(batch.mask, returns - _values(batch.params, batch.output), 0.0)
    sums = [Std(jnp.sum(x), jnp.sum(x**2), loss.weight) for x in (errors, returns)]
    return {"value/loss": Mean(loss.sum, loss.weight), "value/explained_variance": Explained(*sums)}


# The values are those of the weights that sampled. The returns come with the advantages.
RETURNS = {"values": Column("BS", "float32", by=values, weights="current"), "returns": Column("BS", "float32")}


@part(columns=RETURNS, leaves=CRITIC, metrics=_critic_metrics)
def value(batch: PolicyBatch, *, coefficient: float = 0.1, clip: float = 0.2) -> Term:
    """1/2 max((V - G)^2, (V_old + clip(V - V_old, -clip, clip) - G)^2), a mean over tokens: the critic V learns the returns.

    G: the column `returns`; V_old: the column `values`, the critic's values when the text was sampled.
    """
    new, old, returns = _values(batch.params, batch.output), batch.constant("values"), batch.constant("returns")
    clipped = old + jnp.clip(new - old, -clip, clip)
    loss = jnp.maximum((new - returns) ** 2, (clipped - returns) ** 2) / 2
    return Term(jnp.sum(jnp.where(batch.mask, loss, 0.0)), jnp.sum(batch.mask.astype(jnp.float32)))


KL = (kl_k1_ratio, kl_k2, kl_k3_ratio, kl_k1_return, k1_in_loss, k3_in_loss)
TERMS = {f.__name__: f for f in (*KL, entropy, entropy_target, sft, value)}
