"""Runs with an adapter: what their checkpoints hold and what they leave where it is, and how they go on, load and leave."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

import jaxpost
from jaxpost import export, optim, recipe, sharding, train
from jaxpost.adapters import lora, peft
from jaxpost.errors import UserError
from jaxpost.models import families, hf, loading
from jaxpost.models.transformer import Transformer
from jaxpost.reporting.log import Log
from jaxpost.stages import train as stage_train
from jaxpost.stages.plan import plan_stage
from jaxpost.step import combine
from jaxpost.storage import checkpoint, fingerprint
from jaxpost.tasks import arithmetic
from jaxpost.tokenizer import save
from jaxpost.types import TrainState

TOKENS = np.arange(24).reshape(2, 12) % 17


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def model_folder(folder):
    arch = families.architecture(runs.MODEL)
    hf.save(folder, Transformer(arch).init(jax.random.PRNGKey(5)), arch, runs.MODEL)
    save(arithmetic.tokenizer(), folder)
    return folder


def settings(folder, base: str = "nf4", **changes) -> dict:
    """SFT with an adapter around a folder's weights, then REINFORCE, which trains it on."""
    found = runs.settings(
        folder,
        stages=("sft", "reinforce"),
        model=str(folder / "base"),
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        save_every=2,
        sft={"steps": 4, "ema": 0.5, "adapter": {"name": "lora.dora", "rank": 2, "base": base}},
        reinforce={
            "source": "rollouts",
            "objective": {"name": "policy_gradient.reinforce"},
            "steps": 3,
            "optimizer": {"lr": 1e-2},
        },
    )
    return found | changes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run: its model under base, its workdir under w."""
    folder = tmp_path_factory.mktemp("adapted")
    model_folder(folder / "base")
    train.run(recipe.make(**settings(folder)), folder / "w")
    return folder


def size(folder) -> int:
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


def state_of(workdir, stage):
    """(the state of a stage's newest checkpoint by path, through the loop's own restore)."""
    config, mesh = recipe.make(**json.loads((workdir / "config.json").read_text())), sharding.make_mesh(fsdp=2, tensor=2)
    with sharding.use(mesh):
        plan = plan_stage(stage, dict(recipe.stages(config))[stage], mesh)
        kept = checkpoint.Checkpoints(workdir / "checkpoints" / stage)
        state = stage_train._restore(plan, kept, kept.latest(), optim.make(plan.settings.optimizer, plan.steps), mesh)
        kept.close()
    return {sharding.path_name(path): jax.device_get(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.slow
def test_checkpoints_hold_the_adapter_and_name_the_base(whole):
    for stage in ("sft", "reinforce"):
        step = checkpoint.find_step(whole / "w" / "checkpoints" / stage)
        held = checkpoint.paths(step)
        assert len(held) == 7 * 3 and {name.rpartition(".")[2] for name in held} == {"a", "b", "magnitude"}
        meta = checkpoint.read_meta(step)
        assert meta["adapter"]["name"] == "lora.dora" and meta["adapter"]["alpha"] == 16.0  # the defaults are written down too
        # The second stage's base is the first one's: a chain would break with its first link.
        digest = fingerprint.digest(whole / "base")
        assert meta["base"] == {"reference": str(whole / "base"), "hash": digest, "beside": []}
    state = state_of(whole / "w", "reinforce")
    adapter = sum(x.nbytes for path, x in state.items() if path.startswith("train"))
    moments = sum(x.nbytes for path, x in state.items() if path.startswith("opt_state"))
    assert 2 * adapter <= moments <= 2 * adapter + 64  # and the counts of the steps
    arch = families.architecture(runs.MODEL)
    assert adapter < 4 * arch.parameters() / 6
    # Learning happened, in both stages and in every part.
    first, last = state_of(whole / "w", "sft"), state
    for part in ("a", "b", "magnitude"):
        name = f"train/layers/mlp/up/kernel/{part}"
        assert np.abs(first[name] - last[name]).max() > 1e-5
    name = "frozen/layers/mlp/up/kernel/base/codes"
    assert first[name].dtype == np.uint8 and np.array_equal(first[name], last[name])


def test_a_checkpoints_bytes_are_the_adapters(tmp_path):
    """16 MB are elsewhere, 32 kB are learned; the moments are zeros yet, which compress. Orbax takes some kB for any tree."""
    rng, zero = np.random.default_rng(0), np.zeros((), np.int32)
    node = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("a", (2048, 2)), ("b", (2, 2048)))}
    train = {"kernel": {"base": None} | node}
    frozen = {"kernel": {"base": jnp.asarray(rng.normal(size=(2048, 2048)), jnp.float32), "a": None, "b": None}}
    state = TrainState(zero, train, frozen, optax.adam(1e-3).init(train), None, jax.random.PRNGKey(0), zero, zero)
    saved = checkpoint.Checkpoints(tmp_path / "s")
    saved.save(state, {"base": {"reference": "elsewhere", "hash": "", "beside": []}})
    saved.close()
    assert 30_000 < size(tmp_path / "s") < 150_000
    saved = checkpoint.Checkpoints(tmp_path / "s")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    below = jax.tree.map(jnp.zeros_like, combine(train, frozen))
    again = saved.restore(0, shapes, {"kernel": below["kernel"] | {"base": frozen["kernel"]["base"]}})
    saved.close()
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.slow
def test_a_run_that_was_cut_off_is_the_run_that_was_not(whole, tmp_path, monkeypatch):
    for name in ("base", "task.py"):
        (tmp_path / name).symlink_to(whole / name)
    config = recipe.make(**settings(whole))
    logged = Log.step

    def breaks(self, at, *rest):
        if (self.plan.name, at) in moments:
            moments.remove((self.plan.name, at))
            raise KeyboardInterrupt
        return logged(self, at, *rest)

    moments = [("sft", 3), ("reinforce", 3)]
    monkeypatch.setattr(Log, "step", breaks)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "w")
    train.run(config, tmp_path / "w")
    assert not moments
    for stage in ("sft", "reinforce"):
        one, other = state_of(whole / "w", stage), state_of(tmp_path / "w", stage)
        assert one.keys() == other.keys()
        for path in one:
            np.testing.assert_array_equal(one[path], other[path], err_msg=f"{stage} {path}")


@pytest.mark.slow
def test_a_workdir_loads_generates_and_leaves_merged(whole, tmp_path):
    model = jaxpost.load(whole / "w", mesh=one_device())
    state = state_of(whole / "w", "reinforce")
    for path, x in jax.tree_util.tree_leaves_with_path(model.params):
        name = sharding.path_name(path)
        np.testing.assert_array_equal(x, state.get(f"train/{name}", state.get(f"frozen/{name}")), err_msg=name)
    assert len(model.generate("12+34", new=3, n=2, temperature=1.0)) == 2
    export.export(str(whole / "w"), str(tmp_path / "merged"), mesh=one_device())
    ours, merged = (np.asarray(m.logits(TOKENS)) for m in (model, jaxpost.load(tmp_path / "merged", mesh=one_device())))
    assert np.abs(ours - merged).max() <= 1e-5 * np.abs(ours).max()
    base = np.asarray(jaxpost.load(whole / "base", mesh=one_device()).logits(TOKENS))
    assert np.abs(ours - base).max() > 1e-2
    # The running mean is what a stage leaves behind: the first stage's last weights differ from it.
    first = jaxpost.load(whole / "w" / "checkpoints" / "sft", mesh=one_device()).params["layers"]["mlp"]["up"]["kernel"].b
    assert np.abs(np.asarray(first) - state_of(whole / "w", "sft")["train/layers/mlp/up/kernel/b"]).max() > 1e-6
    names = export.export(str(whole / "w"), str(tmp_path / "adapter"), mesh=one_device(), adapter=True)
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter" / names[0]).read_text())["base_model_name_or_path"] == str(whole / "base")
    entry = {"name": "peft", "folder": str(tmp_path / "adapter"), "base": "nf4"}
    again = jaxpost.load(whole / "base", mesh=one_device(), adapter=entry)
    np.testing.assert_array_equal(again.logits(TOKENS), ours)


@pytest.mark.slow
def test_a_base_that_is_gone_or_another_is_named(whole, tmp_path):
    base = whole / "base"
    tensors = base / "model.safetensors"
    kept = tensors.read_bytes()
    try:
        base.rename(whole / "away")
        with pytest.raises(UserError, match=f"its frozen weights are those in {base}, which is not there. Bring them back"):
            jaxpost.load(whole / "w", mesh=one_device())
        (whole / "away").rename(base)
        tensors.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(UserError, match=f"those that {base} held when training began; what it holds now is something else"):
            jaxpost.load(whole / "w", mesh=one_device())
    finally:
        tensors.write_bytes(kept)


@pytest.mark.slow
def test_a_stage_of_the_same_run_is_named_from_the_workdir_on(whole, tmp_path):
    """Full SFT, then an adapter: the workdir may move, and a third stage keeps what the second learned beside the adapter."""
    chosen = settings(whole, stages=("sft", "tuned", "last"), save_every=0)
    del chosen["reinforce"], chosen["rollouts"]["group"]  # which nothing would read
    chosen["optimizer"] = {"lr": 1e-3, "warmup": 0}
    chosen |= {"sft": {"steps": 1}, "tuned": {"steps": 1, "adapter": {"name": "lora"}, "trainable": "kernel/b$|norm/scale$"}}
    train.run(recipe.make(**chosen, last={"steps": 1}), tmp_path / "w")
    (tmp_path / "w").rename(tmp_path / "moved")
    metas = [
        checkpoint.read_meta(checkpoint.find_step(tmp_path / "moved" / "checkpoints" / n)) for n in ("sft", "tuned", "last")
    ]
    assert metas[0]["base"] is None and metas[0]["adapter"] == {}
    reference = [meta["base"]["reference"] for meta in metas[1:]]
    assert reference == ["./checkpoints/sft/1"] * 2
    # What is drawn at random is kept, learned or not; the norm, once learned, stays with the adapter though frozen again.
    assert {name.rpartition(".")[2] for name in metas[1]["base"]["beside"]} == {"a"}
    assert metas[2]["base"]["beside"] == ["norm.scale"]
    second, third = (state_of(tmp_path / "moved", n) for n in ("tuned", "last"))
    np.testing.assert_array_equal(second["train/norm/scale"], third["frozen/norm/scale"])
    assert np.abs(second["train/norm/scale"] - state_of(tmp_path / "moved", "sft")["train/norm/scale"]).max() > 1e-6
    model = jaxpost.load(tmp_path / "moved", mesh=one_device())
    np.testing.assert_array_equal(model.params["norm"]["scale"], second["train/norm/scale"])


@pytest.mark.slow
def test_adapters_over_adapters_are_refused(whole, tmp_path):
    one, other = {"name": "lora", "rank": 2}, {"name": "lora", "rank": 3}
    two = settings(whole, stages=("sft", "reinforce"), adapter=one, rollouts={})
    with pytest.raises(UserError, match="config.reinforce.adapter: the stage that it starts from has another"):
        recipe.stages(recipe.make(**two | {"sft": {}, "reinforce": {"adapter": other}}))
    assert recipe.stages(recipe.make(**two | {"sft": {}, "reinforce": {}}))[1][1].adapter.to_dict() == one
    with pytest.raises(UserError, match="config.adapter: the model has one inside, .*'lora.dora'.* or merge it first"):
        loading.describe(str(whole / "w"), adapter=one)
    assert loading.describe(str(whole / "w"), adapter={"name": "lora.dora", "rank": 2, "base": "nf4"}).adapter["rank"] == 2


@pytest.mark.slow
def test_a_fresh_model_is_kept_whole(tmp_path):
    """There is no folder to point at."""
    around = {"name": "lora", "base": "int8"}
    chosen = runs.settings(tmp_path, steps=1, adapter=around, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    train.run(recipe.make(**chosen), tmp_path / "w")
    step = checkpoint.find_step(tmp_path / "w")
    assert checkpoint.read_meta(step)["base"] is None
    state = state_of(tmp_path / "w", "train")
    model = jaxpost.load(tmp_path / "w", mesh=one_device())
    node = model.params["layers"]["attention"]["q"]["kernel"]
    np.testing.assert_array_equal(node.base.values, state["frozen/layers/attention/q/kernel/base/values"])
    np.testing.assert_array_equal(node.b, state["train/layers/attention/q/kernel/b"])


def test_what_the_digest_covers(tmp_path):
    """Every byte of a small file; of a large one its head, pieces throughout and its end; names and sizes; of the files that
    are read, whatever they are called, and of no others."""
    file, other, index = (tmp_path / name for name in ("model.safetensors", "part.safetensors", "model.safetensors.index.json"))
    with pytest.raises(UserError, match="no model.safetensors and no model.safetensors.index.json"):
        fingerprint.digest(tmp_path)
    rng = np.random.default_rng(0)
    content = bytearray(rng.bytes(3 * fingerprint.WHOLE))
    file.write_bytes(content)
    before = fingerprint.digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-makers.safetensors").write_text("the same weights in another layout")
    assert fingerprint.digest(tmp_path) == before  # not a weight
    seen = {}
    for place in (0, fingerprint.HEAD - 1, len(content) - 1, len(content) - fingerprint.PIECE, fingerprint.HEAD + 300_000):
        content[place] ^= 1
        file.write_bytes(content)
        seen[place] = fingerprint.digest(tmp_path) != before
        content[place] ^= 1
    assert list(seen.values()) == [True, True, True, True, False]
    file.write_bytes(content[:-1])
    assert fingerprint.digest(tmp_path) != before
    file.write_bytes(content)
    assert fingerprint.digest(tmp_path) == before
    file.rename(other)
    index.write_text(json.dumps({"weight_map": {"norm": other.name}}))
    assert fingerprint.digest(tmp_path) != before
    other.write_bytes(content[:1000])
    short = fingerprint.digest(tmp_path)
    other.write_bytes(content[:500] + b"x" + content[501:1000])
    assert fingerprint.digest(tmp_path) != short


def test_a_base_that_may_be_deleted_is_refused(tmp_path, monkeypatch):
    (tmp_path / "3" / "params").mkdir(parents=True)
    spec = loading.ModelSpec(None, None, {}, tmp_path / "3")
    monkeypatch.setattr(checkpoint, "read_meta", lambda folder: {"done": False})
    with pytest.raises(UserError, match="config.model: .*3 is a checkpoint of a run that is not over"):
        loading.base_in(spec, tmp_path / "w", {"norm": {"scale": jnp.ones(2)}})
    assert loading.base_in(spec, tmp_path / "w", {"norm": {"scale": None}}) is None


def test_what_was_learned_beside_an_adapter_is_no_part_of_its_file(tmp_path):
    arch = families.architecture(runs.MODEL)
    params = Transformer(arch).init(jax.random.PRNGKey(0))
    adapted = lora.lora(params, jax.random.PRNGKey(1), rank=2)
    with pytest.raises(UserError, match="this run learned norm.scale as well"):
        peft.save(tmp_path, adapted, arch, {"name": "lora"}, None, ["norm.scale"])
    assert not list(tmp_path.iterdir())
