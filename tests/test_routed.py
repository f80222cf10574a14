"""Adapters among which the rows of a batch choose: each row's values and gradients are those of its adapter alone."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import sampler_cases as cases
import small
import thin
from test_adapters import TOKENS, load
from test_soft_prompts import MODELS, rows

import jaxpost
from jaxpost import export, optim, recipe, sharding, train
from jaxpost.adapters import peft
from jaxpost.errors import UserError
from jaxpost.models import adapted, loading, routes
from jaxpost.objectives import sft
from jaxpost.reporting.log import Log
from jaxpost.rollouts import source
from jaxpost.sampling.beam import search
from jaxpost.stages import generate
from jaxpost.stages.plan import plan_stage
from jaxpost.step import combine, gradients
from jaxpost.storage import checkpoint

E, M = 3, 2
KEY = jax.random.PRNGKey(3)
KINDS = {
    "lora": {"name": "routed.lora", "experts": E, "rank": 2},
    "nf4": {"name": "routed.lora", "experts": E, "rank": 2, "base": "nf4", "column": "tenant"},
    "soft": {"name": "routed.soft", "experts": E, "length": M},
    "prefix": {"name": "routed.prefix", "experts": E, "length": M, "std": 1.0},
    "both": [{"name": "routed.lora", "experts": E, "rank": 2}, {"name": "routed.soft", "experts": E, "length": M}],
}


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def learned(params):
    """The tree as training may have left it: the second factors are no longer zero."""
    rng = np.random.default_rng(0)

    def move(path, x):
        moved = sharding.path_name(path).endswith("/b")
        return jnp.asarray(rng.normal(size=x.shape) / 4, jnp.float32) if moved else x

    return jax.tree_util.tree_map_with_path(move, params)


@functools.cache
def weights(kind: str, model: str = "kinds"):
    spec = loading.ModelSpec(MODELS[model], None, {}, None, adapter=KINDS[kind])
    return learned(loading.weights(spec, one_device(), seed=1))


def packed(kind: str) -> tuple[dict, np.ndarray]:
    """Documents of several lengths packed into rows, each with an adapter's number; and the numbers, -1 at the padding."""
    batch = {name: x for name, x in rows().items() if name != "own"}
    which = np.where(batch["segments"] > 0, (2 * batch["segments"] + np.arange(len(batch["tokens"]))[:, None]) % E, -1)
    assert (
        set(which.ravel()) == {-1, 0, 1, 2} and (np.ptp(np.where(which < 0, which.max(1, keepdims=True), which), 1) > 0).any()
    )
    (column,) = routes.columns(weights(kind))
    return {**batch, column: np.maximum(which, 0).astype(np.float32)}, which


def adapters(tree) -> dict[str, np.ndarray]:
    """{path: array} of the leaves that a routed adapter adds."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): np.asarray(x) for path, x in leaves}


def near(got, wanted, bound=1e-5):
    """Within 1e-5 of the norm: float32's rounding in sums of other lengths."""
    assert np.linalg.norm(got - wanted) <= bound * np.linalg.norm(wanted) > 0


@pytest.mark.parametrize("kind", thin.slow_after(1, ["both", *(kind for kind in KINDS if kind != "both")]))
def test_a_document_is_computed_and_learned_by_its_adapter_alone(kind):
    model, params, (batch, which) = MODELS["kinds"], weights(kind), packed(kind)
    pattern = adapted.added(KINDS[kind])

    def loss(train, frozen, at):
        values = model.forward(combine(train, frozen), batch).hidden
        return jnp.sum(jnp.sin(values) * at[..., None]), values

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    train, frozen = optim.partition(params, pattern)
    (_, values), grads = grad(train, frozen, which >= 0)
    each = []
    for number in range(E):
        here = which == number
        alone = routes.only(params, number)
        (_, own), wanted = grad(*optim.partition(alone, pattern), here)
        near(np.asarray(values)[here], np.asarray(own)[here])
        got, wanted = adapters(routes.only(combine(grads, frozen), number)), adapters(wanted)
        for path, x in wanted.items():
            near(got[path], x, 2e-5)  # one sum over all documents against sums of each
        each.append(np.asarray(own))
    for number in range(E):
        here = which == number
        assert np.abs(each[(number + 1) % E] - each[number])[here].max() > 1e-2, "the choice must matter"


