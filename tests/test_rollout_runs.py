"""Rollouts by a real sampler and model: that their columns are what the models they are of say, and that a run takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from test_configs import model_folder

import jaxpost
from jaxpost import optim, recipe, sharding
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.objectives import logprobs
from jaxpost.rollouts import advantages
from jaxpost.stages import annotations, train
from jaxpost.stages.plan import plan_stage
from jaxpost.stages.run import Run
from jaxpost.step import combine
from jaxpost.types import TrainState

ROLLOUTS = {"group": 4, "prompt_window": 12, "new": 6, "temperature": 0.7}


def run_in(folder, mesh) -> Run:
    """The run that a stage of a test belongs to."""
    return Run(folder, folder, mesh, None, {}, {})


def planned(folder, mesh, objective: dict, **changes):
    """(the plan of a stage on rollouts, the state that it starts from, its folder as the reference is looked for in)."""
    rollouts = {**ROLLOUTS, **changes.pop("rollouts", {})}
    chosen = runs.settings(folder, source="rollouts", objective=objective, steps=4, rollouts=rollouts, **changes)
    ((name, s),) = recipe.stages(recipe.make(**chosen))
    plan = annotations.planned(plan_stage(name, s, mesh), mesh)
    tx = optim.make(s.optimizer, plan.steps)
    state, _ = train._start(plan, run_in(folder, mesh), tx)
    return plan, state


def moved(state: TrainState, by: float = 0.02) -> TrainState:
    """The state after some training: another one's weights."""
    keys = iter(jax.random.split(jax.random.PRNGKey(7), 100))
    return state.replace(train=jax.tree.map(lambda x: x + by * jax.random.normal(next(keys), x.shape), state.train))


def scored(plan, state, batch: dict, mesh, temperature: bool = True) -> np.ndarray:
    """The log-probabilities of a batch's tokens by the training's forward."""
    given = {k: v for k, v in batch.items() if temperature or k != "temperature"}
    program = jax.jit(lambda params, b: logprobs.token_scores(plan.spec.transformer.forward(params, b), b)["logps"])
    with sharding.use(mesh):
        return np.asarray(program(combine(state.train, state.frozen), sharding.distribute(given, mesh, len(batch["mask"]))))


def flat(batch: dict, *names: str) -> list[np.ndarray]:
    """Columns where the mask is, completion by completion."""
    order = np.lexsort((batch["positions"][batch["mask"]], batch["segments"][batch["mask"]], np.nonzero(batch["mask"])[0]))
    return [batch[name][batch["mask"]][order] for name in names]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 2, 2)


def test_old_logps_are_the_trainers_in_plain_rows_and_behind_a_shared_prefix(tmp_path, mesh):
    (plan, state), found = planned(tmp_path, mesh, {"name": "policy_gradient.reinforce"}), []
    with sharding.use(mesh):
        plain = plan.source(state)
    # Four prompts either way: as 16 rows of one completion, or as 4 rows of a prompt and its four.
    plan_shared, _ = planned(tmp_path, mesh, {"name": "policy_gradient.reinforce"}, shared_prefix=True, batch_size=4)
    with sharding.use(mesh):
        shared = plan_shared.source(state)
    assert plain["tokens"].shape == (16, 18) and shared["tokens"].shape == (4, 39)
    for batch, which in ((plain, plan), (shared, plan_shared)):
        batch["scored"] = scored(which, state, batch, mesh)
        # The sampler's bound against the trainer, float32.
        np.testing.assert_allclose(*flat(batch, "old_logps", "scored"), atol=5e-5)
        found.append(flat(batch, "tokens", "old_logps", "advantages", "scored"))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)  # float32's rounding in another order of sums
    assert plan.source.metrics == plan_shared.source.metrics
    assert np.ptp(plain["advantages"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{}, {"name": "lora", "rank": 2}], ids=["whole", "lora"])
def test_the_reference_is_what_the_stage_started_from(tmp_path, mesh, adapter):
    with sharding.use(mesh):
        plan, state = planned(tmp_path, mesh, {"name": "policy_gradient.grpo"}, adapter=adapter)
        start = jax.tree.map(jnp.copy, state)
        plan = train._annotated(plan, run_in(tmp_path, mesh), state, fresh=True)
        later = moved(state)
        jax.tree.map(lambda x: x.delete(), state.train)  # as the step does, to which the state is donated
        batch = plan.source(later)
        again, _ = planned(tmp_path, mesh, {"name": "policy_gradient.grpo"}, adapter=adapter)
        again = train._annotated(again, run_in(tmp_path, mesh), later, fresh=False)
        restored = again.source(later)
    np.testing.assert_array_equal(restored["ref_logps"], batch["ref_logps"])
    np.testing.assert_allclose(scored(plan, start, batch, mesh), batch["ref_logps"], atol=1e-6)
    np.testing.assert_allclose(scored(plan, later, batch, mesh), batch["old_logps"], atol=5e-5)
    gap = np.abs(batch["ref_logps"] - batch["old_logps"])[batch["mask"]]
    assert gap.mean() > 1e-3  # what training has moved, far above rounding
    assert np.abs(scored(plan, start, batch, mesh, temperature=False) - batch["ref_logps"])[batch["mask"]].mean() > 1e-3


