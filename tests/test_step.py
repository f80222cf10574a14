"""The step around the gradient: what trains, is skipped and is clipped, the learning rate's course, and metrics that add."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stubs

from jaxpost import metrics, optim, recipe
from jaxpost.declare import objective
from jaxpost.errors import UserError
from jaxpost.objectives import sft
from jaxpost.objectives.logprobs import token_scores
from jaxpost.step import contributions, gradients, make_evaluation, make_step, with_prepared
from jaxpost.types import Head, Output, Term, TrainState

PLAIN = recipe.DEFAULTS["optimizer"] | {"lr": 0.1, "schedule": "constant", "warmup": 0, "clip": 0.0}


def _linear(forward, params, batch, key):
    """A loss whose gradient by any weight is the batch's `slope`: w . slope, summed over rows."""
    total = sum(jnp.sum(w) for w in jax.tree.leaves(params))
    return {"line": Term(total * jnp.sum(batch["slope"]), jnp.float32(len(batch["slope"])))}, {}


def _batch(*slopes):
    rows = len(slopes)
    places = {k: jnp.zeros((rows, 1), jnp.int32) for k in ("segments", "positions", "mask")}
    return places | {"slope": jnp.asarray(slopes, jnp.float32)}


def _params():
    return {"a": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 3.0)}, "norm": {"scale": jnp.ones(2)}}


def _state(tx, pattern=".*", ema=False):
    train, frozen = optim.partition(_params(), pattern)
    mean, zero = (train if ema else None), jnp.zeros((), jnp.int32)
    return TrainState(zero, train, frozen, tx.init(train), mean, jax.random.PRNGKey(0), zero, zero)


def _bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# ------------------------------------------------------------------------------------------------- What trains


def test_frozen_leaves_stay_and_cost_no_optimizer_memory():
    tx = optim.make(PLAIN, 10)
    state = _state(tx, "bias")
    after, _ = jax.jit(make_step(None, _linear, tx))(state, _batch(1.0))
    assert after.train["a"]["kernel"] is None and state.frozen["a"]["bias"] is None
    assert _bits(after.frozen) == _bits(state.frozen)
    # Adam's first step is the learning rate, whatever the gradient's size.
    np.testing.assert_allclose(after.train["a"]["bias"], [2.9, 2.9], rtol=1e-6)
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert [x.shape for x in moments] == [(2,), (2,)]


def test_a_pattern_that_trains_nothing_is_refused():
    with pytest.raises(UserError, match=r"config.trainable: 'lora' matches no parameter"):
        optim.partition(_params(), "lora")


def test_the_mean_of_the_weights_follows_them():
    tx = optax.sgd(1.0)
    step, state = jax.jit(make_step(None, _linear, tx, ema=0.75)), _state(tx, "scale", ema=True)
    for _ in range(2):
        state, _ = step(state, _batch(4.0))
    # Weights 1, -3, -7; the mean starts at 1: 0.75 * 1 + 0.25 * -3 = 0, then 0.75 * 0 + 0.25 * -7.
    assert state.train["norm"]["scale"].tolist() == [-7.0, -7.0]
    assert state.ema["norm"]["scale"].tolist() == [-1.75, -1.75]


# --------------------------------------------------------------------------------------------- Non-finite updates


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_left_out_and_counted(bad):
    tx = optim.make(PLAIN, 10)
    step, state = jax.jit(make_step(None, _linear, tx, ema=0.9)), _state(tx, ema=True)
    state, first = step(state, _batch(1.0, 2.0))
    skipped, second = step(state, _batch(1.0, bad))
    for name in ("train", "opt_state", "ema"):
        assert _bits(getattr(skipped, name)) == _bits(getattr(state, name)), name
    assert (int(skipped.step), int(skipped.skipped), int(skipped.streak)) == (2, 1, 1)
    skipped, third = step(skipped, _batch(1.0, bad))
    assert (int(third["skipped"]), int(third["skipped_in_a_row"])) == (2, 2)
    after, fourth = step(skipped, _batch(1.0, 2.0))
    assert (int(fourth["skipped"]), int(fourth["skipped_in_a_row"]), int(first["skipped"])) == (2, 0, 0)
    assert not np.isfinite(second["loss"]) and _bits(after.train) != _bits(state.train)


