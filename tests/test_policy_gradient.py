"""Policy gradients against TRL's own and against closed forms: loss, and gradient by each token; and the page's table.

golden/policy_gradient.npz has TRL's answers on fifty random batches; where TRL is installed it is asked again, about other
batches. The log-probabilities are given instead of computed (given_rollouts.py). What is exact in expectation is in
test_expected_gradients.py, the parts by hand in test_estimator.py.
"""

import functools
import re
from pathlib import Path

import given_rollouts as given
import jax
import jax.numpy as jnp
import numpy as np
import policy_gradient_cases as cases
import pytest

from jaxpost.config.resolve import known, resolve
from jaxpost.declare import declared
from jaxpost.objectives import estimator, policy_gradient
from jaxpost.step import evaluated

# Sums of few float32 numbers: the references are float64, and their inputs the same float32 numbers.
NEAR = 1e-5
TOKENWISE = ("reinforce_pp", "ppo")  # whose advantages are of tokens


@functools.cache
def _golden():
    return np.load(Path(__file__).parent / "golden" / "policy_gradient.npz")


def _agree(entry, batches, values, wanted):
    """Holds the losses [K] and gradients [K,len(given.GIVEN) or fewer,N,T] on K cases to the reference's."""
    stacked = {k: np.stack([b[k] for b in batches]) for k in batches[0]}
    loss, found, _ = given.measured(entry, stacked)
    np.testing.assert_allclose(loss, values, rtol=NEAR, atol=NEAR)
    there, size = stacked["place"] >= 0, len(batches)
    places = np.where(there, stacked["place"], 0).reshape(size, -1)
    for k, expected in zip(given.GIVEN, np.moveaxis(wanted, 1, 0), strict=False):
        own = np.take_along_axis(found[k].reshape(size, -1), places, axis=1).reshape(there.shape)
        gap = np.linalg.norm((np.where(there, own, 0.0) - expected).reshape(size, -1), axis=1)
        assert (gap <= NEAR * np.linalg.norm(expected.reshape(size, -1), axis=1) + 1e-9).all(), (k, gap.max())
        assert not found[k][~stacked["mask"]].any()


@pytest.mark.parametrize("name", cases.TRL)
def test_value_and_gradient_are_trls(name):
    batches = [given.packed(cases.batch(seed)) for seed in range(cases.BATCHES)]
    _agree(cases.TRL[name][0], batches, _golden()[name], _golden()[f"{name}/gradient"])


@pytest.mark.parametrize("name", cases.TRL)
def test_value_and_gradient_are_trls_where_it_is_installed(name):
    pytest.importorskip("trl")
    from golden import make_policy_gradient

    seeds = range(1000, 1003)
    values, wanted = zip(*(make_policy_gradient.reference(name, seed) for seed in seeds), strict=True)
    _agree(cases.TRL[name][0], [given.packed(cases.batch(seed)) for seed in seeds], values, np.stack(wanted))


# ------------------------------------------------------------------------------------------ Closed forms, on [N,T] arrays


def _mean(x, c):
    return jnp.sum(x * c["mask"]) / jnp.sum(c["mask"])


def _ppo(c, low=0.2, high=0.2, dual=None):
    """As verl writes it: the larger of two losses."""
    a, r = c["a"], jnp.exp(c["logps"] - c["old_logps"])
    worse = jnp.maximum(-a * r, -a * jnp.clip(r, 1 - low, 1 + high))
    return worse if dual is None else jnp.where(a < 0, jnp.minimum(worse, -a * dual), worse)


def _k3(c):
    d = c["ref_logps"] - c["logps"]
    return jnp.exp(d) - d - 1


def _gmpo(c):
    n, a = jnp.sum(c["mask"], 1), c["a"][:, 0]
    drift, sign = c["logps"] - c["old_logps"], jnp.sign(c["a"])
    worst = sign * jnp.minimum(sign * drift, jnp.clip(sign * drift, -0.3, 0.3))
    means = jnp.exp(jnp.sum(worst * c["mask"], 1) / jnp.maximum(n, 1))
    return -jnp.sum(jnp.where(n > 0, a * means, 0.0)) / cases.N


def _critic(c):
    old, new, returns = c["old_values"], c["values"], c["returns"]
    errors = jnp.maximum((new - returns) ** 2, (jnp.clip(new, old - 0.2, old + 0.2) - returns) ** 2)
    return _mean(_ppo(c), c) + 0.3 * 0.5 * _mean(errors, c)


def _gspo_without_the_empty(c):
    n = jnp.sum(c["mask"], 1)
    s = jnp.exp(jnp.sum((c["logps"] - c["old_logps"]) * c["mask"], 1) / jnp.maximum(n, 1))
    a = c["a"][:, 0]
    return -jnp.sum(jnp.where(n > 0, jnp.minimum(s * a, jnp.clip(s, 0.97, 1.04) * a), 0.0)) / jnp.sum(n > 0)


