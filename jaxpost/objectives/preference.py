"""Preference losses over pairs: DPO and its family, on one page.

c and r are the log-ratios log policy / reference of a pair's chosen and rejected completion, summed over tokens; D = c - r; n_c
and n_r are the completions' lengths; s is the logistic function. Every loss is a mean over the pairs of the global batch.
Losses of D alone do not change when c and r shift together; the others fix c and r too. At the first step the policy is the
reference, c = r = 0, and each loss has a known value: log 2 for DPO.

    objective={"name": "preference.sigmoid", "beta": 0.1}
    objective={"name": "preference.weighted", "losses": {"sigmoid": 1.0, "sft": 0.1}}
    objective={"name": "preference.length_desensitised", "alpha": 0.5, "of": {"name": "preference.hinge", "beta": 0.2}}

All read tokens, segments and mask [B,S], with pairs laid out as in `pairs`. All but simpo, orpo, cpo and sft also read the
reference's log-probabilities, `ref_logps` [B,S] float32. Log-probabilities are in nats. TRL.md maps TRL's names to these.
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
    """-log s(x), or -log s(-x) with probability `smoothing`, that of a wrong label."""
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

    It differs from sigmoid in assuming that a share e of the labels is wrong; its minimum is at s(beta D) = 1 - e. Source: "A
    Note on DPO with Noisy Preferences & Relationship to IPO".
    """
    return _hedged(beta * _difference(pairs), smoothing)


@pairwise
def robust(pairs, *, beta: float = 0.1, smoothing: float = 0.1):
    """Robust DPO:  L = [-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2e),  e = smoothing, below 1/2.

    It differs from smoothed in being unbiased: if a share e of the labels is flipped, its expectation is sigmoid's loss on the
    true labels. It may be negative. Source: "Provably Robust DPO: Aligning Language Models with Noisy Feedback".
    """
    if not 0 <= smoothing < 0.5:
        raise UserError(f"config.objective.smoothing: {smoothing!r}; a share of flipped labels is at least 0 and below 0.5.")
    x = beta * _difference(pairs)
    return ((1 - smoothing) * _surprise(x) - smoothing * _surprise(-x)) / (1 - 2 * smoothing)


@pairwise(columns=REFERENCE | {"margins": Column("BS", "float32")})
def offset(pairs, *, beta: float = 0.1):
    """DPO with an offset:  L = -log s(beta D - m),  m from the column `margins` [B,S], the same over a pair.

    It differs from sigmoid in a margin for each pair, which the data gives. Source: "Direct Preference Optimization with an
    Offset".
    """
    return _surprise(beta * _difference(pairs) - pairs.constant("margins"))


@pairwise
def hinge(pairs, *, beta: float = 0.1):
    """SLiC with a reference:  L = max(0, 1 - beta D).

    It differs from sigmoid in having no gradient where D is above 1/beta. Source: "SLiC-HF: Sequence Likelihood Calibration
    with Human Feedback"; with a reference in "Statistical Rejection Sampling Improves Preference Optimization".
    """
    return jax.nn.relu(1 - beta * _difference(pairs))


@pairwise
def ipo(pairs, *, beta: float = 0.1):
    """IPO:  L = (c / n_c - r / n_r - 1 / (2 beta))^2.

    It differs from sigmoid in a finite target: certain labels do not drive D to infinity. The ratios are means over tokens, as
    in TRL. Source: "A General Theoretical Paradigm to Understand Learning from Human Preferences", whose tau is beta.
    """
    chosen, rejected = pairs.means((pairs.chosen, pairs.rejected))
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@pairwise
def sigmoid_norm(pairs, *, beta: float = 5.0):
    """Length-normalised DPO:  L = -log s(beta (c / n_c - r / n_r)).

    It differs from sigmoid in log-ratios averaged over tokens, hence the larger beta. Source: "Tulu 3: Pushing Frontiers in
    Open Language Model Post-Training".
    """
    chosen, rejected = pairs.means((pairs.chosen, pairs.rejected))
    return _surprise(beta * (chosen - rejected))


