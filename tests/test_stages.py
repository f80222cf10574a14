"""Stages: what they take from earlier ones, what a workdir records of them, and what may be added to a finished one."""

import contextlib
import json
import types

import jax
import numpy as np
import pytest
import runs
from etils import epath
from ml_collections import ConfigDict

import jaxpost
from jaxpost import recipe, sharding, train
from jaxpost.config import links
from jaxpost.errors import UserError
from jaxpost.stages import annotate, evaluate, records
from jaxpost.stages import train as stage_train
from jaxpost.stages.run import Output, Run
from jaxpost.storage import artefacts, checkpoint, lock

MODEL = {"model_type": "llama"}


def settings_of(**changes) -> dict:
    return dict(recipe.stages(recipe.make(model=MODEL, task={"name": "arithmetic"}, **changes)))


def test_a_stage_starts_from_the_last_weights_or_from_those_that_it_names():
    s = settings_of(
        stages=("a", "drawn", "b", "c", "d", "soup", "e"),
        a={},
        drawn={"do": "generate"},
        b={"data": "@drawn"},
        c={"model": "@a"},
        d={"model": "FOLDER"},
        soup={"do": "merge", "with": "arithmetic.linear", "of": ("@b", "@c")},
        e={},
    )
    assert [x.start for x in s.values()] == ["", "a", "a", "a", "", "b", "soup"]
    models = [recipe.plain(x.model) for x in s.values()]
    assert models == [MODEL, MODEL, MODEL, MODEL, "FOLDER", MODEL, MODEL]


def test_a_recipe_may_train_nothing_and_name_an_objective_around_its_stages():
    alone = recipe.make(model=MODEL, stages=("e",), e={"do": "evaluate", "evals": {"z": {"name": "perplexity", "data": "f"}}})
    assert [name for name, _ in recipe.stages(alone)] == ["e"]
    (_, a), (_, b) = settings_of(stages=("a", "b"), objective="sft.nll", b={"steps": 3}).items()
    assert a.objective == b.objective == "sft.nll"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("@r", ["R"]),
        ("x, @r=3", ["x", ("R", 3.0)]),
        ([" @r", ("@r", 2)], ["R", ("R", 2)]),
        ({"@r": 1, "x": 2}, [("R", 1), ("x", 2)]),
        ("x", "x"),
    ],
)
def test_a_stages_rows_take_the_place_of_its_name(value, expected):
    assert links.filled(value, {"r": "R"}.__getitem__) == expected


def test_what_a_stage_would_not_read_is_refused():
    for does, setting in (("generate", {"too_long": "drop"}), ("select", {"columns": "a=b"}), ("evaluate", {"eval_rows": 3})):
        with pytest.raises(UserError, match=f"config.x.{next(iter(setting))}: .* is not read by do='{does}'"):
            settings_of(stages=("a", "x"), a={}, x={"do": does, "data": "" if does != "select" else "f.jsonl", **setting})


def test_an_unknown_annotator_is_refused_before_anything_runs(tmp_path):
    run = Run(tmp_path, tmp_path, None, None, {}, {})
    with pytest.raises(UserError, match="perplexty.*Did you mean"):
        annotate.planned("x", {"with": "perplexty"}, run)


def test_an_error_of_a_stage_names_it_where_there_are_several():
    for stages, expected in (([("a", None), ("b", None)], "b: no"), ([("b", None)], "no")):
        with pytest.raises(UserError, match=f"^{expected}$"), train._named("b", stages):
            raise UserError("no")


def test_epochs_of_few_steps_are_explained(monkeypatch, capsys):
    monkeypatch.setattr(train.train, "show", lambda plan: None)
    arch = types.SimpleNamespace(parameters=lambda: 7)

    def shown(planned, **settings) -> str:
        s = ConfigDict(
            {"steps": 0, "epochs": 2, "window": 64, "batch_size": 8, "time_of": "", "tokens_of": "", "tokens": 0, **settings}
        )
        spec = types.SimpleNamespace(transformer=types.SimpleNamespace(arch=arch))
        train._introduce([types.SimpleNamespace(name="a", steps=planned, settings=s, spec=spec, trained=7)])
        return capsys.readouterr().err

    assert "share a row of 64 tokens; epochs=14 takes 20 or more" in shown(3)
    assert "share a row" not in shown(20) + shown(3, steps=3)


