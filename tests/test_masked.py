"""Masked language modelling: its noise, its value and gradient written down directly, its rows, and a run."""

import json

import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import stubs
from test_row_types import encode
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from toy_tokenizers import characters

import jaxpost
from jaxpost import export, sharding, tokenizer
from jaxpost.data import encoding
from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.models import encoder, encoder_families, families, heads, hf, loading
from jaxpost.models.transformer import Transformer
from jaxpost.objectives import logprobs, masked
from jaxpost.tasks import arithmetic

BERT = {"share": 0.15, "replaced": 0.8, "random": 0.1}
HIDDEN = 7  # the id of the mask token


def rows(seed: int = 0, shape=(64, 400), vocab: int = 50) -> dict:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, vocab, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    mask = (positions > 0) & (tokens != 11)
    batch = {"tokens": tokens, "segments": np.ones(shape, np.int32), "positions": positions, "mask": mask}
    return jax.tree.map(jnp.asarray, batch | {"mask_token": np.full(shape, HIDDEN, np.int32)})


@pytest.mark.parametrize("noise", [BERT, {"share": 0.3, "replaced": 1.0, "random": 0.0}])
def test_the_noise_has_the_shares_that_are_asked_for(noise):
    batch = rows()
    noisy, chosen = (np.asarray(x) for x in masked.hidden(batch, jax.random.PRNGKey(0), 50, **noise))
    tokens, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"])
    assert not chosen[~mask].any(), "what is not learned is never hidden"
    np.testing.assert_array_equal(noisy[~chosen], tokens[~chosen])

    def near(count, of, share):  # within five standard deviations
        assert abs(count - of * share) <= 5 * np.sqrt(of * share * (1 - share)) + 1e-9, (count / of, share)

    near(chosen.sum(), mask.sum(), noise["share"])
    n, other = chosen.sum(), noisy[chosen]
    near((other == HIDDEN).sum(), n, noise["replaced"] + noise["random"] / 50)
    stays = 1 - noise["replaced"] - noise["random"]
    near((other == tokens[chosen]).sum(), n, stays + noise["random"] / 50 if stays > 0 else 0.0)
    drawn = other[(other != HIDDEN) & (other != tokens[chosen])]
    if noise["random"]:
        counts = np.bincount(drawn, minlength=50)
        assert len(counts) == 50 and counts[np.arange(50) != HIDDEN].min() > 0, "any id, and none beyond the vocabulary"
    assert np.ptp(chosen.mean(0)[1:]) < 0.6 and chosen.mean(1).min() > 0


def test_the_noise_is_the_keys_and_the_documents_own():
    batch, key = rows(shape=(2, 60)), jax.random.PRNGKey(0)
    noisy, chosen = masked.hidden(batch, key, 50, **BERT)
    assert (np.asarray(chosen) != np.asarray(masked.hidden(batch, jax.random.PRNGKey(1), 50, **BERT)[1])).any()
    assert (np.asarray(chosen[0]) != np.asarray(chosen[1])).any()
    # Both documents in one row, the second in front, and padding behind.
    packed = {k: jnp.concatenate([x[1], x[0], jnp.zeros(5, x.dtype)])[None] for k, x in batch.items()}
    packed["segments"] = jnp.repeat(jnp.arange(1, 4) % 3, jnp.array([60, 60, 5]))[None]
    again, places = masked.hidden(packed, key, 50, **BERT)
    np.testing.assert_array_equal(again[0, :120], jnp.concatenate([noisy[1], noisy[0]]))
    np.testing.assert_array_equal(places[0, :120], jnp.concatenate([chosen[1], chosen[0]]))


def test_value_and_gradient_are_those_of_the_equation():
    batch = stubs.pack(stubs.documents(1, columns={"mask_token": masked.mlm.declaration["columns"]["mask_token"]}))
    batch = {k: jnp.asarray(x) for k, x in batch.items()} | {"mask_token": jnp.full(batch["tokens"].shape, 3)}
    key, seen = jax.random.PRNGKey(5), {}
    noise = {"share": 0.4, "replaced": 0.5, "random": 0.3}

    def forward(params, given):
        seen.update({k: given[k] for k in ("tokens", "bidirectional") if k in given})
        return stubs.forward(params, given)

    def loss(params):
        terms, _ = masked.mlm(forward, params, batch, key, **noise)
        return terms["mlm"].sum / terms["mlm"].weight

    noisy, chosen = masked.hidden(batch, key, stubs.VOCAB, **noise)
    rows, places = np.nonzero(np.asarray(chosen))

    def direct(params):
        out = stubs.forward(params, {**batch, "tokens": noisy})
        logps = jax.nn.log_softmax(out.hidden[rows, places] @ out.head.weight.T / batch["temperature"])
        return -jnp.mean(logps[np.arange(len(rows)), batch["tokens"][rows, places]])

    params = stubs.init()
    value, grads = jax.value_and_grad(loss)(params)
    np.testing.assert_array_equal(seen["tokens"], noisy)
    np.testing.assert_array_equal(seen["bidirectional"], batch["segments"] > 0)
    expected, wanted = jax.value_and_grad(direct)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert len(rows) > 20 and (np.asarray(noisy) != batch["tokens"]).sum() > 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, wanted)


