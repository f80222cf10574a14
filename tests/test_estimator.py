"""The estimator's parts by hand: the numbers of the papers, metrics, what is frozen, what is made of the whole batch.

tests/test_policy_gradient.py holds the methods to other people's.
"""

import re

import given_rollouts as given
import jax
import numpy as np
import policy_gradient_cases as cases
import pytest
import stubs

from jaxpost import metrics
from jaxpost.config.resolve import resolve
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.metrics import Explained
from jaxpost.objectives import estimator, policy_gradient
from jaxpost.objectives.logprobs import token_scores
from jaxpost.step import gradients


def test_the_aggregations_of_losses_1_and_2_2_5():
    batch = given.rows([[0.0], [0.0] * 3], [0, 0])
    losses = np.array([[9.0, 1, 9, 2, 2, 5]])
    for name, options, value in (
        ("sequence_mean", {}, 2.0),
        ("token_mean", {}, 2.5),
        ("constant", {"longest": 8}, 0.625),
        ("sequence_sum", {}, 5.0),
    ):
        term = estimator.AGGREGATIONS[name](losses, batch, **options)
        assert term.sum / term.weight == value, name
    # A completion without a learned token: TRL counts it, verl does not, and a mean over tokens does not know of it.
    empty = batch | {"segments": np.array([[1, 1, 2, 2, 2, 3]]), "mask": batch["mask"] & (np.arange(6) < 5)}
    for name, counted, left in (("sequence_mean", 1.0, 1.5), ("sequence_sum", 5 / 3, 2.5)):
        for options, value in (({}, counted), ({"empty": False}, left)):
            term = estimator.AGGREGATIONS[name](losses, empty, **options)
            assert term.sum / term.weight == pytest.approx(value, rel=1e-6)


def test_the_sequences_ratio_is_its_geometric_mean():
    entry = cases.ours("gspo", low=0.2, high=0.2)
    loss, found = given.by_logps(entry, [[0.3, -0.3]], [1])
    assert loss == pytest.approx(-1, rel=1e-6) and found == pytest.approx([-0.5, -0.5], rel=1e-6)
    loss, found = given.by_logps(entry, [[0.2, -0.1, 0.2]], [1])
    assert loss == pytest.approx(-1.105171, rel=1e-6) and found == pytest.approx([-1.105171 / 3] * 3, rel=1e-6)


def test_the_weight_of_a_whole_completion_fades_on_both_sides_of_one():
    entry = cases.variant("dapo", surrogate="vespo")
    known = {(1, 2.0): 0.199148, (1, 0.5): 1.120422, (-1, 2.0): 1.082682, (-1, 0.5): 0.339785, (1, 1.0): 1.0, (-1, 1.0): 1.0}
    for (advantage, ratio), phi in known.items():
        found = given.by_logps(entry, [[np.log(ratio) / 2] * 2], [advantage])[1]
        assert found == pytest.approx([-advantage * phi / 2] * 2, rel=5e-6)


def test_where_clips_let_go():
    up, down = np.log(1.25), np.log(0.79)
    even, higher = cases.ours("dapo", high=0.2), cases.ours("dapo")
    assert given.by_logps(higher, [[up]], [2])[1] == pytest.approx([-2.5], rel=1e-6)
    assert not given.by_logps(even, [[up]], [2])[1].any()
    assert not given.by_logps(even, [[down]], [-2])[1].any() and not given.by_logps(higher, [[down]], [-2])[1].any()
    assert given.by_logps(even, [[down]], [2])[1] == pytest.approx([-1.58], rel=1e-6)
    # Nothing is clipped where the clip would make the loss smaller, but for the other bounds of that side.
    ten, large = cases.ours("verl"), [[np.log(10.0)]]
    assert given.by_logps(even, large, [-1])[1] == pytest.approx([10], rel=1e-6)
    loss, found = given.by_logps(ten, large, [-1])
    assert loss == pytest.approx(3) and not found.any()
    loss, found = given.by_logps(cases.ours("trl", delta=4.0), large, [-1])
    assert loss == pytest.approx(4) and not found.any()
    assert given.by_logps(cases.ours("cispo", cap=1.28), large, [1])[1] == pytest.approx([-1.28], rel=1e-6)
    assert given.by_logps(cases.ours("sapo"), [[0.0]], [1])[0] == pytest.approx(-2)
    assert given.by_logps(cases.ours("sapo"), [[0.0]], [-1])[0] == pytest.approx(2 / 1.05)


