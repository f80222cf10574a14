"""Soft prompts, prefixes and vectors in place of tokens: what a model makes of them is what it makes of the same tokens, or the
same keys and values, in front of each document.
"""

import dataclasses
import functools
import json

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_cases as cases
import small
import thin
from safetensors.numpy import load_file, save_file
from sampler_cases import sampled

import jaxpost
from jaxpost import optim, sharding
from jaxpost.adapters import peft
from jaxpost.adapters.prompts import Prefix, Projected, Soft
from jaxpost.errors import UserError
from jaxpost.models import adapted, attention, hf, loading, prefix, transformer
from jaxpost.models.block import Block, RMSNorm
from jaxpost.models.families import Kind, Rope
from jaxpost.objectives import sft
from jaxpost.sampling.beam import search
from jaxpost.step import gradients

M = 3  # virtual tokens
KEY = jax.random.PRNGKey(3)
SOFT, PREFIX = {"name": "prompts.soft", "length": M}, {"name": "prompts.prefix", "length": M, "std": 1.0}
# Embeddings that are scaled, and a window that a document's tokens look past the prefix with.
MODELS = {
    **small.MODELS,
    "kinds": dataclasses.replace(small.MODELS["kinds"], arch=dataclasses.replace(small.MODELS["kinds"].arch, embed_scale=3.0)),
}
DOCUMENTS = ((4, 7), (6,), (1, 2, 9))  # lengths, a row each


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@functools.cache
def weights(kind: str):
    return MODELS[kind].init(jax.random.PRNGKey(1))


def rows(front: int = 0, length: int = 22, seed: int = 0) -> dict[str, np.ndarray]:
    """DOCUMENTS packed into rows, each behind `front` tokens 1, 2, ...; `own` is where their own tokens are."""
    rng = np.random.default_rng(seed)
    names = ("tokens", "segments", "positions", "own")
    batch = {name: np.zeros((len(DOCUMENTS), length), np.int32) for name in names}
    for row, lengths in enumerate(DOCUMENTS):
        end = 0
        for number, n in enumerate(lengths, 1):
            here = (row, slice(end, end + front + n))
            batch["tokens"][here] = [*range(1, front + 1), *rng.integers(0, small.VOCAB, n)]
            batch["segments"][here], batch["positions"][here] = number, np.arange(front + n)
            batch["own"][here] = np.arange(front + n) >= front
            end += front + n
    return batch


def embeddings(kind: str, ids) -> jax.Array:
    """Tokens' vectors as they enter the first layer."""
    return MODELS[kind].arch.embed_scale * weights(kind)["embed"]["weight"][np.asarray(ids)]


@functools.partial(jax.jit, static_argnames="kind")
def hidden(params, batch, kind=""):
    return MODELS[kind].forward(params, {k: x for k, x in batch.items() if k != "own"}).hidden


def own(batch, values) -> np.ndarray:
    """The values at the documents' own tokens."""
    return np.asarray(values)[batch["own"] > 0]


def near(got, wanted, bound=1e-5):
    """Within 1e-5 of the largest: float32's rounding in sums over another number of keys."""
    np.testing.assert_allclose(got, wanted, atol=bound * np.abs(wanted).max(), rtol=0)


# ------------------------------------------------------------------------------------------------------- What they compute


@pytest.mark.parametrize("kind", thin.slow_after(1, MODELS))
def test_a_soft_prompt_is_the_same_tokens_in_front(kind):
    plain, fronted = rows(), rows(M)
    params = weights(kind) | {"prefix": Soft(embeddings(kind, range(1, M + 1)))}
    wanted = own(fronted, hidden(weights(kind), fronted, kind))
    got = own(plain, hidden(params, plain, kind))
    near(got, wanted)
    assert np.abs(own(plain, hidden(weights(kind), plain, kind)) - wanted).max() > 0.1, "the prompt must matter"


