"""What a policy gradient may have besides the policy's own loss: nearness to a reference, entropy, imitation, a critic.

A term is a function of the `Rollouts` of a batch. It gives a number for every token [B,S], which the objective adds up as it
does the policy's loss, or a Term with a denominator of its own. `coefficient` is what it is multiplied by; 0 leaves it out, and
what it reads is then not asked for.

**KL(policy || reference) by names that say what is differentiated.** d = log reference - log policy of the sampled token; k1 =
-d, k2 = d^2/2, k3 = e^d - d - 1 are numbers whose expectation is the KL or near it, which says nothing about their gradients.
Of a token given what stands before it, in expectation over what was sampled:

    kl_k1_ratio, kl_k3_ratio   r k1, r k3, r differentiated       d KL(policy || reference), whatever policy sampled
    kl_k2                      r k2, r a constant                 d KL(policy || reference), whatever policy sampled
    k1_in_loss                 k1                                 0, where the policy itself sampled
    k3_in_loss                 k3                                 d KL(reference || policy), where the policy itself sampled

Summed over a completion (sequence_sum, constant), the first three have the gradient of the sum of the tokens' KL over texts
that are held as they are: they do not see that an early token leads to places where the KL is larger. For the KL of whole
completions that counts, and kl_k1_return has exactly that gradient, where the policy itself sampled. For completions of one
token all four are the same. Means over tokens weigh completions by their length, and have neither gradient.
"""

import jax
import jax.numpy as jnp

from jaxpost.declare import Column, part
from jaxpost.metrics import Explained, Mean, Std
from jaxpost.models import heads
from jaxpost.objectives import documents
from jaxpost.objectives.logprobs import REFERENCE
from jaxpost.objectives.surrogates import MOST, Rollouts
from jaxpost.types import Term

# The critic: a scalar head on the hidden states, whose values are 0 at first.
CRITIC = {"value_head/kernel": ("D1", 0.0)}


# ------------------------------------------------------------------------------------------------- Nearness to a reference


def _k1(seen: Rollouts) -> jax.Array:
    return jnp.where(seen.mask, seen.logps, 0.0) - seen.constant("ref_logps")


def k3(seen: Rollouts) -> jax.Array:
    """[B,S]: e^d - d - 1, never negative; its expectation is KL(policy || reference)."""
    d = -_k1(seen)
    return jnp.exp(jnp.minimum(d, MOST)) - d - 1


def _sloped(value: jax.Array, slope: jax.Array, seen: Rollouts) -> jax.Array:
    """The value, with this derivative by each token's log-probability.

    Exponents are bounded by MOST. Differentiating a bounded one loses a summand of the derivative, and what is left may point
    away from the reference. So the derivative is written down: it keeps its sign however far the policy is from the reference.
    """
    value, slope = jax.lax.stop_gradient((value, slope))
    return value + slope * (seen.logps - jax.lax.stop_gradient(seen.logps))


@part(columns=REFERENCE)
def kl_k1_ratio(seen: Rollouts, *, coefficient: float) -> jax.Array:
    """r k1, with the slope r (1 + k1): of all forms with the KL's gradient the plainest; its values may be negative."""
    k1 = _k1(seen)
    return _sloped(seen.ratio * k1, seen.ratio * (1 + k1), seen)


@part(columns=REFERENCE)
def kl_k2(seen: Rollouts, *, coefficient: float) -> jax.Array:
    """r k2, r a constant: the KL's gradient, and a value that is larger than the KL's, in the third order of d."""
    return jax.lax.stop_gradient(seen.ratio) * _k1(seen) ** 2 / 2


@part(columns=REFERENCE)
def kl_k3_ratio(seen: Rollouts, *, coefficient: float) -> jax.Array:
    """r k3, with the slope r k1: value and gradient are the KL's. TRL's default.

    Source: "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models".
    """
    return _sloped(seen.ratio * k3(seen), seen.ratio * _k1(seen), seen)


@part(columns=REFERENCE)
def kl_k1_return(seen: Rollouts, *, coefficient: float) -> jax.Array:
    """k1 in value, and in gradient  (sum from here to the end of k1) d log policy: that of the KL of whole completions.

    It is what k1 in the reward comes to, without touching the advantages.
    """
    k1 = jax.lax.stop_gradient(_k1(seen))
    before = jnp.cumsum(k1, axis=1)
    rest = seen.spread(documents.last(before, seen.batch)) - before + k1
    return k1 + rest * (seen.logps - jax.lax.stop_gradient(seen.logps))


@part(columns=REFERENCE)
def k1_in_loss(seen: Rollouts, *, coefficient: float) -> jax.Array:
    """k1, differentiated as it stands. Its value is the KL's, its expected gradient 0: noise, and no pull to the reference."""
    return _k1(seen)