def test_a_gradient_that_is_not_finite_counts_though_the_loss_is():
    def kinked(forward, params, batch, key):
        # 0 at 0, with an infinite slope there.
        return {"root": Term(jnp.sum(jnp.sqrt(params["norm"]["scale"] - 1.0)), jnp.float32(1.0))}, {}

    tx = optax.sgd(0.1)
    state = _state(tx)
    after, measured = jax.jit(make_step(None, kinked, tx))(state, _batch(1.0))
    assert measured["loss"] == 0 and int(after.skipped) == 1 and _bits(after.train) == _bits(state.train)


def test_without_a_single_target_the_loss_is_zero_and_nothing_moves():
    params = stubs.init()
    tx, zero = optax.sgd(0.1), jnp.zeros((), jnp.int32)
    state = TrainState(
        zero, params, jax.tree.map(lambda _: None, params), tx.init(params), None, jax.random.PRNGKey(0), zero, zero
    )
    batch = stubs.pack(stubs.documents(1))
    batch["mask"] = np.zeros_like(batch["mask"])

    after, measured = jax.jit(make_step(stubs.forward, sft.nll, tx))(state, batch)
    assert measured["loss"] == measured["grad_norm"] == 0 and _bits(after.train) == _bits(params)


# ------------------------------------------------------------------------------------------ Clipping, decay, schedules


def test_the_norm_is_that_before_clipping_and_the_update_that_after():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    state = _state(tx, "scale")
    after, measured = jax.jit(make_step(None, _linear, tx))(state, _batch(3.0))
    assert float(measured["grad_norm"]) == pytest.approx(3 * np.sqrt(2), rel=1e-6)
    np.testing.assert_allclose(after.train["norm"]["scale"], 1 - np.sqrt([0.5, 0.5]), rtol=1e-6)


def _second_moment(clip):
    """Adam's second moment of one weight after a gradient of 3 by each of two."""
    tx = optim.make(PLAIN | {"clip": clip}, 10)
    after, _ = jax.jit(make_step(None, _linear, tx))(_state(tx, "scale"), _batch(3.0))
    return float(optax.tree_utils.tree_get(after.opt_state, "nu")["norm"]["scale"][0])


def test_the_recipes_clip_acts_before_adam_and_zero_is_off():
    assert _second_moment(0.0) == pytest.approx(0.001 * 9, rel=1e-5)
    assert _second_moment(1.0) == pytest.approx(0.001 * 0.5, rel=1e-5)


def test_only_the_paths_that_the_pattern_names_decay():
    tx = optim.make(PLAIN | {"weight_decay": 0.5}, 10)
    params = _params()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert updates["norm"]["scale"].tolist() == [0, 0] and updates["a"]["bias"].tolist() == [0, 0]
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * 0.5 * 2.0 * np.ones((2, 2)), rtol=1e-6)


# 100 steps, 10 of them warm-up, from 1 to a tenth: values at steps 0, 5, 10, 55, 85, 90, 100.
RISE = (1 / 11, 6 / 11)  # no update is without a rate
COURSES = {
    "cosine": [*RISE, 1, 0.55, 0.1 + 0.45 * (1 + np.cos(np.pi * 75 / 90)), 0.1 + 0.45 * (1 + np.cos(np.pi * 80 / 90)), 0.1],
    "linear": [*RISE, 1, 0.55, 0.25, 0.2, 0.1],
    "constant": [*RISE, 1, 1, 1, 1, 1],
    "wsd": [*RISE, 1, 1, 0.775, 0.55, 0.1],
}


@pytest.mark.parametrize("warmup", [10, 0.1])
@pytest.mark.parametrize("name", COURSES)
def test_learning_rates_at_their_landmarks(name, warmup):
    course = optim.schedule({"schedule": name, "lr": 1.0, "warmup": warmup, "end": 0.1}, 100)
    np.testing.assert_allclose([course(t) for t in (0, 5, 10, 55, 85, 90, 100)], COURSES[name], atol=1e-6)


def test_every_schedule_is_tested_and_an_unknown_one_is_named():
    assert COURSES.keys() == optim.SCHEDULES.keys()
    for name in optim.SCHEDULES:
        assert optim.schedule({"schedule": name, "lr": 1.0, "warmup": 0, "end": 0.1}, 100)(0) == 1
    with pytest.raises(UserError, match="cosin.*'cosine'"):
        optim.schedule({"schedule": "cosin", "lr": 1.0, "warmup": 0, "end": 0.1}, 100)


