"""Who sees whom: causal, a prompt whole, a whole document; by a column, by a model's config, and while decoding."""

import dataclasses
import itertools
import json
from pathlib import Path

import encoder_cases
import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_cases
import small
from test_encoders import one, scores

import jaxpost
from jaxpost import recipe, sharding
from jaxpost.annotators import scores as scores_annotator
from jaxpost.errors import UserError
from jaxpost.models import attention, families, hf, loading
from jaxpost.models.families import Kind
from jaxpost.models.heads import logits
from jaxpost.objectives import sft
from jaxpost.objectives.logprobs import token_scores
from jaxpost.stages.plan import learned

MODEL = small.MODEL


def of(attend: str, model=MODEL, **changes):
    return dataclasses.replace(model, arch=dataclasses.replace(model.arch, attend=attend, **changes))


def rows():
    """Two documents and padding, and a document that fills its row; of each the first tokens are a prompt."""
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [0], [1] * 12], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0], list(range(12))], jnp.int32)
    mask = np.zeros((2, 12), bool)
    mask[0, [3, 4, 7, 9, 10]] = mask[1, 6:] = True
    tokens = np.random.default_rng(0).integers(1, small.VOCAB, (2, 12)).astype(np.int32)
    return {"tokens": jnp.asarray(tokens), "segments": segments, "positions": positions, "mask": jnp.asarray(mask)}


PROMPT = np.zeros((2, 12), bool)
PROMPT[0, [0, 1, 2, 5, 6]] = PROMPT[1, :6] = True


@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_is_what_the_column_says_token_by_token(window):
    batch = rows()
    column = np.random.default_rng(1).random((2, 12)) < 0.6
    seen = np.asarray(attention.document_mask({**batch, "bidirectional": jnp.asarray(column)}, window))
    causal = np.asarray(attention.document_mask(batch, window))
    for row, i, j in itertools.product(range(2), range(12), range(12)):
        (a, b), (p, q) = np.asarray(batch["segments"])[row, [i, j]], np.asarray(batch["positions"])[row, [i, j]]
        back, both = int(p) - int(q), column[row, i] and column[row, j]
        before = back >= 0 and (window is None or back < window)
        beside = both and (window is None or abs(back) <= window)
        assert seen[row, i, j] == (a == b and a > 0 and (beside if both else before)), (row, i, j)
        assert causal[row, i, j] == (a == b and a > 0 and before)


def test_an_architecture_sets_the_column_and_a_batch_may_bring_it():
    batch = rows()
    assert attention.attending(of("causal").arch, batch) is batch
    prefix = attention.attending(of("prefix").arch, batch)["bidirectional"]
    np.testing.assert_array_equal(prefix, PROMPT)
    whole = attention.attending(of("whole").arch, batch)["bidirectional"]
    np.testing.assert_array_equal(whole, batch["segments"] > 0)
    alone = {k: x for k, x in batch.items() if k != "mask"}
    np.testing.assert_array_equal(attention.attending(of("prefix").arch, alone)["bidirectional"], batch["segments"] > 0)
    own = {**batch, "bidirectional": batch["mask"]}
    assert attention.attending(of("prefix").arch, own) is own
    assert attention.over_rows("splash", of("causal").arch, own, jnp.float32)[1].func is attention.attend


def test_models_see_what_their_column_says():
    """A change of a token is seen by those that see it, through two layers, and by no others."""
    batch = rows()
    params = jax.jit(of("causal", init_std=0.3).init)(jax.random.PRNGKey(0))
    other = {**batch, "tokens": batch["tokens"].at[0, 2].set(1).at[1, 8].set(1)}
    later = np.arange(12)
    for attend, first, second in (
        ("causal", (later >= 2) & (later < 5), later >= 8),
        ("prefix", later < 5, later >= 8),
        ("whole", later < 5, later >= 0),
    ):
        model = of(attend)
        gap = np.abs(scores(model, params, batch) - scores(model, params, other)).max(-1) * (batch["segments"] > 0)
        np.testing.assert_array_equal(gap > 1e-6, [first, second], err_msg=attend)