def test_a_recipe_for_a_model_leaves_the_stages_alone_that_are_not_run(monkeypatch):
    monkeypatch.setattr(train, "_of_recipe", lambda path, config: f"ran {path}")
    config = recipe.make(stages=("a", "b"), a={"steps": 2}, b={"model": "recipe:r.py:x"})
    config.stages = ("b",)
    changed = train._with_recipes(config)
    assert changed.b.model == "ran r.py:x" and changed.a.steps == 2 and config.b.model == "recipe:r.py:x"
    merged = {"do": "merge", "with": "arithmetic.linear", "of": ("FOLDER", "recipe:r.py")}
    changed = train._with_recipes(recipe.make(stages=("m",), m=merged))
    assert changed.m.of == ("FOLDER", "ran r.py")
    fused = {"name": "fused", "of": ["FOLDER", "recipe:r.py:x"], "mix": "r.py:mix"}
    changed = train._with_recipes(
        recipe.make(stages=("e",), model=fused, e={"model": {"name": "patched", "of": "recipe:r.py"}})
    )
    assert tuple(changed.model.of) == ("FOLDER", "ran r.py:x") and changed.e.model.of == "ran r.py"


def test_keywords_inside_of_a_model_can_be_changed():
    model = {"name": "fused", "of": ["FOLDER"], "mix": {"name": "r.py:mix", "most": 1.0}}
    changed = recipe.opened(recipe.make(model=model), model={"mix": {"most": 2.0}}).model
    assert changed.mix.to_dict() == {"name": "r.py:mix", "most": 2.0} and changed.name == "fused"


def test_a_recipe_of_a_model_may_take_the_seed(tmp_path, monkeypatch):
    (tmp_path / "r.py").write_text(
        "from jaxpost import recipe\n\n\ndef get_config(arg):\n    return recipe.make(seed=int(arg))\n"
    )
    seeds = []
    monkeypatch.setattr(train, "run", lambda config, workdir: seeds.append(config.seed))
    named = {"model": f"recipe:{tmp_path}/r.py:{{seed}}", "artefacts": str(tmp_path)}
    workdirs = [train._with_recipes(recipe.make(seed=seed, **named)).model for seed in (3, 4, 3)]
    assert seeds == [3, 4, 3] and workdirs[0] == workdirs[2] != workdirs[1]


def test_a_recipe_of_a_model_waits_for_another_process_that_is_at_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.py").write_text("from jaxpost import recipe\n\n\ndef get_config(arg=''):\n    return recipe.make(steps=1)\n")
    calls = []

    def run(config, workdir):
        calls.append(workdir)
        if len(calls) < 3:
            raise lock.Occupied("another run is at work here: process 7")

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train, "TURN", 0.0)
    train._with_recipes(recipe.make(model=f"recipe:{tmp_path}/r.py", artefacts=str(tmp_path)))
    assert len(calls) == 3 and capsys.readouterr().err.count("process 7") == 1


def test_a_recipe_of_a_model_belongs_to_a_folder_only_where_it_names_a_file_there(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run", lambda config, workdir: None)
    recipe_of = "from jaxpost import recipe\n\n\ndef get_config(arg):\n    return recipe.make(data=arg, steps=3)\n"
    (tmp_path / "r.py").write_text(recipe_of)
    workdirs = {}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").touch()
        monkeypatch.chdir(tmp_path / folder)
        for data in ("rows.jsonl", str(tmp_path / "one" / "rows.jsonl")):
            config = recipe.make(model=f"recipe:{tmp_path}/r.py:{data}", artefacts=str(tmp_path))
            workdirs[folder, data == "rows.jsonl"] = train._with_recipes(config).model
    assert workdirs["one", True] != workdirs["two", True] and workdirs["one", False] == workdirs["two", False]


def test_a_model_that_is_merged_is_named(tmp_path):
    config = recipe.make(stages=("m",), m={"do": "merge", "with": "arithmetic.linear", "of": (MODEL, MODEL)})
    with pytest.raises(UserError, match="config.m.of: .*model_type.* is no name; merge folders, workdirs"):
        jaxpost.train(config, tmp_path / "w")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": {"model": "@b"}}, "config.a.model: no stage 'b' comes before"),
        ({"b": {"data": "@a"}}, "config.b.data: the stage 'a' makes weights .do='train'., and rows are needed"),
        ({"b": {"annotations": "x,@a"}}, "config.b.annotations: the stage 'a' makes weights"),
        ({"b": {"data": {"@rows": 1, "mine.jsonl": 2}}}, "config.b.data: no stage 'rows' comes before"),
        ({"b": {"do": "tran"}}, "config.b.do: 'tran'. Did you mean 'train'"),
        ({"b": {"time_of": "a, c"}}, "config.b.time_of: no stage 'c' comes before"),
        (
            {"a": {"do": "generate", "rows": "pairs"}, "b": {"tokens_of": "a"}},
            "config.b.tokens_of: the stage 'a' has do='generate'; name stages with do=train",
        ),
        ({"b": {"with": "arithmetic.linear"}}, "config.b.with: .* is not read by source='data', which trains"),
        (
            {"b": {"do": "merge", "of": ("@a",), "steps": 3}},
            "config.b.steps: 3 is not read by do=.merge.",
        ),
    ],
)
def test_what_a_stage_cannot_take_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        settings_of(stages=("a", "b"), **{"a": {}, "b": {}, **changes})


