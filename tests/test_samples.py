"""Completions as a data set: which rows they give, made once whatever happens meanwhile, and a stage that learns from them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from etils import epath

import jaxpost
from jaxpost import recipe, sharding, train
from jaxpost.errors import UserError
from jaxpost.rollouts import samples
from jaxpost.sampling import decode
from jaxpost.sampling.decode import Completions
from jaxpost.stages.plan import plan_stage
from jaxpost.tasks import arithmetic

TOKENIZER = arithmetic.tokenizer()
STOP = TOKENIZER.eos_token_id
NEW = 2


def said(row: dict) -> tuple:
    return tuple(row[k][0]["content"] for k in ("prompt", "chosen", "rejected") if k in row)


def test_the_rows_that_completions_give_by_hand():
    texts, rewards = ["1", "2", "3", "4", "1"], [0.5, 0.0, 1.0, 0.5, 0.5]
    found = samples.rows("pairs", "q", texts, rewards)
    assert [said(row) + (row["margin"],) for row in found] == [("q", "3", "2", 1.0)]  # the second best is level
    found = samples.rows("pairs", "q", ["7", "8", "7", "8"], [1, 0, 1, 0])
    assert [said(row) for row in found] == [("q", "7", "8")]  # two such pairs, one row
    found = samples.rows("pairs", "q", list("abcdef"), [3, 1, 2, 0, 5, 4])
    assert [said(row)[1:] + (row["margin"],) for row in found] == [("e", "d", 5.0), ("f", "b", 3.0), ("a", "c", 1.0)]
    assert samples.rows("pairs", "q", ["a", "b"], [1, 1]) == samples.rows("pairs", "q", [], []) == []
    user, best = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "3"}]
    assert samples.rows("demonstrations", "q", texts, rewards) == [{"prompt": user, "completion": best}]
    assert samples.rows("demonstrations", "q", texts, [1] * 5) == samples.rows("demonstrations", "q", [], []) == []
    assert samples.rows("demonstrations", "q", ["", "2"], [1, 0]) == []
    found = samples.rows("scored", "q", ["1", "2", "1"], [0.5, 0, 0.5])
    assert [(row["completion"][0]["content"], row["score"]) for row in found] == [("1", 0.5), ("2", 0.0)]
    found = samples.rows("mismatched", "q", ["1", "2", "1"], [1, 0, 1])
    assert [(row["completion"][0]["content"], row["label"]) for row in found] == [("1", True), ("2", False)]
    with pytest.raises(UserError, match="config.reward: 0.5 of 'a' is no label"):
        samples.rows("labelled", "q", ["a"], [0.5])


def drawn(
    model, params, prompts, *, mesh, seed, step, number, group, have, killed=lambda number: None, **options
) -> Completions:
    """In place of `complete`: completion n of all says n's last digit and stops, and every fifth goes on."""
    killed(number)
    numbers = number + np.array([i for i in range(len(prompts) * group) if i not in have])
    stopped = numbers % 5 != 0
    tokens = np.array([[TOKENIZER.encode(str(n % 10))[-1], STOP if n % 5 else 3] for n in numbers], np.int32)
    return Completions(tokens, np.full(len(numbers), 2), np.zeros(tokens.shape, np.float32), stopped, 2 - stopped)


@pytest.fixture
def stand_in(monkeypatch):
    """`drawn` in the sampler's place, which needs no weights; a test may put another there."""

    def put(complete):
        monkeypatch.setattr(decode, "complete", complete)

    monkeypatch.setattr(decode, "ready", lambda model, params, mesh: params)
    put(drawn)
    return put


def asked(rows: int = 8, count: int = 7, reward=lambda record, text: float(int(text) > 4)) -> samples.Samples:
    def prompt(i):
        return {"prompt": f"{i}+{i}"}, np.array(TOKENIZER.encode(f"{i}+{i}"), np.int32)

    return samples.Samples(None, TOKENIZER, prompt, {"mine": (reward, 1.0)}, "pairs", count, 4, rows, 0, 0, {}, {"new": NEW})


def made(folder, **changes) -> list[dict]:
    parts, seconds = samples.make(asked(**changes), {"of": "x"}, lambda: None, folder, sharding.make_mesh())
    assert seconds >= 0
    return [json.loads(line) for part in parts for line in Path(part).read_text().splitlines()]


def test_a_data_set_is_made_once_and_does_not_depend_on_how_many_at_a_time(tmp_path, stand_in):
    found = made(tmp_path / "a")
    # Completions 4i to 4i+3 are prompt i's; those that are multiples of 5 did not stop and are left out.
    assert [said(row) for row in found] == [("1+1", "6", "4"), ("2+2", "8", "1"), ("6+6", "6", "4")]
    assert made(tmp_path / "b", rows=12) == found == made(tmp_path / "c", rows=4)

    def never(*_, **__):
        raise AssertionError("all is there")

    stand_in(never)
    assert made(tmp_path / "a") == found


