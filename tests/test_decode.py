"""Sampler against trainer, and against itself: what is recorded is what the training forward says, and a completion is the
same whatever else is made, wherever and in how many pieces.

At one compiled shape "the same" is to the bit. Between shapes sums are taken in other orders, so tokens may part where a draw
lies within rounding of the boundary between two of them, and only there.
"""

import dataclasses
from typing import NamedTuple

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_cases as cases
from sampler_cases import COUNT, GROUP, NEW, STOP, WINDOW, assert_same, gaps, judged, sampled, streamed

import jaxpost
from jaxpost import sharding
from jaxpost.models import loading
from jaxpost.models.families import Architecture
from jaxpost.sampling import decode, slots
from jaxpost.sampling.decode import complete, spread, stream
from jaxpost.types import Head, Output

ALL = COUNT * GROUP
# Slots for all completions, or for a few of them that refill; on one device and on eight.
WAYS = {"whole": {}, "refilled": {"slots": 2}, "mesh": {"sizes": (2, 2, 2)}, "mesh, refilled": {"sizes": (2, 2, 2), "slots": 1}}
# 5e-5: float32 through two layers in another order, a row at a time against all at once; the design's bound.
NEAR = {"atol": 5e-5, "rtol": 0}
BOUNDARY = 1e-4  # the design's bound in float32

# --------------------------------------------------------------------------------------------------- Against the trainer


def assert_recorded(found, temperature, **about):
    scores = judged(found, **about)
    np.testing.assert_allclose(found.logps, cases.logps(scores, found, temperature), **NEAR)
    assert (found.logps < -0.01).sum() > len(found.lengths)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("way", WAYS)
def test_recorded_logps_are_the_training_forwards(way, temperature):
    found = sampled(temperature=temperature, **WAYS[way])
    assert_recorded(found, temperature)
    assert 0 < found.stopped.sum() < ALL and (found.tokens.shape, found.logps.shape) == ((ALL, NEW), (ALL, NEW))


@pytest.mark.parametrize("slots", [0, 2])
def test_sixteen_bits_are_decoded_too(slots):
    model = dataclasses.replace(cases.MODEL, dtype=jnp.bfloat16)
    found = sampled(model=model, slots=slots)
    apart = np.abs(found.logps - cases.logps(judged(found, model=model), found))
    # Eight bits of mantissa, through two layers in another order. Of a cache that was read wrongly it would be tenths of nats.
    assert 0 < apart.max() < 0.1 and apart.sum() / found.lengths.sum() < 0.02


QUICK = "mixtral/window"  # a mixture whose layers slide
FIRST = [f"{name}/{next(iter(some))}" for name, some in family_cases.CASES.items()]
SLIDING = ["mistral/window", "qwen3_moe/window", "qwen2/slides_late", "phi3/long", "smollm3/window", "gemma2/caps"]
SLIDING += ["gemma3_text/pattern", "olmoe/clipped"]
NAMES = [QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in dict.fromkeys([*FIRST, *SLIDING]) if n != QUICK)]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_records_what_its_training_forward_says(name, tmp_path):
    family_cases.write(tmp_path, name)
    spec, params = loading.open_model(str(tmp_path), cases.mesh(1, 1, 1))
    about = {"model": spec.transformer, "params": params}
    drawn = {temperature: sampled(temperature=temperature, **WAYS["refilled"], **about) for temperature in (0.5, 1.0)}
    for temperature, completions in drawn.items():
        assert_recorded(completions, temperature, **about)
    if name != QUICK:
        on_mesh = sampled(temperature=1.0, **WAYS["mesh, refilled"], **about)
        assert_recorded(on_mesh, 1.0, **about)
        assert max(gaps(drawn[1.0], on_mesh, temperature=1.0, **about), default=0) < BOUNDARY
    # A mixture sorts its tokens by expert, so a row may lie anywhere in a product: alone it must be the same to the bit.
    (one,) = (one for some in streamed(have=frozenset(range(ALL)) - {7}, slots=2, **about) for one in some)
    whole = drawn[1.0]
    np.testing.assert_array_equal(one.tokens, whole.tokens[7, : whole.lengths[7]])
    np.testing.assert_array_equal(one.logps, whole.logps[7, : whole.lengths[7]])