@pairwise
def exo_pair(pairs, *, beta: float = 0.1, smoothing: float = 1e-3):
    """EXO:  L = q log(q / (1 - e)) + (1 - q) log((1 - q) / e),  q = s(beta D), e = smoothing, above 0.

    It differs from sigmoid in the direction of the KL, from the policy's preferences to the smoothed labels; zero at q = 1 - e.
    Source: "Towards Efficient Exact Optimization of Language Model Alignment".
    """
    if not 0 < smoothing < 1:
        raise UserError(f"config.objective.smoothing: {smoothing!r}; exo_pair needs one above 0 and below 1.")
    x = beta * _difference(pairs)
    up, down = -_surprise(x), -_surprise(-x)
    return jnp.exp(up) * (up - jnp.log1p(-smoothing)) + jnp.exp(down) * (down - jnp.log(smoothing))


@pairwise
def discopop(pairs, *, beta: float = 0.05, tau: float = 0.05):
    """DiscoPOP:  L = (1 - g) (-log s(x)) + g exp(-x),  x = beta D, g = s(x / tau).

    It differs from sigmoid in blending into an exponential loss for x > 0. It was found by search and is not convex: at the
    first step its gradient lowers the chosen. Source: "Discovering Preference Optimization Algorithms with and for Large
    Language Models".
    """
    x = beta * _difference(pairs)
    gate = jax.nn.sigmoid(x / tau)
    return (1 - gate) * _surprise(x) + gate * jnp.exp(-x)


# ------------------------------------------------------------------------------------------- Losses of c and r by themselves


@pairwise
def nca_pair(pairs, *, beta: float = 0.01):
    """NCA:  L = -log s(beta c) - log s(-beta c) / 2 - log s(-beta r) / 2.

    It differs from sigmoid in terms that keep the chosen's likelihood high by itself. Source: "Noise Contrastive Alignment of
    Language Models with Explicit Rewards".
    """
    chosen, rejected = (beta * x for x in pairs.ratios)
    return _surprise(chosen) + 0.5 * _surprise(-chosen) + 0.5 * _surprise(-rejected)


@pairwise
def bco_pair(pairs, *, beta: float = 0.1):
    """BCO on pairs:  L = -log s(beta c) - log s(-beta r).

    A classifier of good against bad without a shift of the boundary (unpaired.bco has one). Source: "Binary Classifier
    Optimization for Large Language Model Alignment".
    """
    chosen, rejected = pairs.ratios
    return _surprise(beta * chosen) + _surprise(-beta * rejected)


