"""A file of prompts as a task, settings that a source does not read, and rewards of TRL's signature."""

import json
import re

import pytest
import runs

from jaxpost import recipe, sharding
from jaxpost.errors import UserError
from jaxpost.rollouts.scoring import judged
from jaxpost.stages import annotations, generate, tasks
from jaxpost.stages.plan import plan_stage
from jaxpost.stages.run import Run
from jaxpost.tasks import arithmetic, prompts

ROWS = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(40)]


def written(folder, rows, name="prompts.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.mark.parametrize("order", [1, -1])
def test_prompts_are_split_by_their_text_and_gone_through(tmp_path, order):
    task = prompts.make(data=written(tmp_path, (ROWS + ROWS[:5])[::order]), held_out=8)
    held = {record["prompt"] for record in task.test_records(100)}
    trained = [task.record(i)["prompt"] for i in range(32)]
    assert len(held) == 8 and not held & {task.record(i)["prompt"] for i in range(100)} and len(set(trained)) >= 27
    assert held == {r["prompt"] for r in prompts.make(data=written(tmp_path, ROWS), held_out=0.2).test_records(100)}
    assert task.record(3)["answer"] == str(int(task.record(3)["prompt"][:-2]) + 1) and task.record(3) == task.record(3)
    apart = prompts.make(data=written(tmp_path, ROWS), test=written(tmp_path, ROWS[:3], "test.jsonl"))
    assert len(apart.test_records(9)) == 3 and not {apart.record(i)["prompt"] for i in range(80)} & {"0+1", "1+1", "2+1"}


def test_a_prompt_with_half_a_character_is_a_problem_like_any_other(tmp_path):
    rows = [{"prompt": f"{i} \ud800", "answer": "1"} for i in range(9)]
    assert prompts.make(data=written(tmp_path, rows), held_out=2).record(0)["prompt"].endswith("\ud800")


def test_prompts_are_texts_or_messages_under_any_name(tmp_path):
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    rows = [{"messages": turns, "id": 1}, {"messages": turns[:1], "id": 2}, {"prompt": turns[:1], "id": 3}]
    for row in rows:
        assert prompts._parsed(row, {}, "a") == {**row, "prompt": turns[:1]}
    assert prompts._parsed({"problem": "x", "a": 1}, {"prompt": "problem", "answer": "a"}, "p")["answer"] == 1


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": "x"}, "", "line 1: has no prompt.*text"),
        ({"prompt": ""}, "", "line 1: has no prompt"),
        ({"prompt": [{"role": "user"}]}, "", "line 1: has no prompt"),
        ({"prompt": "x"}, "prompt=problem", "line 1: has no column 'problem'"),
        ({"prompt": "x"}, "", "no row is left for the train split"),
    ],
)
def test_files_that_are_no_prompts_are_refused(tmp_path, row, columns, message):
    with pytest.raises(UserError, match=message):
        prompts.make(data=written(tmp_path, [row]), columns=columns)


def staged(**changes):
    ((_, s),) = recipe.stages(recipe.opened("configs/grpo.py", model="M", **changes))
    return s


def test_data_for_rollouts_are_prompts_in_place_of_gsm8k():
    s = staged(data="a.jsonl", reward="f.py:g", eval_data="b.jsonl", columns="prompt=problem", held_out=0.2)
    task = {"name": "prompts", "data": "a.jsonl", "test": "b.jsonl", "columns": "prompt=problem", "held_out": 0.2}
    assert recipe.plain(s.task) == task and not s.data and not s.eval_data
    assert recipe.plain(staged().task)["name"] == "gsm8k"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "a.jsonl"}, "config.reward: a file of prompts has no reward"),
        ({"data": "a.jsonl", "task": {"name": "countdown"}}, "config.data: 'a.jsonl'; the prompts of .* countdown"),
        ({"data": "a.jsonl=2,b.jsonl=1", "reward": "f.py:g"}, "config.data: .* without weights"),
        ({"eval_data": "a.jsonl"}, "config.eval_data: 'a.jsonl' is not read by source='rollouts'"),
        ({"columns": "prompt=problem"}, "config.columns: .* is not read"),
        ({"annotations": "x"}, "config.annotations: .* is not read"),
        ({"data": "a.jsonl", "reward": "f.py:g", "train_on": "last"}, "config.train_on: .* is not read"),
    ],
)
def test_settings_that_rollouts_do_not_read_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        staged(**changes)


