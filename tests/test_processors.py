"""The restrictions against closed forms and a plain sorting reference, one's own processor through the whole sampler."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_cases as cases
from sampler_cases import NEW, STOP, sampled

from jaxpost import recipe
from jaxpost.config.resolve import entries, known, resolve
from jaxpost.errors import UserError
from jaxpost.sampling import constrained, decode, processors, slots

PROBS = np.array([0.15, 0.4, 0.05, 0.3, 0.1])


def kept(probs=PROBS, **amounts) -> list[int]:
    """Which of the tokens may be drawn; of those the logits are as they were."""
    with np.errstate(divide="ignore"):
        logits = jnp.log(jnp.asarray(probs, jnp.float32))[None]
    restricted = processors.restricted(logits, processors.controls(**amounts))
    left = np.flatnonzero(np.isfinite(restricted[0]))
    np.testing.assert_array_equal(restricted[0, left], logits[0, left])
    return left.tolist()


def test_what_may_be_drawn_in_closed_form():
    assert kept() == kept(top_k=0, top_p=1.0, min_p=0.0) == kept(top_k=5) == kept(top_k=99) == [0, 1, 2, 3, 4]
    assert (kept(top_k=1), kept(top_k=2), kept(top_k=3)) == ([1], [1, 3], [0, 1, 3])
    # Of 0.4, 0.3, 0.15, 0.1, 0.05: the one that reaches the share is in.
    assert (kept(top_p=0.39), kept(top_p=0.41), kept(top_p=0.69), kept(top_p=0.71)) == ([1], [1, 3], [1, 3], [0, 1, 3])
    assert (kept(top_p=0.86), kept(top_p=0.96), kept(top_p=1e-9)) == ([0, 1, 3, 4], [0, 1, 2, 3, 4], [1])
    assert (kept(min_p=0.76), kept(min_p=0.74), kept(min_p=0.26), kept(min_p=1.0)) == ([1], [1, 3], [0, 1, 3], [1])
    assert kept(min_p=0.24) == [0, 1, 3, 4]
    # One after the other: of the two that top_k leaves, 0.4 is 4/7 of the probability.
    assert (kept(top_k=2, top_p=0.57), kept(top_k=2, top_p=0.58)) == ([1], [1, 3])
    assert kept(top_p=0.71, min_p=0.5) == [1, 3]


def test_equals_share_their_fate_and_the_impossible_stays_so():
    assert kept([0.25] * 4, top_k=2) == [0, 1, 2, 3] == kept([0.25] * 4, top_p=0.1)
    assert kept([0.5, 0.0, 0.5, 0.0], top_k=3) == [0, 2] == kept([0.5, 0.0, 0.5, 0.0], top_p=0.999999)


def reference(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """One row, token by token in float64: from the likeliest on, until something forbids the next."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    chances = np.exp(logits[order].astype(np.float64) - logits.max())
    chances /= chances.sum()
    allowed, before = [], 0.0
    for token, chance in zip(order, chances, strict=True):
        if allowed and (before >= top_p or chance < min_p * chances[0]):
            break
        allowed.append(token)
        before += chance
    return np.where(np.isin(np.arange(len(logits)), allowed), logits, -np.inf)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_restrictions_are_those_of_a_plain_reference(temperature):
    rng, restrict = np.random.default_rng(0), jax.jit(processors.restricted)
    logits = (rng.normal(size=(40, 300)) * 3).astype(np.float32) / np.float32(temperature)
    for top_k, top_p, min_p in itertools.product((0, 1, 7, 300), (1.0, 0.9, 0.3), (0.0, 0.02, 0.5)):
        restricted = restrict(jnp.asarray(logits), processors.controls(temperature, top_k, top_p, min_p))
        np.testing.assert_array_equal(restricted, [reference(row, top_k, top_p, min_p) for row in logits])
    assert restrict._cache_size() == 1  # amounts are arrays


def test_samples_are_of_the_restricted_distribution_and_recorded_with_it():
    drawn = sampled(top_k=5, top_p=0.9, min_p=0.05, temperature=1.5)
    scores = cases.judged(drawn)
    left = np.stack([[reference(row / 1.5, 5, 0.9, 0.05) for row in rows] for rows in scores])
    np.testing.assert_allclose(drawn.logps, cases.logps(left, drawn), atol=5e-5)
    inside = np.arange(NEW) < drawn.lengths[:, None]
    assert (drawn.logps > cases.logps(scores, drawn))[inside].mean() > 0.7


# --------------------------------------------------------------------------------------------------- One of one's own


def never_again(logits, context):
    """Forbids what the completion has said already."""
    taken = jax.nn.one_hot(context["tokens"], logits.shape[-1], dtype=bool)
    taken &= (jnp.arange(context["tokens"].shape[1]) < context["counts"][:, None])[..., None]
    return jnp.where(taken.any(axis=1), -jnp.inf, logits)