def _ratio_times_k1(c):
    k1 = c["logps"] - c["ref_logps"]
    return jnp.sum(jnp.exp(c["logps"] - c["old_logps"]) * k1 * c["mask"]) / cases.N


def _k2(c):
    weight = jax.lax.stop_gradient(jnp.exp(c["logps"] - c["old_logps"]))
    return jnp.sum(weight * (c["logps"] - c["ref_logps"]) ** 2 / 2 * c["mask"]) / cases.N


def _k1_with_its_return(c):
    k1 = jax.lax.stop_gradient(c["logps"] - c["ref_logps"]) * c["mask"]
    rest = jnp.stack([jnp.sum(k1[:, t:], 1) for t in range(cases.T)], 1)
    return jnp.sum(k1 + rest * (c["logps"] - jax.lax.stop_gradient(c["logps"])) * c["mask"]) / cases.N


def _entropy_target(c):
    h = _mean(c["entropy"], c)
    return _plain_sum(c) - jax.lax.stop_gradient(jnp.clip(2 * (1.2 - h), 0, 0.5)) * h


def _plain_sum(c):
    return -jnp.sum(c["a"] * c["logps"] * c["mask"]) / cases.N


CLOSED = {
    "reinforce": (cases.ours("reinforce"), _plain_sum),
    "gmpo": (cases.ours("gmpo", low=0.3, high=0.3), _gmpo),
    "reinforce_pp": (cases.ours("reinforce_pp"), lambda c: _mean(_ppo(c), c)),
    "ppo": (cases.ours("ppo", coefficient=0.3), _critic),
    "verl": (
        cases.ours("verl", dual=1.4, beta=0.2, bonus=0.5),
        lambda c: _mean(_ppo(c, dual=1.4) + 0.2 * _k3(c) - 0.5 * c["entropy"], c),
    ),
    "tulu": (cases.ours("tulu", beta=0.2), lambda c: _mean(_ppo(c) + 0.2 * _k3(c), c)),
    "verl_sequences": (
        cases.variant(cases.ours("gspo", low=0.03, high=0.04), aggregation={"name": "sequence_mean", "empty": False}),
        _gspo_without_the_empty,
    ),
    "kl_k1_ratio": (cases.plus("kl_k1_ratio", 0.7), lambda c: _plain_sum(c) + 0.7 * _ratio_times_k1(c)),
    "kl_k2": (cases.plus("kl_k2"), lambda c: _plain_sum(c) + _k2(c)),
    "kl_k1_return": (cases.plus("kl_k1_return"), lambda c: _plain_sum(c) + _k1_with_its_return(c)),
    "k1_in_loss": (
        cases.plus("k1_in_loss"),
        lambda c: _plain_sum(c) + jnp.sum((c["logps"] - c["ref_logps"]) * c["mask"]) / cases.N,
    ),
    "entropy_target": (
        cases.variant("reinforce", added_terms={"entropy_target": {"target": 1.2, "gain": 2.0, "most": 0.5}}),
        lambda c: (
            _plain_sum(c) - jax.lax.stop_gradient(jnp.clip(2 * (1.2 - _mean(c["entropy"], c)), 0, 0.5)) * _mean(c["entropy"], c)
        ),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_value_and_gradient_are_the_closed_form(name):
    entry, direct = CLOSED[name]
    tokenwise = name in TOKENWISE
    found = [cases.batch(seed) for seed in range(cases.BATCHES)]
    stacked = {k: np.stack([c[k] for c in found]).astype(np.float32) for k in found[0]}
    stacked["a"] = stacked["token_advantages"] if tokenwise else stacked["advantages"][..., None] * stacked["mask"]
    free = {k: stacked.pop(k) for k in ("logps", "entropy", "values")}
    value = jax.jit(jax.vmap(jax.value_and_grad(lambda free, case: direct(case | free))))
    values, wanted = value(free, stacked)
    wanted = np.stack([wanted[k] for k in ("logps", "entropy", "values")], axis=1) * stacked["mask"][:, None]
    _agree(entry, [given.packed(c, tokenwise) for c in found], values, wanted)


def test_every_method_part_and_term_has_a_reference():
    entries = [entry for entry, _ in (*cases.TRL.values(), *CLOSED.values())]
    methods, parts = set(), set()
    for entry in entries:
        of = entry.get("of", entry)
        methods |= {entry["name"], of if isinstance(of, str) else of["name"]}
        found = estimator.inside(entry)
        held = (found.surrogate, found.aggregation, *found.terms, *found.weightings)
        parts |= {estimator.plain(p).__name__ for p in held}
    assert {n for n in known("objectives") if n.startswith("policy_gradient.")} == methods
    assert {name for table in estimator.TABLES.values() for name in table} == parts | {"sft"}  # sft: below, by hand


FROZEN = ("old_logps", "advantages", "ref_logps", "values", "returns")


@pytest.mark.parametrize("name", [*CLOSED, *cases.TRL, "everything"])
def test_no_gradient_through_what_is_frozen(name):
    entry = {**{k: e for k, (e, _) in (*cases.TRL.items(), *CLOSED.items())}, "everything": cases.EVERYTHING}[name]
    objective, batch = resolve(entry, "objectives"), given.packed(cases.batch(1))
    params = {k: batch[k] for k in given.GIVEN} | given.CRITIC
    rest = {k: v for k, v in batch.items() if k not in (*given.GIVEN, "place")}

    def loss(frozen):
        seen = rest | frozen
        seen |= declared(objective, "prepare")(given.forward, params, seen, None)
        return sum(t.coefficient * t.sum for t in evaluated(objective, given.forward, params, seen, None)[0].values())

    with given.scores():
        gradients = jax.jit(jax.grad(loss))({k: rest[k] for k in FROZEN})
    for column, found in gradients.items():
        assert not np.any(found), column


# ------------------------------------------------------------------------------------------------------- The table


def _shown(part) -> str:
    """A part as the table writes it: its name, and the values of its settings."""
    if isinstance(part, str):
        return part
    name, settings = (estimator.plain(part).__name__, estimator.options(part)) if callable(part) else (part["name"], dict(part))
    values = [v for k, v in settings.items() if k != "name" and v is not None]
    return f"{name}({', '.join(str(v) for v in values)})" if values else name


def test_the_table_of_the_page_is_the_code():
    lines = policy_gradient.__doc__.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split() and set(line.split()[0]) == {"-"})
    last = next(i for i in range(first, len(lines)) if not lines[i].strip())
    told = {}
    for line in lines[first + 1 : last]:
        name, *cells = re.split(r"\s{2,}", line.strip())
        told[name] = cells
    methods = {n.partition(".")[2] for n in known("objectives") if n.startswith("policy_gradient.")} - {"variant"}
    assert told.keys() == methods
    for name in methods:
        raw = getattr(policy_gradient, name).__wrapped__()  # with the terms whose coefficient is 0
        terms = " + ".join(_shown(t) for t in raw.terms) or "-"
        assert not raw.weightings
        assert told[name] == [_shown(raw.advantages), _shown(raw.surrogate), _shown(raw.aggregation), terms], name


def test_what_a_method_reads_and_wants_follows_from_its_parts():
    def of(name, what, **options):
        return declared(resolve(cases.ours(name, **options), "objectives"), what)

    reference, critic = {"ref_logps"}, {"values", "returns"}
    for name, read in {
        "reinforce": set(),
        "grpo": reference,
        "trl": set(),
        "rloo": reference,
        "ppo": reference | critic,
    }.items():
        assert of(name, "columns").keys() == read, name
    for name in ("grpo", "rloo", "reinforce_pp", "tulu"):
        assert not of(name, "columns", beta=0.0), name
    assert of("ppo", "columns", beta=0.0).keys() == critic and of("trl", "columns", beta=0.1).keys() == reference
    assert of("rloo", "advantages", beta=0.2) == {"name": "leave_one_out", "beta": 0.2}
    assert of("grpo", "advantages") == of("variant", "advantages") == "group"
    assert of("ppo", "advantages", gamma=0.9)["gamma"] == 0.9
    assert of("grpo", "off_policy") is True and of("reinforce", "off_policy") is False
    assert of("variant", "off_policy", surrogate="reinforce") is False
    assert of("ppo", "leaves") == {"value_head/kernel": ("D1", 0.0)} and of("grpo", "leaves") == {}
    assert of("ppo", "columns")["values"].weights == "current" and of("ppo", "columns")["ref_logps"].weights == "start"
    more = {"sft": 0.5, "kl_k2": {"coefficient": 0.1}}
    assert of("variant", "columns", of="policy_gradient.dapo", added_terms=more).keys() == {"demonstrations", "ref_logps"}


def test_the_policy_term_has_a_coefficient_of_its_own():
    batch = {**given.packed(cases.batch(1)), "demonstrations": jnp.zeros_like(given.packed(cases.batch(1))["mask"])}
    params = {k: batch[k] for k in given.GIVEN}
    entry = {"name": "policy_gradient.variant", "of": "policy_gradient.reinforce", "added_terms": {"entropy": 0.5}}
    with given.scores():
        whole, half = (
            evaluated(resolve({**entry, **more}, "objectives"), given.forward, params, batch, None)[0]
            for more in ({}, {"coefficient": 0.25})
        )
    assert half["policy"] == whole["policy"]._replace(coefficient=0.25) and half["entropy"] == whole["entropy"]
    assert whole["policy"].coefficient == 1.0
