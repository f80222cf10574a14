"""Completions as a data set: which rows they give, made once whatever happens meanwhile, and a stage that learns from them."""

import contextlib
import json
import shutil
import types

import jax
import numpy as np
import pytest
import runs

import jaxpost
from jaxpost import recipe, sharding
from jaxpost.data import readers, row_types
from jaxpost.errors import UserError
from jaxpost.sampling import decode
from jaxpost.sampling.decode import Completions
from jaxpost.stages import generate
from jaxpost.stages.run import Run
from jaxpost.storage.artefacts import Artefact
from jaxpost.tasks import arithmetic

TOKENIZER = arithmetic.tokenizer()
STOP = TOKENIZER.eos_token_id
NEW = 2


def rows(kind: str, *arguments) -> list[dict]:
    return generate.rows(row_types.load(kind), *arguments)


def said(row: dict) -> tuple:
    return tuple(row[k][0]["content"] for k in ("prompt", "chosen", "rejected") if k in row)


def test_the_rows_that_completions_give_by_hand():
    texts, rewards = ["1", "2", "3", "4", "1"], [0.5, 0.0, 1.0, 0.5, 0.5]
    found = rows("pairs", "q", texts, rewards)
    assert [said(row) + (row["margin"],) for row in found] == [("q", "3", "2", 1.0)]  # the second best is level
    found = rows("pairs", "q", ["7", "8", "7", "8"], [1, 0, 1, 0])
    assert [said(row) for row in found] == [("q", "7", "8")]  # two such pairs, one row
    found = rows("pairs", "q", list("abcdef"), [3, 1, 2, 0, 5, 4])
    assert [said(row)[1:] + (row["margin"],) for row in found] == [("e", "d", 5.0), ("f", "b", 3.0), ("a", "c", 1.0)]
    assert rows("pairs", "q", ["a", "b"], [1, 1]) == rows("pairs", "q", [], []) == []
    user, best = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "3"}]
    assert rows("demonstrations", "q", texts, rewards) == [{"prompt": user, "completion": best}]
    assert rows("demonstrations", "q", texts, [1] * 5) == rows("demonstrations", "q", [], []) == []
    assert rows("demonstrations", "q", ["", "2"], [1, 0]) == []
    found = rows("scored", "q", ["1", "2", "", "1"], [0.5, 0, 1, 0.5])
    assert [(row["completion"][0]["content"], row["score"]) for row in found] == [("1", 0.5), ("2", 0.0)]
    found = rows("mismatched", "q", ["1", "2", "1"], [1, 0, 1])
    assert [(row["completion"][0]["content"], row["label"]) for row in found] == [("1", True), ("2", False)]
    with pytest.raises(UserError, match="config.reward: 0.5 of 'a' is no label"):
        rows("labelled", "q", ["a"], [0.5])


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


def asked(batch: int = 8, count: int = 7, reward=lambda record, text: float(int(text) > 4)) -> generate.Samples:
    def prompt(i):
        return {"prompt": f"{i}+{i}"}, np.array(TOKENIZER.encode(f"{i}+{i}"), np.int32)

    return generate.Samples(
        None, TOKENIZER, prompt, {"mine": (reward, 1.0)}, row_types.load("pairs"), count, 4, batch, 0, 0, {}, {"new": NEW}
    )