def by_number(logits, context):
    """Leaves completion i nothing to begin with but token i."""
    own = jnp.arange(logits.shape[-1]) == context["numbers"][:, None]
    return jnp.where((context["counts"] == 0)[:, None] & ~own, -jnp.inf, logits)


@pytest.mark.parametrize("slots", [0, 2])
def test_a_processor_knows_the_completion_so_far_and_whose_it_is(slots):
    drawn = sampled(slots=slots, stop=(), number=2, chain=(by_number, never_again))
    assert (drawn.lengths == NEW).all()
    np.testing.assert_array_equal(drawn.tokens[:, 0], 2 + np.arange(len(drawn.tokens)))
    assert all(len(set(row.tolist())) == NEW for row in drawn.tokens)
    scores = cases.judged(drawn)  # the record is of what was drawn from
    for n in range(1, NEW):
        np.put_along_axis(scores[:, n], drawn.tokens[:, :n], -np.inf, axis=-1)
    wanted = cases.logps(scores, drawn)
    wanted[:, 0] = 0.0
    np.testing.assert_allclose(drawn.logps, wanted, atol=5e-5)


def by_prompt(logits, context):
    """Allows nothing but a token of the prompt."""
    inside = jnp.arange(context["prompts"].shape[1]) < context["prompt_lengths"][:, None]
    own = (jax.nn.one_hot(context["prompts"], logits.shape[-1], dtype=bool) & inside[..., None]).any(axis=1)
    return jnp.where(own, logits, -jnp.inf)


@pytest.mark.parametrize("changes", [{"slots": 2}, {"sizes": (2, 2, 2)}], ids=["refilled", "devices"])
def test_a_processor_sees_the_prompt(changes):
    drawn = sampled(stop=(), chain=(by_prompt,), **changes)
    for i, row in enumerate(drawn.tokens):
        assert set(row.tolist()) <= set(cases.prompts()[i // cases.GROUP].tolist())
    assert sum(len(set(row.tolist())) > 1 for row in drawn.tokens) > 6


def test_prompts_cost_nothing_where_no_processor_reads_them(monkeypatch):
    """The compiled program has no argument for them: its text is the same with them and without."""
    texts = []

    def compared(model, params, bank, *rest, **options):
        assert bank.prompts is None
        with_prompts = bank._replace(prompts=jnp.zeros((len(bank.lengths), cases.WINDOW), jnp.int32))
        texts.append([slots.segment.lower(model, params, x, *rest, **options).as_text() for x in (bank, with_prompts)])
        return slots.segment(model, params, bank, *rest, **options)

    monkeypatch.setattr(decode, "segment", compared)
    sampled(slots=2)
    assert texts and all(one == other for one, other in texts)


def raised(logits, context, *, amounts=0.0):
    return logits + amounts


def test_arrays_are_arguments_of_the_program_and_other_keywords_constants():
    rng = np.random.default_rng(0)
    one, two = ({"name": raised, "amounts": rng.normal(size=17).astype(np.float32) * 3} for _ in range(2))
    about = processors.About(None, (), 17, NEW)
    chains = [
        processors.chain([{"name": "banned", "tokens": [token]}, entry], about, "p") for token, entry in ((5, one), (5, two))
    ]
    first, before = sampled(slots=2, chain=chains[0]), slots.segment._cache_size()
    second = sampled(slots=2, chain=chains[1])
    assert slots.segment._cache_size() == before and (first.tokens != second.tokens).any()
    (banned, plain), (again, _) = chains
    assert (
        jax.tree.structure(banned)
        == jax.tree.structure(again)
        != jax.tree.structure(processors.bound(resolve({"name": "processors.banned", "tokens": [6]}, "processors")))
    )
    assert jax.tree.leaves(banned) == [] and len(jax.tree.leaves(plain)) == 1


# -------------------------------------------------------------------------------------------------------- The contract

TITLES, STOPS = [[1, 4], [1, 4, 1], [4, 4, 4]], (2,)
SETTINGS = {  # of each processor at full strength
    "processors.banned": {"tokens": [1, 4]},
    "processors.at_least": {"count": 3, "ends": [2]},
    "constrained.trie": {"table": constrained.table_of(TITLES, STOPS)},
    "constrained.substring": {"index": constrained.index_of(TITLES, STOPS)},
}


@pytest.mark.parametrize("name", known("processors"))
def test_a_processor_raises_no_forbidden_token_and_without_strength_changes_nothing(name):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 6)).astype(np.float32)
    logits[:, 5], logits[0, 2] = -np.inf, -np.inf
    context = {"tokens": rng.integers(0, 6, (4, 8)), "counts": np.array([0, 2, 3, 8]), "numbers": np.arange(4)}
    context |= {"prompts": rng.integers(0, 6, (4, 3)), "prompt_lengths": np.array([1, 2, 3, 3])}
    own = {k: jnp.asarray(v) for k, v in context.items()}
    strong, weak = resolve({"name": name, **SETTINGS[name]}, "processors"), resolve(name, "processors")
    np.testing.assert_array_equal(weak(jnp.asarray(logits), own), logits)
    forbidden = np.asarray(jax.jit(strong)(jnp.asarray(logits), own))
    assert (
        forbidden.shape == logits.shape and np.isneginf(forbidden[np.isneginf(logits)]).all() and not np.isnan(forbidden).any()
    )
    assert (forbidden <= logits).all()
    # Each row is by itself.
    alone = [strong(jnp.asarray(logits[i : i + 1]), {k: v[i : i + 1] for k, v in own.items()})[0] for i in range(4)]
    np.testing.assert_array_equal(forbidden, np.stack(alone))
    np.testing.assert_array_equal(strong(jnp.asarray(forbidden), own), forbidden)