@pytest.mark.parametrize("name", ("clip", "gspo", "sequence_clip", "cispo", "sapo", "gmpo", "vespo"))
def test_with_the_weights_that_sampled_every_surrogate_is_the_plain_gradient(name):
    aggregation = "sequence_sum" if name == "sequence_clip" else "sequence_mean"
    drifts, advantages = [[0.0] * 3, [0.0]], [1.5, -0.5]
    found = given.by_logps(cases.variant("dapo", surrogate=name, aggregation=aggregation), drifts, advantages)
    plain = given.by_logps(cases.variant("reinforce", aggregation=aggregation), drifts, advantages)
    assert found[1] == pytest.approx(plain[1], rel=1e-6) and plain[1].all()


@pytest.mark.parametrize("name", ("clip", "gspo", "sequence_clip", "cispo", "sapo", "gmpo", "vespo"))
def test_a_ratio_beyond_all_bounds_leaves_the_loss_finite(name):
    entry = cases.variant(cases.ours("grpo"), surrogate=name)
    for advantage in (-1.0, 0.0, 1.0):
        loss, found = given.by_logps(entry, [[200.0, 200.0], [-200.0, -300.0]], [advantage] * 2)
        assert np.isfinite(loss) and np.isfinite(found).all()


def test_a_completion_that_the_policy_left_behind_is_not_pushed_further():
    entry = cases.variant("dapo", weightings={"off_policy": {"most": 0.1}})
    gone, near = [-0.15, -0.1], [-0.15, 0.0]
    for drift, advantage, kept in ((gone, -1, False), (gone, 1, True), (near, -1, True)):
        assert given.by_logps(entry, [drift], [advantage])[1].any() == kept


def test_imitation_has_its_own_tokens_and_denominator():
    # Two sampled tokens, and a demonstration of three behind them.
    batch = given.rows([[0.0, 0.0], [0.5, 0.5, 0.5]], [1, 1])
    shown = batch["mask"] & (batch["segments"] == 2)
    batch |= {"demonstrations": shown, "mask": batch["mask"] & ~shown}
    loss, found, measured = given.measured(cases.variant("dapo", added_terms={"sft": 0.3}), batch)
    assert loss == pytest.approx(-1 + 0.3 * 0.5, rel=1e-6)  # each shown token has log-probability -0.5
    assert found["logps"][0] == pytest.approx([0, -0.5, -0.5, 0, -0.1, -0.1, -0.1], rel=1e-6)
    assert metrics.values(measured)["loss/sft"] == pytest.approx(0.15, rel=1e-6)


def test_the_estimators_of_the_kl_are_those_of_two_coins():
    p, ref = np.array([0.5, 0.5]), np.array([0.8, 0.2])
    drifts = [[0.0]] * 2
    columns = {"logps": np.array([[0, np.log(0.5)] * 2], np.float32), "old_logps": np.array([[0, np.log(0.5)] * 2], np.float32)}
    columns |= {"ref_logps": np.array([[0, np.log(0.8), 0, np.log(0.2)]], np.float32)}
    for name in ("kl_k1_ratio", "kl_k3_ratio", "kl_k1_return", "k1_in_loss", "k3_in_loss", "kl_k2"):
        loss, _ = given.by_logps(cases.plus(name), drifts, [0, 0], **columns)
        assert loss == pytest.approx(0.265123 if name == "kl_k2" else np.sum(p * np.log(p / ref)), rel=1e-5), name


@pytest.mark.parametrize("drift", [0.0, 25.0, -3.0])
@pytest.mark.parametrize("name", ["kl_k2", "kl_k3_ratio", "k3_in_loss", "kl_k1_ratio"])
def test_no_distance_from_the_reference_turns_the_pull_around(name, drift):
    distances = np.array([-100.0, -21.0, -1.0, 1.0, 19.0, 21.0, 60.0, 100.0])  # log reference - log policy
    columns = {"ref_logps": np.array([[0.0, *(distances - 1.0 + drift)]], np.float32)}
    _, slopes = given.by_logps(cases.plus(name), [[drift] * 8], [0.0], **columns)
    r, bounded = np.exp(min(drift, 20.0)), np.minimum(distances, 20.0)
    expected = {
        "kl_k1_ratio": r * (1 - distances),
        "kl_k2": -r * distances,
        "kl_k3_ratio": -r * distances,
        "k3_in_loss": 1 - np.exp(bounded),
    }[name]
    np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-4)  # 1 - d is rounded near 0


