"""A larger vocabulary: old logits bit for bit, new rows by hand, and a folder that transformers opens."""

import dataclasses

import jax
import numpy as np
import pytest
import toy_tokenizers
import transformers
from tokenizers import normalizers

import jaxpost
from jaxpost import export, sharding
from jaxpost.errors import UserError
from jaxpost.models import hf
from jaxpost.tokenizer import encode, load, save

ADD = ["<think>", "bcc", "été"]


def model(tied: bool, vocab: int = 270, sizes=(1, 1, 1)):
    """A tiny model with a byte-level BPE of 261 tokens."""
    fields = {"model_type": "llama", "vocab_size": vocab, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": tied, "initializer_range": 0.5}
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return dataclasses.replace(jaxpost.load(fields, mesh=mesh), tokenizer=toy_tokenizers.byte_pairs())


def weights(of, name: str) -> np.ndarray:
    return np.asarray(of.params[name]["weight"])


@pytest.mark.parametrize("tied, sizes, multiple", [(True, (1, 1, 1), 1), (False, (2, 2, 2), 64)])
def test_old_logits_stay_and_new_rows_are_means(tied, sizes, multiple):
    old = model(tied, vocab=262, sizes=sizes)
    words, tokens = old.tokenizer, np.array([[3, 200, 256, 1], [7, 7, 258, 0]])
    assert len(words) == 261
    for by in ("mean", "merged"):
        new = old.with_tokens(ADD, by=by, multiple=multiple)
        vocab = 264 if multiple == 1 else 320
        assert new.transformer.arch.vocab == new.config["vocab_size"] == vocab and len(new.tokenizer) == 264
        # A product of another width is added up in another order.
        np.testing.assert_allclose(new.logits(tokens)[..., :261], old.logits(tokens)[..., :261], atol=2e-6)
        for name in ("embed", *["head"] * (not tied)):
            before, after = weights(old, name), weights(new, name)
            mean = before[:261].mean(0)
            np.testing.assert_array_equal(after[:261], before[:261])
            for token in ADD:
                (own,) = encode(new.tokenizer, token)
                wanted = mean if by == "mean" else before[encode(words, token)].mean(0)
                np.testing.assert_allclose(after[own], wanted, atol=1e-6)
            np.testing.assert_allclose(after[264:], np.broadcast_to(mean, after[264:].shape), atol=1e-6)
        assert new.params["embed"]["weight"].sharding.is_equivalent_to(old.params["embed"]["weight"].sharding, 2)
    assert encode(old.tokenizer, "bcc") == encode(words, "bcc") and len(old.tokenizer) == 261  # the old one is as it was


def test_rows_that_have_no_token_are_taken_first():
    new = model(True, vocab=270).with_tokens(ADD, by="merged")
    assert new.transformer.arch.vocab == 270 and [encode(new.tokenizer, token) for token in ADD] == [[261], [262], [263]]


def test_rows_are_given(tmp_path):
    rows, old = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32), model(False)
    np.save(tmp_path / "rows.npy", rows[0])
    np.savez(tmp_path / "both.npz", embed=rows[0], head=rows[1])
    for by in (rows[0], str(tmp_path / "rows.npy"), {"embed": rows[0], "head": rows[1]}, str(tmp_path / "both.npz")):
        new = old.with_tokens(ADD, by=by)
        np.testing.assert_array_equal(weights(new, "embed")[261:264], rows[0])
        both = isinstance(by, dict) or str(by).endswith("npz")
        wanted = rows[1] if both else np.broadcast_to(weights(old, "head")[:261].mean(0), (3, 8))
        np.testing.assert_allclose(weights(new, "head")[261:264], wanted, atol=1e-6)


