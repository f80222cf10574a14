"""Log-probabilities in chunks against the [B,S,V] array written out: values, gradients, and what it costs."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.models.families import Architecture
from jaxpost.models.transformer import Transformer
from jaxpost.objectives import logprobs, sft
from jaxpost.step import make_step
from jaxpost.types import Head, Output, Term, TrainState

B, S, D, V = 2, 7, 4, 11

# float32 sums of V terms in another order: a few units in the last place of values around 10.
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def _case(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden, weight = jnp.asarray(2 * rng.normal(size=(B, S, D)), dtype), jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    return hidden, weight, jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32), rng.normal(size=(B, S)).astype(np.float32)


MASKS = {
    "full": np.ones((B, S), bool),
    "empty": np.zeros((B, S), bool),
    "ragged": np.array([[0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0]], bool),
    "one row": np.array([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool),
}


def _chunked(hidden, weight, tokens, mask, temperature=1.0, head=Head):
    batch = {"tokens": tokens, "temperature": jnp.float32(temperature)}
    return logprobs.token_scores(Output(hidden, head(weight)), batch, mask)


def _written_out(hidden, weight, tokens, mask, temperature=1.0, cap=None):
    """The same, from all logits at once; a token's score stands at its own place, so the first has none."""
    logits = jnp.einsum("bsd,vd->bsv", hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    logps = jax.nn.log_softmax(logits[:, :-1] / temperature)
    found = {
        "logps": jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0],
        "entropy": -jnp.sum(jnp.exp(logps) * logps, axis=-1),
        "correct": (jnp.argmax(logps, axis=-1) == tokens[:, 1:]).astype(jnp.float32),
    }
    return {k: jnp.where(mask, jnp.pad(v, ((0, 0), (1, 0))), 0.0) for k, v in found.items()}


@functools.cache
def _compiled(scores, chunk, **options):
    """Scores and the gradients of a weighted sum of logps, compiled once for each size of chunk."""

    def total(hidden, weight, pull, *rest):
        found = scores(hidden, weight, *rest, **options)
        return jnp.sum(found["logps"] * pull), found

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def _with_gradients(scores, *arguments, **options):
    (_, found), grads = _compiled(scores, logprobs.CHUNK, **options)(*arguments)
    return jax.device_get((found, grads))


# Chunks of one position, of two (the seventh stands alone), of three, of four (the second is filled up), of all seven.
@pytest.mark.parametrize("chunk", [1, 2 * B * V, 3 * B * V, 4 * B * V, 2**22])
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients_are_those_of_the_whole_softmax(monkeypatch, name, chunk):
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    hidden, weight, tokens, pull = _case()
    arguments = (hidden, weight, pull, tokens, jnp.asarray(MASKS[name]), 0.7)
    found, expected = _with_gradients(_chunked, *arguments), _with_gradients(_written_out, *arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **NEAR), found, expected)
    assert np.any(expected[1][0]) == MASKS[name].any()


def test_a_soft_cap_reaches_value_and_gradient(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", 2 * B * V)
    hidden, weight, tokens, pull = _case()
    arguments, mask = (hidden, weight, pull, tokens), jnp.asarray(MASKS["ragged"])
    found = _with_gradients(_chunked, *arguments, mask, head=functools.partial(Head, soft_cap=2.0))
    expected = _with_gradients(_written_out, *arguments, mask, cap=2.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **NEAR), found, expected)


def test_a_tied_head_gets_both_gradients():
    _, weight, tokens, pull = _case()
    mask = jnp.asarray(MASKS["ragged"])

    def gradient(scores):
        total = lambda w: jnp.sum(scores(jnp.tanh(w)[tokens], w, tokens, mask)["logps"] * pull)  # noqa: E731
        return jax.jit(jax.grad(total))(weight)

    np.testing.assert_allclose(gradient(_chunked), gradient(_written_out), **NEAR)


