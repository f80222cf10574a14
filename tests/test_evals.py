"""Every eval under one contract, by discovery; the entries of config.evals; one list of evals for loop, stage and command."""

import inspect
import json
import sys
import types

import jax
import numpy as np
import pytest
import runs
from ml_collections import ConfigDict

import jaxpost
from jaxpost import api, recipe, sharding, train
from jaxpost.config import cli
from jaxpost.config.naming import named
from jaxpost.config.resolve import find, known, resolve
from jaxpost.errors import UserError
from jaxpost.evals import intervals
from jaxpost.sampling import decode
from jaxpost.stages import evaluation
from jaxpost.stages.plan import plan_stage
from jaxpost.tasks import arithmetic

YAML = """
task: digits
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {data}.cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def model():
    fields = {**runs.MODEL, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "initializer_range": 0.5}
    loaded = jaxpost.load(fields, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    return api.Model(loaded.transformer, loaded.params, arithmetic.tokenizer(), loaded.config, loaded.mesh)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What an eval may need, by its keyword, and smaller sizes than its defaults."""
    folder = tmp_path_factory.mktemp("evals")
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": f"{i}+{i}-{i % 7}"}) + "\n" for i in range(7, 20)))
    (folder / "digits.yaml").write_text(YAML.format(data=folder / "data.jsonl"))
    collection = {
        "corpus": [{"_id": i, "text": f"{17 * i}+{i}3-40"} for i in range(9)],
        "queries": [{"_id": i, "text": f"{17 * i}+{i}3"} for i in range(3)],
        "qrels": [{"query-id": i, "corpus-id": i, "score": 1} for i in range(3)],
    }
    for name, rows in collection.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    needs = {"task": "arithmetic", "data": str(folder / "data.jsonl"), "tasks": [str(folder / "digits.yaml")]}
    needs |= {name: str(folder / f"{name}.jsonl") for name in collection}
    return {**needs, "per_cell": 1, "new": 4, "window": 8}


# MTEB's tasks are downloaded; test_retrieval.py has one of its mocks.
CASES = [(name, {}) for name in known("evals") if name != "benchmark.mteb"] + [("accuracy", {"samples": 3, "ks": (1, 3)})]


@pytest.mark.parametrize(
    ("name", "more"), [pytest.param(*x, marks=pytest.mark.slow) if "harness" in x[0] or x[1] else x for x in CASES]
)
def test_the_same_weights_have_the_same_figures_whatever_the_batch_size(model, given, name, more):
    takes = inspect.signature(resolve({"name": name, **_needed(name, given)}, "evals")).parameters
    entry = {"name": name, **{k: v for k, v in given.items() if k in takes}, **more}

    def figures(**changes):
        values, rows = evaluation.run_evals(model, evaluation.configured({"mine": {**entry, **changes}}, model))
        return values, [row["completion"] for row in rows]

    values, completions = figures()
    assert values and all(key.startswith("mine/") for key in values)
    assert figures() == (values, completions)
    if "rows" in takes:
        others, again = figures(rows=3)
        # In another batch a sum is taken in another order.
        assert others == pytest.approx(values, rel=1e-6, nan_ok=True) and again == completions


