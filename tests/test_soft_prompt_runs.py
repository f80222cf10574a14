"""Runs that learn a prompt: the reference is the model without it, checkpoints hold it alone, and runs go on bit for bit."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from test_adapter_resume import model_folder, one_device
from test_annotate import MODEL, PLAIN, ROWS
from test_rollout_runs import moved, planned, run_in

import jaxpost
from jaxpost import annotate, export, recipe, sharding, train
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.objectives.logprobs import token_scores
from jaxpost.reporting.log import Log
from jaxpost.stages import train as stage_train
from jaxpost.step import combine
from jaxpost.storage import checkpoint

SOFT = {"name": "prompts.soft", "length": 3, "text": "ab"}


def settings(folder, **changes) -> dict:
    """SFT of a prompt, then DPO of the same one; or one of the two."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    shared = {"model": MODEL, "tokenizer": "test_pairs.characters", "template": PLAIN, "window": 32, "log_every": 1}
    shared |= {"save_every": 1, "keep": 5, "optimizer": {"lr": 1e-2, "warmup": 0}}
    sft = {"data": str(folder / "answers.jsonl"), "objective": "sft.nll", "steps": 2, "adapter": SOFT, "window": 13}
    dpo = {"data": str(folder / "pairs.jsonl"), "objective": "preference.sigmoid", "steps": 3}
    return shared | {"sft": sft, "dpo": dpo, "stages": ("sft", "dpo")} | changes


def scored(plan, params, batch: dict) -> np.ndarray:
    """The log-probabilities of a batch's tokens by the training's forward, on one device."""
    program = jax.jit(lambda params, b: token_scores(plan.spec.transformer.forward(params, b), b)["logps"])
    return np.asarray(program(*jax.device_get((params, batch))))


def losses(workdir, stage: str) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row and row.get("stage", stage) == stage]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_reference_of_pairs_is_the_model_without_a_fresh_prompt(tmp_path):
    """Its column is, file by file, that of the model alone."""
    two = settings(tmp_path)
    one = {k: v for k, v in two.items() if k not in ("sft", "dpo", "stages")} | two["dpo"] | {"steps": 2}
    for adapter in ({}, SOFT):
        annotate.annotate(recipe.make(**one, adapter=adapter), "ref_logps", workdir=tmp_path / "w")
    made = {p: p.read_bytes() for p in (tmp_path / "w" / "columns").rglob("*") if p.is_file()}
    train.run(recipe.make(**one, adapter=SOFT), tmp_path / "w")
    assert {p: p.read_bytes() for p in (tmp_path / "w" / "columns").rglob("*") if p.is_file()} == made
    first, second = losses(tmp_path / "w", "train")
    assert abs(first - math.log(2)) > 1e-4 and second != first
    step = checkpoint.find_step(tmp_path / "w")
    trained = {sharding.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(jaxpost.load(tmp_path / "w").params)}
    fresh = jaxpost.load(MODEL).params
    for path, x in jax.tree_util.tree_leaves_with_path(fresh):
        np.testing.assert_array_equal(trained[sharding.path_name(path)], x)
    assert trained.keys() - {sharding.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(fresh)} == {"prefix/vectors"}
    assert checkpoint.read_meta(step)["adapter"] == SOFT


@pytest.mark.slow
def test_a_prompt_that_has_learned_is_the_next_stages_reference_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    config = recipe.make(**settings(tmp_path))
    train.run(config, tmp_path / "whole")
    assert losses(tmp_path / "whole", "dpo")[0] == pytest.approx(math.log(2), abs=1e-6)
    logged, moments = Log.step, [("sft", 2), ("dpo", 2)]

    def breaks(self, at, *rest):
        if (self.plan.name, at) in moments:
            moments.remove((self.plan.name, at))
            raise KeyboardInterrupt
        return logged(self, at, *rest)

    monkeypatch.setattr(Log, "step", breaks)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "cut")
    train.run(config, tmp_path / "cut")
    assert not moments
    for stage in ("sft", "dpo"):
        whole, cut = (runs.saved(tmp_path / name, stage) for name in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        for step, (values, _) in whole.items():
            for path, x in values.items():
                np.testing.assert_array_equal(x, cut[step][0][path], err_msg=f"{stage} {step} {path}")
    vectors = [runs.saved(tmp_path / "whole", s)[n][0]["train/prefix/vectors"] for s, n in (("sft", 2), ("dpo", 3))]
    assert np.abs(vectors[0] - vectors[1]).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{**SOFT, "text": ""}, {"name": "prompts.prefix", "length": 3}], ids=["soft", "prefix"])
