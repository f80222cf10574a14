"""The Llama family against `transformers`, and the forward against itself.

The golden logits come from tests/golden/make_llama.py; where torch is installed the comparison runs live too, with gradients.
The rest holds one set of weights to what a forward must not depend on: padding, packing, rematerialisation, stacking, a cache.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest

import jaxpost
from jaxpost import sharding
from jaxpost.models import attention, families, hf, loading, tensors
from jaxpost.models.heads import logits
from jaxpost.models.transformer import REMAT, Transformer, unstack
from jaxpost.objectives import sft

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """name -> the case's folder, written once; every second one in three files with an index."""
    root = tmp_path_factory.mktemp("llama")
    for i, name in enumerate(llama_cases.NAMES):
        llama_cases.write(root / name, name, files=1 + 2 * (i % 2))
    return {name: root / name for name in llama_cases.NAMES}


def opened(folder):
    """(Transformer, parameters) of a folder, on one device."""
    spec = loading.describe(str(folder))
    shapes = jax.eval_shape(spec.transformer.init, jax.random.PRNGKey(0))
    return spec.transformer, hf.load(folder, spec.transformer.arch, shapes)


def batch_of(rows, length):
    """Rows of ids as a batch, right-padded to `length`."""
    batch = {k: np.zeros((len(rows), length), np.int32) for k in ("tokens", "segments", "positions")}
    for i, row in enumerate(rows):
        batch["tokens"][i, : len(row)] = row
        batch["segments"][i, : len(row)] = 1
        batch["positions"][i, : len(row)] = np.arange(len(row))
    return batch


@functools.partial(jax.jit, static_argnums=0)
def scores(model, params, batch):
    """[B,S,V] logits."""
    out = model.forward(params, batch)
    return logits(out.hidden, out.head)


def joined(found, rows):
    """The logits [B,S,V] at the rows' own tokens, one row after the other."""
    return np.concatenate([found[i, : len(row)] for i, row in enumerate(rows)])


def assert_near(found, wanted, tolerance):
    """Within `tolerance` of the largest wanted value."""
    assert found.shape == wanted.shape
    worst = np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))
    assert worst <= tolerance, f"{worst:.1e} of the largest"


# ----------------------------------------------------------------------------------------------- Against transformers


@pytest.mark.parametrize("name", llama_cases.NAMES)
def test_logits_equal_those_of_transformers(name, model_folders):
    model, params = opened(model_folders[name])
    rows = llama_cases.tokens(name)
    found = scores(model, params, batch_of(rows, llama_cases.LENGTHS[0]))
    with np.load(GOLDEN / "llama.npz") as golden:
        # Seen: 4e-7 to 1.5e-6 of the largest, float32 rounding; the project's promise is 1e-4.
        assert_near(joined(found, rows), golden[name], 1e-5)


def test_every_honoured_field_moves_the_logits_in_some_case():
    """A field that all cases share could be read wrongly unseen."""
    seen = {}
    for name in llama_cases.NAMES:
        fields = llama_cases.config(name)
        for key in set(llama_cases.config("llama3")) | set(fields) | {"head_dim"}:
            seen.setdefault(key, set()).add(json.dumps(fields.get(key)))
    single = {k for k, values in seen.items() if len(values) < 2}
    assert single == {"model_type"}
    acts = {json.loads(value) for value in seen["hidden_act"]}
    assert acts == set(families.ACTIVATIONS)


def test_llama3_scaling_has_all_three_bands_in_the_case():
    """Short wavelengths stay, long ones are divided, the middle is blended: a band that is empty would not be tested."""
    rope = families.architecture(llama_cases.config("llama3")).kinds[0].rope
    scaled = np.asarray(attention.frequencies(rope, 16))
    plain = np.asarray(attention.frequencies(families.Rope(theta=rope.theta), 16))
    ratio = scaled / plain
    kept, divided = ratio > 0.999, ratio < 1.001 / rope.factor
    assert kept.any() and divided.any() and (~kept & ~divided).any()