def _needed(name, given):
    parameters = inspect.signature(find(name, "evals")).parameters.values()
    return {p.name: given[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}


def test_standard_errors_by_hand():
    values = [1.0, 0.0, 0.5, float("nan")]
    assert intervals.mean(values) == 0.5 and intervals.standard_error(values) == pytest.approx(0.5 / np.sqrt(3))
    assert intervals.standard_error([1.0, 0.0, 0.0], [2, 1, 1]) == pytest.approx(1.5 / 4)
    assert np.isnan(intervals.standard_error([1.0])) and np.isnan(intervals.mean([float("nan")]))


def _two(model, params, prompts, *, new, have, **_):
    """A stand-in for `complete`, which answers 2."""
    count = len(prompts) - len(have)
    tokens, ones = np.zeros((count, new), np.int32), np.ones(count, int)
    tokens[:, :1] = arithmetic.tokenizer()("2")["input_ids"]
    return decode.Completions(tokens, ones, np.zeros(tokens.shape), ones > 0, ones)


def test_all_rows_are_kept_and_the_log_shows_the_first_of_each_cell(model, monkeypatch):
    monkeypatch.setattr(decode, "complete", _two)
    evals = evaluation.configured({"sums": {"name": "accuracy", "task": "arithmetic", "per_cell": 3, "new": 2}}, model)
    values, rows = evaluation.run_evals(model, evals)
    assert values["sums/problems"] == 27 and len(rows) == 2 * 27 and {row["eval"] for row in rows} == {"sums"}
    assert [row["problem"] for row in rows] == [*range(27)] * 2
    shown = evaluation.first_of_each_cell(rows)
    assert [(row["kind"], row["problem"]) for row in shown] == [(k, 3 * i) for k in ("sampled", "greedy") for i in range(9)]
    drawn, _ = evaluation.run_evals(model, [evaluation.Eval("", lambda model: iter([("a", 1)]))])
    assert drawn == {"a": 1.0}


# ------------------------------------------------------------------------------------------------------- config.evals

OWN = """
def figures(model, *, scale=1.0):
    yield "mean", scale * 2.0
    yield "samples", [{"prompt": "p", "completion": "c", "answer": "", "reward": 0.0, "problem": 0}]
"""

WRONG = {
    "unknown": ({"a": "acuracy"}, "config.evals.a: unknown evals 'acuracy'. Did you mean 'accuracy'"),
    "keyword": ({"a": {"name": "accuracy", "task": "arithmetic", "percell": 1}}, "accuracy takes no option 'percell'. Did"),
    "missing": ({"a": "accuracy"}, "config.evals.a: evals: accuracy needs task"),
    "task": ({"a": {"name": "accuracy", "task": "arithmetik"}}, "config.evals.a: unknown module 'arithmetik' for tasks"),
    "prompts": ({"a": {"name": "accuracy", "task": {"name": "TASK"}}}, "config.evals.a: task=.*a prompt of .* leaves no room"),
    "ks": ({"a": {"name": "accuracy", "task": "arithmetic", "samples": 2, "ks": (4,)}}, "config.evals.a: k=4: of 2 samples"),
    "window": ({"a": {"name": "perplexity", "data": "x.jsonl", "window": 1}}, "config.evals.a: window=1: give 2 to 64"),
    "name": ({"accuracy": {"name": "perplexity", "data": "x"}}, "config.evals: 'accuracy'; a name has letters"),
    "slash": ({"a/b": {"name": "perplexity", "data": "x"}}, "config.evals: 'a/b'; a name has letters"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_eval_is_refused_before_anything_is_compiled(tmp_path, kind):
    entries, message = WRONG[kind]
    long = "from jaxpost.tasks.arithmetic import *\ndef test_records(n):\n    return [{'prompt': '1' * 99, 'answer': '1'}]\n"
    (tmp_path / "long.py").write_text(long)
    entries = json.loads(json.dumps(entries).replace("TASK", str(tmp_path / "long.py")))
    with pytest.raises(UserError, match=message):
        train.run(recipe.make(**runs.settings(tmp_path, steps=2, evals=entries)), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_an_eval_whose_package_is_missing_is_told_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "jaxpost.evals.harness", raising=False)
    with pytest.raises(UserError, match=r"evals.harness needs lm_eval, which is not installed; pip install 'jaxpost\[eval\]'"):
        resolve({"name": "harness.lm_eval", "tasks": []}, "evals")
    assert "accuracy" in known("evals") and "harness.lm_eval" not in known("evals")


def _plan(folder, **changes):
    mesh = sharding.make_mesh()
    with sharding.use(mesh):
        return plan_stage("train", recipe.stages(recipe.make(**runs.settings(folder, steps=1, **changes)))[0][1], mesh), mesh


def test_the_best_figure_may_be_an_evals(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    entries = {"mine": f"{tmp_path / 'mine.py'}:figures"}
    plan, mesh = _plan(tmp_path, evals=entries, best="eval/mine/mean")
    evaluation.check(plan, mesh)
    for best in ("eval/other/mean", "eval/mine"):
        with pytest.raises(UserError, match=f"config.best: '{best}' is no figure of train's evaluations"):
            evaluation.check(plan._replace(settings=ConfigDict({**plan.settings, "best": best})), mesh)
    figures, rows = evaluation.run_evals(None, evaluation.planned(plan, mesh)[-1:])
    assert figures == {"mine/mean": 2.0} and rows[0]["eval"] == "mine"


def test_evals_of_a_stage_take_the_place_of_those_around_it_and_change_nothing_learned(tmp_path):
    made = recipe.make(stages=("a", "b"), evals={"one": "x.py:f"}, b={"evals": {"two": "y.py:g"}})
    (_, a), (_, b) = recipe.stages(made)
    assert a.evals.to_dict() == {"one": "x.py:f"} and b.evals.to_dict() == {"two": "y.py:g"}
    other = recipe.make(stages=("a", "b"), b={"evals": {"two": {"name": "y.py:g", "k": 1}}})
    assert recipe.difference(made.to_dict(), other.to_dict()) == []
    (tmp_path / "r.py").write_text(
        "from jaxpost import recipe\n\n\ndef get_config():\n    return recipe.make(evals={'one': {'name': 'x.py:f'}})\n"
    )
    keys = ["evals.one.k=3", 'evals={"two": "y.py:g"}', "evals.three=z.py:h"]
    argv = ["jaxpost", f"--config={tmp_path / 'r.py'}", "--config.steps=3", *(f"--config.{key}" for key in keys)]
    assert cli._new_keywords(argv) == (argv[:3], [tuple(key.split("=", 1)) for key in keys])
    recipe.put(made, "evals", '{"three": {"name": "accuracy", "task": "arithmetic"}}')
    assert made.evals.to_dict() == {"three": {"name": "accuracy", "task": "arithmetic"}}


def test_functions_and_tasks_handed_over_in_evals_and_processors_have_names():
    def figures(model):
        """An eval of a notebook."""

    def never(logits, context):
        """A processor of a notebook."""

    evals = {"mine": figures, "other": {"name": figures, "scale": 2.0}, "sums": {"name": "accuracy", "task": arithmetic}}
    out = named({"evals": evals, "rollouts": {"processors": [never, {"name": "banned", "tokens": [1]}]}}, recipe.DEFAULTS)
    assert out["evals"]["mine"]["name"].startswith("figures#") and out["evals"]["other"]["scale"] == 2.0
    assert out["evals"]["sums"] == {"name": "accuracy", "task": {"name": "arithmetic"}}
    one, two = out["rollouts"]["processors"]
    assert resolve(one, "processors").func is never and two == {"name": "banned", "tokens": [1]}
    assert resolve(out["evals"]["mine"], "evals").func is figures
    stage = named({"stages": ("eval",), "eval": {"objective": figures}}, recipe.DEFAULTS)
    assert stage["eval"]["objective"]["name"].startswith("figures#")  # a noun is no stage's name


CALLS = []  # not in a closure, whose values are part of a function's digest


def counting(model, *, scale=1.0):
    """An eval that gives another figure each time it is computed."""
    CALLS.append(scale)
    yield "mean", float(len(CALLS))


def test_the_origins_figures_are_taken_over_where_the_same_is_asked_of_the_same_weights():
    CALLS.clear()

    def evaluated(stage, origin, step, scale=1.0, **about):
        one = object.__new__(evaluation.Evaluation)
        one.plan, one.memory, one.origin = types.SimpleNamespace(name=stage), memory, origin
        entry = {"name": f"{__name__}.counting", "scale": scale}
        one.evals = evaluation.configured({"a": entry}, None, about=about)
        return one.run(None, step)[0]["eval/a/mean"]

    memory: dict = {}
    assert evaluated("sft", "", 0) == 1 and evaluated("sft", "", 9) == 2
    assert evaluated("rl", "sft", 0) == evaluated("control", "sft", 0) == 2 and len(CALLS) == 2
    assert evaluated("rl", "sft", 4) == 3 and evaluated("late", "sft", 0) == 2
    for changes in ({"scale": 2.0}, {"dtype": "bfloat16"}):
        count = len(CALLS)
        evaluated("control", "sft", 0, **changes)
        assert len(CALLS) == count + 1, changes
    evaluated("sft", "", 10)
    assert {key[1:] for key in memory} == {("sft", 10), ("rl", 4)}  # of each stage, only its last


@pytest.mark.slow
def test_a_run_with_evals_and_a_control_of_equal_tokens(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    drawn = []
    real = decode.complete
    monkeypatch.setattr(decode, "complete", lambda *a, **k: drawn.append(1) or real(*a, **k))
    entries = {
        "mine": {"name": f"{tmp_path / 'mine.py'}:figures", "scale": 3.0},
        "sums": {"name": "accuracy", "task": "arithmetic", "per_cell": 1, "samples": 2, "ks": [1, 2], "new": 4},
    }
    settings = runs.settings(tmp_path, stages=("sft", "control"), evals=entries, best="eval/sums/pass@2", highest=True)
    settings |= {"rollouts": {"prompt_window": 12, "new": 6}, "save_every": 2, "model": {**runs.MODEL, "num_hidden_layers": 1}}
    more = {
        "sft": {"steps": 4, "eval_every": 2},
        "control": {"model": "@sft", "tokens_of": "sft", "steps": 99, "batch_size": 8},
    }
    train.run(recipe.make(**settings, **more), tmp_path / "w")
    rows = runs.rows(tmp_path / "w" / "metrics.jsonl")
    told = {stage: [r for r in rows if r["stage"] == stage and "eval/mine/mean" in r] for stage in ("sft", "control")}
    assert [r["step"] for r in told["sft"]] == [0, 2, 4] and {r["eval/mine/mean"] for r in told["sft"]} == {6.0}
    first, last = told["control"][0], told["sft"][-1]
    assert {k: v for k, v in first.items() if k.startswith("eval/sums")} == {
        k: v for k, v in last.items() if k.startswith("eval/sums")
    }
    # Own problems in 3 looks (sampled, greedy) and sums in one draw each: at the start of the control both are taken over.
    assert len(drawn) == 3 * (2 + 1) + (2 + 1)
    tokens = {stage: [r["num_tokens"] for r in rows if r["stage"] == stage and "loss" in r] for stage in told}
    assert tokens["control"][-2] < tokens["sft"][-1] <= tokens["control"][-1]
    samples = runs.rows(tmp_path / "w" / "samples.jsonl")
    assert {row.get("eval") for row in samples} == {None, "mine", "sums"}
    assert "mine" in (tmp_path / "w" / "report.html").read_text()
