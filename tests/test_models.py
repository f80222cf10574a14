"""The model protocol, for every class of models/ that is one and for models that a file of one's own makes.

A document does not depend on its neighbours, decoding gives what whole rows give, and a model that is made of others gives what
they give.
"""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_cases as cases

import jaxpost
from jaxpost import recipe, sharding
from jaxpost.errors import UserError
from jaxpost.models import composed, encoder, encoder_families, loading, protocol
from jaxpost.models.heads import logits
from jaxpost.objectives.logprobs import token_scores
from jaxpost.types import Head, Output

SMALL = cases.MODEL


def contrast(large, small):
    """Contrastive decoding's logits: what the large model likes more than the small one does."""
    return 1.7 * large - 0.7 * small


WIDE = dataclasses.replace(SMALL, arch=dataclasses.replace(SMALL.arch, width=24, layers=1, logit_cap=3.0))
ENCODER = encoder.model(
    encoder_families.architecture({**encoder_cases.config("modernbert/biased"), "vocab_size": SMALL.vocab, "hidden_size": 8})
)
EACH = {
    "Transformer": SMALL,
    "Encoder": ENCODER,
    "Fused": composed.Fused((WIDE, SMALL), contrast),
    "Patched": composed.Patched(
        SMALL, {"layers.1.resid_pre": lambda x, batch: x + 0.5 * jnp.cos(batch["positions"])[..., None]}
    ),
}


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """A model with a state a row in place of keys and values: h_t = tanh(a h_{t-1} + embed_t), begun anew in each document."""

    vocab: int = SMALL.vocab
    width: int = 8
    max_positions: int = 64
    dtype = jnp.float32

    def init(self, key):
        a, b = jax.random.split(key)
        return {
            "embed": {"weight": jax.random.normal(a, (self.vocab, self.width))},
            "decay": jnp.linspace(0.3, 0.9, self.width),
            "head": {"weight": jax.random.normal(b, (self.vocab, self.width))},
        }

    def forward(self, params, batch, cache=None, *, tap=(), patch=None):
        x = params["embed"]["weight"][batch["tokens"]]
        state = jnp.zeros((len(x), self.width)) if cache is None else cache["state"]
        fresh = batch["positions"] == 0

        def turn(h, inputs):
            x, fresh, real = inputs
            h = jnp.where(real[:, None], jnp.tanh(params["decay"] * jnp.where(fresh[:, None], 0.0, h) + x), h)
            return h, h

        real = jnp.ones_like(fresh) if "lengths" not in batch else jnp.arange(x.shape[1]) < batch["lengths"][:, None]
        state, hidden = jax.lax.scan(turn, state, (x.swapaxes(0, 1), fresh.T, real.T))
        return Output(hidden.swapaxes(0, 1), Head(params["head"]["weight"]), None if cache is None else {"state": state})

    def make_cache(self, batch_size, length):
        return {"state": jnp.zeros((batch_size, self.width))}

    def cache_axes(self):
        return {"state": "BD"}

    def rotations(self, cache):
        return ()

    def prepared(self, params):
        return params

    def is_prepared(self, params):
        return True


MODELS = {**EACH, "Recurrent": Recurrent()}


def test_every_model_of_the_package_is_held():
    folder, names = Path(protocol.__file__).parent, set()
    for path in folder.glob("*.py"):
        module = importlib.import_module(f"jaxpost.models.{path.stem}")
        classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        names |= {c.__name__ for c in classes if hasattr(c, "forward")} - {"Model"}
    assert names - {"Sampled"} == set(EACH)


