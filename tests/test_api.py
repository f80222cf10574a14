"""jaxpost from Python: a model as an object, and the loop with functions where a recipe has names.

What a model says is compared with its own forward on single documents, without batch, padding or mesh. The loop runs as in a
notebook: its functions come out of exec, so no file holds them and no import finds them.
"""

import functools
import inspect
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import jaxpost
from jaxpost import api, recipe, sharding, train
from jaxpost.config import naming
from jaxpost.config.resolve import find, resolve
from jaxpost.errors import UserError
from jaxpost.models.heads import logits
from jaxpost.objectives import sft
from jaxpost.stages.plan import plan_stage
from jaxpost.step import evaluated
from jaxpost.tasks import arithmetic

# As sharp as an untrained model's logits can be told apart: greedy choices must not be ties.
MODEL = {**runs.MODEL, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
ROWS = [[4, 5, 6, 7, 8], [9, 10, 11], [12]]


def python(code: str, **environment) -> str:
    """What a fresh interpreter prints."""
    where = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(runs.ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=where, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A fresh model on eight devices, with a tokenizer."""
    loaded = jaxpost.load(MODEL)
    return api.Model(loaded.transformer, loaded.params, arithmetic.tokenizer(), loaded.config, loaded.mesh)


@pytest.fixture(scope="module")
def alone(model):
    """Logits [S,V] of one row by itself, from the plain forward."""

    @jax.jit
    def full(tokens):
        place = jnp.arange(tokens.shape[1])[None]
        out = model.forward(model.params, {"tokens": tokens, "positions": place, "segments": jnp.ones_like(tokens)})
        return logits(out.hidden, out.head)

    # Padded on the right to one shape, which the causal mask hides from the tokens before.
    return lambda ids: np.asarray(full(np.array([[*ids, *[0] * (16 - len(ids))]]))[0, : len(ids)])


# ------------------------------------------------------------------------------------------------------------- Imports


def test_the_import_is_light_and_train_is_one_object_in_either_order():
    first = "import jaxpost, sys; print(sorted({'jax', 'flax', 'transformers', 'orbax'} & sys.modules.keys())); "
    assert python(first) == "[]\n"
    told = "print(jaxpost.train is t, callable(t), jaxpost.train.run is t.run, t.__name__, callable(jaxpost.load))"
    assert python(f"import jaxpost; t = jaxpost.train; import jaxpost.train; {told}") == "True True True jaxpost.train True\n"
    assert python(f"import jaxpost.train; from jaxpost import train as t; {told}") == "True True True jaxpost.train True\n"
    with pytest.raises(AttributeError, match="no attribute 'lod'; from Python it has load, train"):
        jaxpost.lod  # noqa: B018


# --------------------------------------------------------------------------------------------------------------- Model


def test_logits_of_padded_rows_are_those_of_each_alone(model, alone):
    tokens = np.full((3, 5), 16)
    for row, ids in zip(tokens, ROWS, strict=True):
        row[: len(ids)] = ids
    found = model.logits(tokens, lengths=[5, 3, 1])
    assert found.shape == (3, 5, 17) and found.dtype == jnp.float32
    scores = {k: np.asarray(v) for k, v in model.scores(tokens, lengths=[5, 3, 1]).items()}
    for i, ids in enumerate(ROWS):
        wanted = alone(ids)
        # Logits of about 1; two programs of the same float32 products.
        np.testing.assert_allclose(found[i, : len(ids)], wanted, atol=1e-5)
        logps = np.asarray(jax.nn.log_softmax(wanted))[:-1]
        want = np.zeros(5)
        want[1 : len(ids)] = logps[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(scores["logps"][i], want, atol=1e-5)
        assert scores["correct"][i].tolist() == [0, *(logps.argmax(-1) == ids[1:]), *[0] * (5 - len(ids))]
    np.testing.assert_array_equal(model.logits(tokens[:1]), model.logits(tokens)[:1])


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, 2], None, r"ids \[B,S\].*shape \(2,\)"),
        ([[1.5]], None, "float64"),
        ([[1, 17]], None, "tokens: has id 17, and the model has a vocabulary of 17"),
        (np.zeros((2, 65), int), None, "rows of 1 to 64"),
        ([[1, 2]], [3], "0 to 2"),
        ([[1, 2]], [1, 1], "1 numbers"),
        ([[1, 2]], ["a"], "1 numbers"),
        ([[1, 2], [3]], None, "all rows of one length; these are"),
        ("12", None, "ids"),
    ],
)
def test_what_are_no_tokens_is_refused(model, tokens, lengths, message):
    with pytest.raises(UserError, match=message):
        model.logits(tokens, lengths)


@pytest.mark.parametrize(
    ("method", "arguments", "options", "message"),
    [
        ("logits", ([[1, 2]],), {"patch": "x"}, "patch: 'x'; give {site: number, array or function"),
        ("logits", ([[1, 2]],), {"patch": {"embed": "x"}}, "patch: embed: 'x' is no number"),
        ("patched", (5,), {}, "patch: '5'; give"),
        ("patched", ({3: 0.0},), {}, "patch: .* give {site"),
        ("tap", (5, "1+1"), {}, "tap: 5 names no site"),
        ("tap", ([], "1+1"), {}, "names no site"),
        ("tap", ("embed", 5), {}, "prompts: '5'; give a text"),
        ("generate", (5,), {}, "prompts: '5'; give a text"),
        ("generate", ("1+1",), {"temprature": 1.0}, "^generate takes no option 'temprature'. Did you mean 'temperature'"),
        ("generate", ("1+1",), {"new": "a"}, "^generate: new='a'; it takes a whole number"),
        ("generate", ("1+1",), {"temperature": "a"}, "temperature='a'; it takes a number"),
        ("generate", ("1+1",), {"n": 0}, "n=0, temperature=0.0, beams=None: give n and beams of at least 1"),
        ("generate", ("1+1",), {"beams": 0}, "beams=0: give n and beams of at least 1"),
        ("generate", ("1+1",), {"processors": 5}, "processors: 5 is no entry"),
        ("embed", (5,), {}, "embed: '5'; give a text"),
        ("embed", ([5],), {}, "embed: .* give a text"),
        ("embed", ("1",), {"rows": "a"}, "embed: rows='a'; it takes a whole number"),
        ("embed", ("1",), {"rows": 0}, "rows=0 at least 1"),
        ("embed", ("1",), {"normalise": "no"}, "embed: normalise='no'; it takes true or false"),
        ("with_tokens", (5,), {}, "with_tokens: add=5; it takes a list of texts"),
        ("with_tokens", (["a"],), {"multiple": "x"}, "with_tokens: multiple='x'; it takes a whole number"),
    ],
)
def test_arguments_of_another_kind_are_refused_with_what_they_are(model, method, arguments, options, message):
    with pytest.raises(UserError, match=message):
        getattr(model, method)(*arguments, **options)


def test_greedy_text_is_the_likeliest_token_again_and_again(model, alone):
    for prompt, stops in (("1+1", False), ("7x8", True)):
        ids = model.tokenizer(prompt)["input_ids"]
        own = list(ids)
        while len(own) < len(ids) + 8 and own[-1] != model.tokenizer.eos_token_id:
            own.append(int(alone(own)[-1].argmax()))
        assert (own[-1] == model.tokenizer.eos_token_id) == stops
        wanted = own[len(ids) : len(own) - stops]
        assert wanted and model.complete(prompt, new=8)[0].tolist() == wanted
        assert model.generate([prompt], new=8) == [model.tokenizer.decode(wanted)]
        np.testing.assert_array_equal(model.complete(np.array(ids), new=8)[0], wanted)


def test_prompts_in_each_form(model):
    turns = [{"role": "user", "content": "1+2"}]
    options = {"new": 8, "temperature": 1.0, "n": 2, "seed": 5}
    told = model.generate("1+2", chat=True, **options)
    assert len(told) == 2 and told[0] != told[1]
    assert model.generate(turns, **options) == told and model.generate([turns], **options) == told
    assert model.generate("1+2", **options) != told
    for wrong in ([], [[]], [{"role": "user"}], [*turns, {"role": "assistant", "content": "3"}], [7]):
        with pytest.raises(UserError, match="prompt"):
            model.generate(wrong)
    for wrong in (np.zeros(0, int), np.ones((1, 2), int), np.ones(2)):
        with pytest.raises(UserError, match=r"a prompt of ids is \[n\] integers, n at least 1; this one is"):
            model.generate(wrong)
    for wrong in ([1, 17], [-1]):
        with pytest.raises(UserError, match=f"a prompt: has id {wrong[-1]}, and the model has a vocabulary of 17"):
            model.generate(np.array(wrong))


# --------------------------------------------------------------------------------------------------------------- Names


def make(by):
    return lambda forward, params, batch, key: by


def recursive(record, completion):
    def inner(depth):
        return inner(depth - 1) if depth else 0.0

    return inner, recursive


def test_what_can_be_imported_is_recorded_by_name_and_the_rest_by_what_it_does():
    assert naming.name_of(sft.dft, "objectives") == "sft.dft"
    assert naming.name_of(arithmetic, "tasks") == "arithmetic"
    assert naming.name_of(json.dumps, "objectives") == "json.dumps"
    assert find(naming.name_of(recursive, "rewards"), "rewards") is recursive
    one, other = lambda r, c: 1.0, lambda r, c: 2.0  # fmt: skip  # on one line, so not told apart by it
    held = [make(1), make(2), make(np.ones(2)), make(np.zeros(2)), one, other]
    held += [functools.partial(sft.nll, x=1), functools.partial(sft.nll, x=2), recursive(0, 0)[0]]
    names = [naming.name_of(f, "objectives") for f in held]
    assert len(set(names)) == len(names) and all("#" in name for name in names)
    assert naming.name_of(make(1), "objectives") == names[0]
    # A task as `make` gives it; of what is written in C, the name is what there is to tell.
    tasks = [types.SimpleNamespace(reward=make(by), record=math.sqrt) for by in (1, 1, 2)]
    assert naming.digest_of(tasks[0]) == naming.digest_of(tasks[1]) != naming.digest_of(tasks[2])
    assert [find(name, "objectives") for name in names[1:]] == held[1:]


def test_a_name_is_the_same_in_every_process():
    code = """
from jaxpost.config.naming import name_of
space = {}
exec('def mine(record, completion, *, among=frozenset("abcdef")):\\n    return completion in {"a", "b", "c", "d"}', space)
print(name_of(space["mine"], "rewards"))
"""
    names = {python(code, PYTHONHASHSEED=seed) for seed in "123"}
    assert len(names) == 1 and names.pop().startswith("mine#")
    # `__main__.mine` is another function tomorrow.
    script = "from jaxpost.config.naming import name_of\ndef mine(record, completion): pass\nprint(name_of(mine, 'rewards'))"
    assert python(script).startswith("mine#")


def test_a_function_of_another_session_is_asked_for_again():
    for kind in ("objectives", "rewards"):
        with pytest.raises(UserError, match="'mine#00000000' was handed over from Python, in another session"):
            resolve("mine#00000000", kind)


# ------------------------------------------------------------------------------------------------------------ Settings


def test_a_recipe_with_changes_from_python():
    path = str(runs.ROOT / "configs" / "sft.py")
    assert recipe.opened(f"{path}:dft").objective.name == "sft.dft"
    config = recipe.opened(path, objective=sft.dft, optimizer={"lr": 1.0}, task="arithmetic")
    assert config.objective.to_dict() == {"name": "sft.dft"} and config.task.to_dict() == {"name": "arithmetic"}
    assert (config.optimizer.lr, config.optimizer.warmup, config.window) == (1.0, 0.03, 512)
    rolled = {"source": "rollouts", "objective": sft.nll, "rollouts": {"group": 2, "new": 3}}
    staged = recipe.make(stages=("a", "b"), a=rolled, b={"steps": 3})
    changed = recipe.opened(staged, objective=sft.dft, a={"rollouts": {"new": 5}, "steps": 7})
    (_, a), (_, b) = recipe.stages(changed)
    assert (a.objective.name, a.rollouts.group, a.rollouts.new, a.steps) == ("sft.nll", 2, 5, 7)
    assert (b.objective.name, b.steps) == ("sft.dft", 3)
    assert recipe.opened(staged) == staged
    # Even what is the default: it was asked for.
    with pytest.raises(UserError, match=r"config\.objective\.name: 'sft\.nll' reaches no stage, .* config\.a\.objective, "):
        recipe.opened(staged, objective=sft.nll, b={"objective": sft.dft})
    with pytest.raises(UserError, match="unknown key 'windw'. Did you mean 'window'"):
        recipe.opened(path, windw=3)


def planned(folder, **changes):
    mesh = sharding.make_mesh()
    with sharding.use(mesh):
        return plan_stage("train", recipe.stages(recipe.opened(runs.settings(folder), **changes))[0][1], mesh)


def judge(plan):
    """The only reward of a stage, whose weight is 1."""
    ((reward, weight),) = plan.problems["rewards"].values()
    assert weight == 1
    return reward


@pytest.mark.slow
def test_a_reward_takes_the_place_of_the_tasks_own(tmp_path):
    (tmp_path / "judge.py").write_text("def short(record, completion, *, most):\n    return len(completion) <= most")
    plan = planned(tmp_path, reward={"name": f"{tmp_path}/judge.py:short", "most": 2})
    assert [judge(plan)({}, text) for text in ("12", "123")] == [1.0, 0.0]
    assert judge(planned(tmp_path))({}, "123") == 0.75
    # What the mean is called goes by the annotation, through whatever is around the function.
    plan = planned(tmp_path, task=arithmetic)
    assert inspect.signature(judge(plan)).return_annotation is bool
    assert judge(plan)({"answer": "7"}, "7 ") == 1.0
    with pytest.raises(UserError, match="config.reward: source='data' without a config.task"):
        plan_stage(
            "train",
            recipe.make(model=runs.MODEL, tokenizer="tasks.arithmetic.tokenizer", window=32, reward=sft.nll),
            sharding.make_mesh(),
        )
    with pytest.raises(UserError, match=r"no function of \(record, completion\), as rewards are"):
        planned(tmp_path, reward=sft.nll)


# --------------------------------------------------------------------------------------------------------------- Train

CELL = """
import jax.numpy as jnp
from jaxpost.errors import UserError
from jaxpost.objectives.logprobs import token_scores
from jaxpost.tasks import arithmetic
from jaxpost.types import Term

calls = []

def my_loss(forward, params, batch, key, *, scale=1.0):
    logps = token_scores(forward(params, batch), batch)["logps"]
    return {"mine": Term(-scale * jnp.sum(batch["advantages"] * logps), jnp.sum(batch["mask"].astype(jnp.float32)))}, {}

def my_reward(record, completion):
    calls.append(record)
    if len(calls) == stop_at:
        raise UserError("the kernel died")  # any other error is one failure of the reward, and contained
    return sum(letter.isdigit() for letter in completion) / 4

class Problems:
    def record(self, index, *, split="train", seed=0):
        return arithmetic.record(index, split=split, seed=seed)

    def test_records(self, per_cell, *, seed=0):
        return arithmetic.test_records(per_cell, seed=seed)[:2]
"""


@pytest.mark.slow
def test_a_notebook_trains_is_interrupted_goes_on_and_is_refused_another_function(tmp_path):
    def session(cell=CELL, stop_at=0, **changes):
        """The cell run anew, as after a restart of the kernel: nothing is known of the functions it had before."""
        naming._HANDED_OVER.clear()
        space = {"__name__": "__main__", "stop_at": stop_at}
        exec(cell, space)
        own = {"objective": space["my_loss"], "reward": space["my_reward"], "task": space["Problems"]()}
        return jaxpost.train(config, tmp_path / "w", **{**own, **changes}), space["calls"]

    config = recipe.make(**runs.settings(tmp_path, source="rollouts", steps=4, save_every=2, held_out=0.0))
    config.rollouts.reward_workers = 0  # the reward counts its calls in this process
    # Twice two problems are judged at the start; then 16 completions a step, and the third step does not come to its end.
    with pytest.raises(UserError, match="the kernel died"):
        session(stop_at=4 + 40)
    recorded = json.loads((tmp_path / "w" / "config.json").read_text())
    names = [recorded["objective"]["name"], recorded["reward"]["name"], recorded["task"]["name"]]
    assert [name.partition("#")[0] for name in names] == ["my_loss", "my_reward", "Problems"]

    for cell, key in (
        (CELL.replace("-scale *", "-2 * scale *"), "objective"),
        (CELL.replace("/ 4", "/ 5"), "reward"),
        (CELL.replace("[:2]", "[:3]"), "task"),
    ):
        with pytest.raises(UserError, match=rf"holds a run with other settings:\n  {key}.name: '\w+#\w+' -> '\w+#\w+'\n"):
            session(cell)
    with pytest.raises(UserError, match="other settings:\n  objective.name: 'my_loss#.*' -> 'sft.nll'"):
        session(objective=sft.nll)

    results, calls = session()
    assert len(calls) == 2 * 16 + 4 and 0 <= results["eval/reward"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_the_module_is_the_function():
    assert jaxpost.train is train and train.run is find("jaxpost.train.run", "")
    with pytest.raises(UserError, match="nowhere.py: no such file"):
        jaxpost.train("nowhere.py", "w")


def test_the_cells_of_the_page_on_python_mean_what_they_say(model, monkeypatch):
    """Run with the loop left out: the settings add up, and the loss is an objective."""
    text = (runs.ROOT / "docs" / "python.md").read_text()
    cell = text.split("```python\n")[2].split("```")[0]
    asked, space = [], {"jaxpost": jaxpost, "__name__": "__main__"}
    monkeypatch.setattr(train._Callable, "__call__", staticmethod(lambda *given, **changes: asked.append((given, changes))))
    exec(cell, space)
    monkeypatch.chdir(runs.ROOT)
    first, second = [recipe.opened(config, **changes) for (config, _), changes in asked]
    assert first.objective.name.startswith("my_loss#") and second.reward.name.startswith("my_reward#")
    batch = {"tokens": np.ones((8, 4), np.int32), "mask": np.ones((8, 4), bool), "positions": np.zeros((8, 4), np.int32)}
    batch["segments"] = np.ones((8, 4), np.int32)
    loss = resolve({"name": first.objective.name, "gamma": 1.0}, "objectives")
    terms, _ = jax.eval_shape(lambda p: evaluated(loss, model.forward, p, batch, jax.random.PRNGKey(0)), model.params)
    assert list(terms) == ["focal"]
    judge = resolve(second.reward.to_dict(), "rewards")
    assert [judge({"answer": "46"}, text) for text in (" 46 ", "47")] == [1.0, 0.0]


def test_a_digest_tells_all_that_a_class_does():
    from jaxpost.config import naming

    def made(sign, attribute=1, slot=0):
        class Task:
            factor = attribute
            __slots__ = ("k",)

            @staticmethod
            def reward(record, completion, sign=sign):
                return sign * len(completion)

            @property
            def twice(self, by=sign):
                return by

        task = Task()
        task.k = slot
        return naming._described(task, ())

    assert made(1) == made(1)
    assert len({made(1), made(-1), made(1, attribute=2), made(1, slot=3)}) == 4

    def outer():
        def early():
            return late

        told = naming._described(early, ())  # its cell is still empty
        late = 1
        return told, late

    assert outer()


def test_a_file_of_ones_own_may_have_dataclasses_and_neighbours(tmp_path):
    from jaxpost.config.resolve import find

    (tmp_path / "neighbour.py").write_text("VALUE = 7\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nimport neighbour\n\n\n@dataclasses.dataclass\nclass Held:\n"
        "    value: int = neighbour.VALUE\n\n\ndef mine():\n    return Held().value\n"
    )
    assert find(f"{tmp_path}/mine.py:mine", "tasks")() == 7