@pytest.mark.parametrize("name", COURSES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 0.5])
def test_every_update_has_a_rate_above_zero(name, warmup):
    course = optim.schedule({"schedule": name, "lr": 1e-3, "warmup": warmup, "end": 0.0}, 8)
    assert all(course(t) > 0 for t in range(8))


@pytest.mark.parametrize(("warmup", "steps"), [(8, 8), (10, 3), (1, 1), (-1, 5)])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup, steps):
    with pytest.raises(UserError, match=f"optimizer.warmup: {warmup} of {steps} steps"):
        optim.schedule({"schedule": "linear", "lr": 1.0, "warmup": warmup, "end": 0.1}, steps)


# ------------------------------------------------------------------------------------------------ Terms and metrics


def test_terms_have_their_own_denominators_and_coefficients():
    terms = {
        "a": Term(jnp.float32(6), jnp.float32(3)),
        "b": Term(jnp.float32(8), jnp.float32(2), -0.5),
        "c": Term(jnp.float32(0), jnp.float32(0)),
    }
    weights = {k: t.weight for k, t in terms.items()}
    assert {k: float(v) for k, v in contributions(terms, weights).items()} == {"a": 2, "b": -2, "c": 0}


@pytest.mark.parametrize("microbatches", [1, 2])
def test_each_of_several_terms_is_logged_as_its_share(microbatches):
    def two(forward, params, batch, key):
        weight = jnp.float32(len(batch["slope"]))
        scale = jnp.sum(params["norm"]["scale"])
        return {"one": Term(scale * jnp.sum(batch["slope"]), weight), "other": Term(scale * weight, weight, 0.25)}, {}

    tx = optax.sgd(0.0)
    _, measured = jax.jit(make_step(None, two, tx, microbatches=microbatches))(_state(tx), _batch(1.0, 2.0, 3.0, 4.0))
    assert [float(measured[k]) for k in ("loss", "loss/one", "loss/other")] == [5.5, 5.0, 0.5]