@pytest.mark.slow
def test_an_export_with_tokens_opens_in_transformers(tmp_path):
    old = model(False, vocab=261)
    hf.save(tmp_path / "old", old.params, old.transformer.arch, old.config)
    save(old.tokenizer, tmp_path / "old")
    options = {"add": ADD, "by": "merged", "special": True}
    export.export(str(tmp_path / "old"), str(tmp_path / "new"), mesh=old.mesh, tokens=options)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert words("x<think>bcc y", add_special_tokens=False)["input_ids"] == [
        *encode(old.tokenizer, "x"), 261, 262, *encode(old.tokenizer, " y"),
    ]  # fmt: skip
    assert words.decode([261, 10], skip_special_tokens=True) == words.decode([10])
    assert transformers.AutoConfig.from_pretrained(tmp_path / "new").vocab_size == 264
    new, given = jaxpost.load(str(tmp_path / "new"), mesh=old.mesh), old.with_tokens(ADD, by="merged", special=True)
    for name in ("embed", "head"):
        np.testing.assert_array_equal(weights(new, name), weights(given, name))
    assert new.generate("x", new=3) == given.generate("x", new=3)
    with pytest.raises(UserError, match="--add: an adapter has no embedding"):
        export.export(str(tmp_path / "old"), str(tmp_path / "other"), mesh=old.mesh, tokens=options, adapter=True)


@pytest.mark.slow
def test_rows_that_pad_are_never_drawn_and_transformers_reads_that(tmp_path):
    """A head that likes nothing but the rows that belong to no token: what is drawn is a token all the same."""
    old = model(False, vocab=261)
    hf.save(tmp_path / "old", old.params, old.transformer.arch, old.config)
    save(old.tokenizer, tmp_path / "old")
    place, padding = tmp_path / "new", set(range(264, 320))
    export.export(str(tmp_path / "old"), str(place), mesh=old.mesh, tokens={"add": ADD, "multiple": 64})
    assert set(transformers.GenerationConfig.from_pretrained(place).suppress_tokens) == padding
    new = jaxpost.load(str(place), mesh=old.mesh)
    assert set(new.suppressed) == set(old.with_tokens(ADD, multiple=64).suppressed) == padding and not old.suppressed
    hidden = np.asarray(new.tap("final", ["x"]))[0, -1]
    head = np.array(new.params["head"]["weight"])
    head[264:] = 50 * hidden
    liking = dataclasses.replace(new, params={**new.params, "head": {"weight": jax.numpy.asarray(head)}})
    free = dataclasses.replace(liking, suppressed=())
    assert not padding & set(liking.complete("x", new=2)[0].tolist()) and padding & set(free.complete("x", new=2)[0].tolist())
    # A further token takes the first of those rows, and may be drawn.
    assert set(new.with_tokens(["<b>"]).suppressed) == padding - {264}


def test_a_token_is_found_where_a_tokenizer_changes_texts_first(tmp_path):
    """As Llama's does, which puts a mark in front of a text and in place of spaces."""
    words = toy_tokenizers.characters(adds_bos=False)
    words.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    old = dataclasses.replace(model(True), tokenizer=words)
    new = old.with_tokens(["ab", " cd"], by="merged")
    for tokenizer in (new.tokenizer, _kept(new.tokenizer, tmp_path)):
        x, ab, cd = (tokenizer.convert_tokens_to_ids(token) for token in ("x", "ab", " cd"))
        assert encode(tokenizer, "xab cdx")[-4:] == [ab, cd, *encode(tokenizer, "x")] and x in encode(tokenizer, "xab cdx")
    np.testing.assert_allclose(weights(new, "embed")[ab], weights(old, "embed")[encode(words, "ab")].mean(0), atol=1e-6)


def _kept(words, folder):
    save(words, folder)
    return load(folder)


def test_what_cannot_be_added_is_refused(tmp_path):
    old = model(True)
    (tmp_path / "broken.npy").write_bytes(b"none")
    for add, options, message in (
        ([], {}, "give a list of one token or more"),
        ("<a>", {}, "with_tokens: add='<a>'; it takes a list of texts"),
        (["<a>", "<a>"], {}, "'<a>' is named twice"),
        (["bc"], {}, "'bc' is a token already"),
        (["<a>"], {"multiple": 0}, "multiple: 0"),
        (["<a>"], {"by": "median"}, "'median' is neither 'mean', 'merged'"),
        (["<a>"], {"by": np.zeros((2, 8))}, r"embed is of shape \(2, 8\); give 1 rows of 8"),
        (["<a>"], {"by": np.full((1, 8), np.nan)}, "finite numbers"),
        (["<a>"], {"by": {"head": np.zeros((1, 8))}}, "give `embed`, and maybe `head`"),
        (["<a>"], {"by": str(tmp_path / "broken.npy")}, "cannot be read as numpy's arrays"),
    ):
        with pytest.raises(UserError, match=message):
            old.with_tokens(add, **options)