def learned_on(mesh, kind: str, microbatches: int = 1):
    """(loss, gradients) of SFT on the small model."""
    model = small.MODEL
    params = weights(kind, "")
    batch = small.batch()
    (column,) = routes.columns(params)
    batch[column] = np.where(batch["segments"] > 0, (batch["segments"] + np.arange(small.ROWS)[:, None]) % E, 0)
    with sharding.use(mesh):
        params = jax.device_put(jax.device_get(params), sharding.stored(mesh, params))
        train, frozen = optim.partition(params, adapted.added(KINDS[kind]))
        batch = sharding.distribute({k: np.asarray(x) for k, x in batch.items()}, mesh, small.ROWS)

        def run(train, frozen, batch):
            return gradients(model.forward, sft.nll, train, frozen, batch, KEY, microbatches)[:2]

        loss, grads = jax.jit(run, out_shardings=(None, sharding.stored(mesh, train)))(train, frozen, batch)
        return float(loss), grads


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["both", pytest.param("nf4", marks=pytest.mark.slow), pytest.param("prefix", marks=pytest.mark.slow)]
)
def test_eight_devices_and_microbatches_learn_what_one_does(kind):
    loss, one = learned_on(one_device(), kind)
    other, eight = learned_on(sharding.make_mesh(2, 2, 2), kind, microbatches=2)
    assert other == pytest.approx(loss, rel=1e-6)
    for a, b in zip(jax.tree.leaves(jax.device_get(eight)), jax.tree.leaves(one), strict=True):
        near(a, np.asarray(b), 2e-5)  # sums in another order, of which each adapter has those of a third of the rows
    if kind == "both":  # inputs are split over fsdp, outputs over tensor, experts and rank over nothing
        up = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, eight["layers"]["mlp"]["up"]["kernel"])
        assert (up.a, up.b) == ((2, E, 16, 2), (2, E, 2, 24))


# ---------------------------------------------------------------------------------------------------------- The sampler

CHOSEN = [0, 2, 1, 2, 0]


@functools.cache
def sampler_weights(kind: str):
    return learned(adapted.applied(KINDS[kind], cases.weights(), KEY))