def test_bfloat16_weights_of_a_folder_widen_exactly(tmp_path, model_folders):
    model, params = opened(model_folders["grouped"])
    hf.save(tmp_path / "once", params, model.arch, llama_cases.config("grouped"), "bfloat16")
    _, narrow = opened(tmp_path / "once")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(y, x.astype(jnp.bfloat16).astype(jnp.float32)), params, narrow)
    hf.save(tmp_path / "twice", narrow, model.arch, llama_cases.config("grouped"), "bfloat16")
    first, second = (folder / "model.safetensors" for folder in (tmp_path / "once", tmp_path / "twice"))
    assert first.read_bytes() == second.read_bytes()
    assert json.loads((tmp_path / "once" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["both_biases_tied", "multi_head"])
def test_live_logits_and_gradients_equal_those_of_torch(name, model_folders):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model_folders[name], dtype=torch.float32)
    row = llama_cases.tokens(name)[0]
    ids = torch.from_numpy(row[None]).long()
    loss = theirs(ids, labels=ids).loss
    loss.backward()

    model, params = opened(model_folders[name])
    batch = batch_of([row], len(row)) | {"mask": np.arange(len(row))[None] > 0}

    def mean(params):
        term = sft.nll(model.forward, params, batch, None)[0]["nll"]
        return term.sum / term.weight

    value, gradients = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)  # float32, forty tokens; seen 1e-7
    names = dict(theirs.named_parameters())
    ours = tensors.of_tree(gradients, model.arch)
    assert set(ours) == set(names)
    for name, leaf in ours.items():
        # Seen: 2e-6 at most, float32 rounding through two layers.
        assert_near(leaf, names[name].grad.numpy(), 2e-5)


def test_stories_continue_as_with_transformers(shared):
    """Greedy text from the real checkpoint, 120 tokens: one wrong constant in the forward and it is another story."""
    wanted = json.loads((GOLDEN / "stories.json").read_text())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = jaxpost.load(str(shared / "models" / "stories260k"), mesh=mesh)
    (text,) = model.generate(wanted["text"], new=len(wanted["continuation"]))
    whole = model.tokenizer.decode(wanted["prompt"] + wanted["continuation"])
    assert whole == model.tokenizer.decode(wanted["prompt"]) + text
    assert text.startswith(", there was a little girl named Lily.")


# ------------------------------------------------------------------------------------------------------ Against itself


@pytest.fixture(scope="module")
def case(model_folders):
    """One model that has everything at once (grouped heads, biases, a tied head), its rows and their logits."""
    model, params = opened(model_folders["both_biases_tied"])
    rows = llama_cases.tokens("both_biases_tied")
    return model, params, rows, joined(scores(model, params, batch_of(rows, 40)), rows)


def test_padding_changes_nothing(case):
    model, params, rows, wanted = case
    batch = batch_of([*rows, rows[0][:1]], 48)
    batch["tokens"] = np.where(batch["segments"] > 0, batch["tokens"], 5)  # what padding holds does not matter either
    found = joined(scores(model, params, batch), rows)
    assert_near(found, wanted, 1e-5)  # other shapes may sum in another order; seen 0


def test_packing_changes_nothing(case):
    """Two documents in a row, and the other way about, equal each in a row of its own."""
    model, params, rows, wanted = case
    apart = np.split(wanted, [len(rows[0])])
    packed = {}
    for key in ("tokens", "positions"):
        single = batch_of(rows, 40)[key]
        parts = [single[i, : len(row)] for i, row in enumerate(rows)]
        packed[key] = np.stack([np.concatenate(parts), np.concatenate(parts[::-1])])
    lengths = [[40, 17], [17, 40]]
    packed["segments"] = np.stack([np.repeat([1, 2], n) for n in lengths]).astype(np.int32)
    found = scores(model, params, packed)
    assert_near(np.asarray(found[0]), np.concatenate(apart), 1e-5)  # seen 3e-7
    assert_near(np.asarray(found[1]), np.concatenate(apart[::-1]), 1e-5)