@part(columns=REFERENCE)
def k3_in_loss(seen: Rollouts, *, coefficient: float) -> jax.Array:
    """k3, differentiated as it stands. Its value is the KL's, its expected gradient that of KL(reference || policy), the other
    way round: it pulls hardest where the reference is likelier than the policy. GRPO's.
    """
    return _sloped(k3(seen), 1 - jnp.exp(jnp.minimum(-_k1(seen), MOST)), seen)


# ------------------------------------------------------------------------------------------------- Entropy and imitation


def _acted_on(seen: Rollouts) -> jax.Array:
    """The sampled tokens, or those of them that top_entropy keeps."""
    return seen.mask & seen.batch.get("undecided", True)


@part(differentiates_entropy=True)
def entropy(seen: Rollouts, *, coefficient: float) -> Term:
    """Less the mean entropy over tokens: a bonus of `coefficient` a nat, differentiated through the whole distribution."""
    acted = _acted_on(seen)
    return Term(-jnp.sum(jnp.where(acted, seen.entropy, 0.0)), jnp.sum(acted.astype(jnp.float32)))


def _mean_entropy(seen: Rollouts, **_) -> dict:
    return {"mean_entropy": jnp.sum(jnp.where(seen.mask, seen.entropy, 0.0)) / jnp.maximum(jnp.sum(seen.mask), 1)}


@part(differentiates_entropy=True, prepare=_mean_entropy)
def entropy_target(seen: Rollouts, *, target: float = 0.2, gain: float = 1.0, most: float = 1.0) -> Term:
    """The same bonus with a coefficient that follows the batch's own mean entropy H:  gain (target - H), within 0 and most.

    TRL's adaptive coefficient walks in steps of 0.005 and remembers where it is; this one is a function of the batch alone, so
    there is nothing to save. It costs a forward pass more.
    """
    share = jnp.clip(gain * (target - seen.batch["mean_entropy"]), 0.0, most)
    return entropy(seen, coefficient=1.0)._replace(coefficient=share)


@part(columns={"demonstrations": Column("BS", "bool")}, masks=("demonstrations",))
def sft(seen: Rollouts, *, coefficient: float = 1.0) -> Term:
    """-log policy, a mean over the tokens of demonstrations, which the column `demonstrations` [B,S] bool marks.

    The policy did not draw them, so the mask leaves them out: rows of data beside rollouts (sources.py), a demonstration in a
    completion's place, or a hint at its beginning (rollouts/steps.py, rollouts/given.py). They are scored at the temperature.
    """
    shown = seen.batch["demonstrations"]
    return Term(-jnp.sum(jnp.where(shown, seen.logps, 0.0)), jnp.sum(shown.astype(jnp.float32)))


# ------------------------------------------------------------------------------------------------- A critic


def values(forward, params, batch) -> dict:
    """{"values": [B,S] float32}: what the critic expects before each token, from the hidden state that predicts it."""
    return {"values": _values(params, forward(params, batch))}


def _values(params, output) -> jax.Array:
    return jnp.roll(heads.scalar(output.hidden, params["value_head"]["kernel"]), 1, axis=1)


def _of_the_critic(seen: Rollouts, **options) -> dict:
    loss, returns = value(seen, **options), seen.constant("returns")
    errors = jnp.where(seen.mask, returns - _values(seen.params, seen.output), 0.0)
    sums = [Std(jnp.sum(x), jnp.sum(x**2), loss.weight) for x in (errors, returns)]
    return {"value/loss": Mean(loss.sum, loss.weight), "value/explained_variance": Explained(*sums)}


# What the critic expected is asked of the weights that sampled; the returns come with the advantages.
RETURNS = {"values": Column("BS", "float32", by=values, weights="current"), "returns": Column("BS", "float32")}


@part(columns=RETURNS, leaves=CRITIC, metrics=_of_the_critic)
def value(seen: Rollouts, *, coefficient: float = 0.1, clip: float = 0.2) -> Term:
    """1/2 max((V - G)^2, (V_old + clip(V - V_old, -clip, clip) - G)^2), a mean over tokens: the critic V learns the returns.

    G: the column `returns`; V_old: the column `values`, what the critic expected when the text was sampled.
    """
    now, old, returns = _values(seen.params, seen.output), seen.constant("values"), seen.constant("returns")
    near = old + jnp.clip(now - old, -clip, clip)
    loss = jnp.maximum((now - returns) ** 2, (near - returns) ** 2) / 2
    return Term(jnp.sum(jnp.where(seen.mask, loss, 0.0)), jnp.sum(seen.mask.astype(jnp.float32)))


NEARNESS = (kl_k1_ratio, kl_k2, kl_k3_ratio, kl_k1_return, k1_in_loss, k3_in_loss)
TERMS = {f.__name__: f for f in (*NEARNESS, entropy, entropy_target, sft, value)}