@pytest.mark.parametrize("attend", ["prefix", pytest.param("whole", marks=pytest.mark.slow)])
def test_packed_equals_alone_rematerialised_and_over_devices_in_value_and_gradient(attend):
    kinds = {"kinds": (Kind(), Kind(4)), "pattern": (1, 0)}
    model, batch = of(attend, **kinds), rows()
    params = jax.jit(model.init)(jax.random.PRNGKey(0))
    pieces = [(0, slice(0, 5)), (0, slice(5, 11)), (1, slice(0, 12))]

    def value(model, batch):
        def total(params):
            out = model.forward(params, batch)
            scores = logits(out.hidden, out.head)
            return jnp.sum(jnp.sin(scores) * (batch["segments"] > 0)[..., None]), scores

        return total

    def apart(params):
        each = [value(model, {k: x[row : row + 1, place] for k, x in batch.items()})(params) for row, place in pieces]
        return sum(total for total, _ in each), [scores[0] for _, scores in each]

    (expected, alone), grads = jax.jit(jax.value_and_grad(apart, has_aux=True))(params)
    mesh = sharding.make_mesh(2, 2, 2)
    remat = dataclasses.replace(model, remat="full")
    double = {k: np.concatenate([x, np.zeros_like(x)]) for k, x in batch.items()}  # rows for all devices
    with sharding.use(mesh):
        placed = jax.device_put(jax.device_get(params), sharding.stored(mesh, params))
        spread = sharding.distribute(double, mesh, 4)
        (total, together), own = jax.jit(jax.value_and_grad(value(remat, spread), has_aux=True))(placed)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for (row, place), one_alone in zip(pieces, alone, strict=True):
        np.testing.assert_allclose(np.asarray(together)[row, place], one_alone, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(jax.device_get(own)), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))  # sums in another order


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_what_a_prefix_model_samples_scores_as_it_was_drawn(window):
    model = of("prefix", sampler_cases.MODEL, kinds=(Kind(window),))
    params = jax.jit(model.init)(jax.random.PRNGKey(1))
    drawn = sampler_cases.sampled(model=model, params=params)
    prompts = [prompt for prompt in sampler_cases.prompts() for _ in range(sampler_cases.GROUP)]
    tokens = np.zeros((len(prompts), sampler_cases.WINDOW + sampler_cases.NEW), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, (prompt, answer, n) in enumerate(zip(prompts, drawn.tokens, drawn.lengths, strict=True)):
        tokens[i, : len(prompt) + n] = np.concatenate([prompt, answer[:n]])
        mask[i, len(prompt) : len(prompt) + n] = True
    real = mask | (np.arange(tokens.shape[1]) < np.array([len(p) for p in prompts])[:, None])
    batch = {"tokens": tokens, "segments": real.astype(np.int32), "positions": np.where(real, np.arange(tokens.shape[1]), 0)}
    batch = jax.tree.map(jnp.asarray, batch | {"mask": mask})
    scored = jax.jit(lambda p, b: token_scores(model.forward(p, b), b))(params, batch)["logps"]
    causal = jax.jit(lambda p, b: token_scores(of("causal", model).forward(p, b), b))(params, batch)["logps"]
    for prompt, logps, n, row in zip(prompts, drawn.logps, drawn.lengths, scored, strict=True):
        np.testing.assert_allclose(row[len(prompt) : len(prompt) + n], logps[:n], atol=5e-5)
    assert np.abs(scored - causal).max() > 1e-2


@pytest.mark.parametrize("name", encoder_cases.WHOLE)
def test_a_decoder_that_sees_whole_documents_equals_transformers(name, tmp_path):
    encoder_cases.write_whole(tmp_path, name)
    spec, params = loading.open_model(str(tmp_path), one())
    batch = {k: np.zeros((2, 24), np.int32) for k in ("tokens", "segments", "positions")}
    for i, tokens in enumerate(family_cases.tokens(name)):
        for key, values in (("tokens", tokens), ("segments", 1), ("positions", np.arange(len(tokens)))):
            batch[key][i, : len(tokens)] = values
    with np.load(Path(__file__).parent / "golden" / "encoders.npz") as golden:
        expected = golden[name]
    rows = scores(spec.transformer, params, batch)
    found = np.concatenate([rows[0], rows[1, : len(expected) - 24]])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


CONFIG = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 2, "max_position_embeddings": 64}


