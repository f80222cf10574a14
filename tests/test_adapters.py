"""Adapters and quantised weights, as leaves of the tree: what they compute, what they cost, and what `peft` makes of them."""

import json
import re
import statistics
from pathlib import Path

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import thin
from safetensors.numpy import load_file, save_file

import jaxpost
from jaxpost import optim, sharding
from jaxpost.adapters import lora, peft, quantise
from jaxpost.config.naming import name_of
from jaxpost.config.resolve import known, resolve
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.models import adapted, hf, loading, routes
from jaxpost.models.einsum import dense, project
from jaxpost.objectives import sft
from jaxpost.step import combine, gradients

KEY = jax.random.PRNGKey(3)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
KINDS = {
    "lora": {"name": "lora", "rank": 3},
    "rslora": {"name": "lora.rslora", "rank": 3, "targets": "attention/(q|v)/kernel$"},
    "dora": {"name": "lora.dora", "rank": 3},
    "int8": {"name": "lora", "rank": 3, "base": "int8"},
    "nf4": {"name": "lora", "rank": 3, "base": "nf4"},
    "dora nf4": {"name": "lora.dora", "rank": 3, "base": "nf4"},
}
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 12))


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def load(adapter=None, config=CONFIG):
    return jaxpost.load(config, mesh=one_device(), adapter=adapter)


def learned(params, seed: int = 0):
    """The tree as training may have left it: random B, magnitudes that moved."""
    rng = np.random.default_rng(seed)

    def move(path, x):
        name = sharding.path_name(path)
        if name.endswith("/b"):
            return jnp.asarray(rng.normal(size=x.shape) / 4, jnp.float32)
        return x * jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32) if name.endswith("magnitude") else x

    return jax.tree_util.tree_map_with_path(move, params)


def logits(model, params) -> np.ndarray:
    return np.asarray(jaxpost.api.Model(model.transformer, params, None, {}, model.mesh).logits(TOKENS))


def merged(params):
    return jax.tree.map(dense, params, is_leaf=lambda x: hasattr(x, "merged"))


# ------------------------------------------------------------------------------------------------------- What they compute


def test_an_adapter_that_has_learned_nothing_is_the_base_bit_for_bit():
    base = np.asarray(load().logits(TOKENS))
    for kind in ("lora", "rslora"):
        np.testing.assert_array_equal(load(KINDS[kind]).logits(TOKENS), base, err_msg=kind)
    # DoRA divides a norm by itself, computed in two programs: float32 rounding.
    np.testing.assert_allclose(load(KINDS["dora"]).logits(TOKENS), base, atol=2e-5)


@pytest.mark.parametrize("kind", thin.slow_after(3, KINDS))
def test_merged_and_unmerged_say_the_same(kind):
    model = load(KINDS[kind])
    params = learned(model.params)
    apart, together = logits(model, params), logits(model, merged(params))
    assert np.abs(apart - logits(model, merged(model.params))).max() > 0.05, "what was learned must matter here"
    assert np.abs(apart - together).max() <= 1e-5 * np.abs(together).max()


@pytest.mark.parametrize("name", thin.slow_after(3, (name for name in known("adapters") if not name.endswith("peft"))))
def test_an_adapter_is_what_it_declares(name):
    """By discovery: the leaves that it adds and no others, whether it merges, whether it changes nothing at its start."""
    entry, tree = {"name": name}, loading.abstract(small.MODEL, one_device(), {"name": name})
    plain, adapted_paths = ({sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(t)} for t in (
        loading.abstract(small.MODEL, one_device()), tree
    ))  # fmt: skip
    fresh = {path for path in adapted_paths if re.search(adapted.added(entry), path)}
    assert fresh and {path.removesuffix("/base") for path in adapted_paths - fresh} == plain
    nodes = [x for x in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "merged")) if hasattr(x, "merged")]
    (merges,), (files,), (one,) = (adapted.declares(entry, field) for field in ("merges", "files", "one"))
    assert bool(nodes) == merges and declared(resolve(entry, "adapters"), "recorded") is None
    assert (files or declared(resolve({"name": one}, "adapters"), "files")).kind
    assert adapted.recorded(adapted.recorded(entry)) == adapted.recorded(entry)
    columns = dict.fromkeys(routes.columns(tree), [0, 1])
    assert bool(columns) == bool(one)
    base, ours = np.asarray(load().logits(TOKENS)), np.asarray(load(entry).logits(TOKENS, columns=columns))
    # DoRA divides a norm by itself, computed in two programs: float32 rounding.
    assert (np.abs(base - ours).max() <= 2e-5) == bool(adapted.neutral(entry))