# ------------------------------------------------------------------------------------------------------- Metrics and more


def test_metrics_have_trls_names_and_values():
    case = cases.batch(3)
    _, _, measured = given.measured(cases.ours("ppo"), given.packed(case))
    found, mask = metrics.values(measured), case["mask"]
    drift, a = (case["logps"] - case["old_logps"])[mask], (case["advantages"][:, None] * mask)[mask]
    low, high = (np.exp(drift) < 0.8) & (a < 0), (np.exp(drift) > 1.2) & (a > 0)
    d = (case["ref_logps"] - case["logps"])[mask]
    errors, returns = (case["returns"] - case["values"])[mask], case["returns"][mask]
    near = np.clip(case["values"], case["old_values"] - 0.2, case["old_values"] + 0.2)[mask]
    expected = {
        "entropy": case["entropy"][mask].mean(),
        "kl": (np.exp(d) - d - 1).mean(),
        "clip_ratio/low_mean": low.mean(),
        "clip_ratio/high_mean": high.mean(),
        "clip_ratio/region_mean": (low | high).mean(),
        "sampling/sampling_logp_difference/mean": np.abs(drift).mean(),
        "sampling/sampling_logp_difference/max": np.abs(drift).max(),
        "sampling/importance_sampling_ratio/min": np.exp(drift).min(),
        "sampling/importance_sampling_ratio/mean": np.exp(drift).mean(),
        "sampling/importance_sampling_ratio/max": np.exp(drift).max(),
        "value/loss": np.maximum(errors**2, (near - returns) ** 2).mean() / 2,
        "value/explained_variance": 1 - errors.var() / returns.var(),
    }
    assert expected["clip_ratio/low_mean"] > 0 and expected["clip_ratio/high_mean"] > 0
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert found.keys() - expected.keys() == {"loss/policy", "loss/value"}
    assert found["loss/value"] == pytest.approx(0.1 * expected["value/loss"], rel=1e-5)


def test_the_sampler_is_compared_with_the_trainer_where_both_are_known():
    batch = given.rows([[0.5, -0.5]], [1], sampler_logps=np.array([[0, -1.25, -1.5]], np.float32))
    found = metrics.values(given.measured(cases.ours("dapo"), batch)[2])
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(0.375)
    assert found["sampling/importance_sampling_ratio/max"] == pytest.approx(np.exp(0.5))


def test_what_the_weights_moved_since_they_sampled_is_no_mismatch():
    batch = given.rows([[0.5, -0.5]], [1])
    known, none = (metrics.values(given.measured(cases.ours("dapo"), batch | {"fresh": np.bool_(x)})[2]) for x in (True, False))
    sampling = {k for k in known if k.startswith("sampling/")}
    assert len(sampling) == 5 and all(np.isfinite(known[k]) for k in sampling) and all(np.isnan(none[k]) for k in sampling)
    assert {k: none[k] for k in none.keys() - sampling} == {k: known[k] for k in known.keys() - sampling}