# ------------------------------------------------------------------------------------------------------ At one shape


def by_index(segments):
    return {one.index: one for some in segments for one in some}


def assert_equal(one, found):
    n = found.lengths[one.index]
    for name in ("tokens", "logps"):
        np.testing.assert_array_equal(getattr(one, name), getattr(found, name)[one.index, :n], err_msg=name)
    assert (one.stopped, one.text_length) == (found.stopped[one.index], found.text_lengths[one.index])


@pytest.mark.parametrize("way", ["refilled", "mesh, refilled"])
def test_a_completion_alone_is_the_same_to_the_bit(way):
    found = sampled(**WAYS[way])
    for i in range(ALL) if way == "refilled" else (0, 7, 14):
        only = by_index(streamed(have=frozenset(range(ALL)) - {i}, **WAYS[way]))
        assert set(only) == {i}
        assert_equal(only[i], found)


def test_a_completion_is_the_same_beside_others_in_other_slots():
    found = sampled(slots=2)
    rest = by_index(streamed(slots=2, have=frozenset({0, 1, 4, 8, 9, 13})))
    assert sorted(rest) == [2, 3, 5, 6, 7, 10, 11, 12, 14]
    for one in rest.values():
        assert_equal(one, found)
    # The same number in another place of the batch, its group and its prompt's place in the bank.
    last = (*cases.prompts()[2:], *cases.prompts()[:2])
    moved = sampled(last, slots=2, number=6)
    np.testing.assert_array_equal(moved.tokens[:9], found.tokens[6:])
    np.testing.assert_array_equal(moved.logps[:9], found.logps[6:])
    assert (moved.tokens[9:] != found.tokens[:6]).any()
    assert streamed(have=frozenset(range(ALL))) == []


def test_how_many_turns_a_segment_has_changes_nothing():
    found = sampled(slots=2)
    for turns in (1, 5 * NEW):
        assert_same(sampled(slots=2, turns=turns), found)


def test_nothing_is_compiled_again():
    sampled(slots=2)
    before = [program._cache_size() for program in (slots.prepare, slots.prefill, slots.begin, slots.segment)]
    other = [np.array([5, 9, 9, 9, 9, 9]), *cases.prompts()[1:]]
    for changes in (
        {"temperature": 0.3}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"stop": (7,)},
        {"seed": 4, "step": 8, "number": 100}, {"slots": 2, "chosen": other}, {"strings": ("7",), "tokenizer": Digits()},
    ):  # fmt: skip
        chosen = changes.pop("chosen", None)
        sampled(chosen, **{"slots": 2, **changes})
    streamed(slots=2, have=frozenset({1, 2, 3}))
    assert before == [program._cache_size() for program in (slots.prepare, slots.prefill, slots.begin, slots.segment)]


# ---------------------------------------------------------------------------------------------------- Between shapes


def test_between_shapes_tokens_part_at_a_boundary_alone():
    found = sampled()
    for way in [*WAYS.values(), {"prompt_window": WINDOW + 7}]:
        other = sampled(**way)
        assert max(gaps(found, other), default=0.0) < BOUNDARY
        same = (found.tokens == other.tokens).all(axis=1)
        assert same.sum() > 0.9 * ALL
        np.testing.assert_allclose(found.logps[same], other.logps[same], **NEAR)


def test_what_parts_elsewhere_is_found():
    """The measure itself: weights that are a little others part from these far from any boundary."""
    near = jax.tree.map(lambda x: x * 1.02, cases.weights())
    apart = gaps(sampled(), sampled(params=near))
    assert len(apart) > 1 and max(apart) > 10 * BOUNDARY


