"""Activations that are tapped and patched: each site against what the others and the weights say, in every way a model runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import thin

import jaxpost
from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models.heads import logits
from jaxpost.models.sites import LAYER
from jaxpost.models.transformer import unstack
from jaxpost.tasks import arithmetic

MODEL = small.MODEL
ARCH = MODEL.arch
PARAMS = MODEL.init(jax.random.PRNGKey(0))
EVERY = tuple(f"layers.*.{site}" for site in LAYER)


def rows(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(1, ARCH.vocab, (3, 7)), jnp.int32)
    segments = jnp.asarray([[1] * 7, [1] * 4 + [2] * 3, [1] * 5 + [0] * 2], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 0]], jnp.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions}


BATCH, OTHER = rows(0), rows(1)


def run(batch=BATCH, model=MODEL, params=PARAMS, **options):
    return jax.jit(lambda p, b: model.forward(p, b, **options))(params, batch)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def test_each_site_follows_from_the_ones_before_it():
    out = run(tap=(*EVERY, "embed", "final"))
    at = {name.rpartition(".")[2]: np.asarray(x) for name, x in out.taps.items()}
    layer = jax.tree.map(np.asarray, PARAMS["layers"])
    real = np.asarray(BATCH["segments"]) > 0
    close(at["embed"], np.asarray(PARAMS["embed"]["weight"])[BATCH["tokens"]])
    close(at["resid_pre"][0], at["embed"])
    close(at["resid_pre"][1], at["resid_post"][0])
    for site, stream, norm in (("attn_input", "resid_pre", "norm1"), ("mlp_input", "resid_mid", "norm2")):
        x = at[stream] / np.sqrt(np.mean(np.square(at[stream]), axis=-1, keepdims=True) + ARCH.eps)
        close(at[site], x * layer[norm]["scale"][:, None, None])
    close(at["v"].reshape(2, 3, 7, -1), np.einsum("lbsd,ldf->lbsf", at["attn_input"], layer["attention"]["v"]["kernel"]))
    gate, up = (np.einsum("lbsd,ldf->lbsf", at["mlp_input"], layer["mlp"][name]["kernel"]) for name in ("gate", "up"))
    close(at["mlp_act"], gate / (1 + np.exp(-gate)) * up)
    close(at["resid_mid"], at["resid_pre"] + at["attn_out"])
    close(at["resid_post"], at["resid_mid"] + at["mlp_out"])
    close(at["mlp_out"], np.einsum("lbsf,lfd->lbsd", at["mlp_act"], layer["mlp"]["down"]["kernel"]))
    flat = at["head_out"].reshape(*at["head_out"].shape[:3], -1)
    close(at["attn_out"], np.einsum("lbsf,lfd->lbsd", flat, layer["attention"]["o"]["kernel"]))
    k, v = (np.repeat(at[name], ARCH.heads // ARCH.kv_heads, axis=3) for name in ("k", "v"))
    scores = np.einsum("lbsnh,lbtnh->lbnst", at["q"], k) / np.sqrt(ARCH.head_width)
    segments, order = np.asarray(BATCH["segments"]), np.arange(7)
    sees = (order[:, None] >= order) & (segments[:, :, None] == segments[:, None, :])
    scores = np.where(sees[None, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    close(np.moveaxis(at["pattern"], 2, 3)[:, real], np.moveaxis(weights, 2, 3)[:, real])
    close(at["head_out"], np.einsum("lbnst,lbtnh->lbsnh", at["pattern"], v))
    close(at["final"], out.hidden)


@pytest.mark.parametrize("kind", thin.slow_after(2, ["unstacked", "kinds", "rematerialised", "mixture"]))
def test_taps_are_the_same_in_every_way_that_layers_run(kind):
    model = small.MODELS.get(kind, MODEL)
    if kind == "rematerialised":
        model = dataclasses.replace(MODEL, remat="full")
    params = model.init(jax.random.PRNGKey(0))
    loop = unstack(params, ARCH.layers)
    wanted = [name for name in EVERY if kind != "mixture" or "mlp_act" not in name]
    stacked = run(model=model, params=params, tap=[*wanted, "layers.1.q"])
    other = run(model=dataclasses.replace(model, remat="none"), params=loop, tap=[*wanted, "layers.1.q"])
    for name, x in stacked.taps.items():
        close(x, other.taps[name])
    np.testing.assert_array_equal(stacked.taps["layers.1.q"], stacked.taps["layers.*.q"][1])
    close(stacked.hidden, run(model=model, params=params).hidden)


def test_a_layer_that_is_not_tapped_is_not_kept():
    text = jax.jit(lambda p: MODEL.forward(p, BATCH, tap=("layers.1.resid_post",)).taps).lower(PARAMS).as_text()
    assert "tensor<1x3x7x32xf32>" in text
    assert "tensor<2x3x7x32xf32>" not in text


def test_a_stream_taken_from_another_run_gives_that_run():
    """Activation patching's identity: what lies after the patched place depends on nothing before it."""
    both = {**BATCH, "tokens": OTHER["tokens"]}
    clean = run(batch=both, tap=("layers.0.resid_post", "layers.1.v"))
    corrupt = run()
    assert not np.allclose(clean.hidden, corrupt.hidden, atol=1e-3)
    close(run(patch={"layers.0.resid_post": clean.taps["layers.0.resid_post"]}).hidden, clean.hidden)
    # One place of one row: the rest of the batch, and what comes before the place, stay as they were.
    place = (jnp.arange(3)[:, None] == 1) & (BATCH["positions"] == 2) & (BATCH["segments"] == 1)
    function = lambda x, batch: jnp.where(place[..., None], clean.taps["layers.0.resid_post"], x)  # noqa: E731
    patched = run(patch={"layers.0.resid_post": function})
    same = np.array(~((np.arange(3)[:, None] == 1) & (np.arange(7) >= 2) & (np.arange(7) < 4)))
    np.testing.assert_array_equal(np.asarray(patched.hidden)[same], np.asarray(corrupt.hidden)[same])
    assert not np.allclose(np.asarray(patched.hidden)[~same], np.asarray(corrupt.hidden)[~same], atol=1e-4)


