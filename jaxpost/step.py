"""The one train step, for every objective.

An objective returns Terms and metrics. The loss is sum_k coefficient_k * sum_k / weight_k, with each weight taken over the
global batch. Weights come from masks alone, so they are known before the first microbatch, and gradients of microbatches add.
An objective's `prepare` makes columns that need the whole batch (a sort, a baseline, the other rows' embeddings). What it needs
of the model, its `gather` computes a microbatch at a time.
"""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.metrics import Mean, Total, merge
from jaxpost.types import Batch, Term, TrainState


def combine(train, frozen):
    """The whole parameter tree; each of the two has None where the other has the leaf."""
    return jax.tree.map(lambda a, b: b if a is None else a, train, frozen, is_leaf=lambda x: x is None)


@contextlib.contextmanager
def _reading(batch: Batch):
    """Raises UserError if a missing column of the batch is read inside."""
    try:
        yield
    except KeyError as e:
        if e.args[0] in batch or not isinstance(e.args[0], str):
            raise
        raise UserError(
            f"the objective asks for {e}, and there is none; the columns of its batches are {', '.join(batch)}."
        ) from e


def evaluated(objective: Callable, forward: Callable, params, batch: Batch, key) -> tuple[dict, dict]:
    """The objective's terms and metrics. Raises UserError if it reads a missing column or returns no Terms."""
    with _reading(batch):
        result = objective(forward, params, batch, key)
    terms = result[0] if isinstance(result, tuple) and len(result) == 2 else None
    if not isinstance(terms, dict) or not terms or not all(isinstance(t, Term) for t in terms.values()):
        raise UserError(
            "an objective returns ({name: Term(sum, weight)}, {name: metric}), with one Term at least; this one gave "
            f"{type(result).__name__} {str(result)[:100]}."
        )
    return result


def contributions(terms: dict, weights: dict) -> dict:
    """coefficient_k * sum_k / weight_k for each term k; their sum is the loss. Zero where weight_k is 0 (an empty mask)."""
    return {k: t.coefficient * t.sum / jnp.where(weights[k] > 0, weights[k], 1.0) for k, t in terms.items()}


def with_prepared(objective: Callable, forward: Callable, params, batch: Batch, key, microbatches: int = 1) -> Batch:
    """The batch with the columns of the objective's `prepare`, if it has one; its `gather` runs first, in so many parts."""
    prepare, gather = declared(objective, "prepare"), declared(objective, "gather")
    if prepare is None:
        return batch
    constant = jax.lax.stop_gradient(params)
    with _reading(batch):
        gathered = {} if gather is None else _gathered(gather, forward, constant, batch, key, microbatches)
        columns = prepare(forward, constant, {**batch, **gathered}, key)
    return {**batch, **jax.lax.stop_gradient(columns)}


def _gathered(gather: Callable, forward: Callable, params, batch: Batch, key, microbatches: int) -> dict:
    """The columns [B,...] of a `gather`, computed for the rows of one microbatch after the other."""

    def part(rows: Batch) -> dict:
        columns, count = gather(forward, params, rows, key), len(rows["mask"])
        if wrong := [k for k, x in columns.items() if x.shape[:1] != (count,)]:
            raise UserError(
                f"the objective's gather returns a column {wrong[0]} that is no [{count},...], a value for each row."
            )
        return columns

    if microbatches == 1:
        return part(batch)
    rows, scalars = _dealt(batch, microbatches)
    parts = jax.lax.map(lambda rows: part({**rows, **scalars}), rows)
    return {k: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for k, x in parts.items()}


def _dealt(batch: Batch, microbatches: int) -> tuple[Batch, Batch]:
    """(the columns of rows as [M,B/M,...], the scalars); row i is in microbatch i % M, which keeps every device busy."""

    def deal(x):
        return x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)

    return {k: deal(x) for k, x in batch.items() if x.ndim}, {k: x for k, x in batch.items() if not x.ndim}


def gradients(
    forward: Callable, objective: Callable, train, frozen, batch: Batch, key, microbatches: int = 1, term_norms: bool = False
):
    """(loss, gradients of `train`, metrics) of a global batch, computed in `microbatches` parts.

    The result does not depend on their number, which must divide the batch's rows: sums add and weights are global. term_norms:
    whether metrics include the norm of each term's gradient, grad_norm/TERM, if there are several terms; each costs a backward
    pass and its memory.
    """
    batch = with_prepared(objective, forward, combine(train, frozen), _numbered(batch), key, microbatches)
    # Only the weights are used. They depend on masks alone, so the compiler drops this forward pass.
    terms, _ = evaluated(objective, forward, combine(train, frozen), batch, key)
    weights = {k: jax.lax.stop_gradient(t.weight) for k, t in terms.items()}

    def part(train, rows):
        terms, metrics = evaluated(objective, forward, combine(train, frozen), rows, key)
        shares = contributions(terms, weights)
        return sum(shares.values(), jnp.float32(0.0)), (shares, metrics)

    differentiate = _by_term(part) if term_norms and len(terms) > 1 else _together(part)
    if microbatches == 1:
        (loss, (shares, metrics)), grads = differentiate(train, batch)
        return loss, _summed(grads), {**_term_metrics(shares), **_norms(grads), **metrics}

    rows, scalars = _dealt(batch, microbatches)

    def body(carry, rows):
        (loss, (shares, metrics)), grads = differentiate(train, {**rows, **scalars})
        return jax.tree.map(jnp.add, carry, (loss, shares, grads)), metrics

    names = terms if term_norms and len(terms) > 1 else [""]
    zeros = {name: jax.tree.map(jnp.zeros_like, train) for name in names}
    zero = (jnp.float32(0.0), {k: jnp.float32(0.0) for k in terms}, zeros)
    (loss, shares, grads), metrics = jax.lax.scan(body, zero, rows)
    return loss, _summed(grads), {**_term_metrics(shares), **_norms(grads), **merge(metrics)}