def test_data_around_several_stages_are_those_of_the_stage_that_reads_them():
    rolled = {"source": "rollouts", "objective": {"name": "policy_gradient.grpo"}}
    config = recipe.make(stages=("sft", "rl"), data="a.jsonl", task={"name": "countdown"}, rl=rolled)
    assert recipe.stages(config)[1][1].task.name == "countdown"
    config = recipe.make(stages=("sft", "rl"), task={"name": "countdown"}, rl={**rolled, "data": "a.jsonl"})
    with pytest.raises(UserError, match="config.rl.data"):
        recipe.stages(config)


@pytest.mark.parametrize("answer", ["12 pi", "5xy", "May 5", "(2, 5)", "3 to 5", None])
def test_a_gold_that_numeric_cannot_judge_by_is_named_by_file_row_and_value(tmp_path, answer):
    task = prompts.make(data=written(tmp_path, [*ROWS, {"prompt": "?", "answer": answer}]))
    judges = tasks.rewards(task, "prompts", {"right": {"name": "math.numeric", "weight": 0.5}})
    with pytest.raises(UserError, match=f"prompts.jsonl, line 41: reward right: .*{re.escape(answer or 'no answer')}"):
        tasks._check_records(task, judges)
    tasks._check_records(task, tasks.rewards(task, "prompts", "math.exact" if answer else "text.length"))
    tasks._check_records(prompts.make(data=written(tmp_path, ROWS)), judges)


TRL = """
def longest(completions, answer, **kwargs):
    return [float(len(c)) + (c == a) for c, a in zip(completions, answer)]


def asked(prompts, completions):
    return [len(p[0]["content"]) + len(c[0]["content"]) for p, c in zip(prompts, completions)]


def wrong(completions):
    return None if len(completions) > 9 else 1.0
"""


def test_rewards_of_trls_signature_are_rewards(tmp_path):
    (tmp_path / "mine.py").write_text(TRL)
    rewards = tasks.rewards(None, "", {name: f"{tmp_path / 'mine.py'}:{name}" for name in ("longest",)})
    assert [s.total for s in judged(rewards, [{"prompt": "?", "answer": "ab"}] * 2, ["ab", "abc"])] == [3.0, 3.0]
    message = "reward longest reads the column 'answer', .* theirs are prompt, id. .*--config.columns=answer=NAME takes another"
    with pytest.raises(UserError, match=message):
        judged(rewards, [{"prompt": "?", "id": 1}], ["ab"])
    rewards = tasks.rewards(None, "", f"{tmp_path / 'mine.py'}:asked")
    turns = [{"role": "user", "content": "hello"}]
    assert judged(rewards, [{"prompt": turns, "answer": ""}], ["abc"])[0].total == 8.0
    rewards = tasks.rewards(None, "", f"{tmp_path / 'mine.py'}:wrong")
    assert "gave no list of one score" in judged(rewards, [{"prompt": "?"}], ["a"])[0].failures[0]


# ---- what a source does not read

# Settings that the loop reads, or the whole run, whatever the source of a stage's batches.
LOOP = {
    *(
        "do",
        "artefacts",
        "seed",
        "stages",
        "result",
        "time_of",
        "tokens_of",
        "tokens",
        "evals",
        "ema",
        "max_skipped",
        "topology",
        "best",
        "highest",
        "profile",
    ),
    *("log_every", "term_norms", "eval_every", "save_every", "keep", "mesh.data", "mesh.fsdp", "mesh.tensor"),
}


class Reads:
    """Settings that note the path of whatever is read of them."""

    def __init__(self, settings, seen: set, prefix: str = ""):
        self._settings, self._seen, self._prefix = settings, seen, prefix

    def __getitem__(self, key):
        value = self._settings[key]
        if key == "rollouts":
            return Reads(value, self._seen, "rollouts.")
        self._seen.update({self._prefix + key, *recipe.flat(recipe.plain(value), self._prefix + key)})
        return value

    __getattr__ = __getitem__