@pytest.mark.parametrize("kind", ["both", pytest.param("prefix", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "way",
    [{"slots": 2}, pytest.param({"sizes": (2, 2, 2), "slots": 1}, marks=pytest.mark.slow)],
    ids=["refilled", "mesh"],
)
def test_a_prompt_is_completed_by_its_adapter(kind, way):
    params = sampler_weights(kind)
    drawn = cases.sampled(params=params, columns={"adapter": CHOSEN}, temperature=0.0, **way)
    apart = []
    for number in range(E):
        of = np.repeat(np.array(CHOSEN) == number, cases.GROUP)
        alone = cases.sampled(params=routes.only(params, number), temperature=0.0, **way)
        np.testing.assert_array_equal(drawn.tokens[of], alone.tokens[of])
        # 5e-5: the design's bound for the sampler in float32.
        np.testing.assert_allclose(drawn.logps[of], alone.logps[of], atol=5e-5, rtol=0)
        apart.append((drawn.tokens[~of] != alone.tokens[~of]).any())
    assert any(apart), "the choice must matter"


@pytest.mark.slow
def test_a_beam_search_goes_by_the_prompts_adapter():
    params, options = sampler_weights("both"), {"mesh": cases.mesh(1, 1, 1), "new": 4, "stop": (cases.STOP,), "beams": 3}
    options["prompt_window"] = cases.WINDOW
    found = search(cases.MODEL, params, cases.prompts(), columns={"adapter": CHOSEN}, **options)
    for number in range(E):
        of = np.array(CHOSEN) == number
        alone = search(cases.MODEL, routes.only(params, number), cases.prompts(), **options)
        np.testing.assert_array_equal(found.tokens[of], alone.tokens[of])
        np.testing.assert_allclose(found.logps[of], alone.logps[of], atol=5e-5, rtol=0)


def test_columns_that_do_not_say_it_are_refused():
    params = sampler_weights("lora")
    for columns, message in (
        (None, "columns: none given, and the model's rows choose among its adapters by adapter \\(0 to 2\\)"),
        ({"adapter": [0, 1, 3, 0, 0]}, "adapter is \\[0, 1, 3, 0, 0\\]; give 5 numbers of 0 to 2"),
        ({"adapter": [0]}, "give 5 numbers of 0 to 2"),
        ({"adapter": CHOSEN, "other": CHOSEN}, "columns: adapter, other given"),
    ):
        with pytest.raises(UserError, match=message):
            cases.sampled(params=params, columns=columns)
    batch = {name: x for name, x in rows().items() if name != "own"}
    with pytest.raises(UserError, match="by the column 'adapter', and this batch has none"):
        MODELS["kinds"].forward(weights("lora"), batch)
    with pytest.raises(UserError, match="adapter 3 of the model: it has adapters 0 to 2"):
        routes.only(params, 3)
    with pytest.raises(UserError, match="adapter 0 of the model: its rows do not choose"):
        routes.only(cases.weights(), 0)
    two = [KINDS["lora"], {**KINDS["soft"], "experts": 2}]
    with pytest.raises(UserError, match="the column 'adapter' chooses among 3 and among 2|among 2 and among 3"):
        loading.columns(loading.ModelSpec(small.MODEL, None, {}, None, adapter=two))
    for entry, message in (
        ({"experts": 0}, "config.adapter.experts: 0"),
        ({"column": "a b"}, "config.adapter.column: 'a b'"),
        ({"rank": 0}, "config.adapter.rank: 0"),
    ):
        with pytest.raises(UserError, match=message):
            loading.abstract(small.MODEL, one_device(), {"name": "routed.lora", **entry})


# ----------------------------------------------------------------------------------------------------------- peft's files


@pytest.mark.parametrize("kind", ["lora", pytest.param("soft", marks=pytest.mark.slow), "prefix"])
def test_each_goes_out_as_a_folder_and_several_folders_are_one_adapter(kind, tmp_path):
    model = load(KINDS[kind])
    params = learned(model.params)
    names = peft.save(tmp_path, params, model.transformer.arch, adapted.recorded(KINDS[kind]), "the/base")
    assert names == sorted(f"{i}/adapter_{name}" for i in range(E) for name in ("config.json", "model.safetensors"))
    folders = [str(tmp_path / str(i)) for i in range(E)]
    for number, folder in enumerate(folders):
        alone = load({"name": "peft", "folder": folder})
        wanted = dataclasses.replace(model, params=params).only(number).logits(TOKENS)
        np.testing.assert_allclose(alone.logits(TOKENS), wanted, rtol=1e-6, atol=1e-6)
    entry = {"name": "routed.peft", "folders": folders}
    again = load(entry)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    record = adapted.recorded(entry)
    assert (record["name"], record["experts"], record["column"]) == (KINDS[kind]["name"], E, "adapter")
    assert "folders" not in record and adapted.recorded(record) == record
    mixed = dataclasses.replace(model, params=params).logits(TOKENS, columns={"adapter": [2, 1]})
    for row, number in enumerate((2, 1)):
        alone = load({"name": "peft", "folder": folders[number]}).logits(TOKENS)
        near(np.asarray(mixed)[row], np.asarray(alone)[row])
    fields = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    if kind == "lora":
        (tmp_path / "1" / "adapter_config.json").write_text(json.dumps(fields | {"lora_alpha": 3.0}))
        with pytest.raises(UserError, match="folders: alpha is 16.0 in .*0 and 3.0 in .*1"):
            load(entry)
    with pytest.raises(UserError, match="it takes a list of texts"):
        load({"name": "routed.peft", "folders": folders[0]})


def test_folders_whose_kind_rows_cannot_choose_are_refused(tmp_path):
    model = load({"name": "lora.dora", "rank": 2})
    peft.save(tmp_path, model.params, model.transformer.arch, {"name": "lora.dora"}, None)
    with pytest.raises(UserError, match="holds lora.dora, of which rows cannot choose one"):
        load({"name": "routed.peft", "folders": [str(tmp_path)] * 2})


# ------------------------------------------------------------------------------------------------------------------ Runs

TASK = """
from jaxpost.tasks import arithmetic
from jaxpost.tasks.arithmetic import tokenizer  # noqa: F401


def record(index, *, split="train", seed=0):
    return arithmetic.record(index, split=split, seed=seed) | {"tenant": index % 3}


def conversation(index, *, seed=0):
    return arithmetic.conversation(index, seed=seed) | {"tenant": index % 3}


def test_records(per_cell, *, seed=0):
    return [one | {"tenant": i % 3} for i, one in enumerate(arithmetic.test_records(per_cell, seed=seed))]


def reward(record, completion):
    return sum(letter.isdigit() for letter in completion) / 4
"""


def settings(folder, **changes) -> dict:
    """SFT, then GRPO on the adapters that it trained."""
    chosen = runs.settings(folder, stages=("sft", "grpo"), adapter={**KINDS["nf4"], "rank": 1}, **changes)
    (folder / "task.py").write_text(TASK)
    chosen |= {"sft": {"steps": 3, "microbatches": 2}, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "save_every": 2}
    grpo = {"source": "rollouts", "objective": "policy_gradient.grpo", "steps": 2, "optimizer": {"lr": 1e-2}}
    return chosen | {"grpo": grpo}


def test_batches_say_which_adapter_a_row_takes(tmp_path):
    """Of data and of rollouts, packed and with a shared prefix; a row that does not say it is named."""
    config, mesh = recipe.make(**settings(tmp_path)), one_device()
    with sharding.use(mesh):
        plan = plan_stage("sft", dict(recipe.stages(config))["sft"], mesh)
        batch = plan.source(None)
        assert plan.own["tenant"].shape == batch["tenant"].shape and batch["tenant"].dtype == np.float32
        # The digits that a document adds tell its number in the task: all documents of one text have one tenant.
        documents = {}
        for row in range(len(batch["tokens"])):
            for number in range(1, batch["segments"][row].max() + 1):
                here = batch["segments"][row] == number
                (tenant,) = set(batch["tenant"][row, here])
                documents.setdefault(tuple(batch["tokens"][row, here]), set()).add(tenant)
        assert {x for each in documents.values() for x in each} == {0.0, 1.0, 2.0}
        assert not batch["tenant"][batch["segments"] == 0].any()
        plan.source.close()
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1", "completion": "2", "tenant": 3}\n')
    one = {
        k: x for k, x in settings(tmp_path).items() if k not in ("stages", "sft", "grpo", "task", "eval_per_cell", "eval_rows")
    }
    one |= {"data": str(tmp_path / "data.jsonl"), "steps": 1, "held_out": 0}
    one.pop("rollouts")
    with pytest.raises(UserError, match="data.jsonl.* tenant is 3; config.adapter has 3 adapters, and a row names one, 0 to 2"):
        plan_stage("train", dict(recipe.stages(recipe.make(**one)))["train"], mesh)


@pytest.mark.parametrize(("shared", "wanted"), [(False, [2, 2, 1, 1]), (True, [2, 1])])
def test_rows_of_rollouts_have_their_records_number(shared, wanted):
    shape = source.Rows(len(wanted), 2, 3, 2, shared=shared)
    rollouts = types.SimpleNamespace(config=types.SimpleNamespace(rows=shape, columns=("tenant",)))
    completions = types.SimpleNamespace(lengths=np.array([1, 2, 2, 1]))
    batch = types.SimpleNamespace(
        prompts=[np.array([4, 5, 6]), np.array([4])], records=[{"tenant": 2}, {"tenant": 1}], completions=completions
    )
    where = source.Rollouts._layout(rollouts, batch)
    real = where.columns["segments"] > 0
    np.testing.assert_array_equal(where.columns["tenant"], np.where(real, np.array(wanted)[:, None], 0))
    assert not real.all() and where.columns["tenant"].dtype == np.float32


def test_a_stage_that_generates_says_which_adapter_answers(monkeypatch):
    asked = {}
    monkeypatch.setattr(generate, "in_chunks", lambda *_, **options: asked.update(options) or iter(()))
    names = ("model", "tokenizer", "rewards", "row_type", "judging")
    about = dict.fromkeys(names) | {"count": 4, "group": 2, "batch": 4, "seed": 0, "step": 0, "options": {}}
    samples = generate.Samples(prompt=lambda i: ({"adapter": i % E}, np.array([1])), **about)
    begun = {"prompts": 1, "rows": 0, "tokens": 0, "seconds": 0.0}
    assert generate._draw(samples, None, begun, sampler_weights("lora"), None, None) == begun
    assert asked["columns"] == {"adapter": [1, 2, 0]}
    asked.clear()
    generate._draw(samples, None, begun, cases.weights(), None, None)
    assert "columns" not in asked


@pytest.mark.slow
def test_a_run_trains_them_resumes_and_leaves(tmp_path, monkeypatch):
    config, logged, moments = recipe.make(**settings(tmp_path)), Log.step, []
    batches = []

    def breaks(self, at, batch, *rest):
        batches.append((self.plan.name, batch))
        if (self.plan.name, at) in moments:
            moments.remove((self.plan.name, at))
            raise KeyboardInterrupt
        return logged(self, at, batch, *rest)

    monkeypatch.setattr(Log, "step", breaks)
    train.run(config, tmp_path / "whole")
    for name, batch in batches:
        assert {0.0, 1.0, 2.0} >= set(np.unique(batch["tenant"])) and batch["tenant"].max() > 0, name
        assert (np.ptp(batch["tenant"], axis=1) > 0).any() if name == "sft" else True, "rows hold documents of several"
    moments += [("sft", 3), ("grpo", 2)]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "cut")
    train.run(config, tmp_path / "cut")
    assert not moments
    whole, cut = (jaxpost.load(tmp_path / name, mesh=one_device()) for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, cut.params)
    first = checkpoint.find_step(tmp_path / "whole" / "checkpoints" / "sft")
    moved = adapters(jax.tree.map(lambda a, b: a - b, whole.params, jaxpost.load(first, mesh=one_device()).params))
    for number in range(E):
        assert np.abs(moved["layers/mlp/up/kernel/b"][:, number]).max() > 1e-5, "each of them has learned"
    with pytest.raises(UserError, match="its rows choose among adapters, which no weights can"):
        export.export(str(tmp_path / "whole"), str(tmp_path / "merged"), mesh=one_device())
    texts = whole.generate(["1+1", "1+1"], new=3, columns={"tenant": [0, 2]})
    assert texts == [whole.only(i).generate("1+1", new=3)[0] for i in (0, 2)]
