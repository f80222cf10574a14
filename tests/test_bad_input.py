"""What a user gets wrong is said in one message, with place and remedy, before anything is compiled.

Most cases go through `train.run`, which is all that the command line adds its flags to; a listener fails the test if anything
was compiled on the way. A handful start the real command, where a message must be all of stderr and the exit status 2.
"""

import json
import runpy
import shlex
import sys

import jax
import numpy as np
import pytest
import runs
from absl import flags
from etils import epath
from safetensors.numpy import save_file

from jaxpost import recipe, sharding, tokenizer, train
from jaxpost.config import cli
from jaxpost.errors import UserError
from jaxpost.models import families
from jaxpost.stages import records
from jaxpost.stages.plan import plan_stage
from jaxpost.tasks import arithmetic

CHAT = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]


@pytest.fixture
def compiled():
    """The programs compiled while the test ran."""
    found = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_listener_hears_a_compilation(compiled):
    jax.jit(lambda x: x + len(compiled))(np.arange(3)).block_until_ready()
    assert compiled


def refused(folder, **changes) -> str:
    """The message that a recipe with these changes is refused with; nothing may be left in the workdir."""
    with pytest.raises(UserError) as stopped:
        train.run(recipe.make(**runs.settings(folder, steps=2, **changes)), folder / "w")
    assert not (folder / "w").exists()
    return str(stopped.value)


def holding(folder, content, name="data.jsonl") -> str:
    """A data file: text as it is, rows one a line."""
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    (folder / name).write_text(text)
    return str(folder / name)