def test_a_patched_head_and_every_layer_at_once():
    def without_head(x, batch):
        return x.at[:, :, 2].set(0.0)

    out = run(patch={"layers.0.head_out": without_head}, tap=("layers.*.head_out",))
    assert not np.asarray(out.taps["layers.*.head_out"])[0, :, :, 2].any()
    assert np.asarray(out.taps["layers.*.head_out"])[1, :, :, 2].any()
    zeroed = jax.tree.map(jnp.copy, PARAMS)
    kernel = zeroed["layers"]["attention"]["o"]["kernel"]
    zeroed["layers"]["attention"]["o"]["kernel"] = kernel.at[0, 2 * ARCH.head_width : 3 * ARCH.head_width].set(0.0)
    close(out.hidden, run(params=zeroed).hidden)
    # Nothing added anywhere leaves the embeddings; a value with the axis L is one for each layer.
    nothing = {"layers.*.attn_out": 0.0, "layers.*.mlp_out": np.zeros((ARCH.layers, 1, 1, 1))}
    bare = run(patch=nothing, tap=("embed", "layers.1.resid_post"))
    close(bare.taps["embed"], bare.taps["layers.1.resid_post"])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_reach_a_patch_and_the_weights_before_a_tap(remat):
    model = dataclasses.replace(MODEL, remat=remat)

    def score(value):
        out = model.forward(PARAMS, BATCH, patch={"layers.1.mlp_out": value})
        return jnp.sum(jnp.sin(logits(out.hidden, out.head)))

    value = 0.1 * jax.random.normal(jax.random.PRNGKey(1), (3, 7, ARCH.width))
    direction = jax.random.normal(jax.random.PRNGKey(2), value.shape)
    slope = jnp.vdot(jax.jit(jax.grad(score))(value), direction)
    step = 1e-2
    jitted = jax.jit(score)
    close(slope, (jitted(value + step * direction) - jitted(value - step * direction)) / (2 * step), 2e-2)

    def norm(params):
        return jnp.sum(model.forward(params, BATCH, tap=("layers.0.resid_post",)).taps["layers.0.resid_post"] ** 2)

    grads = jax.jit(jax.grad(norm))(PARAMS)["layers"]["mlp"]["down"]["kernel"]
    assert grads[0].any() and not grads[1].any()  # the second layer lies behind the tap