def test_bfloat16_hidden_states_keep_float32_logits_and_head_gradients(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", 2 * B * V)
    hidden, weight, tokens, pull = _case(jnp.bfloat16)
    arguments = (hidden, weight, pull, tokens, jnp.asarray(MASKS["ragged"]))
    found, (d_hidden, d_weight) = _with_gradients(_chunked, *arguments)
    expected, (e_hidden, e_weight) = _with_gradients(_written_out, *arguments)
    assert found["logps"].dtype == d_weight.dtype == np.float32 and d_hidden.dtype == jnp.bfloat16
    # The same bfloat16 factors in both, accumulated in float32, so the values agree to float32's rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **NEAR), found, expected)
    # Gradients pass through bfloat16 products, each good to 2^-8 of what it adds.
    np.testing.assert_allclose(d_weight, e_weight, atol=2**-6 * np.abs(e_weight).max())
    np.testing.assert_allclose(d_hidden.astype(np.float32), e_hidden.astype(np.float32), atol=2**-6 * np.abs(e_hidden).max())


def test_a_score_stands_at_its_own_token():
    # Hidden state t is certain that the next token is t + 1, and the row is 0, 1, 2, ...: all but the first are certain.
    hidden, tokens = 50.0 * jnp.eye(5)[None], jnp.arange(5, dtype=jnp.int32)[None]
    weight = jnp.roll(jnp.eye(5), 1, axis=0)
    mask = jnp.ones((1, 5), bool)
    scores = logprobs.token_scores(Output(hidden, Head(weight)), {"tokens": tokens, "mask": mask})
    assert scores["correct"].tolist() == [[0, 1, 1, 1, 1]]
    np.testing.assert_allclose(scores["logps"], np.zeros((1, 5)), atol=1e-6)
    wrong = logprobs.token_scores(Output(hidden, Head(weight)), {"tokens": tokens.at[0, 3].set(0), "mask": mask})
    # Token 3 alone is wrong, by the whole logit; that it now stands before token 4 is the hidden state's business.
    np.testing.assert_allclose(wrong["logps"], [[0, 0, 0, -50, 0]], atol=1e-5)


@contextlib.contextmanager
def _counted():
    """How often the head is applied: a host callback in the function that is applied over it."""
    seen = []

    def fn(logits, columns):
        jax.debug.callback(lambda: seen.append(1))
        return {"top": jnp.max(logits, axis=-1)}

    yield fn, seen


@pytest.mark.parametrize(("name", "trips"), [("empty", 0), ("full", 4), ("ragged", 2), ("one row", 4)])
def test_the_loop_ends_with_the_last_position_that_the_mask_keeps(monkeypatch, name, trips):
    monkeypatch.setattr(logprobs, "CHUNK", 2 * B * V)
    hidden, weight, _, _ = _case()
    with _counted() as (fn, seen):
        total = lambda h: jnp.sum(logprobs.over_head(fn, h, Head(weight), {}, jnp.asarray(MASKS[name]))["top"])  # noqa: E731
        jax.block_until_ready(jax.jit(total)(hidden))
        jax.effects_barrier()
        assert len(seen) == trips
        jax.block_until_ready(jax.jit(jax.grad(total))(hidden))
        jax.effects_barrier()
        assert len(seen) == 3 * trips  # forward again, and once more inside the backward pass


# ------------------------------------------------------------------------------------- The largest array of a step


def _compiled_step(objective, vocabulary=131072, length=1024, rows=8):
    """The SFT step of a small model with a large vocabulary, compiled for one device and never run."""
    arch = Architecture(
        vocab=vocabulary, width=64, mlp_width=128, layers=1, heads=1, kv_heads=1, head_width=64, max_positions=length
    )
    model, tx = Transformer(arch, remat="full"), optax.sgd(0.1)

    def state():
        params, zero = model.init(jax.random.PRNGKey(0)), jnp.zeros((), jnp.int32)
        nothing = jax.tree.map(lambda _: None, params)
        return TrainState(zero, params, nothing, tx.init(params), None, jax.random.PRNGKey(0), zero, zero)

    place = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {"tokens": place, "segments": place, "positions": place, "mask": jax.ShapeDtypeStruct(place.shape, bool)}
    step = jax.jit(make_step(model.forward, objective, tx), donate_argnums=0)
    return step.lower(jax.eval_shape(state), batch).compile()


def _materialised(forward, params, batch, key):
    """sft.nll with its logits written out, as the losses that this module is there to replace have them."""
    out = forward(params, batch)
    scores = _written_out(out.hidden, out.head.weight, batch["tokens"], batch["mask"])
    return {"nll": Term(-jnp.sum(scores["logps"]), jnp.sum(batch["mask"].astype(jnp.float32)))}, {}


def _largest(compiled):
    """Elements of the largest array that the compiled program names."""
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred|s8|u8)\[([\d,]+)\]", compiled.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def test_no_array_of_the_step_has_the_size_of_all_logits():
    chunked, materialised = _compiled_step(sft.nll), _compiled_step(_materialised)
    took, would = (c.memory_analysis().temp_size_in_bytes for c in (chunked, materialised))
    print(f"temporary memory: {took / 2**20:.0f} MiB in chunks, {would / 2**20:.0f} MiB with all logits")
    assert took < would / 4
    # Head and embedding [V,D] are the largest there is; all logits would be 128 times that.
    assert _largest(chunked) <= 131072 * 64
    assert _largest(materialised) >= 8 * 1023 * 131072
