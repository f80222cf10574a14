"""The attention kernels against the oracle in plain operations: values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import thin

from jaxpost import sharding
from jaxpost.models import attention
from jaxpost.models.families import Architecture, Kind

ROWS, LENGTH, HEADS, WIDTH = 4, 256, 4, 16


def _batch():
    """Packed rows of documents of many lengths, which cross the kernel's blocks, with padding behind; and positions."""
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        ends = np.sort(rng.choice(np.arange(1, LENGTH - 20), 3 + row, replace=False))
        for number, (a, b) in enumerate(zip([0, *ends], [*ends, LENGTH - 10], strict=True), 1):
            segments[row, a:b], positions[row, a:b] = number, np.arange(b - a)
    return {"segments": jnp.array(segments), "positions": jnp.array(positions)}


def _inputs(kv_heads):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(ROWS, LENGTH, HEADS, WIDTH))
    k, v = rng.normal(size=(2, ROWS, kv_heads, LENGTH, WIDTH))
    return tuple(jnp.array(x, jnp.float32) for x in (q, k, v))


def _both(fn, arrays, real):
    """(values, gradients) of a function of q, k and v, where there are real tokens."""
    weight = jnp.cos(jnp.arange(WIDTH)) * real[:, :, None, None]

    def value(*arrays):
        out = fn(*arrays)
        return jnp.sum(out * weight), out * real[:, :, None, None]

    (_, out), gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [out, *gradients]


@pytest.mark.parametrize(
    "kv_heads, options",
    thin.slow_after(1, [(2, {"window": 200, "cap": 5.0}), (4, {}), (2, {"window": 40}), (1, {"cap": 2.0, "scale": 0.5})]),
)
def test_splash_equals_the_oracle(kv_heads, options):
    batch, arrays = _batch(), _inputs(kv_heads)
    rest = {k: v for k, v in options.items() if k != "window"}
    mask = attention.document_mask(batch, options.get("window"))
    real = batch["segments"] > 0
    wanted = _both(lambda q, k, v: attention.attend(q, k, v, mask, **rest), arrays, real)
    got = _both(lambda *a: attention.splash(*a, batch["segments"], interpret=True, **options), arrays, real)
    for a, b in zip(got, wanted, strict=True):
        assert float(jnp.abs(b).max()) > 0.1
        # Float32 sums in blocks, each of a softmax: 1e-5 of the largest.
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_splash_on_a_mesh_splits_rows_and_heads(kv_heads):
    batch, arrays = _batch(), _inputs(kv_heads)
    real = batch["segments"] > 0

    def run(*arrays):
        return attention.splash(*arrays, batch["segments"], interpret=True, window=64)

    wanted = _both(run, arrays, real)
    with sharding.use(sharding.make_mesh(2, 2, 2)):
        got = _both(run, arrays, real)
    for a, b in zip(got, wanted, strict=True):
        # Key and value gradients of repeated heads are added in another order.
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()), rtol=0)


def test_a_kernel_gives_way_where_it_cannot_do_what_is_asked(monkeypatch):
    called = []
    monkeypatch.setattr(attention, "splash", lambda q, *_, **__: called.append("splash"))
    monkeypatch.setattr(attention, "cudnn", lambda q, *_, **__: called.append("cudnn"))
    monkeypatch.setattr(attention, "attend", lambda q, *_, **__: called.append("xla"))
    arch = Architecture(8, 64, 8, 1, HEADS, HEADS, WIDTH, 512)

    def used(kernel, batch, dtype=jnp.bfloat16, **changes):
        seen, over = attention.over_rows(kernel, dataclasses.replace(arch, **changes), batch, dtype)
        over(*_inputs(HEADS), seen[0])
        return called.pop()

    batch = _batch()
    odd = {k: v[:, :200] for k, v in batch.items()}
    branched = {**batch, "branches": jnp.zeros_like(batch["segments"])}
    assert [used("splash", b) for b in (batch, odd, branched)] == ["splash", "xla", "xla"]
    assert used("xla", batch) == "xla" and used("cudnn", batch) == "cudnn"
    assert used("cudnn", batch, jnp.float32) == used("cudnn", batch, attention_cap=3.0) == "xla"
    assert used("cudnn", batch, head_width=12) == used("cudnn", batch, head_width=256) == "xla"


def test_the_operands_of_cudnn_are_the_oracles(monkeypatch):
    # The kernel itself runs on GPUs alone; the function that calls it has a plain implementation of the same signature.
    plain = jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    batch, arrays = _batch(), _inputs(2)
    mask, real = attention.document_mask(batch, 30), batch["segments"] > 0
    got = _both(lambda *a: attention.cudnn(*a, mask, 0.3), arrays, real)
    wanted = _both(lambda *a: attention.attend(*a, mask, 0.3), arrays, real)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()), rtol=0)


def test_kinds_of_layers_are_chosen_by_a_traced_index(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "splash", lambda q, *_, window, **__: seen.append(window) or q * (window or 1))
    kinds = (Kind(None), Kind(7))
    arch = Architecture(8, 64, 8, 2, HEADS, HEADS, WIDTH, 512, kinds=kinds, pattern=(1, 0))
    each, over = attention.over_rows("splash", arch, _batch(), jnp.float32)
    q, k, v = _inputs(HEADS)
    found = jax.jit(lambda i: over(q, k, v, jnp.stack(each)[i]))(jnp.int32(1))
    np.testing.assert_array_equal(found, q * 7)
    assert seen == [None, 7]


def test_two_branches_see_their_prompt_and_not_each_other():
    # One pair: prompt 0 1, branch 2 3, branch 2 3 4; then a document of another pair, and padding.
    batch = {
        "segments": jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 0]]),
        "branches": jnp.array([[0, 0, 1, 1, 2, 2, 2, 1, 0]]),
        "positions": jnp.array([[0, 1, 2, 3, 2, 3, 4, 0, 0]]),
    }
    rows = ["1........", "11.......", "111......", "1111.....", "11..1....", "11..11...", "11..111..", ".......1.", "........."]
    expected = np.array([[c == "1" for c in row] for row in rows])
    np.testing.assert_array_equal(attention.document_mask(batch)[0], expected)
    # Within two positions: the rejected branch's first token sees the prompt's second, though three places lie between.
    rows = ["1........", "11.......", ".11......", "..11.....", ".1..1....", "....11...", ".....11..", ".......1.", "........."]
    np.testing.assert_array_equal(attention.document_mask(batch, 2)[0], np.array([[c == "1" for c in row] for row in rows]))