def test_decoding_taps_and_patches_as_the_whole_row_does():
    tokens = BATCH["tokens"]
    whole = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": jnp.broadcast_to(jnp.arange(7), (3, 7))}
    options = {"tap": EVERY, "patch": {"layers.1.resid_pre": lambda x, batch: x + (batch["positions"] > 3)[..., None]}}
    expected = run(batch=whole, **options)
    cache, steps = MODEL.make_cache(3, 7), []
    for i in range(7):
        batch = {"tokens": tokens[:, i : i + 1], "positions": whole["positions"][:, i : i + 1]}
        out = MODEL.forward(PARAMS, batch, cache, **options)
        cache = out.cache
        steps.append(out.taps)
    for name in EVERY:
        axis = 3 if name.endswith("pattern") else 2
        close(jnp.concatenate([taps[name] for taps in steps], axis=axis), expected.taps[name])


def test_without_sites_the_program_is_the_same():
    def text(**options):
        return jax.jit(lambda p: MODEL.forward(p, BATCH, **options).hidden).lower(PARAMS).as_text()

    assert text() == text(tap=(), patch={}) != text(tap=("embed",), patch={"embed": 0.0})


def test_what_is_no_site_is_refused():
    for tap, message in (
        ("layers.2.q", "the model has layers 0 to 1"),
        ("layers.0.resid", "no site 'layers.0.resid'. Did you mean 'resid_"),
        ("block.0.q", "no site 'block.0.q'"),
    ):
        with pytest.raises(UserError, match=message):
            MODEL.forward(PARAMS, BATCH, tap=(tap,))
    with pytest.raises(UserError, match="has no mlp_act"):
        small.MODELS["mixture"].forward(PARAMS, BATCH, tap=("layers.0.mlp_act",))
    with pytest.raises(UserError, match=r"layers.0.q has the shape \(3, 7, 4, 8\), and its patch gives \(5,\)"):
        run(patch={"layers.0.q": np.zeros(5)})
    with pytest.raises(UserError, match="a value of 3 layers, and the model has 2"):
        run(patch={"layers.*.q": np.zeros((3, 1, 1, 1, 1))})


# -------------------------------------------------------------------------- From Python, as docs/analysis.md has it


def loaded():
    config = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    model = jaxpost.load(config, mesh=sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    return dataclasses.replace(model, tokenizer=arithmetic.tokenizer())


def test_logit_lens_and_tracing_in_a_few_lines():
    model = loaded()
    tokens, lengths = model.encoded(["12+34", "1+2"])
    assert tokens.shape == (2, 5) and lengths.tolist() == [5, 3]
    streams = model.tap("layers.*.resid_post", tokens, lengths)
    plain = model.logits(tokens, lengths)
    lens = [model.logits(tokens, lengths, patch={"layers.2.resid_post": stream}) for stream in streams]
    close(lens[2], plain)
    scale, head = model.params["norm"]["scale"], model.params["head"]["weight"]
    normed = streams[0] * scale / np.sqrt(np.mean(np.square(streams[0]), -1, keepdims=True) + model.transformer.arch.eps)
    close(lens[0], normed @ head.T, 1e-4)
    # Tracing: noise on the first two tokens, then the clean stream of one layer at every place brings all of it back.
    noise = 3 * jax.random.normal(jax.random.PRNGKey(0), streams.shape[1:])
    noisy = {"embed": lambda x, batch: x + jnp.where((batch["positions"] < 2)[..., None], noise[: len(x)], 0.0)}
    corrupt = model.logits(tokens, lengths, patch=noisy)
    assert np.abs(corrupt - plain)[:, 1:].max() > 0.05
    close(model.logits(tokens, lengths, patch={**noisy, "layers.1.resid_post": streams[1]})[0], plain[0], 1e-4)
    seen = model.tap("layers.1.resid_post", ["12+34"], patch=noisy)
    assert seen.shape == (1, 5, 16) and not np.allclose(seen[0], streams[1][0], atol=1e-3)


def test_a_patched_model_generates_as_it_scores():
    model = loaded()
    direction = jnp.zeros(16).at[3].set(5.0)
    steered = model.patched({"layers.1.resid_post": lambda x, batch: x + direction})
    (ids,) = steered.complete(["12+34"], new=5)
    prompt, _ = model.encoded("12+34")
    row = np.concatenate([prompt[0], ids])[None]
    patch = {"layers.1.resid_post": lambda x, batch: x + direction}
    likeliest = np.argmax(model.logits(row, patch=patch)[0], axis=-1)
    np.testing.assert_array_equal(likeliest[len(prompt[0]) - 1 : -1], ids)
    assert ids.tolist() != model.complete(["12+34"], new=5)[0].tolist()