def test_names_of_stages_become_their_files():
    def files(name):
        return f"/x/{name}/part-*.jsonl"

    assert links.filled("a.jsonl,b.jsonl=2", files) == "a.jsonl,b.jsonl=2"
    assert links.filled("@r", files) == ["/x/r/part-*.jsonl"]
    assert links.filled("@r=3, c=d.jsonl=1", files) == [("/x/r/part-*.jsonl", 3.0), ("c=d.jsonl", 1.0)]
    assert links.filled((("@r", 1), ("f,g", 2)), files) == [("/x/r/part-*.jsonl", 1), ("f,g", 2)]
    assert list(links.references({"@a": 1, "b": 2})) == ["a"] and list(links.references("b,@c=2")) == ["c"]


# ---------------------------------------------------------------------------------------------------------- Artefacts


def test_an_artefact_is_named_for_what_makes_it_and_told_whole(tmp_path):
    artefact = artefacts.Artefact(tmp_path, "rows", {"a": 1, "b": [2]})
    assert artefact.folder == artefacts.Artefact(tmp_path, "rows", {"b": [2], "a": 1}).folder
    assert artefact.folder != artefacts.Artefact(tmp_path, "rows", {"a": 1, "b": [3]}).folder
    assert artefact.resume(n=0, seconds=0.0) == ({"n": 0, "seconds": 0.0}, False)
    artefact.add(".txt", b"one", n=1, seconds=0.5)
    artefact.add(".txt", b"two", n=2, seconds=1.5)
    (artefact.folder / "part-00000009.txt").write_bytes(b"half of a part that was being written")
    again = artefacts.Artefact(tmp_path, "rows", {"a": 1, "b": [2]})
    assert again.resume(n=0, seconds=0.0) == ({"n": 2, "seconds": 1.5}, False) and len(list(again.folder.iterdir())) == 3
    with pytest.raises(UserError, match="is not finished"):
        artefacts.check(again.folder)
    (again.folder / "whole.txt").write_bytes(b"onetwo")
    again.finish(["whole.txt"], sum=3)
    assert sorted(p.name for p in again.folder.iterdir()) == ["meta.json", "whole.txt"]
    assert again.resume(n=0, seconds=0.0) == ({"n": 2, "seconds": 1.5}, True)
    assert artefacts.check(again.folder)["facts"] == {"sum": 3}
    (again.folder / "whole.txt").write_bytes(b"onetwp")
    with pytest.raises(UserError, match="whole.txt: damaged .* Delete "):
        artefacts.check(again.folder)
    assert again.resume(n=0) == ({"n": 0}, False) and not (again.folder / "whole.txt").exists()


def test_an_artefact_of_one_part_replaces_what_a_killed_attempt_left(tmp_path):
    artefact = artefacts.Artefact(tmp_path, "rows", {})
    artefact.resume()
    artefact.add(".jsonl", b"one")
    again = artefacts.Artefact(tmp_path, "rows", {})
    assert again.resume() == ({}, False)
    again.write(".jsonl", b"two", rows=1)
    assert [path.read_bytes() for path in again.folder.glob("part-*")] == [b"two"]