def _together(part: Callable) -> Callable:
    """part's value, and {"": its gradient}."""
    value_and_grad = jax.value_and_grad(part, has_aux=True)

    def differentiate(train, rows):
        value, grads = value_and_grad(train, rows)
        return value, {"": grads}

    return differentiate


def _by_term(part: Callable) -> Callable:
    """part's value, and {term: the gradient of its share of the loss}."""

    def differentiate(train, rows):
        def by_term(train):
            loss, (shares, metrics) = part(train, rows)
            return shares, (loss, metrics)

        shares, back, (loss, metrics) = jax.vjp(by_term, train, has_aux=True)
        grads = {k: back({other: jnp.float32(other == k) for other in shares})[0] for k in shares}
        return (loss, (shares, metrics)), grads

    return differentiate


def _summed(grads: dict):
    """The gradient of the loss: the sum of its terms' gradients."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *grads.values())


def _norms(grads: dict) -> dict:
    """The norm of each term's gradient, if they were computed separately."""
    return {f"grad_norm/{k}": optax.tree.norm(x) for k, x in grads.items() if k}


def _numbered(batch: Batch) -> Batch:
    return {**batch, "rows": jnp.arange(batch["mask"].shape[0], dtype=jnp.int32)}


def _term_metrics(shares: dict) -> dict:
    """Each term's share of the loss, if there are several."""
    return {f"loss/{k}": v for k, v in shares.items()} if len(shares) > 1 else {}


def make_step(
    forward: Callable, objective: Callable, tx, *, microbatches: int = 1, ema: float | None = None, term_norms: bool = False
) -> Callable:
    """step(state, batch) -> (state, metrics), to be jitted with a donated state.

    tx: an optax transformation over the trainable leaves. ema: decay of the running mean of the weights. term_norms: as in
    `gradients`. An update with a non-finite loss or gradient is skipped and counted: parameters, moments and mean do not
    change. Metrics include loss, grad_norm (before clipping) and skipped.
    """

    def step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        loss, grads, metrics = gradients(forward, objective, state.train, state.frozen, batch, key, microbatches, term_norms)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def unless_skipped(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        updates, opt_state = tx.update(grads, state.opt_state, state.train)
        train = unless_skipped(optax.apply_updates(state.train, updates), state.train)
        mean = state.ema
        if ema is not None:
            mean = unless_skipped(jax.tree.map(lambda m, w: ema * m + (1 - ema) * w, state.ema, train), state.ema)
        state = state.replace(
            step=state.step + 1,
            train=train,
            opt_state=unless_skipped(opt_state, state.opt_state),
            ema=mean,
            skipped=state.skipped + ~finite,
            streak=jnp.where(finite, 0, state.streak + 1),
        )
        base = {"loss": loss, "grad_norm": norm, "skipped": state.skipped, "skipped_in_a_row": state.streak}
        return state, {**base, **_sizes(batch), **metrics}

    return step


def _sizes(batch: Batch) -> dict:
    """The batch's size: real tokens, learned tokens, and the (query, key) pairs of causal attention."""
    real = batch["segments"] > 0
    pairs = jnp.sum(jnp.where(real, batch["positions"] + 1, 0).astype(jnp.float32))
    return {"num_tokens": jnp.sum(real), "num_trained": jnp.sum(batch["mask"]), "num_pairs": pairs}


def make_evaluation(forward: Callable, objective: Callable, *, microbatches: int = 1) -> Callable:
    """evaluate(params, batch, key) -> metrics of one batch. An objective's `gather` runs in so many parts.

    These are the objective's metrics, each term by name if there are several, and `loss`, as in training: sum_k coefficient_k *
    sum_k / weight_k.
    """

    def evaluate(params, batch: Batch, key):
        batch = with_prepared(objective, forward, params, _numbered(batch), key, microbatches)
        terms, metrics = evaluated(objective, forward, params, batch, key)
        each = {k: Mean(t.sum, t.weight) for k, t in terms.items()} if len(terms) > 1 else {}
        loss = Total(tuple(Mean(t.coefficient * t.sum, t.weight) for t in terms.values()))
        return {**each, **metrics, "loss": loss}

    return evaluate