def reads(folder, changes: dict, rows: str) -> set[str]:
    """What planning a stage of these settings reads, and reading its data; nothing is compiled. rows: a file."""
    ((name, s),) = recipe.stages(recipe.make(**runs.settings(folder, **changes)))
    # What a prompt that is at fault makes a stage read; of rollouts besides what log.py reads of batches that have a table.
    seen = {"bad_rows", "too_long"} if s.source == "rollouts" else set()
    seen |= {"completions", "rollouts.correction_cap"} if s.source == "rollouts" else set()  # the cap of a correction
    mesh = sharding.make_mesh()
    if s.do == "generate":
        generate.planned(name, Reads(s, seen), Run(folder, folder, mesh, None, {}, {}))
        return seen
    annotations.planned(plan_stage(name, Reads(s, seen), mesh), mesh)
    seen -= {"annotations"} if s.source != "data" else set()  # a dict of annotators, where folders are refused
    return seen


def other(value):
    """A value of the same kind that is not this one, and that the setting may have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 or 0.5
    return ("x",) if value == () else "x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("source", ["data", "data without a task", "rollouts", "generate"])
def test_every_setting_is_read_by_a_source_or_refused(tmp_path, source):
    rows = written(tmp_path, [arithmetic.conversation(i) for i in range(30)])
    reinforce = {"source": "rollouts", "objective": {"name": "policy_gradient.reinforce"}, "steps": 2}
    changes = {
        "data": {},
        "data without a task": {"task": {}, "data": rows},
        "rollouts": {**reinforce, "rollouts": {"group": 4, "prompt_window": 12, "new": 6, "reward_workers": 0}},
        "generate": {"do": "generate"},
    }[source]
    seen, refused, paths = reads(tmp_path, changes, rows), set(), recipe.flat(recipe.DEFAULTS)
    for path in paths.keys() - LOOP - {"source"}:
        *around, key = path.split(".")
        changed = {key: other(paths[path])}
        try:
            settings = runs.settings(tmp_path, **changes)
            recipe.stages(recipe.make(**settings | ({around[0]: settings.get(around[0], {}) | changed} if around else changed)))
        except UserError as error:
            refused |= {path} if re.search(f"config.{path}: .*(is not read by|Leave data out)", str(error)) else set()
    assert (seen & refused, paths.keys() - seen - refused - LOOP - {"source"}) == (set(), set())


def test_settings_that_were_written_to_json_are_the_same():
    written = recipe.make(data="a.jsonl")
    ((_, read),) = recipe.stages(recipe.make(**json.loads(written.to_json())))
    assert json.loads(read.to_json())["data"] == "a.jsonl"


def test_settings_around_stages_are_read_by_one_of_them():
    rl = {"source": "rollouts", "objective": {"name": "policy_gradient.grpo"}}
    around = {"task": {"name": "countdown"}, "window": 64, "rollouts": {"lag": 1}}
    recipe.stages(recipe.make(stages=("sft", "rl"), rl=rl, **around))
    one = recipe.opened(recipe.make(stages=("sft", "rl"), sft={"seed": 1}, rl=rl, **around), stages=("rl",))
    assert [name for name, _ in recipe.stages(one)] == ["rl"]  # window is a setting of the stage that is left out
    with pytest.raises(UserError, match="config.rollouts.lag: 1 is not read by any of a, b .a has source='data', which draws"):
        recipe.stages(recipe.make(stages=("a", "b"), **around))
    with pytest.raises(UserError, match="config.window: 64 is not read by any of a .*rollouts.prompt_window and .*default 512"):
        recipe.stages(recipe.make(stages=("a",), a=rl, **around))
    drawn, dpo = {"do": "generate", "task": "countdown"}, {"data": "@drawn", "objective": "preference.sigmoid"}
    around = {"data": "a.jsonl", "columns": "prompt=q", "split_seed": 2}
    config = recipe.make(stages=("sft", "drawn", "dpo"), drawn=drawn, dpo=dpo, **around)
    (_, sft), _, (_, dpo) = recipe.stages(config)
    assert (sft.columns, dpo.columns, dpo.split_seed) == ("prompt=q", "", 2)  # the names are those of the file's columns