def test_the_adapter_of_contributing_is_one(tmp_path):
    """In a file of its own: it trains its factors alone, lies as its weights do, and merged it says the same."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    cells = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "mine.py").write_text("\n".join([cells[0], *(cell for cell in cells if "class Scaled" in cell)]))
    entry = {"name": f"{tmp_path}/mine.py:scaled"}
    model = load(entry)
    rng = np.random.default_rng(0)
    train, frozen = optim.partition(model.params, adapted.added(entry))
    assert {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(train)} == {
        f"layers/attention/{name}/kernel/factor" for name in "kv"
    }
    params = combine(jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape), jnp.float32), train), frozen)
    apart = logits(model, params)
    assert np.abs(apart - logits(model, merged(params))).max() <= 1e-5 * np.abs(apart).max()
    assert np.abs(apart - logits(model, model.params)).max() > 0.05
    places = sharding.stored(sharding.make_mesh(2, 2, 2), loading.abstract(small.MODEL, sharding.make_mesh(2, 2, 2), entry))
    node = places["layers"]["attention"]["k"]["kernel"]
    assert (node.base.shard_shape((2, 32, 16)), node.factor.shard_shape((2, 16))) == ((2, 16, 8), (2, 8))


def test_an_adapter_that_declares_nothing_is_named():
    def silent(params, key):
        return params

    with pytest.raises(UserError, match=r"does not say which leaves it adds; put @adapter\(adds=\(...\)\) above"):
        adapted.added({"name": name_of(silent, "adapters")})


def test_the_formulas():
    rng = np.random.default_rng(1)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 4), (3, 5)))
    tree = {"layers": {"attention": {"q": {"kernel": w}}}}

    def node(function, **options):
        return learned(function(tree, KEY, rank=2, alpha=6.0, **options))["layers"]["attention"]["q"]["kernel"]

    for function, scale in ((lora.lora, 3.0), (lora.rslora, 6 / 2**0.5)):
        held = node(function)
        wanted = np.asarray(w) + scale * np.asarray(held.a) @ np.asarray(held.b)
        np.testing.assert_allclose(held.merged(), wanted, rtol=1e-5)
        assert held.a.shape == (2, 5, 2) and held.b.shape == (2, 2, 4)
        assert np.abs(held.a).max() < 5**-0.5 and np.ptp(held.a) > 5**-0.5
        assert np.linalg.matrix_rank(np.asarray(held.merged() - w)[0], tol=1e-4) == 2
    held = node(lora.dora)
    np.testing.assert_allclose(np.linalg.norm(held.merged(), axis=1), np.abs(held.magnitude), rtol=1e-6)
    fresh = lora.dora(tree, KEY)["layers"]["attention"]["q"]["kernel"]
    np.testing.assert_allclose(fresh.magnitude, np.linalg.norm(w, axis=1), rtol=1e-6)
    # The norm is a constant to the gradient: d(sum of outputs)/d(b) = scale * magnitude / |V| * a^T x, summed over rows.
    layer = jax.tree.map(lambda a: a[0], held)
    got = jax.grad(lambda n: project(x, n).sum())(layer).b
    length = layer.magnitude / np.linalg.norm(np.asarray(w)[0] + 3 * np.asarray(layer.a @ layer.b), axis=0)
    np.testing.assert_allclose(got, 3 * np.outer((x @ layer.a).sum(0), length), rtol=1e-4, atol=1e-5)


def test_what_is_drawn_depends_on_path_and_key_alone():
    tree = {"layers": {n: {k: {"kernel": jnp.ones((2, 8, 8))} for k in ks} for n, ks in (("attention", "qo"), ("mlp", ["up"]))}}
    whole, part = lora.lora(tree, KEY), lora.lora({"layers": {"attention": tree["layers"]["attention"]}}, KEY)
    jax.tree.map(np.testing.assert_array_equal, whole["layers"]["attention"], part["layers"]["attention"])
    q, o = (whole["layers"]["attention"][n]["kernel"].a for n in "qo")
    assert np.abs(q - o).min() > 0 and np.abs(q[0] - q[1]).min() > 0
    assert np.abs(q - lora.lora(tree, jax.random.PRNGKey(4))["layers"]["attention"]["q"]["kernel"].a).min() > 0


# ----------------------------------------------------------------------------------------------------------- Quantised


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA's construction: 8 positive and 7 negative quantiles between 1/2 and the mean of 1 - 1/32 and 1 - 1/30, and zero."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    upper, lower = ([statistics.NormalDist().inv_cdf(q) for q in np.linspace(end, 0.5, n)[:-1]] for n in (9, 8))
    wanted = np.array(sorted([*upper, 0.0, *(-x for x in lower)])) / upper[0]
    np.testing.assert_allclose(quantise.LEVELS, wanted, atol=2e-6)  # the library's table was made in float32


@pytest.mark.parametrize("inputs", [128, 70])
def test_nf4_takes_the_nearest_level_of_its_block(inputs):
    w = np.random.default_rng(2).normal(size=(2, inputs, 3)).astype(np.float32)
    held = quantise.nf4(jnp.asarray(w))
    wanted = np.zeros_like(w)
    for start in range(0, inputs, 64):
        block = w[:, start : start + 64]
        top = np.abs(block).max(1, keepdims=True)
        nearest = np.abs(block[..., None] / top[..., None] - quantise.LEVELS).argmin(-1)
        wanted[:, start : start + 64] = quantise.LEVELS[nearest] * top
    np.testing.assert_array_equal(held.merged(), wanted)
    np.testing.assert_array_equal(quantise.nf4(held.merged()).merged(), wanted)  # its own numbers come back
    gap = np.diff(quantise.LEVELS).max() / 2
    assert np.abs(wanted - w).max() <= gap * np.abs(w).max() and gap == pytest.approx(0.15190, abs=1e-5)
    if inputs == 128:
        assert sum(x.nbytes for x in jax.tree.leaves(held)) == w.size * (1 / 2 + 4 / 64)
    x = np.random.default_rng(3).normal(size=(5, inputs)).astype(np.float32)
    layer = jax.tree.map(lambda a: a[1], held)
    np.testing.assert_allclose(project(x, layer), x @ wanted[1], rtol=1e-5, atol=1e-5)


def test_int8_is_within_half_a_step():
    w = np.random.default_rng(2).normal(size=(2, 50, 3)).astype(np.float32)
    w[0, :, 1] = 0.0  # a channel that is dead must not divide by its scale
    held = quantise.int8(jnp.asarray(w))
    steps = np.abs(w).max(1, keepdims=True) / 127
    np.testing.assert_allclose(held.scales, steps, rtol=1e-6)
    error = np.abs(np.asarray(held.merged()) - w)
    assert (error <= steps * 0.5001).all() and error.max() > 0.4 * steps.max()
    x = np.random.default_rng(3).normal(size=(4, 50)).astype(np.float32)
    layer = jax.tree.map(lambda a: a[1], held)
    for dtype, close in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):  # bfloat16 has eight bits
        got = np.asarray(project(jnp.asarray(x, dtype), layer), np.float32)
        np.testing.assert_allclose(got, x @ np.asarray(layer.merged()), rtol=close, atol=10 * close)


# ------------------------------------------------------------------------------------------------------------- Learning


def test_only_what_the_adapter_adds_gets_gradients_and_moments():
    spec = loading.describe(CONFIG, adapter=KINDS["dora nf4"])
    shapes = loading.abstract(spec.transformer, one_device(), spec.adapter)
    train, frozen = optim.partition(shapes, adapted.added(spec.adapter))
    names = {sharding.path_name(path).rpartition("/")[2] for path, _ in jax.tree_util.tree_leaves_with_path(train)}
    assert names == {"a", "b", "magnitude"}
    widths = [(24, 24), (24, 12), (24, 12), (24, 24), (24, 20), (24, 20), (20, 24)]
    assert sum(x.size for x in jax.tree.leaves(train)) == 2 * sum(3 * (i + o) + o for i, o in widths)
    moments = jax.eval_shape(optax.adamw(1e-3).init, train)
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (moments, train)]
    assert sizes[0] == 2 * sizes[1] + 1  # two moments, and a count
    with pytest.raises(UserError, match="kernel/base/codes, whose uint8 has no gradient"):
        optim.partition(shapes, "kernel")


def gradients_on(mesh, adapter, rows=small.ROWS):
    """Gradients of SFT on the small model with an adapter that has learned something."""
    model = small.MODEL
    with sharding.use(mesh):
        spec = loading.ModelSpec(model, None, {}, None, adapter=adapter)
        params = loading.weights(spec, mesh)
        params = jax.device_put(jax.device_get(learned(params)), sharding.stored(mesh, params))
        train, frozen = optim.partition(params, adapted.added(adapter))
        batch = sharding.distribute(small.batch(), mesh, rows)
        places = sharding.stored(mesh, train)
        run = jax.jit(lambda t, f, b: gradients(model.forward, sft.nll, t, f, b, KEY, 2)[:2], out_shardings=(None, places))
        loss, spec = run(train, frozen, batch)
        return float(loss), spec


@pytest.mark.slow
def test_eight_devices_learn_what_one_does():
    kind, mesh = "dora nf4", sharding.make_mesh(2, 2, 2)
    loss, one = gradients_on(one_device(), KINDS[kind])
    other, eight = gradients_on(mesh, KINDS[kind])
    assert other == pytest.approx(loss, rel=1e-6)

    # Sums in another order, float32: 1e-5 of a leaf's norm.
    def same(path, a, b):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) > 0, sharding.path_name(path)

    jax.tree_util.tree_map_with_path(same, jax.device_get(eight), jax.device_get(one))
    # The kernel's inputs are split over fsdp and its outputs over tensor, and so is what stands around it; the rank never is.
    down = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, eight["layers"]["mlp"]["down"]["kernel"])
    assert (down.a, down.b) == ((2, 24, 3), (2, 3, 16))
    up = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, eight["layers"]["mlp"]["up"]["kernel"])
    assert (up.a, up.b) == ((2, 16, 3), (2, 3, 24))
    base = sharding.stored(mesh, loading.abstract(small.MODEL, mesh, KINDS[kind]))["layers"]["mlp"]["up"]["kernel"].base
    whole = jax.tree.leaves(loading.abstract(small.MODEL, mesh, KINDS[kind])["layers"]["mlp"]["up"]["kernel"].base)[0]
    assert jax.tree.leaves(base)[0].shard_shape(whole.shape) == (2, whole.shape[1] // 2, whole.shape[2] // 2)


# ------------------------------------------------------------------------------------------------------------- Refusals

WRONG = {
    "embedding": ({"targets": ".*"}, "'.*' matches embed/weight, which cannot be adapted"),
    "norm": ({"targets": "norm1"}, "matches layers/norm1/scale, which cannot be adapted"),
    "nothing": ({"targets": "q_proj"}, "'q_proj' matches no parameter; the default is"),
    "pattern": ({"targets": "("}, "is no regular expression"),
    "rank": ({"rank": 0}, "config.adapter.rank: 0; it is a whole number of at least 1"),
    "alpha": ({"alpha": -1.0}, "config.adapter.alpha: -1.0; it is a number above 0"),
    "base": ({"base": "nf5"}, "config.adapter.base: unknown 'nf5'. Did you mean 'nf4'"),
    "option": ({"dropout": 0.1}, "adapters: lora takes no option 'dropout'"),
    "name": ({"name": "rslora"}, "unknown adapters 'rslora'. Did you mean 'lora.rslora'"),
}


@pytest.mark.parametrize("second", [{"name": "lora", "rank": 2}, {"name": "lora.dora", "targets": "attention/(o|q)/kernel$"}])
def test_two_adapters_around_one_weight_are_refused_and_around_others_they_are_not(second):
    first = {"name": "lora", "rank": 3, "targets": "attention/(q|v)/kernel$"}
    with pytest.raises(UserError, match="two adapters are around layers/attention/q/kernel, and a weight takes one"):
        loading.abstract(small.MODEL, one_device(), [first, second])
    apart = loading.abstract(small.MODEL, one_device(), [first, {**second, "targets": "attention/o/kernel$"}])
    assert [hasattr(apart["layers"]["attention"][name]["kernel"], "base") for name in "qkvo"] == [True, False, True, True]


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_adapter_is_refused(kind):
    options, message = WRONG[kind]
    with pytest.raises(UserError) as e:
        loading.abstract(small.MODEL, one_device(), {"name": "lora", **options})
    assert message in str(e.value)


def test_experts_are_refused_and_their_attention_is_not():
    spec = loading.describe(family_cases.config("mixtral/plain"))
    shapes = loading.abstract(spec.transformer, one_device(), {"name": "lora"})
    assert hasattr(shapes["layers"]["attention"]["q"]["kernel"], "project")
    assert not hasattr(shapes["layers"]["mlp"]["router"]["kernel"], "project")
    for path in ("mlp/experts/up/kernel", "mlp/router/kernel"):
        with pytest.raises(UserError, match=f"matches layers/{path}, which cannot be adapted"):
            loading.abstract(spec.transformer, one_device(), {"name": "lora", "targets": path})


# ----------------------------------------------------------------------------------------------------------- peft's files


def saved(folder, kind: str, config=CONFIG):
    """(model, params) with something learned, and its adapter in a folder."""
    model = load(KINDS[kind], config)
    params = learned(model.params)
    peft.save(folder, params, model.transformer.arch, adapted.recorded(KINDS[kind]), "the/base")
    return model, params


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_goes_out_in_pefts_layout_and_comes_back(kind, tmp_path):
    model, params = saved(tmp_path, kind)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wanted = {"r": 3, "lora_alpha": 16.0, "use_rslora": kind == "rslora", "use_dora": kind == "dora"}
    assert wanted.items() <= config.items() and config["base_model_name_or_path"] == "the/base"
    node = params["layers"]["attention"]["q"]["kernel"]
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(tensors[f"{stem}.lora_A.weight"], node.a[1].T)
    np.testing.assert_array_equal(tensors[f"{stem}.lora_B.weight"], node.b[1].T)
    assert tensors[f"{stem}.lora_B.weight"].flags.c_contiguous
    if kind == "dora":
        np.testing.assert_array_equal(tensors[f"{stem}.lora_magnitude_vector"], node.magnitude[1])
    assert len(tensors) == 2 * {"lora": 7 * 2, "rslora": 2 * 2, "dora": 7 * 3}[kind]
    again = load({"name": "peft", "folder": str(tmp_path)})
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(again.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=sharding.path_name(path))
    np.testing.assert_allclose(logits(again, again.params), logits(model, params), rtol=1e-6, atol=1e-6)  # scales' last bit
    entry = adapted.recorded({"name": "peft", "folder": str(tmp_path)})
    assert entry["name"] == ("lora.dora" if kind == "dora" else "lora.lora") and "folder" not in entry


BAD = {
    "no config": (lambda c, t: (None, t), "has no adapter_config.json"),
    "no object": (lambda c, t: ([c], t), "adapter_config.json: holds a JSON list, not an object"),
    "kind": (lambda c, t: (c | {"peft_type": "IA3"}, t), "peft_type = 'IA3' is not supported"),
    "pissa": (lambda c, t: (c | {"init_lora_weights": "pissa"}, t), "init_lora_weights = 'pissa' is not supported"),
    "ranks": (lambda c, t: (c | {"rank_pattern": {"q_proj": 4}}, t), "rank_pattern = {'q_proj': 4} is not supported"),
    "new": (lambda c, t: (c | {"use_tomorrow": True}, t), "use_tomorrow = True is not supported"),
    "layer": (lambda c, t: (c, {k: v for k, v in t.items() if "s.1." not in k}), "is missing; an adapter of some layers only"),
    "deeper": (
        lambda c, t: (c, t | {k.replace("layers.1", "layers.2"): v for k, v in t.items() if "layers.1" in k}),
        "adapts more than the model's 2 layers",
    ),
    "module": (
        lambda c, t: (c, {k.replace("q_proj", "qkv_proj"): v for k, v in t.items()}),
        "adapts self_attn.qkv_proj, which is no projection",
    ),
    "head": (lambda c, t: (c, t | {"base_model.model.lm_head.weight": np.ones(2)}), "lm_head.weight is no tensor of a"),
    "width": (
        lambda c, t: (c, {k: v[..., :7] if "lora_A" in k else v for k, v in t.items()}),
        r"is \(7, 3\) .* belongs to another base",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_peft_folder_that_is_more_or_less_is_refused(kind, tmp_path):
    saved(tmp_path, "rslora")
    files = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    change, message = BAD[kind]
    config, tensors = change(json.loads(files[0].read_text()), load_file(files[1]))
    files[0].unlink()
    if config:
        files[0].write_text(json.dumps(config))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, files[1])
    with pytest.raises(UserError, match=message):
        loading.abstract(loading.describe(CONFIG).transformer, one_device(), {"name": "peft", "folder": str(tmp_path)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_peft_folder_with_values_that_are_not_finite_is_refused(value):
    read = {f"model.layers.{layer}.mlp.up_proj.lora_B.weight": np.ones((4, 3), np.float32) for layer in range(2)}
    assert lora._stacked("folder", read, "mlp.up_proj", "b", (2, 3, 4)).shape == (2, 3, 4)
    read["model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = value
    with pytest.raises(UserError, match="folder: model.layers.1.mlp.up_proj.lora_B.weight has 1 values that are NaN or inf"):
        lora._stacked("folder", read, "mlp.up_proj", "b", (2, 3, 4))


def test_fused_projections_are_not_written_one_by_one(tmp_path):
    model = load(KINDS["lora"], family_cases.config("phi3/" + next(iter(family_cases.CASES["phi3"]))))
    with pytest.raises(UserError, match="phi3 keeps several projections in one tensor .*qkv_proj"):
        peft.save(tmp_path, model.params, model.transformer.arch, KINDS["lora"], None)
    with pytest.raises(UserError, match="there is no adapter in this checkpoint"):
        peft.save(tmp_path, load().params, load().transformer.arch, {}, None)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_peft_itself_says_the_same(kind, tmp_path):
    """The library, on transformers' model, with the exported folder; and a folder that it saved, read here."""
    library = pytest.importorskip("peft")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, params = saved(tmp_path / "adapter", kind)
    hf.save(tmp_path / "base", load().params, model.transformer.arch, CONFIG)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = library.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        said = theirs(torch.tensor(TOKENS)).logits.numpy()
    ours = logits(model, params)
    difference = np.abs(said - ours).max()
    print(f"{kind}: {difference:.1e} of {np.abs(ours).max():.1f}")
    assert difference <= 1e-4
    theirs.save_pretrained(tmp_path / "again")
    again = jaxpost.load(str(tmp_path / "base"), mesh=one_device(), adapter={"name": "peft", "folder": str(tmp_path / "again")})
    np.testing.assert_allclose(logits(again, again.params), ours, atol=1e-5)
