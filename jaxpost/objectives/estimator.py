"""The one policy-gradient estimator: its parts, their aggregation, and how a choice of parts becomes an objective.

    grad = sum over tokens of  stable_mask * advantage / reference_policy * d policy

A method chooses an advantage (`jaxpost.rollouts.advantages`), a surrogate and its weightings (`surrogates`), an aggregation
(below) and further terms (`terms`). It is a function from its settings to `Parts`, and `estimator` makes it an objective:

    @estimator
    def mine(*, high=0.5):
        return Parts("centred", partial(surrogates.clip, high=high), token_mean)

The parts determine what the objective declares (`declare.objective`): its columns, the leaves that it adds to the parameters,
its advantages, whether it may take several steps a batch, and whether a completion has a single advantage.

An aggregation reduces the tokens' numbers [B,S] to a Term. It decides how much a completion counts by its length.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import declare
from jaxpost.config.resolve import bind, nearest, resolve
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.metrics import Max, Min, masked_max, masked_mean
from jaxpost.objectives import documents
from jaxpost.objectives.logprobs import at_tokens, drawn, token_scores
from jaxpost.objectives.surrogates import MAX_LOG_RATIO, SURROGATES, WEIGHTINGS, PolicyBatch, Surrogate
from jaxpost.objectives.terms import TERMS, k3
from jaxpost.types import Batch, Output, Term


class Parts(NamedTuple):
    """One choice of the estimator's parts: functions of the tables, with their settings bound by functools.partial."""

    advantages: Mapping | str  # the config entry of the advantages
    surrogate: Callable  # PolicyBatch -> Surrogate
    aggregation: Callable  # (numbers [B,S], batch) -> Term
    terms: tuple[Callable, ...] = ()  # PolicyBatch -> [B,S] or Term
    weightings: tuple[Callable, ...] = ()  # PolicyBatch -> [B,S]
    reads: Mapping = {}  # columns that only the advantages or the metrics read
    coefficient: float = 1.0  # of the policy term; other terms have their own

    def used(self) -> "Parts":
        """Without the terms whose coefficient is 0."""
        return self._replace(terms=tuple(t for t in self.terms if options(t).get("coefficient", 1.0)))

    def gather(self, name: str) -> dict:
        """The union of what the parts declare under a name."""
        return functools.reduce(dict.__or__, [declared(p, name) for p in self._all()], {})

    def masks(self) -> tuple[str, ...]:
        """The mask columns of all parts."""
        return tuple(dict.fromkeys(mask for part in self._all() for mask in ("mask", *declared(part, "masks"))))

    def _all(self) -> tuple[Callable, ...]:
        return self.surrogate, *self.weightings, *self.terms


def plain(part: Callable) -> Callable:
    """A part's function, without its settings."""
    return getattr(part, "func", part)


def options(part: Callable) -> dict:
    """The settings of a part."""
    return dict(getattr(part, "keywords", {}))


# -------------------------------------------------------------------------------------------------------- Aggregations


def _completions(batch: Batch, empty: bool) -> jax.Array:
    """The number of completions. empty: whether those without a learned token count too, such as truncated ones.

    Where the column `sampled` marks the tokens that the policy drew, a completion is a document with such a token:
    demonstrations and rows of data do not count.
    """
    if not empty:
        counted = jnp.sum(documents.lengths(batch) > 0, axis=1)
    elif "sampled" in batch:
        counted = jnp.sum(documents.counts(batch["sampled"], batch) > 0, axis=1)
    else:
        counted = jnp.max(batch["segments"], axis=1)
    return jnp.sum(counted.astype(jnp.float32))


def token_mean(numbers: jax.Array, batch: Batch) -> Term:
    """The mean over all tokens of the global batch: each token counts the same, so that longer completions count more."""
    return Term(jnp.sum(jnp.where(batch["mask"], numbers, 0.0)), jnp.sum(batch["mask"].astype(jnp.float32)))