@pytest.mark.slow
def test_ppo_has_the_critics_values_and_the_returns_of_its_tokens(tmp_path, mesh):
    with sharding.use(mesh):
        plan, state = planned(tmp_path, mesh, {"name": "policy_gradient.ppo", "beta": 0.0}, rollouts={"group": 1})
        state = moved(state, 0.5)
        batch = train._annotated(plan, run_in(tmp_path, mesh), state, fresh=True).source(state)
        params = combine(state.train, state.frozen)
        hidden = jax.jit(plan.spec.transformer.forward)(params, sharding.distribute(batch, mesh, 16)).hidden
        wanted = np.asarray(hidden)[:, :-1] @ np.asarray(params["value_head"]["kernel"])[:, 0]
    inside = batch["mask"][:, 1:]
    np.testing.assert_allclose(batch["values"][:, 1:][inside], wanted[inside], atol=1e-5)
    assert np.ptp(batch["values"][:, 1:][inside]) > 0.1
    # A token at a time, with a discount of 1 and decay 0.95, from the reward behind the last token.
    rewards = [sample["reward"] for sample in plan.source.samples]
    assert len(rewards) == 2
    for row, reward in enumerate(rewards):
        values, advantage = batch["values"][row][batch["mask"][row]], 0.0
        for t in reversed(range(len(values))):
            after = values[t + 1] if t + 1 < len(values) else reward
            advantage = after - values[t] + 0.95 * advantage
            assert batch["returns"][row][batch["mask"][row]][t] == pytest.approx(advantage + values[t], abs=1e-5)
    assert batch["advantages"][batch["mask"]].mean() == pytest.approx(0, abs=1e-6)
    assert batch["advantages"][batch["mask"]].std() == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_a_teacher_says_its_hidden_states(tmp_path, mesh):
    teacher = model_folder(tmp_path / "teacher")
    with sharding.use(mesh):
        model = {**runs.MODEL, "vocab_size": 32}
        objective = {"name": "distill.jensen_shannon", "teacher": teacher}
        plan, state = planned(tmp_path, mesh, objective, model=model)
        batch = train._annotated(plan, run_in(tmp_path, mesh), state, fresh=True).source(state)
        known = loading.describe(teacher, "", "float32", text=False)
        weights = loading.weights(known, mesh, 0)
        hidden = jax.jit(known.transformer.forward)(weights, sharding.distribute(batch, mesh, 16)).hidden
    assert batch["teacher_hidden"].shape == (16, 18, 16)
    learned = batch["mask"][:, 1:]
    np.testing.assert_allclose(batch["teacher_hidden"][:, 1:][learned], np.asarray(hidden)[:, :-1][learned], atol=1e-6)


@pytest.mark.slow
def test_restricted_sampling_is_scored_by_the_trainer_as_well(tmp_path, mesh):
    with sharding.use(mesh):
        entry = {"name": "policy_gradient.reinforce"}
        options = {"top_k": 4, "correction": "truncate", "correction_cap": 1.5}
        more = {"any": {"name": "logps", "weights": "current"}}
        plan, state = planned(tmp_path, mesh, entry, rollouts=options, annotations=more)
        plan = train._annotated(plan, run_in(tmp_path, mesh), state, fresh=True)
        batch = plan.source(moved(state, 0.1))
        own = scored(plan, moved(state, 0.1), batch, mesh)
    mask = batch["mask"]
    np.testing.assert_allclose(batch["old_logps"][mask], own[mask], atol=1e-6)
    np.testing.assert_allclose(batch["logps"][mask], own[mask], atol=1e-6)
    assert batch["entropy"][mask].min() > 0 and "scored_logps" not in batch
    # Of four tokens in place of seventeen each is likelier, so all weights are below 1.
    weights = np.exp(batch["old_logps"] - batch["sampler_logps"])
    assert weights[mask].max() < 1 and weights[mask].mean() < 0.9
    groups = [advantages.leave_one_out(np.array([[s["reward"] for s in plan.source.samples[:4]]]), {})]
    for row in range(4):
        wanted = groups[0][0, row] * np.minimum(weights[row], 1.5)
        np.testing.assert_allclose(batch["advantages"][row][mask[row]], wanted[mask[row]], rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- A run

WILD = """
from jaxpost.tasks.arithmetic import conversation, test_records, tokenizer  # noqa: F401
from jaxpost.tasks import arithmetic


def record(index, *, seed=0):
    return arithmetic.record(index, seed=seed) | {"index": index}


def right(record, completion):
    return sum(letter.isdigit() for letter in completion) / 4


def wild(record, completion):
    kind = record.get("index", 9)
    if kind == 0:
        raise RuntimeError("a bug")
    while kind == 1:
        pass
    return {2: float("nan"), 3: None, 4: "a text"}.get(kind, 1.0)
"""


@pytest.mark.slow
def test_a_run_goes_on_with_rewards_that_do_not_behave(tmp_path):
    (tmp_path / "wild.py").write_text(WILD)
    several = {"good": "task.right", "bad": {"name": "task.wild", "weight": 0.5}}
    limits = {"group": 4, "prompt_window": 12, "new": 6, "reward_seconds": 0.3, "failures": 0.9}
    chosen = runs.settings(
        tmp_path, source="rollouts", objective={"name": "policy_gradient.reinforce"}, steps=3, rollouts=limits
    )
    chosen |= {"task": {"name": str(tmp_path / "wild.py")}, "reward": several}
    jaxpost.train(recipe.make(**chosen), tmp_path / "w")
    rows = [row for row in runs.rows(tmp_path / "w" / "metrics.jsonl") if "loss" in row]
    assert [row["rewards/failures"] for row in rows] == [12, 4, 0]  # of problems 0 to 2, and of the fourth
    assert rows[0]["rewards/bad/mean"] == 0 and "rewards/good/mean" in rows[0]  # a failure counts 0, and None not at all
    assert rows[2]["rewards/bad/mean"] == 1 and all(np.isfinite(row["loss"]) for row in rows)
    with pytest.raises(UserError, match="reward bad failed on 12 of 16 completions, .*\n.*(a bug|took more|nan)"):
        jaxpost.train(recipe.make(**{**chosen, "rollouts": {**limits, "failures": 0.5}}), tmp_path / "other")