FILES = {
    "empty": ("", ["data.jsonl: no rows", "at least one example"]),
    "broken": ('{"text": "1"}\n{"text": ', ["data.jsonl, line 2, column 10", "broken JSON", "each line must be one object"]),
    "columns": ([{"question": "1", "reply": "2"}], ["line 1", "question, reply", "rename them to one of: messages"]),
    "roles": (
        [{"messages": CHAT}, {"messages": CHAT[::-1]}],
        ["line 2, message 1", "role is assistant, not user", "must alternate"],
    ),
    "turn": ([{"messages": [CHAT[0], {"role": "assistant", "content": " "}]}], ["line 1, message 2", "is empty", "fill it in"]),
    "long": ([{"text": "1" * 40}], ["line 1", "41 tokens and the window 32", 'too_long="truncate"']),
    "letters": ([{"text": "one"}], ["line 1", "'o'"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_data_file(tmp_path, compiled, kind):
    content, parts = FILES[kind]
    message = refused(tmp_path, data=holding(tmp_path, content), held_out=0)
    assert all(part in message for part in parts), message
    assert not compiled


def test_an_empty_mask(tmp_path, compiled):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    data = holding(tmp_path, [{"messages": CHAT}])
    message = refused(tmp_path, data=data, template=template, held_out=0)
    assert "line 1" in message and "template" in message
    assert not compiled


def rolled(objective="reinforce", **rollouts) -> dict:
    """The settings of a stage on rollouts."""
    entry = objective if isinstance(objective, dict) else {"name": f"policy_gradient.{objective}"}
    entry = {"name": "preference.sigmoid"} if objective == "dpo" else entry
    sizes = {"group": 4, "prompt_window": 12, "new": 6}
    return {"source": "rollouts", "objective": entry, "rollouts": {**sizes, **rollouts}}


SETTINGS = {
    "missing file": ({"data": "nowhere.jsonl"}, ["nowhere.jsonl: no such file", "check the path"]),
    "objective": ({"objective": {"name": "sft.nl"}}, ["'sft.nl'", "Did you mean 'nll'?"]),
    "its option": ({"objective": {"name": "sft.nll", "beta": 1}}, ["sft.nll takes no option 'beta'", "Known: none"]),
    "task": ({"task": {"name": "arithmetics"}}, ["'arithmetics'", "Did you mean 'arithmetic'?"]),
    "its option, too": (
        {"task": {"name": "arithmetic", "corrupted": 0.1}},
        ["no option 'corrupted'", "Did you mean 'corrupt'?"],
    ),
    "nameless task": ({"task": {"examples": 3}}, ["config.task: {'examples': 3} names no task", "config.task.name=arithmetic"]),
    "source": ({"source": "files"}, ["config.source: 'files'", "'data' nor 'rollouts'"]),
    "mesh": ({"mesh": {"data": 3}}, ["config.mesh: data=3", "does not fill 8 devices", "set one axis to -1"]),
    "mesh axis": ({"mesh": {"fsdp": 0}}, ["config.mesh", "fsdp=0", "positive"]),
    "rows": ({"batch_size": 12}, ["config.batch_size: 12", "data x fsdp = 8", "use a multiple"]),
    "microbatches": ({"microbatches": 3}, ["config.batch_size: 16", "= 24", "use a multiple"]),
    "group": (
        {"source": "rollouts", "rollouts": {"group": 3}},
        ["config.rollouts.group: 3", "divide config.batch_size x minibatches = 16"],
    ),
    "group with minibatches": (rolled(group=16, minibatches=3, objective="grpo") | {"batch_size": 8}, ["= 24"]),
    "several steps": (rolled(epochs=2), ["config.rollouts: with several steps a batch", "policy_gradient.grpo"]),
    "a lag": (rolled(lag=1), ["config.rollouts: with several steps a batch, or a lag"]),
    "a lag of pairs": (rolled(lag=1, objective="dpo"), ["config.rollouts: with several steps a batch, or a lag"]),
    "correction": (rolled(correction="clip"), ["config.rollouts.correction: 'clip'", "'truncate' or 'mask'"]),
    "correction of pairs": (rolled(correction="mask", objective="dpo"), ["config.rollouts.correction", "no advantages"]),
    "no cap": (rolled(correction="mask", correction_cap=0.0), ["config.rollouts.correction_cap: 0"]),
    "top_p": (rolled(top_p=0.9), ["config.rollouts.top_p", "config.rollouts.correction=truncate"]),
    "top_k": (rolled(top_k=5), ["config.rollouts.top_k", "another distribution"]),
    "a processor": (rolled(processors="processors.nothing"), ["config.rollouts.processors", "another distribution"]),
    "overlong": (rolled(overlong=7), ["config.rollouts.overlong: 7 of at most 6 new tokens"]),
    "advantages": (rolled(advantages="grup"), ["'advantages.grup'", "Did you mean 'group'?"]),
    "advantages of pairs": (rolled(advantages="group", objective="dpo"), ["config.rollouts.advantages", "Leave it out"]),
    "advantages of a critic": (
        rolled(advantages='{"name": "gae", "beta": 0.0}'),
        ["config.rollouts.advantages: they read 'values'", "policy_gradient.ppo"],
    ),
    "advantages of tokens": (
        rolled("rloo", advantages='{"name": "reinforce_pp", "beta": 0.1}'),
        ["config.rollouts.advantages: these are tokens' own"],
    ),
    "tokens' weights": (rolled("rloo", correction="truncate"), ["weighs whole completions, not tokens; take 'mask'"]),
    "a restriction masked": (rolled(top_p=0.9, correction="mask"), ["config.rollouts.correction=truncate"]),
    "more than all": (rolled(top_p=1.5), ["top_p=1.5", "1 at most"]),
    "a group of one": (rolled(group=1), ["config.rollouts.group: 1 leaves nothing to compare"]),
    "a pair of one": (rolled(group=1, objective="dpo"), ["config.rollouts.group: 1 is no pair"]),
    "resampling of one": (rolled(group=1, resample=2, objective="reinforce_pp"), ["config.rollouts.resample", "always tied"]),
    "dropping all": (rolled(group=1, drop_level=True, objective="reinforce_pp"), ["config.rollouts.drop_level"]),
    "no time": (rolled(reward_seconds=0.0), ["config.rollouts.reward_seconds: 0"]),
    "failures": (rolled(failures=1.5), ["config.rollouts.failures: 1.5"]),
    "failed": (rolled(failed=float("inf")), ["config.rollouts.failed: inf"]),
    "stop": (rolled(stop=(99,)), ["config.rollouts.stop", "99"]),
    "prompts left out": (
        rolled(prompt_window=3) | {"too_long": "drop"},
        ["no test problem has a prompt of at most config.rollouts.prompt_window=3"],
    ),
    "weight": ({"reward": {"a": {"name": "task", "weight": "2"}}}, ["config.reward.a.weight: '2' is no number"]),
    "no weight": (
        rolled() | {"reward": {"a": {"name": "task", "weight": 0}}},
        ["config.reward: every weight is 0", "nothing to learn"],
    ),
    "a task's own": ({"reward": {"a": "task.rewrad"}}, ["config.reward.a: the task has no function rewrad"]),
    "a reward for data": (
        {"reward": "math.exact", "task": {}},
        ["config.reward: source='data' without a config.task makes no", "configs/grpo.py"],
    ),
    "a column of rollouts": (
        rolled(objective={"name": "distill.top_k"}),
        ["config.objective: it reads the column teacher_tokens, which rollouts do not have"],
    ),
    "no tokenizer": ({"tokenizer": ""}, ["config.tokenizer", "comes without one", "name a folder"]),
    "window": ({"window": 65}, ["config.window: 65", "the model takes 64"]),
    "dtype": ({"dtype": "float23"}, ["config.dtype", "Did you mean 'float32'?"]),
    "schedule": ({"optimizer": {"schedule": "cosin"}}, ["config.optimizer.schedule", "Did you mean 'cosine'?"]),
    "no model": ({"model": ""}, ["config.model: give a folder"]),
    "no folder": ({"model": "nowhere"}, ["nowhere: no such folder", "config.json and *.safetensors"]),
    "family": ({"model": {**runs.MODEL, "model_type": "lama"}}, ["model_type 'lama'", "llama"]),
    "train_on": ({"train_on": "assistants"}, ["train_on='assistants'", "assistant, last"]),
    "a pattern": ({"trainable": "(q"}, ["config.trainable: '(q' is no regular expression"]),
    "a pattern for nothing": ({"trainable": "lora"}, ["config.trainable: 'lora' matches no parameter", "embed/weight"]),
    "decay": ({"optimizer": {"decay": "["}}, ["config.optimizer.decay: '[' is no regular expression"]),
    "a tokenizer's folder": ({"tokenizer": "./no/where"}, ["config.tokenizer: no folder ./no/where", "tokenizer.json"]),
    "prompts": (
        {"source": "rollouts", "rollouts": {"prompt_window": 3}},
        ["its prompt has", "config.rollouts.prompt_window takes 3"],
    ),
    "held_out": ({"held_out": 300}, ["held_out=300", "a fraction below 1.0"]),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_setting(tmp_path, compiled, kind):
    changes, parts = SETTINGS[kind]
    message = refused(tmp_path, **changes)
    assert all(part in message for part in parts), message
    assert not compiled


def test_rollouts_without_steps_or_a_task(tmp_path):
    for changes, part in (({"steps": 0}, "config.steps"), ({"task": {}}, "config.task")):
        chosen = runs.settings(
            tmp_path, source="rollouts", **{"steps": 2, **changes} | ({"task": {}} if "task" in changes else {})
        )
        with pytest.raises(UserError, match=part):
            train.run(recipe.make(**chosen), tmp_path / "w")


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("from jaxpost.tasks.arithmetic import record, conversation, test_records", ["has no function reward"]),
        (
            "from runs_task import *\ndef test_records(n): return [{'question': '1'}]",
            ["test problem 0", "`prompt`", "question"],
        ),
    ],
)
def test_a_task_of_ones_own(tmp_path, monkeypatch, compiled, code, parts):
    (tmp_path / "runs_task.py").write_text(runs.TASK)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(code + "\n")
    message = refused(tmp_path, task={"name": str(tmp_path / "mine.py"), "examples": 300})
    assert all(part in message for part in parts), message
    assert not compiled


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return {}, {}", "with one Term at least"),
        ("return 0.0", "with one Term at least; this one gave float 0.0"),
        ("return batch['weights'], {}", "asks for 'weights'.* the columns of its batches are .*mask"),
    ],
)
def test_an_objective_of_ones_own(tmp_path, body, told):
    (tmp_path / "mine.py").write_text(f"def mine(forward, params, batch, key):\n    {body}\n")
    chosen = runs.settings(tmp_path, steps=2, objective={"name": f"{tmp_path}/mine.py:mine"})
    with pytest.raises(UserError, match=told):
        train.run(recipe.make(**chosen), tmp_path / "w")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"best": "eval/rewrad"}, "is no figure of train's evaluations. Did you mean 'eval/reward'"),
        ({"best": "eval/mean_token_acuracy"}, "Did you mean 'eval/mean_token_accuracy'"),
        ({"best": "loss", "held_out": 0}, "Known: eval/reward"),
    ],
)
def test_a_best_that_no_evaluation_reports(tmp_path, compiled, changes, told):
    assert told in refused(tmp_path, **changes)
    assert not compiled