@pytest.mark.slow
def test_completions_of_a_trained_model_are_equal_between_shapes(shared):
    model = jaxpost.load(str(shared / "models" / "stories260k"), dtype="float32", mesh=cases.mesh(1, 1, 1))
    rng = np.random.default_rng(0)
    chosen = [np.array([1, *rng.integers(3, 512, n)], np.int32) for n in range(2, 10)]
    about = {"model": model.transformer, "params": model.params}
    plain = {"new": 48, "prompt_window": 16, "group": 4, "turns": 16, "stop": (1,)}
    first = sampled(chosen, **plain, **about)
    for way in (WAYS["mesh, refilled"], {"prompt_window": 24}):
        other = sampled(chosen, **{**plain, **way}, **about)
        assert max(gaps(first, other, chosen=chosen, group=4, **about), default=0.0) < BOUNDARY
        assert (first.tokens == other.tokens).all(axis=1).mean() > 0.9


# ------------------------------------------------------------------------------------------------------ What it costs


class Counting(NamedTuple):
    """A model that always says token 1, and counts its calls and the tokens that each is of."""

    arch: Architecture

    def make_cache(self, batch_size, length):
        return ()

    def rotations(self, cache):
        return []

    def cache_axes(self):
        return ()

    def is_prepared(self, params):
        return True

    def prepared(self, params):
        return params

    init = dtype = vocab = width = max_positions = None

    def forward(self, params, batch, cache):
        jax.debug.callback(CALLS.append, batch["tokens"].shape)
        return Output(jnp.zeros((*batch["tokens"].shape, 2)).at[..., 1].set(1.0), Head(9 * jnp.eye(2)), cache)


CALLS = []


def counted(count=3, group=4, **changes):
    """(completions, [shapes of the tokens of each forward]) of the counting model."""
    CALLS.clear()
    arguments = Counting(cases.MODEL.arch), {"layers": ()}, cases.prompts()[:count]
    options = {"prompt_window": WINDOW, "new": NEW, "stop": (0,), "group": group, "temperature": 0.0}
    found = complete(*arguments, mesh=cases.mesh(1, 1, 1), **{**options, **changes})
    jax.effects_barrier()
    # A device has a whole segment before it knows that there is nothing to do in it, which takes no turn.
    return found, [tuple(int(n) for n in shape) for shape in CALLS]


def test_a_prompt_is_read_once_for_its_group_and_a_turn_is_a_token_of_each():
    for stop, turns in (((1,), 0), ((0,), NEW - 1)):  # the first token takes no turn
        found, calls = counted(stop=stop)
        assert calls == [(3, WINDOW)] + [(12, 1)] * turns and (found.stopped == (turns == 0)).all()
    assert counted(new=1)[1] == [(3, WINDOW)]


LENGTHS = np.array([10, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 1])


def cut_to_length(logits, context):
    """Says token 0, the stop, where LENGTHS has the completion end."""
    ends = context["counts"] + 1 == jnp.asarray(LENGTHS)[context["numbers"]]
    return logits.at[:, 0].set(jnp.where(ends, 99.0, logits[:, 0]))


def test_no_segment_is_begun_that_is_known_to_be_empty(monkeypatch):
    begun = []
    monkeypatch.setattr(decode, "segment", lambda *a, **k: begun.append(1) or slots.segment(*a, **k))
    counted(turns=4)
    assert len(begun) == 3  # of NEW tokens, the first of which takes no turn


def test_a_long_completion_holds_up_nobody():
    """With two slots: the first is busy for 9 turns; the other has in turn all that take one, then 3 turns and none."""
    for turns in (1, 4, 100):
        found, calls = counted(slots=2, chain=(cut_to_length,), turns=turns)
        np.testing.assert_array_equal(found.lengths, LENGTHS)
        assert found.stopped.all() and calls[0] == (3, WINDOW) and calls[1:] == [(2, 1)] * 12