def rows():
    rng = np.random.default_rng(0)
    segments = jnp.asarray([[1] * 4 + [2] * 3 + [0], [1] * 8], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 0], list(range(8))], jnp.int32)
    return {
        "tokens": jnp.asarray(rng.integers(1, SMALL.vocab, (2, 8)), jnp.int32),
        "segments": segments,
        "positions": positions,
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_the_protocol(name):
    model, batch = MODELS[name], rows()
    sampled = isinstance(model, protocol.Sampled)
    protocol.check(model, name, protocol.Sampled if sampled else protocol.Model)
    params = jax.jit(model.init)(jax.random.PRNGKey(0))
    out = jax.jit(model.forward)(params, batch)
    assert out.hidden.shape == (2, 8, model.width)
    scores = logits(out.hidden, out.head)
    assert scores.shape == (2, 8, model.vocab)
    # A document alone in its row says what it says beside another.
    alone = {k: x[:1, 4:7] for k, x in batch.items()}
    np.testing.assert_allclose(logits(model.forward(params, alone).hidden, out.head), scores[:1, 4:7], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        jax.jit(lambda p: logits(model.forward(p, batch).hidden, out.head))(params).shape, scores.shape
    )
    assert sampled == (name != "Encoder")
    if not sampled:
        return
    # A token at a time says what the whole row says.
    cache, steps, prepared = model.make_cache(1, 8), [], model.prepared(params)
    assert jax.tree.structure(model.cache_axes()) == jax.tree.structure(cache)
    assert model.is_prepared(prepared)
    turn = jax.jit(model.forward)
    for i in range(8):
        inputs = {k: batch[k][1:, i : i + 1] for k in ("tokens", "positions")}
        step = turn(prepared, {**inputs, "rotations": model.rotations(cache)}, cache)
        cache = step.cache
        steps.append(logits(step.hidden[:, 0], step.head))
    np.testing.assert_allclose(jnp.stack(steps, 1), scores[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Fused", "Patched", "Recurrent"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_what_was_sampled_scores_as_it_was_drawn(name, sizes):
    model = MODELS[name]
    params = model.init(jax.random.PRNGKey(1))
    drawn = cases.sampled(model=model, params=params, sizes=sizes)
    prompts = [prompt for prompt in cases.prompts() for _ in range(cases.GROUP)]
    documents = [np.concatenate([p, t[:n]]) for p, t, n in zip(prompts, drawn.tokens, drawn.lengths, strict=True)]
    tokens = np.zeros((len(documents), cases.WINDOW + cases.NEW), np.int32)
    for row, document in zip(tokens, documents, strict=True):
        row[: len(document)] = document
    real = np.arange(tokens.shape[1]) < np.array([len(x) for x in documents])[:, None]
    batch = {"tokens": tokens, "segments": real.astype(np.int32), "positions": np.where(real, np.arange(tokens.shape[1]), 0)}
    scores = jax.jit(lambda p, b: token_scores(model.forward(p, b), b, real))(params, jax.tree.map(jnp.asarray, batch))
    for prompt, logps, n, scored in zip(prompts, drawn.logps, drawn.lengths, scores["logps"], strict=True):
        np.testing.assert_allclose(scored[len(prompt) : len(prompt) + n], logps[:n], atol=5e-5)


def test_a_fused_model_says_what_its_parts_say_and_its_gradient_is_theirs():
    model, batch = EACH["Fused"], rows()
    batch["mask"] = (batch["segments"] > 0) & (batch["positions"] > 0)
    params = model.init(jax.random.PRNGKey(0))

    def apart(params):
        parts = [one.forward(params[str(i)], batch) for i, one in enumerate(model.models)]
        scores = jax.nn.log_softmax(contrast(*(logits(out.hidden, out.head) for out in parts)))
        logps = jnp.take_along_axis(scores[:, :-1], batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(batch["mask"][:, 1:], logps, 0.0))

    def together(params):
        return jnp.sum(token_scores(model.forward(params, batch), batch)["logps"])

    expected, grads = jax.jit(jax.value_and_grad(apart))(params)
    value, own = jax.jit(jax.value_and_grad(together))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), own, grads)
    tapped = model.forward(params, batch, tap=("0.layers.0.q", "1.layers.0.q"), patch={"1.layers.0.q": 0.0}).taps
    assert tapped["0.layers.0.q"].any() and not tapped["1.layers.0.q"].any()
    with pytest.raises(UserError, match="'layers.0.q' names none of 2 models"):
        model.forward(params, batch, tap=("layers.0.q",))


def folder(tmp_path, name: str, seed: int, vocab: int = 32):
    from jaxpost.models import hf
    from jaxpost.tasks import arithmetic

    config = {"model_type": "llama", "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    spec = loading.describe(config, text=False)
    path = tmp_path / name
    hf.save(path, loading.weights(spec, mesh, seed), spec.transformer.arch, config, "float32")
    arithmetic.tokenizer().save_pretrained(path)
    return str(path)


MINE = '''
import dataclasses, jax, jax.numpy as jnp
from jaxpost.types import Head, Output

def mix(a, b):
    return 0.25 * a + 0.75 * b

@dataclasses.dataclass(frozen=True)
class Bag:
    """Each token's class follows from its own number alone."""
    vocab: int = 32
    width: int = 4
    max_positions: int = 64
    dtype = jnp.float32

    def init(self, key):
        a, b = jax.random.split(key)
        weights = {name: jax.random.normal(key, (32, self.width)) for name, key in (("embed", a), ("head", b))}
        return {name: {"weight": x} for name, x in weights.items()}

    def forward(self, params, batch, cache=None, *, tap=(), patch=None):
        return Output(params["embed"]["weight"][batch["tokens"]], Head(params["head"]["weight"]))

def make(*, width: int = 4):
    return Bag(width=width)

def nothing():
    return 3
'''


def test_a_model_is_made_by_a_function_that_the_recipe_names(tmp_path):
    """Trained, kept, resumed as a stage's start and scored; what it cannot do is said."""
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    entry = {"name": f"{mine}:make", "width": 6}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1", "completion": f"{i + 1}"}) + "\n" for i in range(40)))
    common = {"tokenizer": "tasks.arithmetic.tokenizer", "batch_size": 8, "window": 32, "steps": 3, "log_every": 1}
    common |= {"model": entry, "objective": "sft.nll"}
    jaxpost.train(None, tmp_path / "run", data=str(data), held_out=0.2, **common)
    values = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in values if "loss" in row) and not any("mfu" in row for row in values)
    model = jaxpost.load(tmp_path / "run")
    assert model.params["embed"]["weight"].shape == (32, 6)
    assert np.isfinite(model.scores(np.ones((1, 4), int))["logps"]).all()
    with pytest.raises(
        UserError, match="Bag lacks cache_axes, is_prepared, make_cache, prepared, rotations and cannot be sampled"
    ):
        model.generate("1+1", new=2)
    with pytest.raises(UserError, match="nothing.*: int lacks dtype, forward, init"):
        jaxpost.load({"name": f"{mine}:nothing"})
    with pytest.raises(UserError, match="takes no option 'wide'. Did you mean 'width'"):
        jaxpost.load({"name": f"{mine}:make", "wide": 3})


def test_fused_and_patched_folders_are_models_of_a_recipe(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    names = [folder(tmp_path, name, seed) for seed, name in enumerate("ab")]
    fused = jaxpost.load({"name": "fused", "of": names, "mix": f"{mine}:mix"})
    tokens = np.array([[3, 4, 5, 6]])
    one, two = (np.asarray(jaxpost.load(name).logits(tokens)) for name in names)
    np.testing.assert_allclose(fused.logits(tokens), 0.25 * one + 0.75 * two, rtol=1e-5, atol=1e-5)
    assert isinstance(fused.generate("1+1", new=3), list)
    patched = jaxpost.load({"name": "patched", "of": names[0], "patch": {"layers.*.mlp_out": 0.0}})
    plain = jaxpost.load(names[0])
    assert not np.allclose(patched.logits(tokens), one, atol=1e-3)
    out = plain.transformer.forward(plain.params, patched._batch(tokens, None)[0], patch={"layers.*.mlp_out": 0.0})
    np.testing.assert_allclose(patched.logits(tokens)[0], logits(out.hidden, out.head)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="the vocabularies have 32, 40 tokens"):
        jaxpost.load({"name": "fused", "of": [names[0], folder(tmp_path, "c", 2, vocab=40)], "mix": f"{mine}:mix"})


def test_a_downloaded_config_does_not_decide_which_code_runs(tmp_path):
    names, evil = [folder(tmp_path, "a", 0)], tmp_path / "evil.py"
    evil.write_text("raise SystemExit('it ran')")
    for number, entry in enumerate(
        (
            {"name": "fused", "of": names, "mix": f"{evil}:mix"},
            {"name": "fused", "of": names, "mix": {"name": f"{evil}:mix"}},
            {"name": "patched", "of": names[0], "patch": {"embed": f"{evil}:steer"}},
            {"name": f"{evil}:make"},
        )
    ):
        place = tmp_path / f"downloaded{number}"
        place.mkdir()
        (place / "config.json").write_text(json.dumps(entry))
        with pytest.raises(UserError, match="a file does not decide what is run"):
            loading.describe(str(place), text=False)


def test_what_cannot_be_sampled_patched_or_prompted_is_said(tmp_path):
    name = folder(tmp_path, "a", 0)
    encoder_like = loading.describe(name, attend="whole", text=False)
    with pytest.raises(UserError, match="each token of the model sees those behind it"):
        protocol.check(encoder_like.transformer, "config.model:", protocol.Sampled)
    with pytest.raises(UserError, match="a prompt stands before each document of a decoder"):
        loading.check(loading.describe(name, attend="whole", adapter="prompts.soft", text=False))
    prompted = jaxpost.load(name, adapter={"name": "prompts.soft", "length": 2})
    patched = prompted.patched({"layers.0.mlp_out": 0.0})
    tokens = np.array([[3, 4, 5]])
    assert not np.allclose(patched.logits(tokens), prompted.logits(tokens), atol=1e-4)
    assert isinstance(patched.generate("1+", new=2), list)


def test_a_recipe_names_patches_as_pairs_and_a_workdir_lends_its_tokenizer(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def steer(x, batch):\n    return x + 1.0\n")
    name, place = folder(tmp_path, "a", 0), tmp_path / "run"
    spec = loading.describe(name)
    loading.keep_description(spec, place, "")
    assert loading.describe(name, str(place)).tokenizer.vocab_size == spec.tokenizer.vocab_size
    pairs = (("layers.1.resid_post", f"{mine}:steer"), ("layers.0.mlp_out", 0.0))
    config = recipe.make(model={"name": "patched", "of": name, "patch": pairs})
    model = jaxpost.load(recipe.plain(config.model))
    assert model.tokenizer is not None
    plain, tokens = jaxpost.load(name), np.array([[3, 4, 5]])
    patch = {"layers.1.resid_post": lambda x, batch: x + 1.0, "layers.0.mlp_out": 0.0}
    np.testing.assert_allclose(model.logits(tokens), plain.logits(tokens, patch=patch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Fused", "Patched"])
def test_models_made_of_fresh_ones_have_fresh_weights(name):
    model, mesh = EACH[name], sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    params = loading.weights(loading.ModelSpec(model, None, {"name": name}, None), mesh, 3)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes)


def test_what_a_fused_or_patched_model_cannot_be_is_said_before_it_is_compiled(tmp_path):
    mine, name = tmp_path / "mine.py", folder(tmp_path, "a", 0)
    mine.write_text(MINE + "\ndef first(a):\n    return a\n\ndef narrow(a, b):\n    return a[:, :3]\n")
    both = {"name": "fused", "of": [name, name]}
    for entry, message in (
        ({**both, "mix": f"{mine}:first"}, r"mix first fails on the logits \[R,V\] of 2 models.*takes 1 positional argument"),
        ({**both, "mix": lambda a, b: a[:, :3]}, r"mix <lambda> gives .*\(2, 3\).* for logits \[2, 32\]"),
        ({**both, "mix": f"{mine}:narrow"}, "mix narrow gives"),
        ({**both, "of": name, "mix": f"{mine}:mix"}, "models: fused: of='.*'; it takes a list of texts"),
        ({**both, "of": [], "mix": f"{mine}:mix"}, "`of` names no model"),
        ({"name": "patched", "of": [name], "patch": {}}, r"models: patched: of=\['.*it takes a text"),
        ({"name": "patched", "of": name, "patch": "x"}, "models: patched: patch='x'; it takes a dict"),
        ({"name": "patched", "of": name, "patch": {"embed": [[1], [1, 2]]}}, "patch: embed: .* is no number, no array"),
    ):
        with pytest.raises(UserError, match=message):
            loading.describe(entry, text=False)


def test_settings_of_the_computation_reach_a_model_that_a_function_makes_or_are_refused(tmp_path):
    mine, name = tmp_path / "mine.py", folder(tmp_path, "a", 0)
    mine.write_text(MINE)
    fused = {"name": "fused", "of": [name, name], "mix": f"{mine}:mix"}
    patched = {"name": "patched", "of": name, "patch": {"embed": 0.0}}
    options = {"dtype": "bfloat16", "remat": "full", "attention": "xla", "text": False}
    for models in (loading.describe(fused, **options).transformer.models, [loading.describe(patched, **options).transformer]):
        assert {(model.dtype, model.remat, model.kernel) for model in models} == {(jnp.bfloat16, "full", "xla")}
    entry = {**fused, "dtype": "float32"}  # the entry's own counts
    assert loading.describe(entry, **options).transformer.dtype == jnp.float32
    for key in ("dtype", "remat", "attention"):
        with pytest.raises(UserError, match=f"config.{key}: '{options[key]}' is not read by .*mine.py:make; leave it out"):
            loading.describe({"name": f"{mine}:make"}, text=False, **{key: options[key]})