def test_its_gradient_is_that_of_vectors_in_place_of_the_tokens():
    kind, plain, fronted = "kinds", rows(), rows(M)
    weights(kind)  # which are kept, so they are made outside of a program
    weight = jnp.cos(jnp.arange(small.ARCH.width))
    vectors = jnp.asarray(np.random.default_rng(4).normal(size=(M, small.ARCH.width)), jnp.float32)

    @jax.jit
    def by_prompt(vectors):
        values = hidden(weights(kind) | {"prefix": Soft(vectors)}, plain, kind)
        return jnp.sum((values @ weight) * plain["own"])

    place = np.minimum(fronted["positions"], M - 1)
    at_front = (fronted["own"] == 0) & (fronted["segments"] > 0)

    @jax.jit
    def by_rows(embeds):
        values = hidden(weights(kind), {**fronted, "embeds": embeds, "embedded": at_front}, kind)
        return jnp.sum((values @ weight) * fronted["own"])

    value, got = jax.value_and_grad(by_prompt)(vectors)
    embeds = jnp.where(at_front[..., None], vectors[place], 7.0)  # what stands elsewhere is not read
    other, each = jax.value_and_grad(by_rows)(embeds)
    assert float(value) == pytest.approx(float(other), rel=1e-5)
    wanted = np.stack([np.asarray(each)[at_front & (place == i)].sum(0) for i in range(M)])
    near(got, wanted, 2e-5)  # one sum over documents against sums of each
    assert not np.asarray(each)[~at_front].any()


def test_vectors_take_the_place_of_embeddings():
    batch, kind = rows(), "kinds"
    other = {**batch, "tokens": np.random.default_rng(9).integers(0, small.VOCAB, batch["tokens"].shape)}
    where = np.random.default_rng(8).random(batch["tokens"].shape) < 0.5
    mixed = {**batch, "tokens": np.where(where, batch["tokens"], other["tokens"])}
    embedded = {**batch, "embeds": embeddings(kind, other["tokens"]), "embedded": ~where}
    np.testing.assert_array_equal(
        own(batch, hidden(weights(kind), embedded, kind)), own(batch, hidden(weights(kind), mixed, kind))
    )


@pytest.mark.parametrize("kind", MODELS)
def test_a_prefix_is_those_keys_and_values(kind):
    """Keys and values that decoding's own cache holds after the same tokens."""
    model, plain, fronted = MODELS[kind], rows(), rows(M)
    front = {"tokens": jnp.arange(1, M + 1)[None], "positions": jnp.arange(M)[None]}
    cache = jax.jit(model.forward)(weights(kind), front, model.make_cache(1, M)).cache
    axes = attention.cache_axes()
    k, v = (jnp.stack([jnp.einsum(f"{axes[n]}->TKH", held[n]) for held in cache]).reshape(2, M, -1) for n in "kv")
    wanted = own(fronted, hidden(weights(kind), fronted, kind))
    near(own(plain, hidden(weights(kind) | {"prefix": Prefix(k, v)}, plain, kind)), wanted)
    computed = prefix.keys_values(model, weights(kind) | {"prefix": Soft(embeddings(kind, range(1, M + 1)))})
    near(computed.k.reshape(k.shape), k)
    near(computed.v.reshape(v.shape), v)


def test_what_sees_what_is_written_down_one_by_one():
    """A window of w sees the w last places, the prefix's among them; branches see the prefix too; padding sees nothing."""
    batch = {k: jnp.asarray(x) for k, x in rows().items() if k != "own"}
    batch["positions"] = batch["positions"] + M
    for window in (None, 4):
        got = np.asarray(attention.document_mask(batch, window, M))
        assert got.shape == (3, 22, M + 22)
        segments, positions = np.asarray(batch["segments"]), np.asarray(batch["positions"])
        for row, query, key in np.ndindex(got.shape):
            place = key if key < M else positions[row, key - M]
            same = key < M or (segments[row, key - M] == segments[row, query] and key - M <= query)
            wanted = segments[row, query] > 0 and same and (window is None or positions[row, query] - place < window)
            assert got[row, query, key] == wanted, (window, row, query, key)