def made(folder, stopped=lambda: False, **changes) -> list[dict]:
    artefact = Artefact(folder, "rows", {"of": "x"})
    progress = generate.draw(asked(**changes), artefact, lambda: None, sharding.make_mesh(), stopped)
    assert progress["seconds"] >= 0
    parts = sorted(artefact.folder.glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def test_a_data_set_is_made_once_and_does_not_depend_on_how_many_at_a_time(tmp_path, stand_in):
    found = made(tmp_path / "a")
    # Completions 4i to 4i+3 are prompt i's; those that are multiples of 5 did not stop and are left out.
    assert [said(row) for row in found] == [("1+1", "6", "4"), ("2+2", "8", "1"), ("6+6", "6", "4")]
    assert made(tmp_path / "b", batch=12) == found == made(tmp_path / "c", batch=4)

    def never(*_, **__):
        raise AssertionError("all is there")

    stand_in(never)
    assert made(tmp_path / "a") == found


def test_a_killed_run_goes_on_after_its_last_part(tmp_path, monkeypatch, stand_in):
    monkeypatch.setattr(generate, "SECONDS", 0.0)  # a part for each batch
    whole = made(tmp_path / "whole", count=30)

    class Killed(Exception):
        """The machine is gone."""

    def at(number):
        if number >= 64:
            raise Killed

    stand_in(lambda *a, **k: drawn(*a, killed=at, **k))
    with pytest.raises(Killed):
        made(tmp_path / "x", count=30)
    (folder,) = (tmp_path / "x" / "rows").iterdir()
    before = len(list(folder.glob("part-*")))
    (folder / "part-00000099.jsonl").write_text("half a row that was written when the run was killed")
    seen = []
    stand_in(lambda *a, **k: drawn(*a, killed=seen.append, **k))
    # With less room than before, so that fewer are made at a time.
    assert made(tmp_path / "x", count=30, batch=4) == whole and before >= 3 and min(seen) == 64


def test_a_part_without_rows_is_no_file_of_rows(tmp_path, monkeypatch, stand_in):
    monkeypatch.setattr(generate, "SECONDS", 0.0)  # a part for each prompt, of which four give no row
    rows = made(tmp_path, batch=4)
    (folder,) = (tmp_path / "rows").iterdir()
    assert [record.row for record in readers.read(str(folder / "part-*.jsonl"))] == rows
    assert len(list(folder.glob("part-*"))) == 7


def test_a_run_that_is_asked_to_stop_keeps_what_it_has(tmp_path, stand_in):
    whole, stops = made(tmp_path / "whole", count=30), iter([False, True])
    made(tmp_path / "x", lambda: next(stops), count=30)
    meta = json.loads(next((tmp_path / "x" / "rows").glob("*/meta.json")).read_text())
    assert meta["parts"][-1]["progress"]["prompts"] == 4 and not meta.get("done")
    assert made(tmp_path / "x", count=30) == whole


@pytest.mark.parametrize("damage", ["", "cut", "[1]", '{"prompts": 7}', "part"])
def test_what_is_damaged_is_named_and_drawn_again(tmp_path, monkeypatch, stand_in, capsys, damage):
    monkeypatch.setattr(generate, "SECONDS", 0.0)
    whole = made(tmp_path)
    (meta,) = tmp_path.glob("rows/*/meta.json")
    path = meta.parent / "part-00000001.jsonl" if damage == "part" else meta
    content = path.read_text()
    path.write_text({"cut": content[:-5], "part": content.replace("8", "9")}.get(damage, damage))
    numbers = []
    stand_in(lambda *a, **k: drawn(*a, killed=numbers.append, **k))
    assert made(tmp_path) == whole and str(path) in capsys.readouterr().err
    assert min(numbers) == (8 if damage == "part" else 0)  # what came before the damaged part is kept


def test_an_artefact_is_of_the_tables_of_its_processors(tmp_path, monkeypatch):
    """Another content of a file that a processor reads makes other rows."""
    texts, abouts = tmp_path / "titles.txt", []
    monkeypatch.setattr(generate, "Artefact", lambda root, kind, about: abouts.append(about) or Artefact(root, kind, about))
    monkeypatch.setattr(generate, "draw", lambda *_: {"seconds": 0.0, "tokens": 0})
    mesh, stop = sharding.make_mesh(), types.SimpleNamespace(saving=contextlib.nullcontext, asked=False)
    run = Run(tmp_path, tmp_path, mesh, stop, {}, {})
    trie = [{"name": "constrained.trie", "texts": str(texts)}]
    for processors, content in ((trie, "12"), (trie, "12"), (trie, "13"), ("", "")):
        texts.write_text(content)
        rollouts = {"prompt_window": 12, "new": 6, "group": 2, "processors": processors}
        ((name, s),) = recipe.stages(recipe.make(**runs.settings(tmp_path, do="generate", rows="scored", rollouts=rollouts)))
        generate.make(generate.planned(name, s, run), run)
    assert abouts[0] == abouts[1] != abouts[2] and "tables" not in abouts[3]


def test_completions_that_are_all_alike_teach_nothing(tmp_path, stand_in):
    for _ in range(2):
        with pytest.raises(UserError, match="7 prompts, and in none do completions differ in their reward"):
            made(tmp_path, reward=lambda record, text: 1.0)
    # What mends it may be nothing that the digest knows, as a file that the reward reads: the next attempt begins anew.
    mended = tmp_path / "mended"

    def function(record, text):
        return float(int(text) > 4) if mended.exists() else 1.0

    with pytest.raises(UserError, match="in none do completions differ"):
        made(tmp_path, reward=function)
    mended.touch()
    assert len(made(tmp_path, reward=function)) == 3


# ---- a stage

DPO = {"data": "@drawn", "objective": "preference.sigmoid", "steps": 4, "save_every": 2}


def configured(folder, drawn=(), **changes):
    generated = {"do": "generate", "rows": "pairs", "task": {"name": str(folder / "task.py"), "examples": 60}, **dict(drawn)}
    settings = runs.settings(folder, stages=("sft", "drawn", "dpo"), best="", sft={"steps": 1}, held_out=0.0)
    generated["rollouts"] = {"group": settings["rollouts"].pop("group"), **generated.get("rollouts", {})}
    return recipe.make(**settings, drawn=generated, dpo={**DPO, **changes})


def weights(workdir) -> list[np.ndarray]:
    state, _ = runs.saved(workdir, "dpo")[4]
    return [x for name, x in state.items() if name.startswith("train/")]


@pytest.mark.slow
def test_a_stage_learns_from_rows_of_another_and_goes_on_with_them(tmp_path):
    work, config = tmp_path / "w", configured(tmp_path)
    jaxpost.train(config, str(work))
    (folder,) = (work / "rows").iterdir()
    meta, first = json.loads((folder / "meta.json").read_text()), weights(work)
    assert meta["done"] and meta["facts"]["rows"] > 10
    rows = [r for r in runs.rows(work / "metrics.jsonl") if r["stage"] == "dpo" and "rewards/margins" in r]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[-1]["loss"] < rows[0]["loss"]
    # Cut off at step 2, and the rows lost with it: the same are drawn again from the same weights.
    shutil.rmtree(work / "checkpoints" / "dpo" / "4")
    shutil.rmtree(work / "rows")
    jaxpost.train(config, str(work))
    jax.tree.map(np.testing.assert_array_equal, weights(work), first)


def test_what_cannot_be_generated_or_learned_from_it_is_refused(tmp_path):
    for drawn, changes, message in (
        ({"rollouts": {"group": 1}}, {}, "config.rollouts.group: 1 leaves nothing to compare"),
        ({"data": "x.jsonl"}, {}, "config.drawn.data: 'x.jsonl'; the prompts of do='generate' are those of config.drawn.task"),
        ({"annotations": "x"}, {}, "config.drawn.annotations: 'x' is not read by do='generate', which does not train"),
        ({"rows": "pear"}, {}, "unknown module 'pear' for row_types. Did you mean 'pairs'"),
        ({"rollouts": {"prompt_window": 2}}, {}, "its prompt has"),
        ({"rollouts": {"new": 5000}}, {}, "prompt_window . new = .* tokens, but the model takes"),
        ({"tokenizer": ""}, {}, "config.tokenizer: the model comes without one"),
        ({}, {"objective": {"name": "reward_model.process"}}, "the objective judges the steps of a solution"),
        ({}, {"train_on": "all"}, "config.train_on: 'all'"),
        ({}, {"window": 4}, "a row of an earlier stage, 0.*make the window"),
        ({}, {"data": "@down"}, "config.dpo.data: no stage 'down' comes before. Did you mean 'drawn'"),
        ({}, {"data": "@sft"}, "config.dpo.data: the stage 'sft' makes weights .*, and rows are needed"),
        ({}, {"model": "@drawn"}, "config.dpo.model: the stage 'drawn' makes rows"),
        ({}, {"start": "sft"}, "config.dpo: unknown key 'start'. It is now model=\"@sft\""),
        ({}, {"source": "samples"}, "config.dpo.source: 'samples' is now a stage of its own: drawn="),
    ):
        with pytest.raises(UserError, match=message):
            jaxpost.train(configured(tmp_path, drawn, **changes), str(tmp_path / "w"))
    assert not (tmp_path / "w" / "checkpoints").exists()