def sequence_mean(numbers: jax.Array, batch: Batch, *, empty: bool = True) -> Term:
    """The mean over completions of the mean over their tokens: a token of a longer completion counts less.

    empty: whether a completion without a learned token counts in the denominator, as in TRL; in verl it does not.
    """
    means = documents.sums(numbers, batch) / jnp.maximum(documents.lengths(batch), 1.0)
    return Term(jnp.sum(means), _completions(batch, empty))


def sequence_sum(numbers: jax.Array, batch: Batch, *, empty: bool = True) -> Term:
    """The mean over completions of the sum over their tokens: the completion is one action. empty: as for sequence_mean."""
    return Term(jnp.sum(jnp.where(batch["mask"], numbers, 0.0)), _completions(batch, empty))


def constant(numbers: jax.Array, batch: Batch, *, longest: int) -> Term:
    """sequence_sum divided by a constant, the largest number of tokens of a completion."""
    total = sequence_sum(numbers, batch)
    return total._replace(weight=total.weight * longest)


AGGREGATIONS = {f.__name__: f for f in (token_mean, sequence_mean, sequence_sum, constant)}


# --------------------------------------------------------------------------------------------------------- An objective


def _scores(logits: jax.Array, columns: dict) -> dict:
    """Log-probability and entropy of a token, both with their gradients."""
    logps = jax.nn.log_softmax(logits / columns["temperature"][:, None], axis=-1)
    hit = jnp.arange(logits.shape[-1]) == columns["tokens"][:, None]
    return {"logps": jnp.sum(jnp.where(hit, logps, 0.0), axis=-1), "entropy": -jnp.sum(jnp.exp(logps) * logps, axis=-1)}


def _scored(forward: Callable, params: Any, batch: Batch, parts: Parts) -> PolicyBatch:
    output = forward(params, batch)
    mask = functools.reduce(jnp.logical_or, [batch[name] for name in parts.masks()])
    return PolicyBatch(params, output, batch, **_logps_and_entropy(output, batch, mask, parts))


def _logps_and_entropy(output: Output, batch: Batch, mask: jax.Array, parts: Parts) -> dict:
    if any(declared(term, "differentiates_entropy") for term in parts.terms):
        return at_tokens(_scores, output, columns=drawn(batch), mask=mask)
    scores = token_scores(output, batch, mask)
    return {k: scores[k] for k in ("logps", "entropy")}


def _metrics(batch: PolicyBatch, surrogate: Surrogate, parts: Parts) -> dict:
    """The metrics of every policy gradient, under TRL's names, as means over tokens.

    sampling/*: the trainer's probabilities against the sampler's, of the same weights. With a correction (`sampler_logps`) they
    are reported at every step, else only while the weights are those that sampled: where the scalar `fresh` is absent or true.
    """
    mask = batch.mask
    if "sampler_logps" in batch.columns:
        gap, fresh = batch.constant("old_logps") - batch.constant("sampler_logps"), mask
    else:
        gap, fresh = jax.lax.stop_gradient(batch.log_ratio), mask & batch.columns.get("fresh", True)
    ratio, prefix = jnp.exp(jnp.minimum(gap, MAX_LOG_RATIO)), "sampling/importance_sampling_ratio"
    metrics = {
        "entropy": masked_mean(batch.entropy, mask),
        "sampling/sampling_logp_difference/mean": masked_mean(jnp.abs(gap), fresh),
        "sampling/sampling_logp_difference/max": masked_max(jnp.abs(gap), fresh),
        f"{prefix}/min": Min(jnp.min(jnp.where(fresh, ratio, jnp.inf))),
        f"{prefix}/mean": masked_mean(ratio, fresh),
        f"{prefix}/max": Max(jnp.max(jnp.where(fresh, ratio, -jnp.inf))),
    }
    if "ref_logps" in batch.columns:
        metrics["kl"] = masked_mean(k3(batch), mask)
    if surrogate.low is not None:
        clipped = {"low": surrogate.low, "high": surrogate.high, "region": surrogate.low | surrogate.high}
        metrics |= {f"clip_ratio/{k}_mean": masked_mean(x, mask) for k, x in clipped.items()}
    for term in parts.terms:
        if term_metrics := declared(term, "metrics"):
            metrics |= term_metrics(batch)
    return metrics