def test_documents_are_alone_packed_padded_and_as_branches():
    params, plain = weights("kinds") | {"prefix": Soft(embeddings("kinds", range(1, M + 1)))}, rows()
    packed = np.asarray(hidden(params, plain, "kinds"))
    for row, lengths in enumerate(DOCUMENTS):
        for number in range(1, len(lengths) + 1):
            here = plain["segments"][row] == number
            alone = {k: np.zeros_like(x) for k, x in plain.items()}
            for name in alone:
                alone[name][0, : here.sum()] = 1 if name == "segments" else plain[name][row, here]
            near(np.asarray(hidden(params, alone, "kinds"))[0, : here.sum()], packed[row, here])
    # A prompt a b with the branches c d and c e, against a b c d and a b c e.
    whole = {k: np.zeros((3, 22), np.int32) for k in ("tokens", "segments", "positions")}
    shared = {k: x.copy() for k, x in whole.items()} | {"branches": np.zeros((3, 22), np.int32)}
    for row, last in enumerate((5, 9)):
        whole["tokens"][row, :4], whole["segments"][row, :4], whole["positions"][row, :4] = (7, 8, 4, last), 1, range(4)
    shared["tokens"][0, :6], shared["segments"][0, :6] = (7, 8, 4, 5, 4, 9), (1, 1, 1, 1, 2, 2)
    shared["positions"][0, :6], shared["branches"][0, :6] = (0, 1, 2, 3, 2, 3), (0, 0, 1, 1, 2, 2)
    one, other = np.asarray(hidden(params, whole, "kinds")), np.asarray(hidden(params, shared, "kinds"))
    near(other[0, :4], one[0, :4])
    near(other[0, 4:6], one[1, 2:4])


@pytest.mark.slow
def test_layers_that_are_unstacked_or_remembered_less_say_the_same():
    model, batch = MODELS["kinds"], {k: x for k, x in rows().items() if k != "own"}
    params = weights("kinds") | {"prefix": Soft(embeddings("kinds", range(1, M + 1)))}
    wanted = np.asarray(hidden(params, batch, "kinds"))

    @jax.jit
    def unstacked(params):
        return model.forward(transformer.unstack(prefix.computed(model, params), model.arch.layers), batch).hidden

    near(unstacked(params), wanted)

    def loss(model):
        return lambda vectors: jnp.sum(jnp.sin(model.forward({**params, "prefix": Soft(vectors)}, batch).hidden))

    each = [
        jax.jit(jax.grad(loss(dataclasses.replace(model, remat=way))))(params["prefix"].vectors) for way in ("none", "full")
    ]
    near(*each)


def test_a_perceptron_is_the_prefix_that_it_makes():
    params = adapted.applied({**PREFIX, "hidden": 5}, weights(""), KEY)
    held = params["prefix"]
    assert isinstance(held, Projected) and held.length == M
    flat = np.tanh(np.asarray(held.inputs) @ held.w1 + held.b1) @ held.w2 + held.b2
    layers = np.asarray(flat).reshape(M, 2, 2, 16)
    near(held.plain().k, layers[:, :, 0].transpose(1, 0, 2))
    near(held.plain().v, layers[:, :, 1].transpose(1, 0, 2))
    batch = rows()
    near(own(batch, hidden(params, batch)), own(batch, hidden(params | {"prefix": held.plain()}, batch)))


def test_nothing_is_compiled_of_what_is_not_there():
    """Without a prefix and vectors the program is, operation by operation, that of the layers alone."""
    model, arch = small.MODEL, small.ARCH
    batch = {k: x for k, x in rows().items() if k != "own"}

    def forward(params, batch):
        x = sharding.lookup(params["embed"]["weight"], batch["tokens"], model.dtype)
        x = x * jnp.asarray(arch.embed_scale, x.dtype)
        (mask,), attend = attention.over_rows("xla", arch, batch, model.dtype)
        lengths = attention.document_lengths(batch["segments"], batch["positions"])
        turn = attention.rotary(arch.kinds[0].rope, arch.head_width, batch["positions"], lengths)

        def block(x, layer):
            layer = sharding.gather(layer, model.dtype)
            x, *_ = Block(arch).apply({"params": layer}, x, batch["positions"], turn, mask, attend)
            return x, None

        x, _ = jax.lax.scan(block, x, params["layers"])
        return RMSNorm(arch.eps).apply({"params": params["norm"]}, x)

    def ours(params, batch):
        return model.forward(params, batch).hidden

    ours.__name__ = "forward"
    wanted, got = (jax.jit(f).lower(weights(""), batch).as_text() for f in (forward, ours))
    assert got == wanted and wanted.count("dot_general") == 9
    # A model whose prompt is taken away, as the reference's is, is the same tree.
    params = weights("") | {"prefix": Soft(embeddings("", [1]))}
    bare = loading.to_reference(loading.ModelSpec(model, None, {}, None, adapter=SOFT))(params)
    assert jax.tree.structure(bare) == jax.tree.structure(weights(""))