def test_the_reference_of_rollouts_is_the_model_without_it(tmp_path, adapter):
    mesh, objective = sharding.make_mesh(2, 2, 2), {"name": "policy_gradient.grpo"}
    with sharding.use(mesh):
        plan, state = planned(tmp_path, mesh, objective, adapter=adapter)
        whole = combine(state.train, state.frozen)
        bare = {name: jax.tree.map(jnp.copy, x) for name, x in whole.items() if name != "prefix"}
        plan = stage_train._annotated(plan, run_in(tmp_path, mesh), state, fresh=True)
        later = moved(state)
        jax.tree.map(lambda x: x.delete(), state.train)  # as the step does, to which the state is donated
        batch = plan.source(later)
        again, _ = planned(tmp_path, mesh, objective, adapter=adapter)
        restored = stage_train._annotated(again, run_in(tmp_path, mesh), later, fresh=False).source(later)
    np.testing.assert_array_equal(restored["ref_logps"], batch["ref_logps"])
    np.testing.assert_allclose(scored(plan, bare, batch), batch["ref_logps"], atol=1e-5)  # float32, on another mesh
    np.testing.assert_allclose(scored(plan, combine(later.train, later.frozen), batch), batch["old_logps"], atol=5e-5)
    assert np.abs(batch["ref_logps"] - batch["old_logps"])[batch["mask"]].mean() > 1e-3


@pytest.mark.slow
def test_reinforcement_trains_a_prompt_alone(tmp_path):
    """GRPO around a folder: the checkpoint holds the prompt, names the rest, and loads, completes and leaves."""
    model_folder(tmp_path / "base")
    chosen = runs.settings(
        tmp_path,
        model=str(tmp_path / "base"),
        source="rollouts",
        objective={"name": "policy_gradient.grpo"},
        steps=3,
        adapter=({"name": "prompts.soft", "length": 3}, {"name": "lora", "rank": 2, "base": "int8"}),
        optimizer={"lr": 1e-2},
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        microbatches=2,
    )
    train.run(recipe.make(**chosen), tmp_path / "w")
    step = checkpoint.find_step(tmp_path / "w")
    held = checkpoint.paths(step)
    assert "prefix.vectors" in held and len(held) == 1 + 2 * 7
    assert [entry["name"] for entry in checkpoint.read_meta(step)["adapter"]] == ["prompts.soft", "lora.lora"]
    model, base = jaxpost.load(tmp_path / "w", mesh=one_device()), loading.describe(str(tmp_path / "base"))
    start = loading.weights(base, one_device())
    rows = np.abs(np.asarray(start["embed"]["weight"])[None] - np.asarray(model.params["prefix"].vectors)[:, None])
    assert 0 < rows.max(-1).min() < 0.2, "it began as tokens and has moved"
    np.testing.assert_array_equal(model.params["embed"]["weight"], start["embed"]["weight"])
    assert len(model.generate("12+34", new=3, n=2, temperature=1.0)) == 2
    with pytest.raises(UserError, match="stands before each document and cannot become part of the weights"):
        export.export(str(tmp_path / "w"), str(tmp_path / "merged"), mesh=one_device())
    export.export(str(tmp_path / "w"), str(tmp_path / "out"), mesh=one_device(), adapter=True)
    entries = [{"name": "peft", "folder": str(tmp_path / "out" / "soft")}]
    entries += [{"name": "peft", "folder": str(tmp_path / "out" / "lora"), "base": "int8"}]
    again = jaxpost.load(str(tmp_path / "base"), mesh=one_device(), adapter=entries)
    tokens = np.arange(24).reshape(2, 12) % 17
    np.testing.assert_array_equal(again.logits(tokens), model.logits(tokens))


def test_a_window_must_leave_room_for_the_prompt(tmp_path):
    two = settings(tmp_path)
    one = {k: v for k, v in two.items() if k not in ("sft", "dpo", "stages")} | two["sft"]
    with pytest.raises(UserError, match="leaves room for 0 of the model's 16 positions; make it shorter"):
        train.run(recipe.make(**one | {"adapter": {**SOFT, "length": 16}}), tmp_path / "w")
    with pytest.raises(UserError, match="config.adapter.text: the model comes without a tokenizer"):
        jaxpost.load(MODEL, adapter=SOFT)