def test_a_token_that_the_model_has_no_row_for(tmp_path, compiled):
    """A tokenizer may name more tokens than its model has rows, as Gemma's does; only a text that uses one is refused."""
    folder = tmp_path / "text"
    text = arithmetic.tokenizer()
    text.add_tokens(["<picture>"])
    tokenizer.save(text, folder)
    model = {"tokenizer": str(folder), "model": runs.MODEL, "held_out": 0}
    told = refused(tmp_path, data=holding(tmp_path, [{"text": "1+1=2".replace("=", "+")}, {"text": "1<picture>2"}]), **model)
    assert "has the token '<picture>' (id 17), and the model has a vocabulary of 17" in told
    assert not compiled


KEYS = {
    "unknown": ({"windwo": 1}, "config: unknown key 'windwo'. Did you mean 'window'?"),
    "of an inner level": ({"lr": 1e-4}, "config: unknown key 'lr'. Did you mean 'optimizer.lr'?"),
    "of an outer level": ({"optimizer": {"window": 9}}, "config.optimizer: unknown key 'window'. Did you mean 'window'?"),
    "of two levels": ({"optimizer": {"steps": 9}}, "config.optimizer: unknown key 'steps'. Did you mean 'rollouts.steps' or "),
    "of a stage's inner level": (
        {"stages": ("a",), "a": {"lr": 1e-4}},
        "config.a: unknown key 'lr'. Did you mean 'optimizer.lr'?",
    ),
    "unknown inside": ({"optimizer": {"rl": 1}}, "config.optimizer: unknown key 'rl'. "),
    "unknown in a stage": (
        {"stages": ("a",), "a": {"stesp": 1}},
        "config.a: unknown key 'stesp'. Did you mean 'steps'?",
    ),
    "text for a number": ({"batch_size": "8"}, "config.batch_size: '8' is no int."),
    "a share for a count": ({"batch_size": 0.5}, "config.batch_size: 0.5 is no int."),
    "a number for text": ({"data": 7}, "config.data: 7 is no str or dict or tuple or list."),
    "yes for a number": ({"steps": True}, "config.steps: True is no int."),
    "text inside": ({"optimizer": {"lr": "2e-5"}}, "config.optimizer.lr: '2e-5' is no float or int."),
    "no rows": ({"batch_size": 0}, "config.batch_size: 0; it must be at least 1."),
    "no microbatches": ({"microbatches": 0}, "config.microbatches: 0; it must be at least 1."),
    "negative": ({"optimizer": {"lr": -1.0}}, "config.optimizer.lr: -1.0; it must be at least 0."),
    "infinite": ({"optimizer": {"lr": float("inf")}}, "config.optimizer.lr: inf; it must be finite."),
    "a large seed": ({"seed": 2**32}, "config.seed: 4294967296; it must be below 2**32."),
    "part of a step": ({"optimizer": {"warmup": 1.5}}, "config.optimizer.warmup: 1.5; give a whole number of steps"),
    "not a number": ({"ema": float("nan")}, "config.ema: nan; it must be at least 0."),
    "a stage that is none": ({"stages": ("a",), "a": 3}, "config.a: 3; a stage is a dict"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_of_a_recipe(kind):
    changes, message = KEYS[kind]
    with pytest.raises(UserError) as stopped:
        recipe.make(**changes)
    assert str(stopped.value).startswith(message)


def checkpoint(folder, cut: int = 0, without: str = ""):
    """A Hugging Face folder of the tiny model, `cut` bytes short of whole or a tensor short of complete."""
    arch = families.architecture(runs.MODEL)
    d, f, shapes = arch.width, arch.mlp_width, {}
    for name, *_ in families.tensor_names(arch).values():
        shape = {"embed": (arch.vocab, d), "gate": (f, d), "up": (f, d), "down": (d, f)}
        kind = next((k for k in shape if k in name), "norm" if "norm" in name else "attention")
        for i in range(arch.layers if "{}" in name else 1):
            shapes[name.format(i)] = shape.get(kind, (d,) if kind == "norm" else (d, d))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(runs.MODEL))
    path = folder / "model.safetensors"
    save_file({k: np.zeros(s, np.float32) for k, s in shapes.items() if k != without}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    return str(folder)


def test_weights_that_are_cut_off_or_not_all_there(tmp_path, compiled):
    message = refused(tmp_path, model=checkpoint(tmp_path / "cut", cut=100))
    assert "model.safetensors: not a whole safetensors file" in message and "again" in message
    message = refused(tmp_path, model=checkpoint(tmp_path / "short", without="model.norm.weight"))
    assert "1 tensors are missing, first model.norm.weight" in message
    assert not compiled


# ----------------------------------------------------------------------------------------------------- The real command


def commands(folder) -> dict[str, tuple[list[str], list[str]]]:
    """{kind: (command line, what its message must say)}."""
    good = runs.write(folder, runs.settings(folder, steps=2))
    texts = {
        "python": "def get_config(arg=''):\n    return recipe.make()\n",
        "syntax": "def get_config(\n",
        "key": "from jaxpost import recipe\n\n\ndef get_config(arg=''):\n    return recipe.make(windwo=3)\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "other" / "checkpoints" / "train" / "2").mkdir(parents=True)
    begun(folder / "other", runs.settings(folder, steps=2, seed=3))
    w, roles = folder / "w", holding(folder, [{"messages": CHAT[::-1]}])
    (folder / "weights").mkdir()
    weights = runs.settings(folder, model=checkpoint(folder / "cut", cut=100))
    return {
        "no workdir": (runs.command(good), ["--workdir=... is required", "--help"]),
        "no recipe": (runs.command(folder / "none.py", w), ["none.py: no such file", "quickstart.py, ", "sft.py"]),
        "python": (runs.command(folder / "python.py", w), ["python.py, line 2", "NameError"]),
        "syntax": (runs.command(folder / "syntax.py", w), ["syntax.py, line 1", "SyntaxError"]),
        "key": (runs.command(folder / "key.py", w), ["unknown key 'windwo'", "Did you mean 'window'?"]),
        "flag": (runs.command(good, w, "--config.windwo=3"), ["--config.windwo", "Did you mean 'window'?"]),
        "flag inside": (
            runs.command(good, w, "--config.objective.name=sft.nll", "--config.optimizer.wamup=3"),
            ["--config.optimizer.wamup", "Did you mean 'warmup'?"],
        ),
        "keyword": (
            runs.command(good, w, "--config.objective.gamma=2.0"),
            ["objectives: sft.nll takes no option 'gamma'"],
        ),
        "reaches no stage": (
            runs.command("configs/quickstart.py", w, "--config.steps=5"),
            ["config.steps: 5 reaches no stage", "config.sft.steps, config.dpo.steps, config.grpo.steps"],
        ),
        "type": (runs.command(good, w, "--config.window=wide"), ["--config.window=wide", "int"]),
        "settings alone": (
            [*runs.command(good)[:-1], f"--workdir={w}", "--config.steps=3"],
            ["--config=... is required: the recipe that the settings"],
        ),
        "settings first": (
            [*runs.command(good)[:-1], "--config.windwo=3", runs.command(good)[-1], f"--workdir={w}"],
            ["--config.windwo: the recipe has no key", "Did you mean 'window'?"],
        ),
        "argument": (runs.command(good, w, "steps=3"), ["unexpected argument 'steps=3'", "--name=value"]),
        "roles": (
            runs.command(good, w, f"--config.data={roles}", "--config.held_out=0"),
            ["line 1, message 1", "must alternate"],
        ),
        "weights": (runs.command(runs.write(folder / "weights", weights), w), ["not a whole safetensors file", "again"]),
        "workdir": (
            runs.command(good, folder / "other"),
            ["seed: 3 -> 0", f"--config.model={folder / 'other'}", "the optimizer, the schedule"],
        ),
    }


FRONT = ("python", "flag inside", "workdir")  # from the recipe, from the settings, from the loop


@pytest.mark.parametrize("front", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_command_line_prints_one_message_and_fails(tmp_path, front):
    waiting = [(kind, case) for kind, case in commands(tmp_path).items() if (kind in FRONT) is front]
    while waiting:
        pair, waiting = waiting[:2], waiting[2:]  # as many at a time as the smallest machine has cores
        for (kind, (_, parts)), run in [(case, runs.start(case[1][0])) for case in pair]:
            out, errors = run.communicate(timeout=120)
            assert run.returncode == 2 and not out, f"{kind}: {errors}"
            assert errors.startswith("error: ") and errors.count("error: ") == 1 and "Traceback" not in errors, (
                f"{kind}: {errors}"
            )
            assert all(part in errors for part in parts), f"{kind}: {errors}"
            assert len(errors.splitlines()) == (5 if kind == "workdir" else 1), f"{kind}: {errors}"
    assert not (tmp_path / "w").exists()


def begun(workdir, settings):
    """A workdir whose only stage was begun with these settings."""
    ((name, s),) = recipe.stages(recipe.make(**settings))
    records.begin(epath.Path(workdir), name, s, None)


def test_a_workdir_that_never_saved_takes_the_corrected_settings(tmp_path):
    begun(tmp_path, runs.settings(tmp_path, seed=3))
    corrected = recipe.stages(recipe.make(**runs.settings(tmp_path, seed=2)))
    records.check(epath.Path(tmp_path), corrected)
    (tmp_path / "checkpoints" / "train" / "2").mkdir(parents=True)
    with pytest.raises(UserError, match="seed: 3 -> 2") as raised:
        records.check(epath.Path(tmp_path), corrected)
    assert f"another workdir and model='{tmp_path}'" in str(raised.value)  # as Python has it


def test_an_error_in_a_library_that_a_recipe_calls_is_placed_in_the_recipe(tmp_path):
    file = tmp_path / "r.py"
    file.write_text('from pathlib import Path\nPath("x").parents[1]\n')
    with pytest.raises(IndexError) as raised:
        runpy.run_path(str(file))
    assert f"{file}, line 2: IndexError" in cli._explain(raised.value, ["train"])


def test_a_stage_that_the_recipe_lacks_is_told_where_it_is_written(monkeypatch):
    monkeypatch.setattr(cli, "_recipe", lambda argv: recipe.make())
    message = cli._explain(AttributeError("dpo"), ["train", "--config=r.py", "--config.dpo.steps=3"])
    assert message.startswith("--config.dpo.steps: the recipe has no key 'dpo' there.")
    assert message.endswith("A further stage is written in a recipe of your own (docs/stages.md).")


@pytest.mark.parametrize("flag", ["--window=3", "--model=f"])
def test_a_setting_that_is_given_as_a_flag_is_told_how(flag):
    with pytest.raises(flags.UnrecognizedFlagError) as raised:
        flags.FlagValues()(["train", flag])
    name = flag.partition("=")[0]
    told = f"{name}: a recipe's setting is given as --config.{name[2:]}=..."
    assert cli._explain(raised.value, ["train", "--config=r.py", flag]) == told
    assert "Unknown command line flag" in cli._explain(raised.value, ["generate", flag])


def test_other_settings_are_told_with_the_command_that_begins_a_run_from_these_weights(tmp_path, monkeypatch):
    work = epath.Path(tmp_path / "w 1")
    (work / "checkpoints" / "train" / "2").mkdir(parents=True)
    (tmp_path / "w 1-2").mkdir()
    begun(work, {"seed": 3})
    given = ["--config=r.py", "--workdir", str(work), "--config.model.width=8", "--config.data=a b.jsonl", "--config.seed=2"]
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python3", "-u", "-m", "jaxpost.train", *given])
    with pytest.raises(UserError) as raised:
        records.check(work, recipe.stages(recipe.make(seed=2)))
    (command,) = [line for line in str(raised.value).splitlines() if "-m jaxpost.train" in line]
    rest = ["--config=r.py", "--config.data=a b.jsonl", "--config.seed=2", f"--workdir={work}-3", f"--config.model={work}"]
    assert shlex.split(command) == ["/bin/python3", "-u", "-m", "jaxpost.train", *rest]


def test_a_models_folder_is_no_workdir(tmp_path):
    folder = checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match="is a model's folder"):
        train.run(recipe.make(**runs.settings(tmp_path, steps=2)), folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ema": 1.0}, "config.ema: 1.0; a decay is below 1"),
        ({"optimizer": {"b2": 1.0}}, "config.optimizer.b2: 1.0; a decay is below 1"),
        ({"rollouts": {"temperature": 0.0}}, "config.rollouts.temperature: a greedy policy has no gradient"),
        ({"seed": -1}, "config.seed: -1; it must be at least 0"),
    ],
)
def test_a_number_out_of_its_range(changes, told):
    with pytest.raises(UserError, match=told):
        recipe.make(**changes)


# ------------------------------------------------------------------------------------------- Problems that cannot be asked

ODD = """
from jaxpost.tasks import arithmetic
from jaxpost.tasks.arithmetic import conversation, reward, test_records, tokenizer  # noqa: F401

FROM = {begin}


def record(index, *, seed=0):
    found = arithmetic.record(index, seed=seed)
    return {{FROM: {{"prompt": "1" * 40}}, FROM + 1: {{"prompt": "one"}}, FROM + 2: {{"question": "1"}}}}.get(index, found)
"""
SEVENS = (
    "{% if '7' in messages[0]['content'] %}{{ raise_exception('no sevens') }}{% endif %}"
    "{{ messages[0]['content'] }}{% if not add_generation_prompt %}{{ messages[1]['content'] }}{{ eos_token }}{% endif %}"
)


def odd(folder, begin: int, **changes):
    """The prompts of a task whose problems `begin` and the two after it cannot be asked."""
    (folder / "odd.py").write_text(ODD.format(begin=begin))
    chosen = runs.settings(folder, steps=2, **{**rolled(), "task": {"name": str(folder / "odd.py")}, **changes})
    ((name, s),) = recipe.stages(recipe.make(**chosen))
    return plan_stage(name, s, sharding.make_mesh()).source.config.prompt


def test_a_problem_that_cannot_be_asked_stops_before_anything_is_compiled(tmp_path, compiled, capsys):
    for lenient, told in (
        ({}, r"problem 3: its prompt has 4\d tokens; .* config.too_long=\"drop\""),
        ({"too_long": "truncate"}, "problem 3: its prompt has"),  # a prompt is never cut
        ({"bad_rows": "skip"}, "problem 3: its prompt has"),
        ({"too_long": "drop"}, "problem 4: .*'o'"),
        ({"template": SEVENS}, "problem .*no sevens"),
    ):
        with pytest.raises(UserError, match=told):
            odd(tmp_path, 3, **lenient)
    prompt = odd(tmp_path, 3, too_long="drop", bad_rows="skip")
    assert [i for i in range(8) if prompt(i) is None] == [3, 4, 5]
    assert "odd.py: 3 of the first 256 problems are left out, first 3" in capsys.readouterr().err
    assert not compiled


def test_a_later_problem_that_cannot_be_asked_is_named(tmp_path):
    prompt = odd(tmp_path, 300)
    for number, told in (
        (300, "its prompt has"),
        (301, "'o'"),
        (302, "no text or messages under `prompt`; its keys are question"),
    ):
        with pytest.raises(UserError, match=f"odd.py, problem {number}: .*{told}"):
            prompt(number)
    prompt = odd(tmp_path, 300, too_long="drop", bad_rows="skip")
    assert [prompt(i) for i in (300, 301, 302)] == [None] * 3 and prompt(303) is not None