@pairwise
def sppo_hard(pairs, *, beta: float = 0.001):
    """SPPO with certain labels:  L = (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2.

    It differs from ipo in a target for each completion. Source: "Self-Play Preference Optimization for Language Model
    Alignment", with winning probabilities of 1 and 0.
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
    """(values sorted over the batch, the rank of each), flat. Values that are not real come last."""
    flat = jnp.where(real, values, jnp.inf).ravel()
    return jnp.sort(flat), jnp.argsort(jnp.argsort(flat))


def _aligned(pairs: Pairs) -> dict:
    """For each pair, the reference's log-likelihood gap of the same rank as the policy's."""
    _, ranks = _order(pairs.logps[0] - pairs.logps[1], pairs.real)
    ordered, _ = _order(pairs.references[0] - pairs.references[1], pairs.real)
    return {"partner": jnp.where(pairs.real, ordered[ranks].reshape(pairs.real.shape), 0.0)}


@pairwise(prepare=_aligned)
def aot(pairs, *, beta: float = 0.1, smoothing: float = 0.0):
    """AOT:  L = mean_k -log s(beta (u_(k) - v_(k))),  u the policy's gaps log p_c - log p_r, v the reference's, both sorted.

    It differs from sigmoid in comparing distributions, sorted over the global batch, where TRL sorts each microbatch. With one
    pair it is sigmoid. smoothing: as in smoothed. Source: "Distributional Preference Alignment of LLMs via Optimal Transport".
    """
    gap = pairs.logps[0] - pairs.logps[1] - pairs.prepared["partner"]
    return _hedged(beta * gap, smoothing)


def _opposed(pairs: Pairs) -> dict:
    """For each completion, the log-ratio of the same rank on the other side."""
    chosen, rejected = (_order(x, pairs.real) for x in pairs.ratios)
    columns = {"to_chosen": rejected[0][chosen[1]], "to_rejected": chosen[0][rejected[1]]}
    return {k: jnp.where(pairs.real, v.reshape(pairs.real.shape), 0.0) for k, v in columns.items()}


@pairwise(prepare=_opposed)
def aot_unpaired(pairs, *, beta: float = 0.1, smoothing: float = 0.0):
    """AOT without pairs:  L = mean_k -log s(beta (c_(k) - r_(k))),  c and r each sorted by itself.

    It differs from aot in comparing all chosen with all rejected, ignoring pairs. The loss counts the chosen side's value; the
    rejected side adds only its gradient. Source: "Distributional Preference Alignment of LLMs via Optimal Transport".
    """
    chosen, rejected = pairs.ratios
    value = _hedged(beta * (chosen - pairs.prepared["to_chosen"]), smoothing)
    other = _hedged(beta * (pairs.prepared["to_rejected"] - rejected), smoothing)
    return value + other - jax.lax.stop_gradient(other)


# ----------------------------------------------------------------------------------------------------- Without a reference


@pairwise(columns={}, rewards=lambda pairs: pairs.logps)
def sft(pairs):
    """Likelihood of the chosen:  L = -sum log p / number of tokens, over the chosen completions of the global batch.

    For sums with other losses: RPO is sigmoid plus this. By itself, sft.nll costs half as much.
    """
    return {"nll": Term(pairs.nll, pairs.lengths[0])}


@pairwise(columns={}, rewards=lambda pairs: pairs.logps)
def cpo(pairs, *, beta: float = 0.1, alpha: float = 1.0):
    """CPO:  L = -log s(beta (log p_c - log p_r)) + alpha NLL_c,  NLL_c a mean over the chosen's tokens.

    It differs from sigmoid in having no reference (a uniform one); the likelihood regularises instead. Source: "Contrastive
    Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation".
    """
    loss = _surprise(beta * (pairs.logps[0] - pairs.logps[1]))
    return {"preference": Term(loss, 1.0), "nll": Term(pairs.nll, pairs.lengths[0], alpha)}


@pairwise(columns={}, rewards=lambda pairs: pairs.means(pairs.logps))
def simpo(pairs, *, beta: float = 2.0, gamma: float = 0.5):
    """SimPO:  L = -log s(beta (log p_c / n_c - log p_r / n_r) - gamma).

    It differs from sigmoid_norm in having no reference and a target margin gamma. TRL's adds an NLL unless its cpo_alpha is 0.
    Source: "SimPO: Simple Preference Optimization with a Reference-Free Reward".
    """
    chosen, rejected = pairs.means(pairs.logps)
    return _surprise(beta * (chosen - rejected) - gamma)


@pairwise(columns={}, rewards=lambda pairs: pairs.means(pairs.logps))
def orpo(pairs, *, beta: float = 0.1):
    """ORPO:  L = NLL_c - beta log s(log odds_c - log odds_r),  odds = p / (1 - p), p the geometric mean over tokens.

    It differs from cpo in comparing odds, and in a weight on the comparison instead of the likelihood. NLL_c is over the
    completion's tokens; TRL's includes the prompt's. Source: "ORPO: Monolithic Preference Optimization without Reference
    Model", whose lambda is beta.
    """
    # Where there is no pair, -1 keeps nan out of the gradient. Probabilities stay below 1.
    chosen, rejected = (jnp.where(pairs.real, jnp.minimum(x, -1e-6), -1.0) for x in pairs.means(pairs.logps))
    odds = (chosen - rejected) - (jnp.log(-jnp.expm1(chosen)) - jnp.log(-jnp.expm1(rejected)))
    return {"nll": Term(pairs.nll, pairs.lengths[0]), "odds": Term(_surprise(odds), 1.0, beta)}


# ------------------------------------------------------------------------------------- Changes to the pairs of a loss

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
    """f-DPO: another loss, with f'(policy / reference) in place of c and r.

    kind: reverse_kl (t log t: c unchanged), forward_kl (1 - exp(-c)), js (log 2 + log s(c)), alpha ((exp((alpha - 1) c) - 1) /
    (alpha - 1)). Raises UserError for an unknown kind, and for a loss that is no function of a difference, where the
    divergence's constant would not cancel. Source: "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse
    Divergence Constraints".
    """
    if kind not in DIVERGENCES or (kind == "alpha" and alpha == 1):
        raise UserError(f"config.objective.kind: {kind!r} (alpha {alpha!r}) is none of {', '.join(DIVERGENCES)} (alpha not 1).")
    if other := [part.name for part in inside(of) if part.loss.__name__ not in OF_DIFFERENCES]:
        raise UserError(f"config.objective.of: {other[0]} is no loss of a difference; those are {', '.join(OF_DIFFERENCES)}.")
    return dataclasses.replace(pairs, score=lambda x: DIVERGENCES[kind](x, alpha))


@around
def length_desensitised(pairs, *, alpha: float = 0.5, of: Mapping | str = "preference.sigmoid"):
    """LD-DPO: another loss, with weight alpha for tokens beyond the shorter completion's length, in policy and reference.

    alpha 1 changes nothing, 0 truncates the longer completion. Source: "Length Desensitization in Direct Preference
    Optimization".
    """
    batch = pairs.batch
    counts = documents.lengths(batch)
    before = documents.over_tokens(jnp.cumsum(counts, axis=1) - counts, batch)
    rank = jnp.cumsum(batch["mask"], axis=1) - before  # from 1, within the completion
    shared = documents.over_tokens(documents.of_pairs(jnp.minimum(*documents.sides(counts))), batch)
    return dataclasses.replace(pairs, emphasis=pairs.emphasis * jnp.where(rank > shared, alpha, 1.0))


def _agreement(logits: jax.Array, columns: dict) -> dict:
    """log p(token) - log sum_v p(v)^2: a token's log-probability relative to that of a token drawn from the policy."""
    logits = logits / columns["temperature"][:, None]
    norm = jax.nn.logsumexp(logits, axis=-1)
    hit = jnp.arange(logits.shape[-1]) == columns["tokens"][:, None]
    drawn_logp = jax.nn.logsumexp(2 * logits, axis=-1) - norm
    return {"agreement": jnp.sum(jnp.where(hit, logits, 0.0), axis=-1) - drawn_logp}