def test_an_evaluation_is_the_objective_and_adds_up_over_batches():
    hidden = jnp.log(jnp.array([0.25, 0.75])) * jnp.ones((1, 3, 1))
    forward = lambda params, batch: Output(hidden, Head(jnp.eye(2)))  # noqa: E731

    evaluate = make_evaluation(forward, sft.nll)
    seen = []
    for tokens, mask in (([0, 0, 1], [0, 1, 1]), ([0, 1, 1], [0, 1, 0])):
        seen.append(evaluate({}, {"tokens": jnp.array([tokens]), "mask": jnp.array([mask], bool)}, None))
    total = metrics.values(metrics.merge(jax.tree.map(lambda *x: jnp.stack(x), *seen)))
    # One batch has two targets and the other one: a mean over the three, not of two means.
    assert total["loss"] == pytest.approx(-np.log([0.25, 0.75, 0.75]).mean(), rel=1e-6)
    assert total["mean_token_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("terms", [("one",), ("one", "other"), ("loss", "other")])
def test_an_evaluations_loss_is_that_of_training_with_any_number_of_terms(terms):
    def objective(forward, params, batch, key):
        weight = {"other": jnp.sum(batch["slope"] > 1.5)}
        found = {
            name: Term(jnp.sum(batch["slope"]), weight.get(name, jnp.float32(len(batch["slope"]))), 0.25) for name in terms
        }
        return found, {}

    params, (first, second) = {"norm": {"scale": jnp.ones(1)}}, (_batch(1.0, 2.0), _batch(3.0, 4.0))
    evaluate = make_evaluation(None, objective)
    seen = [evaluate(params, batch, None) for batch in (first, second)]
    found = metrics.values(metrics.merge(jax.tree.map(lambda *x: jnp.stack(x), *seen)))
    both = {name: jnp.concatenate([first[name], second[name]]) for name in first}
    loss, _, _ = gradients(None, objective, params, jax.tree.map(lambda _: None, params), both, None)
    assert found["loss"] == pytest.approx(float(loss)) and set(found) == ({"loss", *terms} if len(terms) > 1 else {"loss"})


def test_metrics_merge_as_if_nothing_had_been_split():
    values = np.random.default_rng(0).normal(size=12).astype(np.float32)
    parts = np.split(values, [2, 3])

    def merged(make):
        stacked = {"x": jax.tree.map(lambda *x: jnp.stack(x), *map(make, parts))}
        return metrics.values(metrics.merge(stacked))["x"]

    one = np.ones_like
    assert merged(lambda x: metrics.Mean(jnp.sum(x), jnp.sum(one(x)))) == pytest.approx(values.mean(), rel=1e-6)
    assert merged(lambda x: metrics.Std(jnp.sum(x), jnp.sum(x * x), jnp.sum(one(x)))) == pytest.approx(values.std(), rel=1e-6)
    apart = merged(lambda x: metrics.Difference(metrics.masked_mean(x, x > 0), metrics.masked_mean(x, x <= 0)))
    assert apart == pytest.approx(values[values > 0].mean() - values[values <= 0].mean(), rel=1e-6)
    assert merged(lambda x: metrics.Min(jnp.min(x))) == values.min()
    assert merged(lambda x: metrics.Max(jnp.max(x))) == values.max()


def test_what_was_never_measured_is_nan_and_counts_for_nothing():
    nothing = jnp.zeros(3, bool)
    found = metrics.values({"mean": metrics.masked_mean(jnp.ones(3), nothing), "max": metrics.masked_max(jnp.ones(3), nothing)})
    assert np.isnan(found["mean"]) and np.isnan(found["max"])
    assert np.isnan(metrics.values({"std": metrics.Std(*jnp.zeros(3)), "min": metrics.Min(jnp.float32(np.inf))})["std"])
    kept = jnp.array([True, False, True])
    spoilt = jnp.array([1.0, np.nan, 3.0])
    assert metrics.values({"mean": metrics.masked_mean(spoilt, kept)})["mean"] == 2
    assert metrics.values({"max": metrics.masked_max(spoilt, kept)})["max"] == 3


@pytest.mark.slow
def test_noise_by_row_does_not_depend_on_the_split():
    def noisy(forward, params, batch, key):
        draw = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row)))(batch["rows"])
        scores = token_scores(forward(params, batch), batch)["logps"].sum(1)
        return {"noisy": Term(jnp.sum(draw * scores), jnp.float32(len(draw)))}, {}

    params, batch, key = stubs.init(), stubs.pack(stubs.documents()), jax.random.PRNGKey(3)
    frozen = jax.tree.map(lambda x: None, params)
    whole, *split = (gradients(stubs.forward, noisy, params, frozen, batch, key, m)[0] for m in (1, 2, 4))
    assert abs(float(whole)) > 1e-2
    for loss in split:
        np.testing.assert_allclose(loss, whole, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_each_terms_gradient_has_its_norm_where_asked_for(microbatches):
    def two(forward, params, batch, key):
        slopes, rows = jnp.sum(batch["slope"]), jnp.float32(len(batch["slope"]))
        terms = {"up": Term(params["a"] * slopes, rows), "down": Term(-3 * params["b"] * slopes, rows, 0.5)}
        return terms, {}

    params, batch = {"a": jnp.float32(1.0), "b": jnp.float32(1.0)}, _batch(*[1.0, 3.0, 1.0, 3.0])
    arguments = (None, two, params, {"a": None, "b": None}, batch, None, microbatches)
    (loss, grads, plain), (again, same, found) = gradients(*arguments), gradients(*arguments, term_norms=True)
    # The mean slope is 2: the terms' gradients are (2, 0) and (0, -3).
    assert (float(found["grad_norm/up"]), float(found["grad_norm/down"])) == (2.0, 3.0)
    assert again == loss and same == grads == {"a": 2.0, "b": -3.0}
    assert plain == {k: v for k, v in found.items() if not k.startswith("grad_norm")}
    state = _state(optax.sgd(1.0))
    _, _, one = gradients(None, _linear, state.train, state.frozen, batch, None, microbatches, term_norms=True)
    assert not [k for k in one if k.startswith("grad_norm")]  # a single term's is the loss's


def test_a_column_that_prepare_asks_for_in_vain_is_named():
    @objective(prepare=lambda forward, params, batch, key: {"baseline": batch["ref_logps"].mean()})
    def asks(forward, params, batch, key):
        return {"x": Term(jnp.float32(0.0), jnp.float32(1.0))}, {}

    with pytest.raises(UserError, match="asks for 'ref_logps', .* its batches are mask"):
        with_prepared(asks, None, {}, {"mask": jnp.ones((1, 2), bool)}, None)