def test_explained_variance_merges_and_knows_when_there_is_none():
    one = given.measured(cases.ours("ppo"), given.rows([[0.0]], [1]))[2]["value/explained_variance"]
    assert np.isnan(one.value()) and isinstance(one, Explained)
    measured = [given.measured(cases.ours("ppo"), given.packed(cases.batch(seed)))[2] for seed in (1, 2)]
    both = jax.tree.map(lambda *x: np.stack(x), *measured)
    whole = np.concatenate([np.stack([c["returns"], c["values"]])[:, c["mask"]] for c in map(cases.batch, (1, 2))], axis=1)
    found = both["value/explained_variance"].merge().value()
    assert found == pytest.approx(1 - (whole[0] - whole[1]).var() / whole[0].var(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_ratio_with_the_weights_that_sampled_is_exactly_one(temperature):
    batch = stubs.pack(stubs.documents()) | {"temperature": np.float32(temperature)}
    params = stubs.init()
    sampled = _stub_scores(params, batch)
    measured = _stub_metrics(params, batch | {"old_logps": np.asarray(sampled)})
    found = metrics.values(measured)
    ratio = "sampling/importance_sampling_ratio"
    assert found[f"{ratio}/min"] == found[f"{ratio}/max"] == found[f"{ratio}/mean"] == 1.0
    assert found["sampling/sampling_logp_difference/max"] == 0.0 == found["clip_ratio/region_mean"]


@jax.jit
def _stub_scores(params, batch):
    return token_scores(stubs.forward(params, batch), batch)["logps"]


@jax.jit
def _stub_metrics(params, batch):
    return policy_gradient.grpo(stubs.forward, params, batch, None)[1]


def test_what_is_made_of_the_whole_batch_does_not_depend_on_its_split():
    batch = stubs.pack(stubs.documents(3))
    shown = (batch["segments"] == 2) & batch["mask"]
    batch |= {"demonstrations": shown, "mask": batch["mask"] & ~shown}
    entry = cases.EVERYTHING | {"added_terms": cases.EVERYTHING["added_terms"] | {"sft": 0.5}}
    objective, params = resolve(entry, "objectives"), stubs.init()
    nothing = jax.tree.map(lambda _: None, params)

    def found(microbatches):
        return jax.jit(lambda p, b: gradients(stubs.forward, objective, p, nothing, b, None, microbatches))(params, batch)

    (loss, grads, one), (again, others, four) = jax.device_get((found(1), found(4)))
    assert again == pytest.approx(loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)  # sums in another order
    assert metrics.values(one) == pytest.approx(metrics.values(four), rel=1e-5, nan_ok=True)
    kept = np.asarray(declared(objective, "prepare")(stubs.forward, params, batch, None)["undecided"])
    assert 0.4 < kept.sum() / batch["mask"].sum() < 0.6 and not kept[~batch["mask"]].any()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (cases.variant("dapo", surrogate="clipp"), "Did you mean 'clip'"),
        (cases.variant("dapo", surrogate={"name": "clip", "lo": 0.1}), "Did you mean 'low'"),
        (cases.variant("dapo", aggregation="constant"), "needs longest"),
        (cases.variant("dapo", added_terms={"kl": 0.1}), "unknown term 'kl'"),
        (cases.variant("dapo", added_terms={"kl_k2": {}}), "needs coefficient"),
        (cases.variant("dapo", weightings={"top_entropy": 0.2}), "takes no option 'coefficient'"),
        (cases.ours("variant", of="sft.nll"), "policy_gradient.grpo is one"),
        (cases.ours("variant", of="preference.sigmoid"), "policy_gradient.grpo is one"),
        (cases.ours("variant", of={"name": "router.balanced", "of": "policy_gradient.grpo"}), "policy_gradient.grpo is one"),
    ],
)
def test_what_cannot_be_is_said(entry, says):
    with pytest.raises(UserError, match=re.escape(says)):
        estimator.inside(entry)


def test_completions_are_those_in_which_the_policy_drew_something():
    """A row of a completion, a truncated one that the mask leaves out, and a demonstration; and a row of data."""
    segments = np.array([[1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 2, 2, 0]])
    sampled = np.array([[0, 1, 1, 0, 1, 0, 0], [0] * 7], bool)
    mask = np.array([[0, 1, 1, 0, 0, 0, 0], [0] * 7], bool)
    numbers, batch = np.where(mask, 3.0, 0.0), {"segments": segments, "mask": mask, "sampled": sampled}
    weights = {name: estimator.AGGREGATIONS[name](numbers, batch).weight for name in ("sequence_mean", "sequence_sum")}
    assert weights == {"sequence_mean": 2, "sequence_sum": 2}
    assert estimator.constant(numbers, batch, longest=10).weight == 20
    assert estimator.token_mean(numbers, batch) == (6.0, 2.0, 1.0)
    assert estimator.sequence_mean(numbers, batch, empty=False).weight == 1
    assert estimator.sequence_sum(numbers, {"segments": segments, "mask": mask}).weight == 5  # where nobody says


def test_a_method_of_ones_own_takes_the_parts_of_the_page():
    @estimator.estimator
    def mine(*, scale=2.0):
        def surrogate(seen):
            return estimator.Surrogate(-scale * seen.ratio * seen.advantages)

        return estimator.Parts("centred", surrogate, estimator.token_mean)

    batch = given.rows([[0.5]], [1])
    with given.scores():
        terms, _ = mine(given.forward, {k: batch[k] for k in given.GIVEN}, batch, None)
    assert declared(mine, "off_policy") is False
    assert float(terms["policy"].sum) == pytest.approx(-2 * np.exp(0.5), rel=1e-6) and declared(mine, "columns") == {}