def test_the_files_that_an_evals_settings_name_are_in_its_digest(tmp_path):
    (tmp_path / "e.jsonl").write_text("1")
    (tmp_path / "t.py").write_text("2")
    evals = {
        "a": {"name": "perplexity", "data": f"{tmp_path}/e.jsonl=2"},
        "b": {"name": "accuracy", "task": f"{tmp_path}/t.py"},
    }
    before = evaluate.files(evals)
    assert before.keys() == {f"{tmp_path}/e.jsonl", f"{tmp_path}/t.py"}
    assert evaluate.files([f"{tmp_path}/t.py:f"]).keys() == {f"{tmp_path}/t.py"}
    text = json.dumps([{"name": "constrained.trie", "texts": f"{tmp_path}/t.py"}])
    assert evaluate.files({"processors": text, "template": "{{ x }}"}) == evaluate.files([f"{tmp_path}/t.py"])
    (tmp_path / "e.jsonl").write_text("3")
    assert {name for name, digest in evaluate.files(evals).items() if digest != before[name]} == {f"{tmp_path}/e.jsonl"}


def test_rows_that_an_earlier_stage_is_still_to_make_are_waited_for(tmp_path):
    ((name, s),) = recipe.stages(recipe.make(**runs.settings(tmp_path, steps=1, held_out=0.0)))
    mesh = sharding.make_mesh()
    run = Run(tmp_path, tmp_path, mesh, None, {"kept": Output(pending=True)}, {})
    with sharding.use(mesh):
        waiting = stage_train.planned(name, ConfigDict({**s, "eval_data": "@kept"}), run)
        assert waiting.source is None and waiting.sets and waiting.settings.eval_data == "@kept"
        rows = tmp_path / "kept.jsonl"
        rows.write_text('{"prompt": "1+1", "completion": "2"}\n' * 3)
        run.outputs["kept"] = Output(rows=str(rows))
        planned = stage_train.planned(name, waiting.settings, run)
    assert planned.source is not None and len(planned.held_out) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"parts": 3}', '{"about": {}, "files": [{"file": "../x"}]}'])