def test_banned_tokens_and_early_ends_by_hand():
    logits = np.zeros((4, 6), np.float32)
    context = {"counts": jnp.array([0, 2, 3, 8])}
    without = np.asarray(processors.banned(jnp.asarray(logits), {}, tokens=[1, 4]))
    assert np.argwhere(np.isneginf(without))[:, 1].tolist() == [1, 4] * 4 and np.isfinite(without).sum() == 16
    short = np.asarray(processors.at_least(jnp.asarray(logits), context, count=3, ends=[2]))
    assert np.argwhere(np.isneginf(short)).tolist() == [[0, 2], [1, 2]]


def chained(value):
    return processors.chain(value, processors.About(None, (STOP,), 17, NEW), "config.rollouts.processors")


def test_a_stage_takes_processors_with_keywords():
    own = f"{__name__}.never_again"
    for given in ([{"name": "banned", "tokens": [3]}, own], '[{"name": "banned", "tokens": [3]}]'):
        first, *others = chained(recipe.plain(recipe.make(rollouts={"processors": given}).rollouts.processors))
        assert first.function is processors.banned and first.constants == {"tokens": (3,)}
        assert [x.function for x in others] == [never_again] * (len(given) == 2)
    assert [x.function for x in chained(f"{__name__}.by_number, {own}")] == [by_number, never_again]
    with pytest.raises(UserError, match="banned takes no option 'token'. Did you mean 'tokens'"):
        chained(({"name": "banned", "token": 3},))
    with pytest.raises(UserError, match="no 'baned'. Did you mean 'banned'"):
        chained("baned")
    with pytest.raises(UserError, match="constrained.trie takes no option 'text'. Did you mean 'texts'"):
        chained([{"name": "constrained.trie", "text": []}])


def test_processors_are_named_with_keywords_in_a_list_or_with_commas():
    chain = [{"name": "banned", "tokens": [3]}, f"{__name__}.never_again"]
    assert entries(chain, "p") == chain and entries('[{"name": "banned", "tokens": [3]}]', "p") == chain[:1]
    assert (
        entries(" a.b , c:d ", "p") == ["a.b", "c:d"]
        and entries("", "p") == []
        and entries({"name": "x"}, "p") == [{"name": "x"}]
    )
    drawn = sampled(stop=(), chain=chained(chain))
    assert not (drawn.tokens == 3).any() and all(len(set(row.tolist())) == NEW for row in drawn.tokens)


@pytest.mark.parametrize(
    "value, message",
    [
        (5, "config.rollouts.processors: 5 is no entry"),
        ([5], "config.rollouts.processors: 5 is no entry"),
        ("banned", "processors: processors.banned needs tokens"),
        ([{"name": "banned", "tokens": "a"}], "processors.banned: tokens='a'; it takes a list of whole numbers"),
        ([{"name": "banned", "tokens": []}], "banned: tokens: has no ids"),
        ([{"name": "banned", "tokens": [1, 17]}], "banned: tokens: has id 17, and the model has a vocabulary of 17"),
        ([{"name": "at_least", "count": 1, "ends": ["x"]}], r"at_least: ends=\['x'\]; it takes a list of whole numbers"),
        ([{"name": "at_least", "count": 1, "ends": [-1]}], "at_least: ends: has id -1, and the model has a vocabulary of 17"),
        ([{"name": "at_least", "count": NEW, "ends": [2]}], f"count={NEW}, and a completion has {NEW} tokens at most"),
        ([{"name": "constrained.trie", "texts": 5}], "constrained.trie: texts=5; it takes a text or a list of"),
        (
            [{"name": "constrained.substring", "texts": [5]}],
            r"constrained.substring: texts=\[5\]; it takes a text or a list of",
        ),
    ],
)
def test_processors_that_cannot_be_are_refused_before_anything_is_drawn(value, message):
    with pytest.raises(UserError, match=message):
        chained(value)
