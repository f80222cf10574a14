"""Preference losses over pairs: DPO and its family, on one page.

Of a pair, c and r are the log-ratios log policy / reference of the chosen and of the rejected completion, summed over its
tokens, D = c - r, and n_c, n_r the completions' lengths. s is the logistic function. Every loss below is a mean over the pairs
of the global batch; those of D alone leave the level of both completions free, the others fix it too. With the reference itself
as the policy c = r = 0, so that each method has a known loss at the first step: log 2 for DPO.

    objective={"name": "preference.sigmoid", "beta": 0.1}
    objective={"name": "preference.weighted", "losses": {"sigmoid": 1.0, "sft": 0.1}}
    objective={"name": "preference.length_desensitised", "alpha": 0.5, "of": {"name": "preference.hinge", "beta": 0.2}}

All read tokens, segments, mask [B,S] with pairs as `pairs` says, and, but for simpo, orpo, cpo and sft, the reference's
log-probability of each token, `ref_logps` [B,S] float32. Log-probabilities are in nats. TRL.md maps TRL's names to these.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxpost.declare import Column
from jaxpost.errors import UserError
from jaxpost.objectives import documents
from jaxpost.objectives.logprobs import REFERENCE, at_tokens, drawn
from jaxpost.objectives.pairs import Pairs, around, composed, inside, pairwise
from jaxpost.types import Term

MPO = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}


def _surprise(x: jax.Array) -> jax.Array:
    """-log s(x)."""
    return jax.nn.softplus(-x)


def _hedged(x: jax.Array, smoothing: float) -> jax.Array:
    """-log s(x), or -log s(-x) with the probability `smoothing` that the label is wrong."""
    return (1 - smoothing) * _surprise(x) + smoothing * _surprise(-x)


def _difference(pairs: Pairs) -> jax.Array:
    return pairs.chosen - pairs.rejected


# -------------------------------------------------------------------------------------------------- Losses of D alone


@pairwise
def sigmoid(pairs, *, beta: float = 0.1):
    """DPO:  L = -log s(beta D).

    The maximum likelihood of a Bradley-Terry model whose reward is beta log policy / reference. log 2 at the first step.
    Source: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model".
    """
    return _surprise(beta * _difference(pairs))


@pairwise
def smoothed(pairs, *, beta: float = 0.1, smoothing: float = 0.1):
    """Conservative DPO:  L = -(1 - e) log s(beta D) - e log s(-beta D),  e = smoothing.

    It differs from sigmoid in believing that a share e of the labels is wrong; least where s(beta D) = 1 - e. Source: "A Note
    on DPO with Noisy Preferences & Relationship to IPO".
    """
    return _hedged(beta * _difference(pairs), smoothing)


@pairwise
def robust(pairs, *, beta: float = 0.1, smoothing: float = 0.1):
    """Robust DPO:  L = [-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2e),  e = smoothing, below 1/2.

    It differs from smoothed in being unbiased: where a share e of the labels is flipped, its expectation is sigmoid's loss
    without flips. It may be negative. Source: "Provably Robust DPO: Aligning Language Models with Noisy Feedback".
    """
    if not 0 <= smoothing < 0.5:
        raise UserError(f"config.objective.smoothing: {smoothing!r}; a share of flipped labels is at least 0 and below 0.5.")
    x = beta * _difference(pairs)
    return ((1 - smoothing) * _surprise(x) - smoothing * _surprise(-x)) / (1 - 2 * smoothing)


@pairwise(columns=REFERENCE | {"margins": Column("BS", "float32")})
def offset(pairs, *, beta: float = 0.1):
    """DPO with an offset:  L = -log s(beta D - m),  m from the column `margins` [B,S], the same over a pair.

    It differs from sigmoid in how much better the chosen must be, which the data says of each pair. Source: "Direct Preference
    Optimization with an Offset".
    """
    return _surprise(beta * _difference(pairs) - pairs.constant("margins"))


@pairwise
def hinge(pairs, *, beta: float = 0.1):
    """SLiC with a reference:  L = max(0, 1 - beta D).

    It differs from sigmoid in leaving alone what is separated by 1/beta. Source: "SLiC-HF: Sequence Likelihood Calibration with
    Human Feedback"; with a reference in "Statistical Rejection Sampling Improves Preference Optimization".
    """
    return jax.nn.relu(1 - beta * _difference(pairs))


@pairwise
def ipo(pairs, *, beta: float = 0.1):
    """IPO:  L = (c / n_c - r / n_r - 1 / (2 beta))^2.

    It differs from sigmoid in a finite target, so that certain labels do not drive D to infinity. The ratios are means over
    tokens, as TRL's. Source: "A General Theoretical Paradigm to Understand Learning from Human Preferences", whose tau is beta.
    """
    chosen, rejected = pairs.means((pairs.chosen, pairs.rejected))
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@pairwise
def sigmoid_norm(pairs, *, beta: float = 5.0):
    """Length-normalised DPO:  L = -log s(beta (c / n_c - r / n_r)).

    It differs from sigmoid in ratios a token, hence the other scale of beta. Source: "Tulu 3: Pushing Frontiers in Open
    Language Model Post-Training".
    """
    chosen, rejected = pairs.means((pairs.chosen, pairs.rejected))
    return _surprise(beta * (chosen - rejected))


@pairwise
def exo_pair(pairs, *, beta: float = 0.1, smoothing: float = 1e-3):
    """EXO:  L = q log(q / (1 - e)) + (1 - q) log((1 - q) / e),  q = s(beta D), e = smoothing, above 0.

    It differs from sigmoid in the direction of the divergence: from the policy's preferences to the smoothed labels; zero where
    q = 1 - e. Source: "Towards Efficient Exact Optimization of Language Model Alignment".
    """
    if not 0 < smoothing < 1:
        raise UserError(f"config.objective.smoothing: {smoothing!r}; exo_pair needs one above 0 and below 1.")
    x = beta * _difference(pairs)
    up, down = -_surprise(x), -_surprise(-x)
    return jnp.exp(up) * (up - jnp.log1p(-smoothing)) + jnp.exp(down) * (down - jnp.log(smoothing))


@pairwise
def discopop(pairs, *, beta: float = 0.05, tau: float = 0.05):
    """DiscoPOP:  L = (1 - g) (-log s(x)) + g exp(-x),  x = beta D, g = s(x / tau).

    It differs from sigmoid in blending into an exponential loss where the pair is in order. It was found by search, and is not
    convex: at the first step its gradient lowers the chosen. Source: "Discovering Preference Optimization Algorithms with and
    for Large Language Models".
    """
    x = beta * _difference(pairs)
    gate = jax.nn.sigmoid(x / tau)
    return (1 - gate) * _surprise(x) + gate * jnp.exp(-x)


# ------------------------------------------------------------------------------------------- Losses of c and r by themselves


@pairwise
def nca_pair(pairs, *, beta: float = 0.01):
    """NCA:  L = -log s(beta c) - log s(-beta c) / 2 - log s(-beta r) / 2.

    It differs from sigmoid in holding the chosen's likelihood up by itself. Source: "Noise Contrastive Alignment of Language
    Models with Explicit Rewards".
    """
    chosen, rejected = (beta * x for x in pairs.ratios)
    return _surprise(chosen) + 0.5 * _surprise(-chosen) + 0.5 * _surprise(-rejected)


@pairwise
def bco_pair(pairs, *, beta: float = 0.1):
    """BCO on pairs:  L = -log s(beta c) - log s(-beta r).

    A classifier of good against bad, with no shift between them (unpaired.bco has it). Source: "Binary Classifier Optimization
    for Large Language Model Alignment".
    """
    chosen, rejected = pairs.ratios
    return _surprise(beta * chosen) + _surprise(-beta * rejected)


@pairwise
def sppo_hard(pairs, *, beta: float = 0.001):
    """SPPO with certain labels:  L = (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2.

    It differs from ipo in a target for each completion. Source: "Self-Play Preference Optimization for Language Model
    Alignment", with 1 and 0 for the probabilities of winning.
    """
    chosen, rejected = pairs.ratios
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@pairwise
def apo_zero(pairs, *, beta: float = 0.1):
    """APO-zero:  L = 1 - s(beta c) + s(beta r),  for answers better than the model's own: the chosen up, the rejected down.

    Source: "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment".
    """
    chosen, rejected = pairs.ratios
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


@pairwise
def apo_down(pairs, *, beta: float = 0.1):
    """APO-down:  L = s(beta c) + 1 - s(beta D),  for answers worse than the model's own: both down, the rejected more.

    Source: "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment".
    """
    chosen, rejected = pairs.ratios
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


# --------------------------------------------------------------------------------------- Optimal transport, over the batch


def _order(values: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(values sorted over the batch, each one's rank), flat; what is not real comes last."""
    flat = jnp.where(real, values, jnp.inf).ravel()
    return jnp.sort(flat), jnp.argsort(jnp.argsort(flat))


def _aligned(pairs: Pairs) -> dict:
    """For each pair's log-likelihood gap the reference's gap of the same rank among all."""
    _, ranks = _order(pairs.logps[0] - pairs.logps[1], pairs.real)
    ordered, _ = _order(pairs.references[0] - pairs.references[1], pairs.real)
    return {"partner": jnp.where(pairs.real, ordered[ranks].reshape(pairs.real.shape), 0.0)}


@pairwise(prepare=_aligned)
def aot(pairs, *, beta: float = 0.1, smoothing: float = 0.0):
    """AOT:  L = mean_k -log s(beta (u_(k) - v_(k))),  u the policy's gaps log p_c - log p_r, v the reference's, both sorted.

    It differs from sigmoid in comparing distributions: sorted over the whole global batch, where TRL sorts each microbatch. One
    pair is sigmoid. smoothing as in smoothed. Source: "Distributional Preference Alignment of LLMs via Optimal Transport".
    """
    gap = pairs.logps[0] - pairs.logps[1] - pairs.prepared["partner"]
    return _hedged(beta * gap, smoothing)


def _opposed(pairs: Pairs) -> dict:
    """For each completion's log-ratio that of the same rank among all those of the other side."""
    chosen, rejected = (_order(x, pairs.real) for x in pairs.ratios)
    columns = {"to_chosen": rejected[0][chosen[1]], "to_rejected": chosen[0][rejected[1]]}
    return {k: jnp.where(pairs.real, v.reshape(pairs.real.shape), 0.0) for k, v in columns.items()}


@pairwise(prepare=_opposed)
def aot_unpaired(pairs, *, beta: float = 0.1, smoothing: float = 0.0):
    """AOT without pairs:  L = mean_k -log s(beta (c_(k) - r_(k))),  c and r sorted, each by itself.

    It differs from aot in asking that the chosen as a whole be better than the rejected as a whole. The value is counted with
    the chosen; the rejected add their gradient. Source: "Distributional Preference Alignment of LLMs via Optimal Transport".
    """
    chosen, rejected = pairs.ratios
    value = _hedged(beta * (chosen - pairs.prepared["to_chosen"]), smoothing)
    other = _hedged(beta * (pairs.prepared["to_rejected"] - rejected), smoothing)
    return value + other - jax.lax.stop_gradient(other)


# ----------------------------------------------------------------------------------------------------- Without a reference


@pairwise(columns={}, rewards=lambda pairs: pairs.logps)
def sft(pairs):
    """Likelihood of the chosen:  L = -sum log p / number of tokens, over the chosen completions of the global batch.

    For sums with other losses (RPO is sigmoid and this); by itself sft.nll costs half.
    """
    return {"nll": Term(pairs.nll, pairs.lengths[0])}


@pairwise(columns={}, rewards=lambda pairs: pairs.logps)
def cpo(pairs, *, beta: float = 0.1, alpha: float = 1.0):
    """CPO:  L = -log s(beta (log p_c - log p_r)) + alpha NLL_c,  the second a mean over the chosen's tokens.

    It differs from sigmoid in a uniform reference, whose place the likelihood takes. Source: "Contrastive Preference
    Optimization: Pushing the Boundaries of LLM Performance in Machine Translation".
    """
    loss = _surprise(beta * (pairs.logps[0] - pairs.logps[1]))
    return {"preference": Term(loss, 1.0), "nll": Term(pairs.nll, pairs.lengths[0], alpha)}


@pairwise(columns={}, rewards=lambda pairs: pairs.means(pairs.logps))
def simpo(pairs, *, beta: float = 2.0, gamma: float = 0.5):
    """SimPO:  L = -log s(beta (log p_c / n_c - log p_r / n_r) - gamma).

    It differs from sigmoid_norm in having no reference, and a margin that is asked for. Without the NLL that TRL's adds unless
    its cpo_alpha is 0. Source: "SimPO: Simple Preference Optimization with a Reference-Free Reward".
    """
    chosen, rejected = pairs.means(pairs.logps)
    return _surprise(beta * (chosen - rejected) - gamma)


@pairwise(columns={}, rewards=lambda pairs: pairs.means(pairs.logps))
def orpo(pairs, *, beta: float = 0.1):
    """ORPO:  L = NLL_c - beta log s(log odds_c - log odds_r),  odds = p / (1 - p), p the geometric mean of a token's.

    It differs from cpo in odds, and in weighing the comparison instead of the likelihood. NLL_c is over the completion's
    tokens; TRL's counts the prompt's too. Source: "ORPO: Monolithic Preference Optimization without Reference Model", whose
    lambda is beta.
    """
    # Where there is no pair, a number whose logarithms exist keeps nan out of the gradient; certainty is kept below 1.
    chosen, rejected = (jnp.where(pairs.real, jnp.minimum(x, -1e-6), -1.0) for x in pairs.means(pairs.logps))
    odds = (chosen - rejected) - (jnp.log(-jnp.expm1(chosen)) - jnp.log(-jnp.expm1(rejected)))
    return {"nll": Term(pairs.nll, pairs.lengths[0]), "odds": Term(_surprise(odds), 1.0, beta)}


# --------------------------------------------------------------------------------------------------- What a loss may see

# f'(t) at t = exp(log-ratio).
DIVERGENCES = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: -jnp.expm1(-x),
    "js": lambda x, alpha: jnp.log(2.0) - _surprise(x),
    "alpha": lambda x, alpha: jnp.expm1(jnp.minimum((alpha - 1) * x, 80.0)) / (alpha - 1),
}
OF_DIFFERENCES = ("sigmoid", "smoothed", "robust", "offset", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop", "sft")


@around
def divergence(pairs, *, kind: str = "js", alpha: float = 0.5, of: Mapping | str = "preference.sigmoid"):
    """f-DPO: another loss, with f'(policy / reference) in the place of c and of r.

    kind: reverse_kl (t log t: c as it is), forward_kl (1 - exp(-c)), js (log 2 + log s(c)), alpha ((exp((alpha - 1) c) - 1) /
    (alpha - 1)). Only for losses of the difference, in which the divergence's constant cancels; others raise UserError, and so
    does an unknown kind. Source: "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints".
    """
    if kind not in DIVERGENCES or (kind == "alpha" and alpha == 1):
        raise UserError(f"config.objective.kind: {kind!r} (alpha {alpha!r}) is none of {', '.join(DIVERGENCES)} (alpha not 1).")
    if other := [part.name for part in inside(of) if part.loss.__name__ not in OF_DIFFERENCES]:
        raise UserError(f"config.objective.of: {other[0]} is no loss of a difference; those are {', '.join(OF_DIFFERENCES)}.")
    return dataclasses.replace(pairs, score=lambda x: DIVERGENCES[kind](x, alpha))


@around
def length_desensitised(pairs, *, alpha: float = 0.5, of: Mapping | str = "preference.sigmoid"):
    """LD-DPO: another loss, the tokens beyond the shorter completion's length counted alpha, by policy and reference alike.

    alpha 1 changes nothing, 0 cuts the longer one off. Source: "Length Desensitization in Direct Preference Optimization".
    """
    batch = pairs.batch
    counts = documents.lengths(batch)
    before = documents.over_tokens(jnp.cumsum(counts, axis=1) - counts, batch)
    rank = jnp.cumsum(batch["mask"], axis=1) - before  # from 1, within the completion
    shared = documents.over_tokens(documents.of_pairs(jnp.minimum(*documents.sides(counts))), batch)
    return dataclasses.replace(pairs, emphasis=pairs.emphasis * jnp.where(rank > shared, alpha, 1.0))


def _agreement(logits: jax.Array, columns: dict) -> dict:
    """log p(token) - log sum_v p(v)^2: how likely a token is, measured by what a draw of the policy's own would be."""
    logits = logits / columns["temperature"][:, None]
    norm = jax.nn.logsumexp(logits, axis=-1)
    hit = jnp.arange(logits.shape[-1]) == columns["tokens"][:, None]
    own = jax.nn.logsumexp(2 * logits, axis=-1) - norm
    return {"agreement": jnp.sum(jnp.where(hit, logits, 0.0), axis=-1) - own}


def _agreements(pairs: Pairs) -> jax.Array:
    """[B,S] agreement of the tokens at their own places, without gradient."""
    output = jax.lax.stop_gradient(pairs.output)
    return at_tokens(_agreement, output, columns=drawn(pairs.batch), mask=pairs.batch["mask"])["agreement"]


@around
def wpo(pairs, *, of: Mapping | str = "preference.sigmoid"):
    """WPO: another loss, each pair weighted by how likely the policy itself is to say it:

        w = exp(mean_t a_t) of both completions, multiplied;  a = log p(token) - log sum_v p(v)^2

    The weights are constants, are not capped, and count in the sum alone (the mean is over pairs). Not meant for aot, whose
    pairs come apart. Source: "WPO: Enhancing RLHF with Weighted Preference Optimization".
    """
    chosen, rejected = pairs.means(documents.sides(documents.sums(_agreements(pairs), pairs.batch)))
    return dataclasses.replace(pairs, weight=pairs.weight * jnp.exp(chosen + rejected))


@composed
def weighted(*, losses: Mapping = MPO):
    """A weighted sum of losses:  L = sum_k w_k L_k,  each with its own denominator.

    losses: {name: weight}, or {name: {"weight": w, keywords}} for a loss with settings; a name is of this page (sigmoid), or
    stands for the entry's own `name`. The reported rewards are the first one's. The default is MPO's sum: "Enhancing the
    Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization".
    """
    if not losses:
        raise UserError('config.objective.losses: name one at least, {"sigmoid": 1.0, "sft": 0.1}.')
    found = []
    for alias, entry in losses.items():
        entry = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
        weight = entry.pop("weight", 1.0)
        parts = inside({"name": f"preference.{alias}", **entry})
        for part in parts:
            name = alias if len(parts) == 1 else f"{alias}/{part.name}"
            found.append(part._replace(name=name, coefficient=weight * part.coefficient))
    return found