def test_devices_share_completions_evenly():
    assert spread(4, 8, 4) == (1, 8) and spread(4, 8, 1) == (4, 32)
    assert spread(2, 8, 8) == (1, 2)  # four devices for a prompt
    assert spread(5, 3, 4) == (2, 4)  # 0001 1122 2333 444
    assert spread(1, 1, 8) == (1, 1)
    for count, group, ways in ((9, 8, 8), (3, 7, 4), (5, 3, 8)):
        held, own = spread(count, group, ways)
        shares = [{i // group for i in range(w * own, min((w + 1) * own, count * group))} for w in range(ways)]
        assert max(map(len, shares)) == held and ways * own - count * group < ways * own / 2


# ------------------------------------------------------------------------------------------------------ Meanwhile


class Digits:
    """A tokenizer whose text is the tokens' numbers, with commas."""

    def decode(self, ids, **_):
        return ",".join(str(int(i)) for i in ids)


def test_what_has_ended_is_handed_over_while_others_go_on():
    segments = streamed(slots=2, turns=1)
    ends = [len(one.tokens) for some in segments for one in some]
    assert len(segments) > ALL / 2 and len(ends) == ALL
    order = [one.index for some in segments for one in some]
    assert order != sorted(order)
    # All processes hear of everything, and the caller's own work is under no mesh of the sampler's.
    arguments, options = cases.asked(sizes=(2, 2, 2), slots=1)
    assert {sharding.batch_ways() for _ in stream(*arguments, **options)} == {1}


def test_a_stop_string_cuts_at_the_first_token_that_has_it():
    plain, text = sampled(slots=2, stop=()), Digits()
    strings = ("11,5", ",0,", "4,14")
    found = sampled(slots=2, stop=(), strings=strings, tokenizer=text)
    for before, n, own, stopped, said, logps in zip(
        plain.tokens, found.lengths, found.tokens, found.stopped, found.text_lengths, found.logps, strict=True
    ):
        wanted = next((k for k in range(1, NEW + 1) if any(s in text.decode(before[:k]) for s in strings)), None)
        assert (n, said, stopped) == (wanted or NEW, wanted or NEW, wanted is not None)
        np.testing.assert_array_equal(own, np.where(np.arange(NEW) < n, before, 0))
        assert not logps[n:].any()
    assert 2 < found.stopped.sum() < ALL - 2
    for turns in (1, NEW):
        assert_same(sampled(slots=2, stop=(), strings=strings, tokenizer=text, turns=turns), found)
    # Beside a stop token, whichever comes first; the stop token's own text is no part of what is said.
    both = sampled(slots=2, stop=(5,), strings=(*strings, ",5"), tokenizer=text)
    for row, n, said, stopped in zip(both.tokens, both.lengths, both.text_lengths, both.stopped, strict=True):
        ended = row[n - 1] == 5
        assert stopped == (ended or any(s in text.decode(row[:n]) for s in strings)) and said == n - ended
    assert 0 < (both.text_lengths < both.lengths).sum() < both.stopped.sum()


def test_in_chunks_the_completions_are_those_of_their_numbers():
    """Five prompts, two at a time: the padded last chunk has one, and no row of the padding."""
    whole, (arguments, options) = sampled(chosen=cases.prompts()[:5]), cases.asked(chosen=None)
    chunks = list(decode.in_chunks(*arguments, rows=2, **options))
    assert [where for where, _ in chunks] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [len(part.lengths) for _, part in chunks] == [2 * GROUP, 2 * GROUP, GROUP]
    joined = decode.Completions(*map(np.concatenate, zip(*(part for _, part in chunks), strict=True)))
    assert max(gaps(whole, joined), default=0) < BOUNDARY
    ((_, last),) = decode.in_chunks(arguments[0], arguments[1], iter(cases.prompts()[4:]), rows=2, number=4 * GROUP, **options)
    assert_same(last, chunks[-1][1])
    assert list(decode.in_chunks(arguments[0], arguments[1], [], rows=2, **options)) == []


def test_a_string_that_is_found_lets_the_next_one_in():
    """Between looks every two turns, with one slot: what has a string early on is not decoded to its end."""
    _, calls = counted(slots=1, group=1, turns=2, strings=("1,1,1",), tokenizer=Digits())
    full = counted(slots=1, group=1, turns=2)[1]
    assert len(full) == 1 + 3 * (NEW - 1) > len(calls)
    found, _ = counted(slots=1, group=1, turns=2, strings=("1,1,1",), tokenizer=Digits())
    assert (found.lengths == 3).all() and found.stopped.all() and (STOP not in found.tokens)