def test_a_killed_run_goes_on_after_its_last_part(tmp_path, monkeypatch, stand_in):
    monkeypatch.setattr(samples, "SECONDS", 0.0)  # a part for each batch
    whole = made(tmp_path / "whole", count=30)

    class Killed(Exception):
        """The machine is gone."""

    def at(number):
        if number >= 64:
            raise Killed

    stand_in(lambda *a, **k: drawn(*a, killed=at, **k))
    with pytest.raises(Killed):
        made(tmp_path / "x", count=30)
    (folder,) = (tmp_path / "x").iterdir()
    before = len(list(folder.glob("part-*")))
    (folder / "part-00000099.jsonl").write_text("half a row that was written when the run was killed")
    seen = []
    stand_in(lambda *a, **k: drawn(*a, killed=seen.append, **k))
    # With less room than before, so that fewer are made at a time.
    assert made(tmp_path / "x", count=30, rows=4) == whole and before >= 3 and min(seen) == 64


def test_a_run_that_is_asked_to_stop_keeps_what_it_has(tmp_path, stand_in):
    whole, stops = made(tmp_path / "whole", count=30), iter([False, True])
    mesh = sharding.make_mesh()
    parts, _ = samples.make(asked(count=30), {"of": "x"}, lambda: None, tmp_path / "x", mesh, lambda: next(stops))
    assert parts == [] and json.loads(next((tmp_path / "x").glob("*/meta.json")).read_text())["prompts"] == 4
    assert made(tmp_path / "x", count=30) == whole


@pytest.mark.parametrize("damage", ["", "cut", "[1]", '{"prompts": 7}', "flipped"])
def test_a_damaged_meta_is_named_and_nothing_is_drawn_over_it(tmp_path, stand_in, damage):
    made(tmp_path)
    (meta,) = tmp_path.glob("*/meta.json")
    content = meta.read_text()
    meta.write_text({"cut": content[:-5], "flipped": content.replace('"rows"', '"rowr"')}.get(damage, damage))
    with pytest.raises(UserError, match=f"{meta}: .* damaged. Bring it back from a copy, or delete {meta.parent}, and"):
        made(tmp_path)


def test_completions_that_are_all_alike_teach_nothing(tmp_path, stand_in):
    with pytest.raises(UserError, match="7 prompts, and in none do completions differ in their reward"):
        made(tmp_path, reward=lambda record, text: 1.0)
    assert len(made(tmp_path)) == 3  # with another reward


# ---- a stage

CHANGES = {"source": "samples", "objective": {"name": "preference.sigmoid"}, "steps": 4, "save_every": 2}


def configured(folder, **changes):
    dpo = {**CHANGES, "task": {"name": str(folder / "task.py"), "examples": 60}, **changes}
    return recipe.make(**runs.settings(folder, stages=("sft", "dpo"), best="", sft={"steps": 1}, dpo=dpo))


def weights(workdir) -> list[np.ndarray]:
    state, _ = runs.saved(workdir, "dpo")[4]
    return [x for name, x in state.items() if name.startswith("train/")]


@pytest.mark.slow
def test_a_stage_learns_from_samples_and_goes_on_with_them(tmp_path):
    work, config = tmp_path / "w", configured(tmp_path)
    jaxpost.train(config, str(work))
    (folder,) = (work / "samples").iterdir()
    told, first = json.loads((folder / "meta.json").read_text()), weights(work)
    alone = [train._seconds_of(name, epath.Path(work)) for name in ("sft", "dpo")]
    assert told["all"] and told["rows"] > 10 and alone[1] > told["seconds"] > 0
    assert train._seconds_of("sft,dpo", epath.Path(work)) == sum(alone)
    rows = [r for r in runs.rows(work / "metrics.jsonl") if r["stage"] == "dpo" and "rewards/margins" in r]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[-1]["loss"] < rows[0]["loss"]
    # Cut off at step 2, and the data lost with it: the same is drawn again from the same weights.
    shutil.rmtree(work / "checkpoints" / "dpo" / "4")
    shutil.rmtree(work / "samples")
    jaxpost.train(config, str(work))
    jax.tree.map(np.testing.assert_array_equal, weights(work), first)


def test_what_samples_cannot_be_is_refused(tmp_path):
    for changes, message in (
        ({"steps": 0}, "config.steps: samples have no epochs"),
        ({"rollouts": {"group": 1}}, "config.rollouts.group: 1 leaves nothing to compare"),
        ({"data": "x.jsonl"}, "config.dpo.data: 'x.jsonl'; the prompts of source='samples' are those of config.dpo.task"),
        ({"annotations": "x"}, "config.dpo.annotations: 'x' is not read by source='samples', which makes its rows itself"),
        ({"objective": {"name": "reward_model.process"}}, "learns from steps of a data set, and samples are none"),
        ({"train_on": "all"}, "config.train_on: 'all'"),
        ({"window": 4}, "a sample of config.task, 0.*make the window"),
        ({"rollouts": {"prompt_window": 2}}, "its prompt has"),
    ):
        with pytest.raises(UserError, match=message):
            _, (name, s) = recipe.stages(configured(tmp_path, **changes))
            plan_stage(name, s, sharding.make_mesh())
