"""The one policy-gradient estimator: its parts, how they are added up, and how a choice of them becomes an objective.

    grad = sum over tokens of  stable_mask * advantage / reference_policy * d policy

A method is a choice: an advantage (`jaxpost.rollouts.advantages`), a surrogate and its weightings (`surrogates`), an
aggregation (below), and what else it has (`terms`). So a method is a function of its settings that gives `Parts`, and
`estimator` makes an objective of it:

    @estimator
    def mine(*, high=0.5):
        return Parts("centred", partial(surrogates.clip, high=high), token_mean)

What the objective reads, which leaves it adds to the parameters, which advantages it wants and whether it may take several
steps a batch follow from its parts, and whether a completion has one advantage only: what `declare.objective` says of it are
functions of its keywords.

An aggregation gives a Term of the tokens' numbers [B,S]: how much a completion counts by its length is decided here.
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
from jaxpost.objectives.surrogates import MOST, SURROGATES, WEIGHTINGS, Rollouts, Surrogate
from jaxpost.objectives.terms import TERMS, k3
from jaxpost.types import Batch, Output, Term


class Parts(NamedTuple):
    """One choice of the estimator's parts; each a function of its table, with its settings bound by functools.partial."""

    advantages: Mapping | str  # the config entry of the advantages
    surrogate: Callable  # Rollouts -> Surrogate
    aggregation: Callable  # (numbers [B,S], batch) -> Term
    terms: tuple[Callable, ...] = ()  # Rollouts -> [B,S] or Term
    weightings: tuple[Callable, ...] = ()  # Rollouts -> [B,S]
    reads: Mapping = {}  # columns that only the advantages or the metrics read
    coefficient: float = 1.0  # of the policy term; the others have their own

    def used(self) -> "Parts":
        """Without the terms whose coefficient is 0."""
        return self._replace(terms=tuple(t for t in self.terms if options(t).get("coefficient", 1.0)))

    def gather(self, name: str) -> dict:
        """What the parts declare under a name, together."""
        return functools.reduce(dict.__or__, [declared(p, name) for p in self._all()], {})

    def masks(self) -> tuple[str, ...]:
        """The columns that say where the parts learn."""
        return tuple(dict.fromkeys(mask for part in self._all() for mask in ("mask", *declared(part, "masks"))))

    def _all(self) -> tuple[Callable, ...]:
        return self.surrogate, *self.weightings, *self.terms


def plain(part: Callable) -> Callable:
    """The function of a table that a part is, without its settings."""
    return getattr(part, "func", part)


def options(part: Callable) -> dict:
    """The settings of a part."""
    return dict(getattr(part, "keywords", {}))


# -------------------------------------------------------------------------------------------------------- Aggregations


def _completions(batch: Batch, empty: bool) -> jax.Array:
    """How many completions there are; empty: those of which the mask keeps nothing (a truncated one, say) count too.

    Where the column `sampled` says which tokens the policy drew, a completion is a document that has one: demonstrations and
    rows of data are none.
    """
    if not empty:
        held = jnp.sum(documents.lengths(batch) > 0, axis=1)
    elif "sampled" in batch:
        held = jnp.sum(documents.counts(batch["sampled"], batch) > 0, axis=1)
    else:
        held = jnp.max(batch["segments"], axis=1)
    return jnp.sum(held.astype(jnp.float32))


def token_mean(numbers: jax.Array, batch: Batch) -> Term:
    """The mean over all tokens of the global batch: every token counts the same, a long completion more than a short one."""
    return Term(jnp.sum(jnp.where(batch["mask"], numbers, 0.0)), jnp.sum(batch["mask"].astype(jnp.float32)))


def sequence_mean(numbers: jax.Array, batch: Batch, *, empty: bool = True) -> Term:
    """The mean over completions of the mean over their tokens: a token of a long completion counts less.

    empty: whether a completion of which the mask keeps nothing counts in the denominator; in TRL it does, in verl it does not.
    """
    means = documents.sums(numbers, batch) / jnp.maximum(documents.lengths(batch), 1.0)
    return Term(jnp.sum(means), _completions(batch, empty))


def sequence_sum(numbers: jax.Array, batch: Batch, *, empty: bool = True) -> Term:
    """The mean over completions of the sum over their tokens: the completion is one action. empty: as for sequence_mean."""
    return Term(jnp.sum(jnp.where(batch["mask"], numbers, 0.0)), _completions(batch, empty))


def constant(numbers: jax.Array, batch: Batch, *, longest: int) -> Term:
    """sequence_sum over a constant, the most tokens that a completion can have, whatever the batch has."""
    found = sequence_sum(numbers, batch)
    return found._replace(weight=found.weight * longest)


AGGREGATIONS = {f.__name__: f for f in (token_mean, sequence_mean, sequence_sum, constant)}


# --------------------------------------------------------------------------------------------------------- An objective


def _scores(logits: jax.Array, columns: dict) -> dict:
    """Log-probability and entropy of a token, both with their gradients."""
    likely = jax.nn.log_softmax(logits / columns["temperature"][:, None], axis=-1)
    hit = jnp.arange(logits.shape[-1]) == columns["tokens"][:, None]
    return {"logps": jnp.sum(jnp.where(hit, likely, 0.0), axis=-1), "entropy": -jnp.sum(jnp.exp(likely) * likely, axis=-1)}


def _look(forward: Callable, params: Any, batch: Batch, parts: Parts) -> Rollouts:
    output = forward(params, batch)
    mask = functools.reduce(jnp.logical_or, [batch[name] for name in parts.masks()])
    return Rollouts(params, output, batch, **_measured(output, batch, mask, parts))