@pytest.mark.slow
def test_a_recipe_asks_for_it_and_the_weights_keep_it(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1", "completion": f"{i + 1}"}) + "\n" for i in range(24)))
    common = {"tokenizer": "tasks.arithmetic.tokenizer", "batch_size": 8, "window": 32, "steps": 2, "log_every": 1}
    each = {"stages": ("one", "two"), "one": {"attend": "prefix"}, "two": {"attend": "causal"}}
    jaxpost.train(None, tmp_path / "run", model=CONFIG, data=str(data), **each, **common)
    assert jaxpost.load(tmp_path / "run").transformer.arch.attend == "causal"
    model = jaxpost.load(tmp_path / "run" / "checkpoints" / "one")  # though the workdir describes the last stage's model
    assert model.transformer.arch.attend == "prefix"
    hf.save(tmp_path / "out", model.params, model.transformer.arch, model.config, "float32")
    assert loading.describe(str(tmp_path / "out"), text=False).transformer.arch.attend == "prefix"
    whole = loading.describe(CONFIG, attend="whole", text=False)
    assert whole.transformer.arch.attend == "whole" and whole.config["is_causal"] is False
    # Scores are of every token but the first: the first alone is a prompt.
    tokens = np.array([[3, 4, 5, 6]])
    last = tokens.copy()
    last[0, 3] = 7
    np.testing.assert_array_equal(model.scores(tokens)["logps"][0, :3], model.scores(last)["logps"][0, :3])


def test_what_asks_for_the_next_token_is_refused_where_it_is_seen():
    batch = rows()
    params = jax.eval_shape(MODEL.init, jax.random.PRNGKey(0))
    whole = of("whole").forward
    for asks in (lambda p: sft.nll(whole, p, batch, None), lambda p: scores_annotator.perplexity(whole, p, batch)):
        with pytest.raises(UserError, match="the model sees whole documents, the next token included"):
            jax.eval_shape(asks, params)
    encoder = loading.describe(encoder_cases.config("bert/plain"), text=False).transformer
    shapes = jax.eval_shape(encoder.init, jax.random.PRNGKey(0))
    with pytest.raises(UserError, match="sees whole documents"):
        jax.eval_shape(lambda p: sft.nll(encoder.forward, p, batch, None), shapes)
    jax.eval_shape(lambda p: sft.nll(of("prefix").forward, p, batch, None), params)


def test_what_cannot_be_had_is_refused():
    with pytest.raises(UserError, match="config.attend: unknown 'hole'. Did you mean 'whole'"):
        loading.describe(CONFIG, attend="hole", text=False)
    for fields, message in (
        ({"attend": "both"}, "attend = 'both'"),
        ({"attend": "causal", "is_causal": False}, "attend = 'causal', is_causal = False"),
        ({"attend": "whole"}, "attend = 'whole', is_causal = True"),
    ):
        with pytest.raises(UserError, match=message):
            families.architecture({**CONFIG, **fields})
    with pytest.raises(UserError, match="each of its tokens sees those behind it"):
        of("whole").make_cache(1, 4)
    for changes, message in (
        ({"attend": "prefix", "shared_prefix": True}, "shared_prefix: with attend='prefix'"),
        ({"attend": "whole", "task": {"name": "arithmetic"}}, "config.task: the model sees whole documents"),
        ({"attend": "prefix", "source": "rollouts", "task": {"name": "arithmetic"}, "rollouts": {"given": "mine.f"}},
         "rollouts.given: with attend='prefix'"),
    ):  # fmt: skip
        s = recipe.make(model=CONFIG, objective="preference.sigmoid", **changes)
        with pytest.raises(UserError, match=message):
            learned(loading.describe(CONFIG, attend=s.attend, text=False), s, one())


def test_a_stage_sees_what_the_stage_that_it_starts_from_saw():
    common = {"model": CONFIG, "stages": ("one", "two", "three", "other"), "two": {}, "three": {"attend": "causal"}}
    each = dict(recipe.stages(recipe.make(**common, one={"attend": "prefix"}, other={"model": "FOLDER"})))
    assert [each[name].attend for name in ("one", "two", "three", "other")] == ["prefix", "prefix", "causal", ""]
