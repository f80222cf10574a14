"""From names to functions, and from settings to stages: what a recipe says is what runs, and what it cannot mean is refused."""

import inspect
import json

import jax.numpy as jnp
import pytest
import runs

from jaxpost import recipe
from jaxpost.config.resolve import bind, entry_of, find, known, module, nearest, resolve
from jaxpost.declare import declared, objective
from jaxpost.errors import UserError
from jaxpost.objectives import sft
from jaxpost.stages import tasks
from jaxpost.tasks import arithmetic

OWN = """
from jaxpost.declare import objective


def prepare(forward, params, batch, key, *, by):
    return {"by": by}


@objective(prepare=prepare)
def scaled(forward, params, batch, key, *, by, offset=0.0):
    return by, offset


class Other:
    pass
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "losses.py").write_text(OWN)
    return str(tmp_path / "losses.py")


def test_a_name_in_each_of_its_three_forms(own):
    assert find("sft.nll", "objectives") is sft.nll
    assert find("jaxpost.objectives.sft.nll", "objectives") is sft.nll
    assert find("json.dumps", "objectives") is json.dumps
    assert find(f"{own}:scaled", "objectives").__name__ == "scaled"
    assert module("arithmetic", "tasks") is arithmetic and module("jaxpost.tasks.arithmetic", "tasks") is arithmetic
    assert inspect.isfunction(module(own, "tasks").scaled)


def test_the_other_keys_are_keyword_arguments(own):
    bound = resolve({"name": f"{own}:scaled", "by": 3}, "objectives")
    assert bound(None, None, None, None) == (3, 0.0)
    # `prepare` gets those of the options that it takes.
    both = resolve({"name": f"{own}:scaled", "by": 3, "offset": 1.0}, "objectives")
    assert both(None, None, None, None) == (3, 1.0) and declared(both, "prepare")(None, None, None, None) == {"by": 3}
    assert resolve("sft.nll", "objectives").func is sft.nll and declared(resolve("sft.nll", "objectives"), "prepare") is None


DECLARED = ("rows", "columns", "leaves", "masks", "advantages", "off_policy", "sequence_level")


def wrapping(forward, params, batch, key, *, of="sft.nll", scale=1.0):
    """An objective of another that declares nothing itself."""
    return resolve(of, "objectives")(forward, params, batch, key)


@pytest.mark.parametrize("wrapper", ["router.balanced", f"{__name__}.wrapping"])
@pytest.mark.parametrize(
    "inner",
    [
        "policy_gradient.grpo",
        {"name": "policy_gradient.ppo", "gamma": 0.9},
        "policy_gradient.rloo",
        "preference.offset",
        "unpaired.kto",
        "reward_model.bradley_terry",
        {"name": "router.balanced", "of": "policy_gradient.ppo"},
    ],
)
def test_an_objective_of_another_declares_what_that_one_declares(wrapper, inner):
    outer = resolve({"name": wrapper, "of": inner}, "objectives")
    alone = resolve(inner, "objectives")
    for name in DECLARED:
        inherited = declared(alone, name)
        if (wrapper, name) == ("router.balanced", "masks"):
            inherited = (*inherited, "segments")
        assert declared(outer, name) == inherited, name
    assert bool(declared(outer, "prepare")) == (bool(declared(alone, "prepare")) or wrapper == "router.balanced")


@objective(rows="pairs")
def wrapping_pairs(forward, params, batch, key, *, of="sft.nll"):
    """An objective of another that declares its rows."""


def test_an_objective_of_another_says_what_it_declares_itself():
    assert declared(resolve({"name": f"{__name__}.wrapping_pairs"}, "objectives"), "rows") == "pairs"


def test_what_an_objective_says_by_an_attribute_is_refused_with_the_decorator():
    def old(forward, params, batch, key):
        """As older versions had it."""

    old.data, old.columns = "pairs", {"ref_logps": ("BS", "float32")}
    with pytest.raises(UserError, match=r"objective old: its attribute `columns` .* @objective\(columns=..., rows=...\) above"):
        declared(old, "rows")


def test_every_objective_is_known_by_its_short_name():
    names = known("objectives")
    assert {"sft.nll", "sft.dft", "policy_gradient.reinforce"} <= set(names)
    assert not any("._" in name for name in names)


WRONG = {
    "typo": ({"name": "sft.nl"}, "'sft.nl'.* Did you mean 'nll'"),
    "typo in the file": ({"name": "stf.nll"}, "unknown objectives 'stf.nll'. Did you mean 'sft.nll'"),
    "bare": ({"name": "nll"}, "unknown objectives 'nll'. Did you mean 'sft.nll'"),
    "a helper": ({"name": "logprobs.token_scores"}, r"is no function of \(forward, params, batch, key\), as objectives are"),
    "no function": ({"name": "math.pi"}, "'math.pi' is no function of"),
    "no file": ({"name": "nowhere/losses.py:mine"}, "no file nowhere/losses.py"),
    "no name": ({"beta": 0.1}, "needs a name"),
    "a number": (5, "needs a name"),
    "a list": (["sft.nll"], "needs a name"),
    "option": ({"name": "sft.nll", "beta": 0.1}, "objectives: sft.nll takes no option 'beta'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_name_is_refused(kind):
    spec, message = WRONG[kind]
    with pytest.raises(UserError, match=message):
        resolve(spec, "objectives")


def test_options_that_are_missing_unknown_or_positional(own):
    with pytest.raises(UserError, match="scaled needs by"):
        resolve({"name": f"{own}:scaled"}, "objectives")
    with pytest.raises(UserError, match="takes no option 'ofset'. Did you mean 'offset'"):
        resolve({"name": f"{own}:scaled", "by": 1, "ofset": 2}, "objectives")
    with pytest.raises(UserError, match="takes no option 'batch'"):
        bind(find(f"{own}:scaled", "objectives"), {"by": 1, "batch": {}}, "it")
    with pytest.raises(UserError, match=r": losses.py has no 'scale'. Did you mean 'scaled'"):
        find(f"{own}:scale", "objectives")


def test_an_error_inside_a_module_is_not_taken_for_absence(tmp_path, monkeypatch):
    (tmp_path / "broken_losses.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        find("broken_losses.mine", "objectives")


def test_an_entry_of_the_command_line_is_a_name_or_whole_json():
    assert entry_of("mine.py:reward", "p") == "mine.py:reward"
    assert entry_of(' {"name": "gsm8k"}', "--task") == {"name": "gsm8k"}
    with pytest.raises(UserError, match=r"--task: .* is broken JSON \(.+\); quote names, and all of it in single quotes"):
        entry_of("{name: gsm8k}", "--task")
    with pytest.raises(UserError, match="config.reward: .* is broken JSON"):
        tasks.rewards(None, "t", '{"a": {"name": "mine.py:g"')


def test_nearest_names_one_or_all():
    assert nearest("colour", ["color", "width"]) == " Did you mean 'color'?"
    assert nearest("zzz", ["b", "a"]) == " Known: a, b." and nearest("x", []) == " Known: none."


# ------------------------------------------------------------------------------------------------------------ Recipes


def test_the_command_line_adds_keywords_to_functions_alone():
    config = recipe.make(stages=("a", "b"), a={"objective": {"name": "sft.nll"}}, b={"steps": 3})
    recipe.put(config, "a.objective.gamma", "1.5")
    recipe.put(config, "task.name", "arithmetic")
    recipe.put(config, "objective.flag", "True")
    assert config.a.objective.to_dict() == {"name": "sft.nll", "gamma": 1.5}
    assert config.task.name == "arithmetic" and config.objective.flag is True
    assert recipe.has(config.to_dict(), "a.objective.gamma") and not recipe.has(config.to_dict(), "b.objective.gamma")
    with pytest.raises(UserError, match="--config.b.objective.gamma: the recipe has no key 'objective' there"):
        recipe.put(config, "b.objective.gamma", "1.5")


def test_a_setting_that_reaches_no_stage_is_refused():
    changes = {"stages": ("a", "b"), "a": {"steps": 3, "optimizer": {"lr": 1.0}}, "b": {"steps": 4, "optimizer": {"lr": 2.0}}}
    assert [s.steps for _, s in recipe.stages(recipe.make(**changes))] == [3, 4]
    with pytest.raises(UserError, match="config.steps: 5 reaches no stage, .* config.a.steps, config.b.steps"):
        recipe.stages(recipe.make(**changes, steps=5))
    with pytest.raises(UserError, match="config.optimizer.lr: 3.0 reaches no stage"):
        recipe.stages(recipe.make(**changes, optimizer={"lr": 3.0}))
    # A call takes the place of the whole call around it, without a name its own keywords alone; a dict of the user's own names
    # takes the place of all of it.
    called = {"task": {"name": "arithmetic"}, "reward": {"name": "math.copysign"}}
    for around, own, told, place in (
        ({"task": {"name": "t.py"}}, called, "config.task.name: 't.py'", "task"),
        ({"reward": {"name": "r", "most": 2}}, called, "config.reward.most: 2", "reward"),
        ({"task": {"name": "t.py", "examples": 1}}, {"task": {"examples": 2}}, "config.task.examples: 1", "task.examples"),
        ({"columns": {"prompt": "a"}}, {"columns": {"text": "b"}}, "config.columns.prompt: 'a'", "columns"),
    ):
        change = f"change config.a.{place}, config.b.{place}."
        with pytest.raises(UserError, match=f"{told} reaches no stage, since each has its own; {change}"):
            recipe.stages(recipe.make(stages=("a", "b"), **around, a=own, b=own))
        assert recipe.stages(recipe.make(stages=("a", "b"), **around, a=own))
    # One stage without it is enough for it to matter.
    (_, a), (_, b) = recipe.stages(recipe.make(**{**changes, "b": {}}, steps=5))
    assert (a.steps, b.steps) == (3, 5)


def test_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe.located("configs/sft.py:dft").endswith("configs/sft.py:dft")
    assert recipe.opened("configs/sft.py:dft").objective.name == "sft.dft"
    with pytest.raises(UserError, match="mine.py: no such file.*lora.py, .*quickstart.py, .*sft.py"):
        recipe.located("mine.py")
    (tmp_path / "mine.py").write_text("")
    assert recipe.located("mine.py") == "mine.py"


def test_a_stage_is_the_settings_around_it_with_its_own_on_top():
    made = recipe.make(
        stages=("one", "two"),
        optimizer={"lr": 1.0},
        objective={"name": "sft.dft"},
        one={"optimizer": {"clip": 0.5}, "steps": 3},
        two={"objective": {"name": "policy_gradient.reinforce"}, "model": "@one"},
    )
    (first, one), (second, two) = recipe.stages(made)
    assert (first, second) == ("one", "two")
    assert (one.steps, one.optimizer.lr, one.optimizer.clip, one.optimizer.b1) == (3, 1.0, 0.5, 0.9)
    assert (two.steps, two.optimizer.clip, two.start) == (0, 1.0, "one")
    # A dict with a name is a call: it replaces the other, so no argument of another function's is left in it.
    assert one.objective.to_dict() == {"name": "sft.dft"} and two.objective.to_dict() == {"name": "policy_gradient.reinforce"}
    assert set(one) == set(two) == {*recipe.DEFAULTS, "start"}


def test_without_stages_there_is_one_called_train():
    ((name, settings),) = recipe.stages(recipe.make(steps=7))
    assert name == "train" and settings.to_dict() == recipe.DEFAULTS | {"steps": 7, "start": ""}


def test_the_defaults_are_nobodys_to_change():
    recipe.make(optimizer={"lr": 3.0}).optimizer.b1 = 0.0
    assert recipe.DEFAULTS["optimizer"]["b1"] == 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("a", "a")}, "names a stage twice"),
        ({"stages": ("data",)}, "'data' is a setting's name"),
        ({"stages": "sft"}, "config.stages: 'sft' is no tuple or list"),
        ({"stages": ("a", "b"), "a": {"model": "@b"}}, "config.a.model: no stage 'b' comes before"),
        ({"stages": ("a",), "a": {"time_of": "a"}}, "config.a.time_of: no stage 'a' comes before"),
        ({"stages": ("a", "b"), "b": {"tokens_of": "a, c"}}, "config.b.tokens_of: no stage 'c' comes before"),
    ],
)
def test_stages_that_do_not_add_up(changes, message):
    with pytest.raises(UserError, match=message):
        recipe.stages(recipe.make(**changes))


def test_the_difference_that_matters():
    old = recipe.make(stages=("a",), a={"steps": 3, "save_every": 1}).to_dict()
    new = recipe.make(
        stages=("a",), a={"steps": 4, "save_every": 2, "ema": 0.5}, keep=9, mesh={"fsdp": -1, "data": 1}
    ).to_dict()
    assert recipe.difference(old, old) == []
    assert recipe.difference(json.loads(json.dumps(old)), old) == []
    assert recipe.difference(old, new) == ["a.ema: '(absent)' -> 0.5", "a.steps: 3 -> 4"]
    # A free key is free at its own place; an argument that happens to share its name is not.
    kept = [recipe.make(objective={"name": "sft.nll", "keep": k}).to_dict() for k in (1, 2)]
    assert recipe.difference(*kept) == ["objective.keep: 1 -> 2"]


# --------------------------------------------------------------------------------------------------- From one's own file

LOSS = '''
"""An objective of a user's own: the likelihood with a floor under each token's share."""

import jax.numpy as jnp

from jaxpost.objectives.logprobs import token_scores
from jaxpost.types import Term


def floored(forward, params, batch, key, *, floor):
    logps = token_scores(forward(params, batch), batch)["logps"]
    return {"floored": Term(-jnp.sum(jnp.maximum(logps, floor)), jnp.sum(batch["mask"]))}, {}
'''


@pytest.mark.slow
def test_an_objective_in_a_file_of_ones_own_trains_from_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(LOSS)
    spec = {"name": f"{tmp_path / 'mine.py'}:floored", "floor": -2.0}
    config = runs.write(tmp_path, runs.settings(tmp_path, objective=spec, steps=3))
    run = runs.start(runs.command(config, tmp_path / "w"))
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    losses = [row["loss"] for row in runs.rows(tmp_path / "w" / "metrics.jsonl") if "loss" in row]
    # An untrained model's tokens are near log(1/17) = -2.83, under the floor: each counts for 2 exactly, or a little less.
    assert len(losses) == 3 and jnp.isclose(losses[0], 2.0, atol=0.01) and max(losses) <= 2.0