def _agreements(pairs: Pairs) -> jax.Array:
    """[B,S]: each token's agreement, without gradient."""
    output = jax.lax.stop_gradient(pairs.output)
    return at_tokens(_agreement, output, columns=drawn(pairs.batch), mask=pairs.batch["mask"])["agreement"]


@around
def wpo(pairs, *, of: Mapping | str = "preference.sigmoid"):
    """WPO: another loss, each pair weighted by its likelihood under the policy:

        w = exp(mean_t a_t) of both completions, multiplied;  a = log p(token) - log sum_v p(v)^2

    The weights have no gradient and no cap. They multiply the sum, not the denominator, which counts pairs. Not for aot, which
    sorts pairs apart. Source: "WPO: Enhancing RLHF with Weighted Preference Optimization".
    """
    chosen, rejected = pairs.means(documents.sides(documents.sums(_agreements(pairs), pairs.batch)))
    return dataclasses.replace(pairs, weight=pairs.weight * jnp.exp(chosen + rejected))


@composed
def weighted(*, losses: Mapping = MPO):
    """A weighted sum of losses:  L = sum_k w_k L_k,  each with its own denominator.

    losses: {name: weight}, or {name: {"weight": w, keywords}}; the name is one of this page (sigmoid), or any alias for an
    entry with its own `name`. The reported rewards are the first loss's. The default is MPO's sum: "Enhancing the Reasoning
    Ability of Multimodal Large Language Models via Mixed Preference Optimization".
    """
    if not losses:
        raise UserError('config.objective.losses: name one at least, {"sigmoid": 1.0, "sft": 0.1}.')
    summands = []
    for alias, entry in losses.items():
        entry = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
        weight = entry.pop("weight", 1.0)
        parts = inside({"name": f"preference.{alias}", **entry})
        for part in parts:
            name = alias if len(parts) == 1 else f"{alias}/{part.name}"
            summands.append(part._replace(name=name, coefficient=weight * part.coefficient))
    return summands