@pytest.mark.slow
def test_an_encoders_head_in_chunks_on_a_mesh_equals_its_logits(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", 1)
    arch = encoder_families.architecture(
        {**encoder_cases.config("modernbert/biased"), "vocab_size": 40, "num_hidden_layers": 2}
    )
    model, key, noise = encoder.model(arch), jax.random.PRNGKey(5), {"share": 0.5, "replaced": 0.5, "random": 0.3}
    params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), jax.jit(model.init)(key))
    batch = rows(shape=(8, 30), vocab=40)

    def loss(params, batch):
        terms, _ = masked.mlm(model.forward, params, batch, key, **noise)
        return terms["mlm"].sum / terms["mlm"].weight

    def direct(params):
        tokens, chosen = masked.hidden(batch, key, 40, **noise)
        out = model.forward(params, {**batch, "tokens": tokens})
        logps = jnp.take_along_axis(jax.nn.log_softmax(heads.logits(out.hidden, out.head)), batch["tokens"][..., None], -1)
        return -jnp.sum(jnp.where(chosen, logps[..., 0], 0.0)) / jnp.sum(chosen)

    expected, wanted = jax.jit(jax.value_and_grad(direct))(params)
    mesh = sharding.make_mesh(2, 2, 2)
    with sharding.use(mesh):
        placed = jax.device_put(jax.device_get(params), sharding.stored(mesh, params))
        spread = sharding.distribute(jax.device_get(batch), mesh, 8)
        value, grads = jax.jit(jax.value_and_grad(loss))(placed, spread)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(jax.device_get(grads)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()) + 1e-7)  # sums in another order


def test_shares_that_are_none_are_refused():
    for wrong in ({"share": 0.0}, {"share": 1.1}, {"replaced": 0.95}, {"random": -0.1}):
        with pytest.raises(UserError, match="config.objective: share="):
            masked.mlm(stubs.forward, None, {}, None, **wrong)


def words():
    """A token a letter, with BERT's special tokens, which it puts around texts."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz "]
    vocabulary = {token: i for i, token in enumerate(names)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    import transformers

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def test_rows_are_texts_with_their_special_tokens_which_are_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path))
    records = [Record({"text": "ab"}, "a.jsonl, line 1"), Record({"text": "a[MASK]c"}, "a.jsonl, line 2")]
    encoded = encoding.encode_all(records, words(), window=16, row_type="masked")
    assert encoded.examples[0]["tokens"].tolist() == [2, 5, 6, 3]
    assert encoded.examples[0]["mask"].tolist() == [False, True, True, False]
    assert encoded.examples[0]["mask_token"].tolist() == [4] * 4
    assert encoded.examples[1]["mask"].tolist() == [False, True, False, True, False]
    with pytest.raises(UserError, match="a.jsonl, line 1: no token of it can be hidden"):
        encoding.encode_all([Record({"text": "[MASK]"}, "a.jsonl, line 1")], words(), window=16, row_type="masked")
    with pytest.raises(UserError, match="config.tokenizer: it has no mask token.* add one, by python -m jaxpost.export"):
        encoding.encode_all(records, characters(), window=16, row_type="masked")
    chat = [{"prompt": "q", "completion": "xyz"}]
    assert encode(chat, row_type="masked").examples[0]["mask"].sum() == 3  # without the token that ends it


def test_a_decoders_folder_gets_a_mask_token(tmp_path):
    """By the remedy that the error names."""
    arch = families.architecture(runs.MODEL)
    hf.save(tmp_path / "base", Transformer(arch).init(jax.random.PRNGKey(0)), arch, runs.MODEL)
    tokenizer.save(arithmetic.tokenizer(), tmp_path / "base")
    tokens = {"add": ["<mask>"], "special": True}
    export.export(
        str(tmp_path / "base"), str(tmp_path / "out"), mesh=sharding.make_mesh(devices=jax.devices()[:1]), tokens=tokens
    )
    file = tmp_path / "out" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mask_token": "<mask>"}))
    spec = loading.describe(str(tmp_path / "out"))
    assert spec.tokenizer.mask_token_id == 17 and spec.transformer.vocab == 18
    row = encoding.encode_all([Record({"text": "12"}, "a.jsonl, line 1")], spec.tokenizer, window=16, row_type="masked")
    assert row.examples[0]["mask_token"][0] == 17


@pytest.mark.slow
def test_an_encoder_learns_and_is_kept_as_a_folder(tmp_path):
    """A hidden letter of a text that repeats itself follows from the others: better than ln 8, as the letters alone tell."""
    tokenizer.save(words(), tmp_path / "words")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": letter * 12}) + "\n" for letter in "abcdefgh" * 8))
    config = {**encoder_cases.config("bert/plain"), "vocab_size": 32, "num_hidden_layers": 1}
    common = {"tokenizer": str(tmp_path / "words"), "batch_size": 8, "window": 32, "steps": 120, "log_every": 40}
    common |= {"objective": "masked.mlm", "held_out": 8, "optimizer": {"lr": 0.005, "warmup": 10}}
    jaxpost.train(None, tmp_path / "run", model=config, data=str(data), **common)
    values = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/loss"] for row in values if "eval/loss" in row]
    assert losses[0] > 3.0 and losses[-1] < 1.5, losses
    model = jaxpost.load(tmp_path / "run")
    asked = np.array([[2, 9, 9, 4, 9, 9, 3]])  # [CLS] e e [MASK] e e [SEP]
    assert np.argmax(model.logits(asked)[0, 3]) == 9
    with pytest.raises(UserError, match="Encoder lacks .* and cannot be sampled"):
        model.generate("ab", new=2)
    with pytest.raises(UserError, match="config.task: the model sees whole documents"):
        jaxpost.train(None, tmp_path / "other", model=config, data=str(data), task={"name": "arithmetic"}, **common)
    assert loading.describe(str(tmp_path / "run"), text=False).transformer.arch.family == "bert"