def test_a_damaged_record_of_an_artefact_is_named(tmp_path, content, capsys):
    artefact = artefacts.Artefact(tmp_path, "rows", {})
    artefact.folder.mkdir(parents=True)
    (artefact.folder / "meta.json").write_text(content)
    with pytest.raises(UserError, match="meta.json"):
        artefacts.check(artefact.folder)
    assert artefact.resume() == ({}, False) and "meta.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ Records


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A workdir whose stages `a` and `b` have taken steps: what `check` and `begin` say of other settings."""
    taken = {"a": 10, "b": 5}
    monkeypatch.setattr(records, "_taken", lambda workdir, name: taken.get(name))
    workdir = epath.Path(tmp_path)
    optimizer = {"schedule": "constant", "warmup": 2}
    first = {"stages": ("a", "b"), "a": {"steps": 10}, "b": {"model": "@a", "steps": 5}, "optimizer": optimizer}

    def go(changes, steps=None):
        config = {**first, **changes}
        stages = list(settings_of(**config).items())
        records.check(workdir, stages)
        for name, settings in stages:
            plan = ConfigDict({"steps": (steps or {}).get(name, settings.steps)})
            records.check_steps(workdir, name, settings, plan)
            records.begin(workdir, name, settings, plan)

    for name, settings in settings_of(**first).items():
        records.begin(workdir, name, settings, ConfigDict({"steps": settings.steps}))
    return go


def test_a_workdir_takes_further_stages_and_steps(begun, tmp_path):
    begun({})
    begun({"stages": ("a", "b", "c"), "c": {"steps": 7}})
    begun({"stages": ("a", "c", "b"), "c": {"steps": 7, "model": "@a"}})
    begun({"log_every": 3})
    begun({"b": {"model": "@a", "steps": 9}})
    steps = {name: json.loads((tmp_path / "stages" / f"{name}.json").read_text())["steps"] for name in "abc"}
    assert steps == {"a": 10, "b": 9, "c": 7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": {"steps": 12}}, r"a has other settings \(steps: 10 -> 12\), and b has begun from what it was"),
        ({"b": {"model": "@a", "steps": 4}}, "b has taken 5 steps, and 4 are no more"),
        ({"b": {"model": "@a", "steps": 5, "seed": 1}}, "holds a run with other settings:\n  b.seed: 0 -> 1\nThe same"),
        ({"b": {"model": "FOLDER", "steps": 5}}, "b.model: '.absent.' -> 'FOLDER'"),
    ],
)
def test_nothing_that_is_done_changes(begun, changes, message):
    with pytest.raises(UserError, match=message):
        begun(changes)


def test_more_steps_must_leave_the_learning_rates_that_were_used(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_taken", lambda workdir, name: 10)
    for schedule, ok in (("constant", True), ("cosine", False), ("wsd", False)):
        s = settings_of(optimizer={"schedule": schedule, "warmup": 2})["train"]
        records.begin(epath.Path(tmp_path / schedule), "train", s, ConfigDict({"steps": 10}))
        if ok:
            records.check_steps(epath.Path(tmp_path / schedule), "train", s, ConfigDict({"steps": 20}))
            continue
        with pytest.raises(UserError, match=f"train has taken 10 of 10 steps, and with 20 .* schedule='{schedule}' and"):
            records.check_steps(epath.Path(tmp_path / schedule), "train", s, ConfigDict({"steps": 20}))


def test_stages_that_a_command_leaves_out_are_named(tmp_path, capsys):
    config = recipe.make(stages=("train", "dpo"), model=MODEL)
    for name, s in recipe.stages(config):
        records.begin(epath.Path(tmp_path), name, s, None)
    assert records.left_out(epath.Path(tmp_path), recipe.stages(config)) == []
    alone = recipe.make(model=MODEL)
    train._claim(epath.Path(tmp_path), alone, recipe.stages(alone))
    assert f"{tmp_path} also has dpo, which this command does not name" in capsys.readouterr().err


def test_a_stage_whose_output_was_used_keeps_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_taken", lambda workdir, name: 3 if name in taken else None)

    def stages(keep):
        select = {"do": "select", "data": "x.jsonl", "with": {"name": "select.random", "keep": keep}}
        return list(settings_of(stages=("a", "kept", "b"), a={}, kept=select, b={"data": "@kept", "steps": 3}).items())

    for name, settings in stages(5):
        records.begin(epath.Path(tmp_path), name, settings, ConfigDict({"steps": settings.steps}))
    taken = {"a"}
    records.check(epath.Path(tmp_path), stages(3))
    taken = {"a", "b"}
    with pytest.raises(UserError, match="kept.with.keep: 5 -> 3"):
        records.check(epath.Path(tmp_path), stages(3))


def test_the_users_of_a_stage_are_found_through_others_and_in_annotations():
    select = {"do": "select", "data": "@drawn", "with": {"name": "select.random", "keep": 5}}
    merged = {"do": "merge", "with": "arithmetic.linear", "of": ("@a", "@c")}
    taught = {"model": "FOLDER", "annotations": {"t": {"name": "scores.logps", "weights": "@soup"}}}
    names = ("a", "drawn", "kept", "b", "c", "soup", "d")
    each = {"drawn": {"do": "generate", "rows": "pairs"}, "kept": select, "b": {"data": "@kept"}, "c": {"model": "FOLDER"}}
    stages = list(settings_of(stages=names, a={}, soup=merged, d=taught, **each).items())
    assert records._users("drawn", stages) == {"kept", "b"} and records._users("c", stages) == {"soup", "d"}
    assert records._users("a", stages) == {"drawn", "kept", "b", "soup", "d"} and records._users("d", stages) == set()


def test_more_epochs_need_a_last_batch_that_was_full(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_taken", lambda workdir, name: 3)
    s = settings_of(batch_size=2, epochs=1, optimizer={"schedule": "constant", "warmup": 0})["train"]
    for rows, refused in ((5, True), (6, False)):
        folder = epath.Path(tmp_path / str(rows))
        records.begin(folder, "train", s, types.SimpleNamespace(steps=3, source=types.SimpleNamespace(epoch=rows)))
        with pytest.raises(UserError, match="the last batch of train had 1 of 2 rows") if refused else contextlib.nullcontext():
            records.check_steps(folder, "train", s, ConfigDict({"steps": 5 if refused else 6}))


def test_an_older_workdir_is_refused_by_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_taken", lambda workdir, name: 10)
    (tmp_path / "environment.json").write_text(json.dumps({"jaxpost": "0.1.0"}))
    with pytest.raises(UserError, match=r"begun by jaxpost 0\.1\.0, whose runs this one does not continue.*another workdir"):
        records.check(epath.Path(tmp_path), list(settings_of().items()))


# ------------------------------------------------------------------------------------------------------------ Whole runs


@pytest.mark.slow
def test_a_finished_run_takes_a_merge_and_more_steps_and_shares_its_start(tmp_path):
    start = {"steps": 2, "best": "", "optimizer": {"lr": 1e-2, "warmup": 0, "schedule": "constant"}}
    path = runs.write(tmp_path, runs.settings(tmp_path, **start))
    (tmp_path / "arms").mkdir()
    arms = {
        "model": f"recipe:{path}",
        "artefacts": str(tmp_path / "shared"),
        "stages": ("one", "two"),
        "one": {"seed": 1},
        "two": {"seed": 2, "model": f"recipe:{path}"},
    }
    settings = runs.settings(tmp_path / "arms", **{**start, **arms})
    settings["rollouts"].pop("group")
    jaxpost.train(recipe.make(**settings), tmp_path / "w")
    (shared,) = (tmp_path / "shared" / "recipes").iterdir()
    before = {p: p.stat().st_mtime_ns for p in (shared / "checkpoints").rglob("*")}
    folders = {name: tmp_path / "w" / "checkpoints" / name for name in ("soup", "one", "two")}
    first = jaxpost.load(str(folders["one"])).params
    settings["stages"] = ("one", "two", "soup")
    settings["soup"] = {"do": "merge", "with": "arithmetic.linear", "of": ("@one", "@two")}
    settings["two"] |= {"steps": 3}
    jaxpost.train(recipe.make(**settings), tmp_path / "w")
    assert {p: p.stat().st_mtime_ns for p in (shared / "checkpoints").rglob("*")} == before  # made once
    assert checkpoint.steps(epath.Path(folders["two"])) == [2, 3]
    merged, one, two = (jaxpost.load(str(folder)).params for folder in folders.values())
    jax.tree.map(np.testing.assert_array_equal, one, first)
    jax.tree.map(lambda m, a, b: np.testing.assert_allclose(m, (a + b) / 2, rtol=1e-6, atol=1e-8), merged, one, two)


@pytest.mark.slow
def test_two_rounds_of_self_training_in_one_recipe(tmp_path):
    """Train, generate, filter, train, annotate, select, train by a curriculum: each stage takes what earlier ones made."""
    (tmp_path / "mine.py").write_text("def longest(rows, columns, key):\n    return [max(rows, key=lambda r: len(str(r)))]\n")
    names = ("sft", "drawn", "kept", "again", "scored", "hard", "last", "one")
    settings = runs.settings(tmp_path, stages=names, held_out=0.0, best="", sft={"steps": 2})
    settings |= {
        "drawn": {"do": "generate", "rows": "scored", "task": {"name": str(tmp_path / "task.py"), "examples": 40}},
        "kept": {"do": "select", "data": "@drawn", "with": {"name": "select.threshold", "column": "score", "least": 0.25}},
        "again": {"data": "@kept", "steps": 1},
        "scored": {"do": "annotate", "model": "@again", "data": "@kept", "with": "perplexity"},
        "hard": {"do": "select", "data": "@kept", "annotations": "@scored"},
        "last": {"data": "@hard", "steps": 1, "order": {"name": "by", "column": "score"}},
        "one": {"do": "select", "data": "@hard", "with": f"{tmp_path / 'mine.py'}:longest"},
    }
    settings["hard"]["with"] = {"name": "select.top", "column": "perplexity", "keep": 0.5}
    jaxpost.train(recipe.make(**settings), tmp_path / "w")
    facts = {}
    for meta in (tmp_path / "w" / "rows").glob("*/meta.json"):
        content = artefacts.check(meta.parent)
        facts[content["facts"].get("of", "drawn")] = content["facts"]["rows"]
    drawn = facts.pop("drawn")
    kept = facts.pop(drawn)
    half = max(1, round(kept / 2))
    assert 0 < kept <= drawn and facts == {kept: half, half: 1}
    folders = [tmp_path / "w" / name for name in ("rows", "columns", "checkpoints")]
    made = {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*")}
    jaxpost.train(recipe.make(**settings), tmp_path / "w")
    assert {p: p.stat().st_mtime_ns for p in made} == made  # nothing is made twice