# ---------------------------------------------------------------------------------------------------- Gradients and meshes


def learned_on(mesh, adapter, microbatches: int = 1):
    """(loss, gradients of what the adapter adds) of SFT on the small model."""
    with sharding.use(mesh):
        spec = loading.ModelSpec(small.MODEL, None, {}, None, adapter=adapter)
        train, frozen = optim.partition(loading.weights(spec, mesh), adapted.added(adapter))
        batch, places = sharding.distribute(small.batch(), mesh, small.ROWS), sharding.stored(mesh, train)

        def learned(train, frozen, batch):
            return gradients(small.MODEL.forward, sft.nll, train, frozen, batch, KEY, microbatches)[:2]

        loss, grads = jax.jit(learned, out_shardings=(None, places))(train, frozen, batch)
        return float(loss), jax.device_get(grads)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [SOFT, pytest.param(PREFIX, marks=pytest.mark.slow)], ids=["soft", "prefix"])
def test_eight_devices_and_microbatches_learn_what_one_does(adapter):
    one = learned_on(one_device(), adapter)
    eight = learned_on(sharding.make_mesh(2, 2, 2), adapter, microbatches=2)
    assert one[0] == pytest.approx(eight[0], rel=1e-6)
    leaves = jax.tree.leaves(one[1])
    assert len(leaves) == {"prompts.soft": 1, "prompts.prefix": 2}[adapter["name"]]
    for a, b in zip(leaves, jax.tree.leaves(eight[1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a) > 0  # sums in another order, float32


# ---------------------------------------------------------------------------------------------------------- The sampler

WAYS = {"refilled": {"slots": 2}, "mesh, refilled": {"sizes": (2, 2, 2), "slots": 1}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("entry", [SOFT, pytest.param(PREFIX, marks=pytest.mark.slow)], ids=["soft", "prefix"])
def test_recorded_logps_are_the_training_forwards(entry, way):
    params = adapted.applied(entry, cases.weights(), KEY)
    completions = sampled(params=params, **WAYS[way])
    # 5e-5: the design's bound for the sampler in float32.
    np.testing.assert_allclose(
        completions.logps, cases.logps(cases.judged(completions, params=params), completions), atol=5e-5, rtol=0
    )
    plain = cases.logps(cases.judged(completions), completions)
    assert np.abs(plain - completions.logps).max() > 0.05, "the prompt must matter"


def test_a_window_slides_past_the_prefix_in_the_sampler_too():
    arch = dataclasses.replace(cases.MODEL.arch, kinds=(Kind(), Kind(5, Rope(33.0))), pattern=(1, 0))
    model = dataclasses.replace(cases.MODEL, arch=arch)
    params = adapted.applied(SOFT, cases.weights(), KEY)
    completions = sampled(model=model, params=params, slots=2)
    wanted = cases.logps(cases.judged(completions, model=model, params=params), completions)
    np.testing.assert_allclose(completions.logps, wanted, atol=5e-5, rtol=0)
    assert completions.lengths.max() > 5  # past the window


def test_a_sampler_with_a_prompt_draws_what_one_with_its_tokens_draws():
    """The tokens in front of every prompt are as many places in the window."""
    ids = np.array([5, 9, 4])
    params = cases.weights() | {"prefix": Soft(cases.weights()["embed"]["weight"][ids])}
    completions = sampled(params=params, temperature=0.0)
    fronted = [np.concatenate([ids, p]) for p in cases.prompts()]
    other = sampled(fronted, prompt_window=cases.WINDOW + M, temperature=0.0)
    np.testing.assert_array_equal(completions.tokens, other.tokens)
    np.testing.assert_allclose(completions.logps, other.logps, atol=5e-5, rtol=0)


def test_a_beam_search_sees_the_prompt():
    ids = np.array([5, 9, 4])
    params = cases.weights() | {"prefix": Soft(cases.weights()["embed"]["weight"][ids])}
    fronted = [np.concatenate([ids, p]) for p in cases.prompts()]
    options = {"mesh": cases.mesh(1, 1, 1), "new": 4, "stop": (cases.STOP,), "beams": 3}
    prompted = search(cases.MODEL, params, cases.prompts(), prompt_window=cases.WINDOW, **options)
    other = search(cases.MODEL, cases.weights(), fronted, prompt_window=cases.WINDOW + M, **options)
    np.testing.assert_array_equal(prompted.tokens, other.tokens)
    np.testing.assert_allclose(prompted.logps, other.logps, atol=5e-5, rtol=0)


# --------------------------------------------------------------------------------------------- What a model has room for


def test_places_are_counted_against_the_models_positions():
    model = small.MODEL
    assert prefix.max_positions(model, weights("")) == small.LENGTH
    spec = loading.ModelSpec(model, None, {}, None, adapter=SOFT)
    assert loading.max_positions(spec) == small.LENGTH - M
    assert loading.max_positions(dataclasses.replace(spec, adapter={**PREFIX, "length": 5})) == small.LENGTH - 5
    with pytest.raises(UserError, match="leaves room for 1 of the model's 20 positions; make it shorter"):
        loading.max_positions(dataclasses.replace(spec, adapter={**SOFT, "length": small.LENGTH - 1}))
    long = Rope(kind="longrope", original=12, long=(1.0,) * 4, short=(1.0,) * 4)
    turned = dataclasses.replace(model, arch=dataclasses.replace(small.ARCH, kinds=(Kind(None, long),)))
    prompted = weights("") | {"prefix": Soft(jnp.zeros((M, 32)))}
    assert (prefix.max_positions(turned, {}), prefix.max_positions(turned, prompted)) == (20, 9)


def test_a_kernel_gives_way_to_a_prefix():
    batch = {"segments": jnp.ones((1, 128), jnp.int32), "positions": jnp.arange(128)[None] + M}
    for kernel, dtype in (("splash", jnp.float32), ("cudnn", jnp.bfloat16)):
        (mask,), attend = attention.over_rows(kernel, small.ARCH, batch, dtype, M)
        assert mask.shape == (1, 128, M + 128) and attend.func is attention.attend


# -------------------------------------------------------------------------------------------------- Its entry in a recipe


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def adapted_model(adapter, model=small.MODEL, tokenizer=None):
    return loading.weights(loading.ModelSpec(model, tokenizer, {}, None, adapter=adapter), one_device(), seed=1)


def test_a_soft_prompt_begins_as_a_text_or_as_tokens():
    model = MODELS["kinds"]  # whose embeddings are scaled
    table = 3.0 * np.asarray(adapted_model({}, model)["embed"]["weight"])
    for text, ids in (("dca", [3, 2, 0]), ("f", [5, 5, 5]), ("bcdefg", [1, 2, 3])):
        held = adapted_model({**SOFT, "text": text}, model, Letters())["prefix"].vectors
        np.testing.assert_allclose(held, table[ids], rtol=1e-6, err_msg=text)
    drawn = np.asarray(adapted_model(SOFT, model)["prefix"].vectors)
    near(np.abs(drawn[:, None] - table[None]).max(-1).min(1) + 1, np.ones(M))  # each is some token's
    with pytest.raises(UserError, match="config.adapter.text: the model comes without a tokenizer"):
        loading.describe(small_config(), adapter={**SOFT, "text": "a"})


def test_a_text_that_the_tokenizer_has_no_tokens_for_is_refused_before_weights_are_read():
    spec = loading.describe({**small_config(), "vocab_size": 32}, "tasks.arithmetic.tokenizer", adapter={**SOFT, "text": "Say"})
    with pytest.raises(UserError, match="config.adapter.text: 'Say': the tokenizer has no token for 'S'"):
        loading.check(spec)


def small_config() -> dict:
    names = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    names |= {"initializer_range": 0.3}
    return {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **names}


WRONG = {
    "length": ([{"name": "prompts.soft", "length": 0}], "config.adapter.length: 0; it is a whole number of at least 1"),
    "hidden": ([{"name": "prompts.prefix", "hidden": -1}], "config.adapter.hidden: -1; it is a whole number"),
    "two": ([SOFT, PREFIX], "config.adapter: two prompts stand before a document"),
    "option": ([{"name": "prompts.soft", "rank": 2}], "adapters: prompts.soft takes no option 'rank'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_prompt_is_refused(kind):
    adapter, message = WRONG[kind]
    with pytest.raises(UserError, match=message):
        loading.abstract(small.MODEL, one_device(), adapter)


def test_adapters_compose():
    """A prompt beside LoRA is LoRA's model with the prompt, in either order; all of both trains, and nothing else."""
    lora = {"name": "lora", "rank": 2}
    alone, prompt = adapted_model(lora), adapted_model(SOFT)
    for adapter in ([SOFT, lora], [lora, SOFT]):
        both = adapted_model(adapter)
        assert jax.tree.structure(both) == jax.tree.structure({**alone, "prefix": prompt["prefix"]})
        jax.tree.map(np.testing.assert_array_equal, both, {**alone, "prefix": prompt["prefix"]})
        train, _ = optim.partition(both, adapted.added(adapter))
        names = {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(train)}
        assert names == {"prefix/vectors", *(n for n in names if n.endswith(("/kernel/a", "/kernel/b")))} and len(names) == 15
        spec = loading.ModelSpec(small.MODEL, None, {}, None, adapter=adapter)
        assert loading.reference(spec).adapter == lora
        jax.tree.map(np.testing.assert_array_equal, loading.to_reference(spec)(both), alone)
        assert [entry["name"] for entry in loading.adapted.recorded(adapter)] == [
            {"lora": "lora.lora"}.get(entry["name"], entry["name"]) for entry in adapter
        ]


# ----------------------------------------------------------------------------------------------------------- peft's files

FILES = {
    "soft": {"name": "prompts.soft", "length": M},
    "prefix": {"name": "prompts.prefix", "length": M, "std": 1.0},
    "perceptron": {"name": "prompts.prefix", "length": M, "hidden": 5},
}
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 12))


def opened(adapter, config=None):
    return jaxpost.load(config or small_config(), mesh=one_device(), adapter=adapter)


@pytest.mark.parametrize("kind", thin.slow_after(1, FILES))
def test_a_prompt_goes_out_in_pefts_layout_and_comes_back(kind, tmp_path):
    model = opened(FILES[kind])
    names = peft.save(tmp_path, model.params, model.transformer.arch, adapted.recorded(FILES[kind]), "the/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert names == ["adapter_config.json", "adapter_model.safetensors"] and config["num_virtual_tokens"] == M
    tensor = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    held = model.params["prefix"]
    if kind == "soft":
        np.testing.assert_array_equal(tensor, held.vectors)
    else:  # a token's keys and values, layer after layer
        plain = held.plain() if kind == "perceptron" else held
        assert tensor.shape == (M, 2 * 2 * 12)
        np.testing.assert_allclose(
            tensor[1], np.concatenate([x[i, 1] for i in range(2) for x in (plain.k, plain.v)]), rtol=1e-6
        )
    again = opened({"name": "peft", "folder": str(tmp_path)})
    np.testing.assert_allclose(again.logits(TOKENS), model.logits(TOKENS), atol=1e-5)
    assert np.abs(model.logits(TOKENS) - opened(None).logits(TOKENS)).max() > 1e-2, "the prompt must matter"
    entry = adapted.recorded({"name": "peft", "folder": str(tmp_path)})
    assert entry["name"] == FILES[kind]["name"] and entry["length"] == M and "folder" not in entry
    # One that is read has learned already: the model with it is the reference.
    spec = loading.ModelSpec(model.transformer, None, {}, None, adapter={"name": "peft", "folder": str(tmp_path)})
    assert loading.to_reference(spec)(again.params) is again.params


def test_several_adapters_are_a_folder_each(tmp_path):
    entries = [{"name": "lora", "rank": 2}, FILES["soft"]]
    model = opened(entries)
    names = peft.save(tmp_path, model.params, model.transformer.arch, adapted.recorded(entries), None)
    assert names == [f"{a}/adapter_{b}" for a in ("lora", "soft") for b in ("config.json", "model.safetensors")]
    again = opened([{"name": "peft", "folder": str(tmp_path / name)} for name in ("lora", "soft")])
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    with pytest.raises(UserError, match="two adapters are LORA, and a folder of peft's holds one"):
        peft.save(tmp_path / "two", model.params, model.transformer.arch, [entries[0], entries[0]], None)


BAD = {
    "width": (lambda c, t: (c, {k: v[:, :7] for k, v in t.items()}), r"prompt_embeddings is \(3, 7\), the model wants 24"),
    "more": (
        lambda c, t: (c, t | {"word_embeddings": np.ones(2)}),
        "holds prompt_embeddings, word_embeddings; a prompt is one",
    ),
    "nan": (lambda c, t: (c, {k: v * np.nan for k, v in t.items()}), "prompt_embeddings has 72 values that are NaN or inf"),
    "field": (lambda c, t: (c | {"fresh_idea": 2}, t), "fresh_idea = 2 is not supported"),
    "kind": (lambda c, t: (c | {"peft_type": "P_TUNING"}, t), "'P_TUNING' is not supported; what is are LORA, PREFIX_TUNING"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_that_is_no_prompt_of_the_model_is_refused(kind, tmp_path):
    model = opened(FILES["soft"])
    peft.save(tmp_path, model.params, model.transformer.arch, FILES["soft"], None)
    files = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    change, message = BAD[kind]
    config, tensors = change(json.loads(files[0].read_text()), load_file(files[1]))
    files[0].write_text(json.dumps(config))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, files[1])
    with pytest.raises(UserError, match=message):
        opened({"name": "peft", "folder": str(tmp_path)})


def parity(tmp_path, config) -> tuple:
    """(peft, torch, transformers' model of our fresh weights)."""
    library, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = opened(None, config)
    hf.save(tmp_path / "base", model.params, model.transformer.arch, config)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    return library, torch, base


def theirs(torch, model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()[:, -TOKENS.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("kind", FILES)
def test_peft_opens_ours(kind, family, tmp_path):
    config = small_config() if family == "llama" else family_cases.config("gemma/" + next(iter(family_cases.CASES["gemma"])))
    library, torch, base = parity(tmp_path, config)
    model = jaxpost.load(str(tmp_path / "base"), mesh=one_device(), adapter=FILES[kind])
    peft.save(tmp_path / "ours", model.params, model.transformer.arch, FILES[kind], str(tmp_path / "base"))
    difference = np.abs(theirs(torch, library.PeftModel.from_pretrained(base, tmp_path / "ours")) - model.logits(TOKENS)).max()
    print(f"{kind} {family}: {difference:.1e} of {np.abs(model.logits(TOKENS)).max():.1f}")
    assert difference <= 1e-4


@pytest.mark.parametrize("kind", FILES)
def test_ours_opens_what_peft_made(kind, tmp_path):
    library, torch, base = parity(tmp_path, small_config())
    torch.manual_seed(0)
    about = {"task_type": "CAUSAL_LM", "num_virtual_tokens": M}
    chosen = {
        "soft": lambda: library.PromptTuningConfig(**about),
        "prefix": lambda: library.PrefixTuningConfig(**about),
        "perceptron": lambda: library.PrefixTuningConfig(**about, prefix_projection=True, encoder_hidden_size=5),
    }[kind]()
    wrapped = library.get_peft_model(base, chosen).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    model = jaxpost.load(
        str(tmp_path / "base"), mesh=one_device(), adapter={"name": "peft", "folder": str(tmp_path / "theirs")}
    )
    difference = np.abs(theirs(torch, wrapped) - model.logits(TOKENS)).max()
    print(f"{kind}: {difference:.1e} of {np.abs(model.logits(TOKENS)).max():.1f}")
    assert difference <= 1e-4
