"""Preference losses against TRL's own, and the papers' closed forms: value and gradient by each token's log-probability.

golden/preference.npz has the references' answers on fifty random batches; where TRL is installed it is asked again, about other
batches. The log-probabilities are given instead of computed: the parameters here are the tokens' log-probabilities themselves.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import preference_cases as cases
import pytest

from jaxpost import metrics
from jaxpost.config.resolve import resolve
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.objectives import pairs, preference, unpaired
from jaxpost.step import evaluated, gradients, with_prepared
from jaxpost.types import Head, Output

# Two pairs a row, every document with one token of prompt.
WIDTH = 2 * 2 * (cases.T + 1)
# Sums of few float32 numbers: the references are float64, and their inputs the same float32 numbers.
NEAR = 1e-5


def _packed(case: dict) -> dict:
    """The batch of a case, and `place` [N,2,T]: where each token lies in it (the flat index; nowhere is the padding's last)."""
    batch = {k: np.zeros((2, WIDTH), np.float32) for k in ("logps", "ref_logps", "own", "margins", "labels")}
    batch |= {k: np.zeros((2, WIDTH), np.int32) for k in ("tokens", "segments", "positions")}
    batch["mask"], place = np.zeros((2, WIDTH), bool), np.full((cases.N, 2, cases.T), -1)
    for row in range(2):
        start = 0
        for number in range(4):
            pair, side = 2 * row + number // 2, number % 2
            n = case["lengths"][pair, side]
            document, completion = slice(start, start + n + 1), slice(start + 1, start + n + 1)
            batch["segments"][row, document], batch["positions"][row, document] = number + 1, np.arange(n + 1)
            batch["mask"][row, completion] = True
            for k in ("logps", "ref_logps", "own"):
                batch[k][row, completion] = case[k][pair, side, :n]
            batch["margins"][row, document], batch["labels"][row, document] = case["margins"][pair], case["labels"][pair, side]
            place[pair, side, :n] = row * WIDTH + np.arange(start + 1, start + n + 1)
            start += n + 1
    return batch | {"place": place}


def _scores(output, batch, mask=None):
    mask = batch["mask"] if mask is None else mask
    return {"logps": jnp.where(mask, output.hidden, 0.0), "entropy": mask * 1.0, "correct": mask * (output.hidden > -1.9)}


@pytest.fixture(autouse=True)
def given_log_probabilities(monkeypatch):
    for module in (pairs, unpaired):
        monkeypatch.setattr(module, "token_scores", _scores)

    def given(seen):
        return jnp.where(seen.batch["mask"], jax.lax.stop_gradient(seen.output.hidden) - seen.batch["own"], 0.0)

    monkeypatch.setattr(preference, "_agreements", given)


def _forward(params, batch):
    return Output(params, Head(jnp.zeros((1, 1))))


def _measured(entry, batch: dict):
    """(loss, gradient [2,WIDTH], metrics) on a batch from _packed; batches may be stacked in front."""
    objective = resolve(entry, "objectives")

    def one(batch):
        found = {k: v for k, v in batch.items() if k not in ("logps", "place")}
        return gradients(_forward, objective, batch["logps"], None, found, jax.random.PRNGKey(0))

    return jax.device_get(jax.jit(jax.vmap(one) if batch["mask"].ndim == 3 else one)(batch))


@functools.cache
def _golden():
    return np.load(Path(__file__).parent / "golden" / "preference.npz")


def _agree(name, batches, values, wanted):
    """Holds the loss's values [K] and gradients [K,N,2,T] on K cases to the reference's."""
    stacked = {k: np.stack([b[k] for b in batches]) for k in batches[0]}
    loss, gradient, _ = _measured(cases.LOSSES[name][0], stacked)
    np.testing.assert_allclose(loss, values, rtol=NEAR, atol=NEAR)
    there, rows = stacked["place"] >= 0, len(batches)
    places = np.where(there, stacked["place"], 0).reshape(rows, -1)
    found = np.take_along_axis(gradient.reshape(rows, -1), places, axis=1).reshape(there.shape)
    found = np.where(there, found, 0.0)
    gap = np.linalg.norm((found - wanted).reshape(len(batches), -1), axis=1)
    assert (gap <= NEAR * np.linalg.norm(wanted.reshape(len(batches), -1), axis=1) + 1e-9).all(), gap.max()
    assert not gradient[~stacked["mask"]].any()


@pytest.mark.parametrize("name", cases.LOSSES)
def test_value_and_gradient_are_the_references(name):
    batches = [_packed(cases.batch(seed)) for seed in range(cases.BATCHES)]
    _agree(name, batches, _golden()[name], _golden()[f"{name}/gradient"])


@pytest.mark.parametrize("name", cases.LOSSES)
def test_value_and_gradient_are_trls_where_it_is_installed(name):
    pytest.importorskip("trl")
    from golden import make_preference

    seeds = range(1000, 1003)
    values, wanted = zip(*(make_preference.reference(name, seed) for seed in seeds), strict=True)
    _agree(name, [_packed(cases.batch(seed)) for seed in seeds], values, np.stack(wanted))


def test_every_method_has_a_reference():
    from jaxpost.config.resolve import known

    def within(entry):
        return {entry["name"], *(within(entry["of"]) if "of" in entry else ())}

    held = set().union(*(within(entry) for entry, _ in cases.LOSSES.values()))
    assert {n for n in known("objectives") if n.startswith(("preference.", "unpaired."))} == held


# ------------------------------------------------------------------------------------------------------- By hand


def _pair(chosen: float, rejected: float, n: int, m: int, ref: float = -11.0) -> dict:
    """One pair of completions of n and m tokens with these log-probabilities, the reference's both `ref`."""
    segments = np.array([[1] * (n + 1) + [2] * (m + 1)], np.int32)
    mask = np.concatenate([np.arange(n + 1) > 0, np.arange(m + 1) > 0])[None]
    size = np.where(segments == 1, n, m).astype(np.float32)
    logps = np.where(mask, np.where(segments == 1, chosen, rejected) / size, 0).astype(np.float32)
    refs = np.where(mask, ref / size, 0).astype(np.float32)
    zeros = np.zeros(segments.shape, np.int32)
    return {"logps": logps, "ref_logps": refs, "mask": mask, "segments": segments, "tokens": zeros, "positions": zeros}


BY_HAND = {
    "sigmoid": ({"beta": 0.1}, 0.598139, np.log(2)),
    "smoothed": ({"beta": 0.1, "smoothing": 0.1}, 0.618139, np.log(2)),
    "robust": ({"beta": 0.1, "smoothing": 0.1}, 0.573139, np.log(2)),
    "hinge": ({"beta": 0.1}, 0.8, 1.0),
    "ipo": ({"beta": 0.1}, 21.467778, 25.0),
    "sigmoid_norm": ({}, 0.148316, np.log(2)),
    "exo_pair": ({"beta": 0.1}, 2.422015, 2.761231),
    "nca_pair": ({"beta": 0.1}, 1.338793, 2 * np.log(2)),
    "bco_pair": ({"beta": 0.1}, 1.288793, 2 * np.log(2)),
    "sppo_hard": ({"beta": 0.1}, 32.0, 50.0),
    "aot": ({"beta": 0.1}, 0.598139, np.log(2)),
    "aot_unpaired": ({"beta": 0.1}, 0.598139, np.log(2)),
    "apo_zero": ({"beta": 0.1}, 0.950042, 1.0),
    "apo_down": ({"beta": 0.1}, 0.975145, 1.0),
    "discopop": ({}, 0.873792, 0.5 * (1 + np.log(2))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_known_values_of_one_pair_and_of_the_first_step(name):
    options, value, first = BY_HAND[name]
    entry = cases.ours(name, **options)
    assert _measured(entry, _pair(-10, -12, 5, 6))[0] == pytest.approx(value, rel=2e-6, abs=1e-6)
    assert _measured(entry, _pair(-11, -11, 5, 6))[0] == pytest.approx(first, rel=2e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "ipo", "dpo"), [("forward_kl", 21.042363, 0.582517), ("js", 23.238864, 0.644397), ("alpha", 21.403316, 0.594349)]
)
def test_known_values_of_the_divergences(kind, ipo, dpo):
    batch = _pair(-10, -12, 5, 6)
    for name, value in (("ipo", ipo), ("sigmoid", dpo)):
        entry = cases.ours("divergence", kind=kind, of=cases.ours(name, beta=0.1))
        assert _measured(entry, batch)[0] == pytest.approx(value, rel=2e-6, abs=1e-6)


def test_known_values_without_a_reference_and_without_pairs():
    batch = _pair(-10, -12, 5, 6)
    no_reference = {k: v for k, v in batch.items() if k != "ref_logps"}
    assert _measured(cases.ours("simpo"), no_reference)[0] == pytest.approx(0.974077, rel=2e-6, abs=1e-6)
    odds = _measured(cases.ours("orpo"), _pair(-5, -12, 5, 6))[2]  # a mean of -1 against one of -2
    assert metrics.values(odds)["loss/orpo/odds"] == pytest.approx(0.1 * 0.238183, rel=2e-5)
    # s = 1, -1 and, for the baseline, 0.5: one document of each.
    triple = {
        "segments": np.array([[1, 1, 2, 2, 3, 3]], np.int32),
        "mask": np.array([[0, 1, 0, 1, 0, 1]], bool),
        "labels": np.array([[1, 1, 0, 0, -1, -1]], np.float32),
        "logps": np.array([[0, -1, 0, -3, 0, -1.5]], np.float32),
        "ref_logps": np.array([[0, -2, 0, -2, 0, -2]], np.float32),
        "tokens": np.zeros((1, 6), np.int32),
        "positions": np.array([[0, 1, 0, 1, 0, 1]], np.int32),
    }
    loss, _, measured = _measured({"name": "unpaired.kto"}, triple)
    assert loss == pytest.approx((0.487503 + 0.462570) / 2, rel=2e-6, abs=1e-6)
    expected = {"kl": 0.5, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2}
    expected |= {"logps/chosen": -1, "logps/rejected": -3, "entropy": 1}
    assert metrics.values(measured) == pytest.approx(expected, rel=1e-6)
    lower = triple | {"logps": np.array([[0, -1, 0, -3, 0, -4]], np.float32)}
    assert metrics.values(_measured({"name": "unpaired.kto"}, lower)[2])["kl"] == 0.0


def test_metrics_have_trls_names_and_values():
    loss, _, measured = _measured(cases.ours("sigmoid"), _pair(-9, -12, 5, 6))
    found = metrics.values(measured)
    expected = {"rewards/chosen": 0.2, "rewards/rejected": -0.1, "rewards/margins": 0.3, "rewards/accuracies": 1.0}
    expected |= {"logps/chosen": -9, "logps/rejected": -12, "nll": 1.8, "entropy": 1.0, "mean_token_accuracy": 1.0}
    assert found == pytest.approx(expected, rel=1e-5)
    # Equal is not better; a document without its other half is no pair, and counts nowhere.
    assert metrics.values(_measured(cases.ours("sigmoid"), _pair(-11, -11, 3, 3))[2])["rewards/accuracies"] == 0
    alone = _pair(-9, -12, 5, 6)
    alone = {k: np.concatenate([v, np.where(alone["segments"] == 2, 0, v)]).astype(v.dtype) for k, v in alone.items()}
    assert _measured(cases.ours("sigmoid"), alone)[0] == loss
    assert metrics.values(_measured(cases.ours("sigmoid"), alone)[2]) == pytest.approx(found)


def test_a_sum_reports_each_loss_with_its_own_denominator():
    losses = {"sigmoid": {"weight": 0.5, "beta": 0.3}, "nll": {"name": "preference.sft", "weight": 2.0}}
    loss, _, measured = _measured(cases.ours("weighted", losses=losses), _pair(-10, -12, 5, 6))
    found = metrics.values(measured)
    assert found["loss/sigmoid"] == pytest.approx(0.5 * np.log1p(np.exp(-0.6)), rel=1e-6)
    assert found["loss/nll/nll"] == pytest.approx(2 * 2, rel=1e-6)
    assert loss == pytest.approx(found["loss/sigmoid"] + found["loss/nll/nll"], rel=1e-6)
    assert found["rewards/chosen"] == pytest.approx(0.3, rel=1e-5)


def test_what_a_loss_reads_is_known_beforehand():
    def reads(entry):
        return set(declared(resolve(entry, "objectives"), "columns"))

    assert reads("preference.sigmoid") == {"ref_logps"} and reads("preference.simpo") == set()
    assert reads("preference.offset") == {"ref_logps", "margins"} and reads("unpaired.kto") == {"ref_logps", "labels"}
    assert reads(cases.ours("wpo", of="preference.simpo")) == set()
    assert reads(cases.ours("weighted", losses={"simpo": 1.0, "offset": 1.0})) == {"ref_logps", "margins"}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (cases.ours("divergence", kind="renyi"), "reverse_kl, forward_kl"),
        (cases.ours("divergence", kind="alpha", alpha=1), "alpha not 1"),
        (cases.ours("divergence", of="preference.apo_zero"), "apo_zero is no loss of a difference"),
        (cases.ours("wpo", of="sft.nll"), "no loss over pairs"),
        (cases.ours("wpo", of="policy_gradient.grpo"), "no loss over pairs"),
        (cases.ours("weighted", losses={"sigmod": 1.0}), "sigmoid"),
        (cases.ours("weighted", losses={}), "name one"),
        (cases.ours("robust", smoothing=0.5), "below 0.5"),
        (cases.ours("exo_pair", smoothing=0), "above 0"),
    ],
)
def test_what_cannot_be_is_said(entry, says):
    with pytest.raises(UserError, match=says):
        _measured(entry, _pair(-10, -12, 5, 6))


def test_a_missing_column_is_named():
    batch = {k: v for k, v in _pair(-10, -12, 5, 6).items() if k != "ref_logps"}
    with pytest.raises(UserError, match="ref_logps"):
        evaluated(resolve("preference.sigmoid", "objectives"), _forward, jnp.asarray(batch["logps"]), batch, None)


def test_a_loss_of_ones_own_takes_the_changes_of_the_page():
    @pairs.pairwise
    def mine(seen, *, beta=0.5):
        return beta * (seen.rejected - seen.chosen)

    batch = _pair(-10, -12, 5, 6)
    found = gradients(_forward, resolve({"name": "preference.sigmoid"}, "objectives"), batch["logps"], None, batch, None)
    terms, _ = mine(_forward, batch["logps"], batch, None)
    assert float(terms["mine"].sum) == pytest.approx(-1.0, rel=1e-5) and float(terms["mine"].weight) == 1 and found
    assert declared(mine, "prepare") is None and with_prepared(mine, _forward, batch["logps"], batch, None) is batch