def estimator(method: Callable) -> Callable:
    """The objective of a method: method(*, keywords) -> Parts. See the module's docstring."""
    keywords = [p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY]
    positional = [inspect.Parameter(k, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in ("forward", "params", "batch", "key")]

    def parts(**settings) -> Parts:
        return method(**settings).used()

    @functools.wraps(method)
    def objective(forward, params, batch, key, **settings):
        chosen = parts(**settings)
        scored = _scored(forward, params, batch, chosen)
        surrogate = chosen.surrogate(scored)
        loss = functools.reduce(lambda x, w: x * jax.lax.stop_gradient(w(scored)), chosen.weightings, surrogate.loss)
        terms = {"policy": chosen.aggregation(loss, batch)._replace(coefficient=chosen.coefficient)}
        for term in chosen.terms:
            value = term(scored)
            value = value if isinstance(value, Term) else chosen.aggregation(value, batch)
            scale = options(term).get("coefficient", 1.0)
            terms[plain(term).__name__] = value._replace(coefficient=scale * value.coefficient)
        return terms, _metrics(scored, surrogate, chosen)

    def prepare(forward, params, batch, key, **settings):
        chosen = parts(**settings)
        prepares = [function for p in (*chosen.weightings, *chosen.terms) if (function := declared(p, "prepare"))]
        scored = _scored(forward, params, batch, chosen) if prepares else None
        return functools.reduce(dict.__or__, [function(scored) for function in prepares], {})

    objective.__signature__ = prepare.__signature__ = inspect.Signature([*positional, *keywords])
    objective.policy_parts = parts
    declaration = declare.objective(
        columns=lambda **settings: {**parts(**settings).gather("columns"), **parts(**settings).reads},
        leaves=lambda **settings: parts(**settings).gather("leaves"),
        masks=lambda **settings: parts(**settings).masks(),
        prepare=prepare,
        advantages=lambda **settings: parts(**settings).advantages,
        off_policy=lambda **settings: declared(parts(**settings).surrogate, "off_policy"),
        sequence_level=lambda **settings: declared(parts(**settings).surrogate, "sequence_level"),
    )
    return declaration(objective)


# ------------------------------------------------------------------------------------------------ Parts from a config


def inside(entry: Any) -> Parts:
    """The Parts of an objective, from its config entry. Raises UserError for an objective that `estimator` did not make."""
    bound = resolve(entry, "objectives")
    if not hasattr(bound.func, "policy_parts"):
        raise UserError(f"config: {entry!r} is no policy gradient made of parts; policy_gradient.grpo is one.")
    return bound.func.policy_parts(**bound.keywords)


def part(table: Mapping, entry: Any, kind: str) -> Callable:
    """A table's function with its settings bound. entry: its name, or {"name": ..., settings}.

    Raises UserError for an unknown name and an unknown or missing setting.
    """
    settings = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = settings.pop("name", None)
    if name not in table:
        raise UserError(f"config: unknown {kind} {name!r}.{nearest(str(name), table)}")
    return bind(table[name], settings, f"{kind} {name}")


def added(table: Mapping, entries: Mapping, kind: str) -> tuple[Callable, ...]:
    """Several functions of a table. entries: {name: settings, or a coefficient}. Raises UserError as `part` does."""
    settings = {k: v if isinstance(v, Mapping) else {"coefficient": v} for k, v in entries.items()}
    return tuple(part(table, {"name": k, **v}, kind) for k, v in settings.items())


TABLES = {"surrogate": SURROGATES, "aggregation": AGGREGATIONS, "weighting": WEIGHTINGS, "term": TERMS}