def test_unstacked_layers_change_nothing(case):
    model, params, rows, wanted = case
    apart = unstack(params, model.arch.layers)
    assert isinstance(apart["layers"], tuple) and unstack(apart, model.arch.layers) is apart
    assert_near(joined(scores(model, apart, batch_of(rows, 40)), rows), wanted, 1e-5)  # another fusion; seen 0


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient(case):
    model, params, rows, _ = case
    batch = batch_of(rows, 40)

    def gradient(remat):
        other = Transformer(model.arch, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(other.forward(p, batch).hidden))))(params)

    wanted = gradient("none")
    for remat in set(REMAT) - {"none"}:
        # The same sums in another fusion; seen 3e-7 of each leaf's largest.
        jax.tree.map(lambda x, y: assert_near(np.asarray(x), np.asarray(y), 2e-5), gradient(remat), wanted)


def test_decoding_with_a_cache_equals_the_whole_forward(case):
    """Position by position, from a prefill of right-padded prompts of unequal length."""
    model, params, rows, wanted = case
    rows, starts = [rows[0][:24], rows[1]], np.array([20, 9])
    first, second = np.split(wanted, [40])
    longest = int(starts.max())

    @jax.jit
    def turn(cache, tokens, positions):
        out = model.forward(params, {"tokens": tokens, "positions": positions}, cache)
        return logits(out.hidden, out.head), out.cache

    prompts = batch_of([row[:n] for row, n in zip(rows, starts, strict=True)], longest)["tokens"]
    places = np.broadcast_to(np.arange(longest, dtype=np.int32), (2, longest))
    found, cache = turn(model.make_cache(2, 40), prompts, places)
    # Absolute, on logits of up to 20: 5e-5 is the contract of sampling against training; seen 6e-6.
    np.testing.assert_allclose(found[0], first[:20], atol=5e-5)
    np.testing.assert_allclose(found[1, :9], second[:9], atol=5e-5)
    for step in range(4):
        here = (starts + step).astype(np.int32)
        tokens = np.array([[row[n]] for row, n in zip(rows, here, strict=True)])
        found, cache = turn(cache, tokens, here[:, None])
        np.testing.assert_allclose(found[0, 0], first[here[0]], atol=5e-5)
        np.testing.assert_allclose(found[1, 0], second[here[1]], atol=5e-5)


def test_a_sharded_load_equals_a_single_device_one(model_folders, monkeypatch):
    """Data 2 x fsdp 2 x tensor 2: every device holds its piece alone, no read is larger than one, the logits are the same."""
    name = "both_biases_tied"
    reads = []
    files = hf._open

    def recording(folder):
        return {tensor: _Recorder(held, reads) for tensor, held in files(folder).items()}

    model, whole = opened(model_folders[name])
    monkeypatch.setattr(hf, "_open", recording)
    mesh = sharding.make_mesh(2, 2, 2)
    shapes = loading.abstract(model, mesh)
    params = hf.load(model_folders[name], model.arch, shapes)
    jax.tree.map(np.testing.assert_array_equal, params, whole)

    kernel = params["layers"]["mlp"]["up"]["kernel"]  # [2, 24, 20]: fsdp halves the width, tensor the feed-forward width
    assert {s.data.shape for s in kernel.addressable_shards} == {(2, 12, 10)}
    bias = params["layers"]["attention"]["q"]["bias"]  # [2, 24]: tensor halves it
    assert {s.data.shape for s in bias.addressable_shards} == {(2, 12)}
    assert max(size for tensor, size in reads if tensor == (20, 24)) == 12 * 10

    rows = llama_cases.tokens(name)
    batch = sharding.distribute(batch_of([*rows, *rows], 40), mesh, 4)
    with sharding.use(mesh):
        found = np.asarray(scores(model, params, batch))
    # Partial sums over two devices add in another order; seen 3e-7.
    assert_near(found[:2], np.asarray(scores(model, whole, batch_of(rows, 40))), 1e-5)


class _Recorder:
    """A lazy tensor that notes (its shape, how many elements were read)."""

    def __init__(self, held, reads):
        self.held, self.reads = held, reads
        self.get_shape, self.get_dtype = held.get_shape, held.get_dtype

    def __getitem__(self, index):
        part = self.held[index]
        self.reads.append((tuple(self.held.get_shape()), part.size))
        return part