def _measured(output: Output, batch: Batch, mask: jax.Array, parts: Parts) -> dict:
    if any(declared(term, "differentiates_entropy") for term in parts.terms):
        return at_tokens(_scores, output, columns=drawn(batch), mask=mask)
    found = token_scores(output, batch, mask)
    return {k: found[k] for k in ("logps", "entropy")}


def _metrics(seen: Rollouts, found: Surrogate, parts: Parts) -> dict:
    """What every policy gradient reports, under TRL's names; of tokens, each counting the same.

    sampling/*: the trainer's probabilities against the sampler's, of the same weights. Where a correction has asked the trainer
    it is of every step; else of those whose weights have sampled, which the scalar `fresh` says (all, if it is not there).
    """
    mask = seen.mask
    if "sampler_logps" in seen.batch:
        gap, fresh = seen.constant("old_logps") - seen.constant("sampler_logps"), mask
    else:
        gap, fresh = jax.lax.stop_gradient(seen.drift), mask & seen.batch.get("fresh", True)
    ratio, ways = jnp.exp(jnp.minimum(gap, MOST)), "sampling/importance_sampling_ratio"
    metrics = {
        "entropy": masked_mean(seen.entropy, mask),
        "sampling/sampling_logp_difference/mean": masked_mean(jnp.abs(gap), fresh),
        "sampling/sampling_logp_difference/max": masked_max(jnp.abs(gap), fresh),
        f"{ways}/min": Min(jnp.min(jnp.where(fresh, ratio, jnp.inf))),
        f"{ways}/mean": masked_mean(ratio, fresh),
        f"{ways}/max": Max(jnp.max(jnp.where(fresh, ratio, -jnp.inf))),
    }
    if "ref_logps" in seen.batch:
        metrics["kl"] = masked_mean(k3(seen), mask)
    if found.low is not None:
        sides = {"low": found.low, "high": found.high, "region": found.low | found.high}
        metrics |= {f"clip_ratio/{k}_mean": masked_mean(x, mask) for k, x in sides.items()}
    for term in parts.terms:
        if of_term := declared(term, "metrics"):
            metrics |= of_term(seen)
    return metrics


def estimator(method: Callable) -> Callable:
    """The objective of a method: method(*, keywords) -> Parts. See the module's docstring."""
    keywords = [p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY]
    placed = [inspect.Parameter(k, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in ("forward", "params", "batch", "key")]

    def parts(**settings) -> Parts:
        return method(**settings).used()

    @functools.wraps(method)
    def objective(forward, params, batch, key, **settings):
        chosen = parts(**settings)
        seen = _look(forward, params, batch, chosen)
        found = chosen.surrogate(seen)
        loss = functools.reduce(lambda x, w: x * jax.lax.stop_gradient(w(seen)), chosen.weightings, found.loss)
        terms = {"policy": chosen.aggregation(loss, batch)._replace(coefficient=chosen.coefficient)}
        for term in chosen.terms:
            made = term(seen)
            made = made if isinstance(made, Term) else chosen.aggregation(made, batch)
            scale = options(term).get("coefficient", 1.0)
            terms[plain(term).__name__] = made._replace(coefficient=scale * made.coefficient)
        return terms, _metrics(seen, found, chosen)

    def prepare(forward, params, batch, key, **settings):
        chosen = parts(**settings)
        makers = [maker for p in (*chosen.weightings, *chosen.terms) if (maker := declared(p, "prepare"))]
        seen = _look(forward, params, batch, chosen) if makers else None
        return functools.reduce(dict.__or__, [maker(seen) for maker in makers], {})

    objective.__signature__ = prepare.__signature__ = inspect.Signature([*placed, *keywords])
    objective.policy_parts = parts
    says = declare.objective(
        columns=lambda **settings: {**parts(**settings).gather("columns"), **parts(**settings).reads},
        leaves=lambda **settings: parts(**settings).gather("leaves"),
        masks=lambda **settings: parts(**settings).masks(),
        prepare=prepare,
        advantages=lambda **settings: parts(**settings).advantages,
        off_policy=lambda **settings: declared(parts(**settings).surrogate, "off_policy"),
        sequence_level=lambda **settings: declared(parts(**settings).surrogate, "sequence_level"),
    )
    return says(objective)


# ------------------------------------------------------------------------------------------------ Parts from a config


def inside(entry: Any) -> Parts:
    """The Parts of an objective, from its config entry. Raises UserError for one that is no policy gradient of parts."""
    bound = resolve(entry, "objectives")
    if not hasattr(bound.func, "policy_parts"):
        raise UserError(f"config: {entry!r} is no choice of the estimator's parts; policy_gradient.grpo is one.")
    return bound.func.policy_parts(**bound.keywords)


def part(table: Mapping, entry: Any, kind: str) -> Callable:
    """A table's function with its settings bound; entry: its name, or {"name": ..., settings}.

    Raises UserError for an unknown name, setting, or one that is missing.
    """
    settings = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = settings.pop("name", None)
    if name not in table:
        raise UserError(f"config: unknown {kind} {name!r}.{nearest(str(name), table)}")
    return bind(table[name], settings, f"{kind} {name}")


def added(table: Mapping, entries: Mapping, kind: str) -> tuple[Callable, ...]:
    """Several functions of a table, {name: settings, or a number for its coefficient}. Raises UserError as `part` does."""
    told = {k: v if isinstance(v, Mapping) else {"coefficient": v} for k, v in entries.items()}
    return tuple(part(table, {"name": k, **v}, kind) for k, v in told.items())


TABLES = {"surrogate": SURROGATES, "aggregation": AGGREGATIONS, "weighting": WEIGHTINGS, "term": TERMS}
