"""The pairs of a batch, and decorators that make a loss over pairs an objective.

A pair is two consecutive documents of a row, the chosen before the rejected (`documents.sides`). A method is a function from
`Pairs` to the loss of each pair [B,P], or to several Terms of [B,P] arrays. `pairwise` makes it an objective:

    @pairwise
    def mine(pairs, *, beta=0.1):
        return -jax.nn.log_sigmoid(beta * (pairs.chosen - pairs.rejected))

Each Term is a sum over pairs, divided by the global batch's number of pairs or by the method's own weights. `around` makes a
function Pairs -> Pairs an objective, which changes the pairs that another method reads. `composed` combines several methods.
Every change works with every method, and the tokens are scored once.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import declare
from jaxpost.config.resolve import resolve
from jaxpost.errors import UserError
from jaxpost.metrics import Mean, masked_mean
from jaxpost.objectives import documents
from jaxpost.objectives.logprobs import REFERENCE, token_scores
from jaxpost.types import Batch, Output, Term


def _itself(x):
    return x


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of a batch; arrays over pairs are [B,P].

    scores: the tokens' logps, entropy and correct [B,S]. emphasis [B,S]: the weight of each token's log-probability. score: a
    function of the log-ratios. weight [B,P]: the weight of each pair's loss. prepared: columns [B,P] made from the whole batch.
    """

    output: Output
    batch: Batch
    scores: dict
    emphasis: jax.Array | float = 1.0
    score: Callable = _itself
    weight: jax.Array | float = 1.0
    prepared: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def lengths(self) -> tuple[jax.Array, jax.Array]:
        """Tokens of the chosen and of the rejected completion, the stop token included; 0 where there is no pair."""
        return documents.sides(documents.lengths(self.batch))

    @property
    def real(self) -> jax.Array:
        """[B,P] bool: whether there is a pair, with tokens in both completions."""
        return (self.lengths[0] > 0) & (self.lengths[1] > 0)

    @functools.cached_property
    def logps(self) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of the chosen and of the rejected completion, nats."""
        return documents.sides(documents.sums(self.emphasis * self.scores["logps"], self.batch))

    @functools.cached_property
    def references(self) -> tuple[jax.Array, jax.Array]:
        """The same under the frozen reference, from its column `ref_logps`."""
        return documents.sides(documents.sums(self.emphasis * jax.lax.stop_gradient(self.batch["ref_logps"]), self.batch))

    @property
    def ratios(self) -> tuple[jax.Array, jax.Array]:
        """log policy / reference of both completions."""
        return self.logps[0] - self.references[0], self.logps[1] - self.references[1]

    @property
    def chosen(self) -> jax.Array:
        """The chosen completion's score: its log-ratio, or a divergence's function of it."""
        return self.score(self.ratios[0])

    @property
    def rejected(self) -> jax.Array:
        """The rejected completion's score."""
        return self.score(self.ratios[1])

    def means(self, sides: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Sums over both completions, divided by their lengths."""
        return tuple(x / jnp.maximum(n, 1.0) for x, n in zip(sides, self.lengths, strict=True))

    @property
    def nll(self) -> jax.Array:
        """Negative log-likelihood of the chosen completion, without emphasis."""
        return -documents.sides(documents.sums(self.scores["logps"], self.batch))[0]

    def constant(self, name: str) -> jax.Array:
        """A column that is constant over a pair, read at the chosen completion."""
        return documents.sides(documents.constants(self.batch[name], self.batch))[0]


class Part(NamedTuple):
    """One summand of an objective: a method with its settings, and changes to the pairs that it reads (outermost first)."""

    name: str
    loss: Callable
    settings: dict
    columns: dict
    rewards: Callable  # Pairs -> (chosen, rejected); the reported rewards are these times the setting beta
    prepare: Callable | None  # Pairs -> columns [B,P], from the whole batch
    changes: tuple[Callable, ...] = ()
    coefficient: float = 1.0

    def changed(self, pairs: Pairs) -> Pairs:
        """The pairs with this method's changes and prepared columns."""
        pairs = functools.reduce(lambda p, change: change(p), self.changes, pairs)
        prefix = f"{self.name}:"
        prepared = {k.removeprefix(prefix): v for k, v in pairs.batch.items() if k.startswith(prefix)}
        return dataclasses.replace(pairs, prepared=prepared)

    def terms(self, pairs: Pairs) -> dict[str, Term]:
        """The method's Terms, summed over the real pairs."""
        loss = self.loss(pairs, **self.settings)
        named = {f"{self.name}/{k}": t for k, t in loss.items()} if isinstance(loss, dict) else {self.name: Term(loss, 1.0)}

        def summed(t):
            value, weight = (jnp.sum(jnp.where(pairs.real, x, 0.0)) for x in (pairs.weight * t.sum, t.weight))
            return Term(value, weight, self.coefficient * t.coefficient)

        return {k: summed(t) for k, t in named.items()}


def pairwise(loss=None, *, columns: dict = REFERENCE, rewards: Callable | None = None, prepare: Callable | None = None):
    """The objective of a method: loss(pairs, *, keywords) -> [B,P], or {name: Term of [B,P] arrays}.

    columns: what it reads besides tokens, segments and mask. rewards: as in Part; the log-ratios if None. prepare: Pairs ->
    columns [B,P] from the whole batch, which the loss reads from pairs.prepared.
    """
    if loss is None:
        return functools.partial(pairwise, columns=columns, rewards=rewards, prepare=prepare)
    name, rewards = loss.__name__, rewards or (lambda pairs: pairs.ratios)
    return _objective(loss, lambda settings: [Part(name, loss, settings, columns, rewards, prepare)], prepare is not None)


def around(change: Callable) -> Callable:
    """The objective of a change: change(pairs, *, of, keywords) -> Pairs, which the objective `of` then reads."""

    def parts(settings):
        bound = functools.partial(change, **settings)
        return [part._replace(changes=(bound, *part.changes)) for part in inside(settings["of"])]

    return _objective(change, parts)


def composed(make: Callable) -> Callable:
    """The objective of several methods: make(*, keywords) -> [Part]."""
    return _objective(make, lambda settings: make(**settings))


def inside(entry: Any) -> list[Part]:
    """The Parts of an objective over pairs, from its config entry. Raises UserError for an objective of another kind."""
    bound = resolve(entry, "objectives")
    if not hasattr(bound.func, "pair_parts"):
        raise UserError(f"config: {entry!r} is no loss over pairs; preference.sigmoid is one.")
    return bound.func.pair_parts(bound.keywords)


def _objective(function: Callable, parts: Callable, prepares: bool = True) -> Callable:
    """(forward, params, batch, key, *, the function's keywords) -> terms, metrics.

    parts: settings -> [Part]. prepares: whether any of them may read the whole batch.
    """
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    defaults = {p.name: p.default for p in keywords if p.default is not p.empty}
    positional = [inspect.Parameter(k, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in ("forward", "params", "batch", "key")]

    def parts_of(options):
        return parts({**defaults, **options})

    @functools.wraps(function)
    def objective(forward, params, batch, key, **options):
        summands, pairs = parts_of(options), _read(forward, params, batch)
        terms = [part.terms(part.changed(pairs)) for part in summands]
        return functools.reduce(dict.__or__, terms), _metrics(summands[0], summands[0].changed(pairs))

    def prepare(forward, params, batch, key, **options):
        prepared, columns = [part for part in parts_of(options) if part.prepare], {}
        pairs = _read(forward, params, batch) if prepared else None
        for part in prepared:
            columns |= {f"{part.name}:{k}": v for k, v in part.prepare(part.changed(pairs)).items()}
        return columns

    def columns(**options):
        return functools.reduce(dict.__or__, [part.columns for part in parts_of(options)])

    objective.__signature__ = prepare.__signature__ = inspect.Signature([*positional, *keywords])
    objective.pair_parts = parts_of
    return declare.objective(rows="pairs", columns=columns, prepare=prepare if prepares else None)(objective)


def _read(forward: Callable, params: Any, batch: Batch) -> Pairs:
    output = forward(params, batch)
    return Pairs(output, batch, token_scores(output, batch))


def _metrics(part: Part, pairs: Pairs) -> dict:
    """The metrics of every method, under TRL's names; of several methods the rewards are the first one's."""
    real, batch, beta = pairs.real, pairs.batch, part.settings.get("beta", 1.0)
    chosen, rejected = (beta * x for x in part.rewards(pairs))
    learned = batch["mask"] & (batch["segments"] % 2 == 1)
    return {
        "rewards/chosen": masked_mean(chosen, real),
        "rewards/rejected": masked_mean(rejected, real),
        "rewards/margins": masked_mean(chosen - rejected, real),
        "rewards/accuracies": masked_mean(chosen > rejected, real),
        "logps/chosen": masked_mean(pairs.logps[0], real),
        "logps/rejected": masked_mean(pairs.logps[1], real),
        "nll": Mean(jnp.sum(jnp.where(real, pairs.nll, 0.0)), jnp.sum(jnp.where(real, pairs.lengths[0], 0.0))),
        "entropy": masked_mean(pairs.scores["entropy"], batch["mask"]),
        "mean_token_accuracy": masked_mean(pairs.scores["correct"], learned),
    }
