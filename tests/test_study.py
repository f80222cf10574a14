"""Studies: verdicts by hand, budgets, what is fixed before a run, and the table that a killed run goes on with."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import runs as small
from scipy import integrate

from jaxpost import recipe, study, train
from jaxpost.errors import UserError
from jaxpost.reporting.writers import read_rows
from jaxpost.stages.run import Output
from jaxpost.studies import Claim, Study, results, runs
from jaxpost.studies.claims import interval, judge, overall

A, B, C = "eval/a", "eval/b", "eval/c"
PAPER = '''"""Adding constants: a paper that is none.

More of it.
"""

from jaxpost import recipe
from jaxpost.studies import Claim, Study

STUDY = Study(
    arms=("plain", "better"),
    metric="eval/accuracy",
    claims=(Claim("better", over="plain", margin=0.1),),
    tune={"optimizer.lr": (1e-3, 1e-2)},
    family="objective",
)


def get_config(arg="plain"):
    return recipe.make(task="arithmetic", batch_size={"plain": 4, "better": 8}[arg])  # which tells the arms apart
'''


def of(**arms) -> dict:
    """{arm: {seed: {"eval/a": value}}} of lists of values."""
    return {arm: {seed: {A: value} for seed, value in enumerate(values)} for arm, values in arms.items()}


def spent(figures: dict, **tokens) -> dict:
    return {arm: dict.fromkeys(by_seed, {"learned": tokens.get(arm, 100)}) for arm, by_seed in figures.items()}


def verdict(figures: dict, *claims: Claim, **options) -> tuple[str, list]:
    options = {"arms": tuple(figures), "metric": A, "claims": claims, **options}
    return judge(Study(**options), figures, spent(figures))


def test_the_interval_is_students_t():
    """For n = 3 t has two degrees of freedom, whose 97.5% point is 4.302652..., here by integrating the density."""
    mean, low, high = interval([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    t = (high - mean) / (math.sqrt((0.04 + 0.01 + 0.09) / 2) / math.sqrt(3))
    within, _ = integrate.quad(lambda x: (1 + x * x / 2) ** -1.5 / (2 * math.sqrt(2)), -t, t)
    assert within == pytest.approx(0.95, abs=1e-6) and mean - low == pytest.approx(high - mean)
    assert interval([0.5])[1:] == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("better", "margin", "expected"),
    [
        ((0.60, 0.61, 0.62), 0.1, "shown"),
        ((0.60, 0.61, 0.62), 0.2, "partly"),
        ((0.60, 0.40, 0.62), 0.0, "not at this scale"),
        ((0.40, 0.41, 0.42), 0.0, "reversed"),
        ((0.5, 0.5, 0.5), 0.0, "not at this scale"),
    ],
)
def test_a_comparison_is_judged_by_the_interval_and_the_margin(better, margin, expected):
    figures = of(base=(0.5, 0.5, 0.5), method=better)
    assert verdict(figures, Claim("method", over="base", margin=margin))[0] == expected
    losses = {arm: {seed: {A: 1 - one[A]} for seed, one in by_seed.items()} for arm, by_seed in figures.items()}
    whole, (line,) = verdict(losses, Claim("method", over="base", margin=margin), lower=True)
    assert whole == expected and line.effects == pytest.approx([x - 0.5 for x in better])


def test_differences_are_of_the_same_seed():
    figures = of(base=(0.2, 0.5, 0.8), method=(0.25, 0.56, 0.84))
    whole, (line,) = verdict(figures, Claim("method", over="base", margin=0.04))
    assert whole == "shown" and line.effects == pytest.approx((0.05, 0.06, 0.04)) and line.mean == pytest.approx(0.05)


def test_bounds_equality_order_and_correlation():
    figures = of(a=(0.50, 0.51, 0.52), b=(0.505, 0.51, 0.515), c=(0.7, 0.71, 0.73))
    for arm, other in (("a", 3.0), ("b", 2.0), ("c", 1.0)):
        for seed in range(3):
            figures[arm][seed][B] = other
    claims = {
        Claim("c", at_least=0.6): "shown",
        Claim("c", at_most=0.6): "reversed",
        Claim("c", at_least=0.713): "not at this scale",
        Claim("a", over="b", equal_within=0.05): "shown",
        Claim("a", over="b", equal_within=0.001): "not at this scale",
        Claim("a", over="c", equal_within=0.05): "reversed",
        Claim(("b", "c"), monotone=True): "shown",
        Claim(("b", "c"), monotone=True, margin=0.5): "partly",
        Claim(("a", "b", "c"), monotone=True): "not at this scale",
        Claim(("c", "b"), monotone=True): "reversed",
        Claim(("c", "b"), monotone=True, lower=True): "shown",
    }
    assert {claim: verdict(figures, claim)[0] for claim in claims} == claims
    (line,) = verdict(figures, Claim(("a", "b", "c"), correlates=B))[1]
    assert line.effects == pytest.approx((-1.0, -math.sqrt(3) / 2, -0.5))  # with a tie in the second seed
    with pytest.raises(UserError, match="has no finite figure 'eval/c'"):
        verdict(figures, Claim("a", at_least=0.1, metric=C))


def test_a_baseline_at_the_edge_of_the_range_shows_nothing():
    figures = of(base=(0.05, 0.06, 0.04), method=(0.5, 0.5, 0.5))
    assert verdict(figures, Claim("method", over="base"))[0] == "no room"
    assert verdict(figures, Claim("method", over="base"), range=(0.0, 0.2))[0] == "shown"
    assert verdict(figures, Claim("method", over="base"), range=None)[0] == "shown"
    cells = {arm: {s: {**one, f"{A}/new": one[A], C: one[A]} for s, one in each.items()} for arm, each in figures.items()}
    assert verdict(cells, Claim("method", over="base", metric=f"{A}/new"))[0] == "no room"
    assert verdict(cells, Claim("method", over="base", metric=C))[0] == "shown", "another figure has a range of its own"


def test_unequal_budgets_get_no_verdict():
    figures = of(base=(0.5, 0.5, 0.5), method=(0.6, 0.61, 0.62))
    claim = Claim("method", over="base")
    study = Study(arms=("base", "method"), metric=A, claims=(claim,))
    assert judge(study, figures, spent(figures, method=102))[0] == "shown"
    whole, (line,) = judge(study, figures, spent(figures, method=103))
    assert whole == "unequal (base spent 100 tokens and method 103)" and line.verdict == "unequal"
    allowed = Study(arms=("base", "method"), metric=A, claims=(claim,), unequal={"base": "it is not trained"})
    assert judge(allowed, figures, spent(figures, method=103))[0] == "shown"
    all_kinds = {"learned": 1, "generated": 2, "scored": 4, "steps": 8, "seconds": 16}
    budgets = {
        kind: Study(arms=("x",), metric=A, claims=(), equal=kind).spent(all_kinds) for kind in ("tokens", "steps", "seconds")
    }
    assert budgets == {"tokens": 7, "steps": 8, "seconds": 16}


def test_the_verdict_on_several_claims():
    assert overall(["shown", "shown"]) == "shown"
    assert overall(["shown", "reversed"]) == overall(["partly", "not at this scale"]) == "partly"
    assert overall(["reversed", "not at this scale"]) == "reversed"
    assert overall(["no room", "not at this scale"]) == "no room"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Claim("a"), "give one of over"),
        (lambda: Claim("a", over="b", at_least=0.1), "it has over, at_least"),
        (lambda: Claim("a", monotone=True), "monotone is of a tuple of arms"),
        (lambda: Claim(("a", "b"), over="c"), "over is of one arm"),
        (lambda: Claim("a", equal_within=0.1), "equal_within needs `over`"),
        (lambda: Study(arms=("a",), metric=A, claims=(Claim("a", over="z"),)), "speaks of the arm 'z'"),
        (lambda: Study(arms=("a",), metric=A, claims=(), equal="flops"), "equal='flops'"),
        (lambda: Study(arms=("a",), metric=A, claims=(), seeds=(0, 100)), "without the tuning seed 100"),
    ],
)
def test_claims_that_say_nothing_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()


# ---- runs and results; training is replaced by a formula


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A paper's file in a repository of its own, whose runs are counted and computed in no time."""
    folder, calls = tmp_path / "papers", []
    folder.mkdir()
    file = folder / "constants.py"
    file.write_text(PAPER)
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))

    def outputs(config, workdir):
        calls.append((config.batch_size, config.seed, config.optimizer.lr))
        accuracy = 0.4 + 0.05 * config.batch_size / 4 * (config.optimizer.lr > 5e-3) + 0.001 * config.seed
        metrics = {"stage": "train", "step": 1, "time": 0.0, "eval/accuracy": accuracy}
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        (workdir / "config.json").write_text(config.to_json())
        return {"train": Output(figures={"eval/accuracy": accuracy}, spent={"learned": 100, "steps": 1}, seconds=1.0)}

    monkeypatch.setattr(runs.train, "outputs", outputs)
    commit(file)
    return str(file), calls


def commit(file) -> None:
    folder = Path(file).parent
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*name, "commit", "-qm", "x", "--allow-empty")):
        subprocess.run(["git", *command], cwd=folder, check=True)


def test_a_study_tunes_every_arm_and_scores_every_seed_once(paper):
    file, calls = paper
    content = study.score(file)
    # Two arms, two rates on the tuning seed, then three seeds with the better one.
    assert sorted(calls) == sorted(
        [(size, 100, lr) for size in (4, 8) for lr in (1e-3, 1e-2)]
        + [(size, seed, 1e-2) for size in (4, 8) for seed in range(3)]
    )
    assert content["verdict"] == "partly" and content["arms"]["better"]["settings"] == {"optimizer.lr": 0.01}
    (line,) = content["lines"]
    assert line["effects"] == [0.05, 0.05, 0.05] and line["claim"] == "better's eval/accuracy lies above plain's by 0.1"
    assert len(content["commit"]) == 12 and not results.check(file)
    assert study.score(file)["arms"] == content["arms"] and len(calls) == 10
    assert "Adding constants: a paper that is none](constants.py) | objective |" in results.gallery(Path(file).parent)
    (page,) = Path(file).parent.parent.glob("cache/studies/*/study.html")
    assert "lies above plain" in page.read_text()


def test_a_killed_study_goes_on_with_the_run_that_it_was_at(paper, monkeypatch, capsys):
    file, calls = paper
    outputs, left = runs.train.outputs, iter(range(3))

    def killed(config, workdir):
        next(left)
        return outputs(config, workdir)

    monkeypatch.setattr(runs.train, "outputs", killed)
    with pytest.raises((StopIteration, RuntimeError)):
        study.score(file)
    assert re.search(r"better seed 100 ... stopped; its output is in .*better-100-\w+/log.txt", capsys.readouterr().err)
    monkeypatch.setattr(runs.train, "outputs", outputs)
    assert study.score(file)["verdict"] == "partly" and len(calls) == len(set(calls)) == 10


def test_what_was_not_committed_is_not_scored(paper):
    file, calls = paper
    Path(file).write_text(PAPER.replace("margin=0.1", "margin=0.01"))
    with pytest.raises(UserError, match="is not committed as it is.*--pilot"):
        study.score(file)
    assert study.pilot(file)["plain"][1].figures["eval/accuracy"] == pytest.approx(0.55) and len(calls) == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("margin=0.1", "margin=0.04"),
        ('over="plain", margin=0.1', "at_least=0.3"),
        ('family="objective"', 'seeds=(0, 1, 3), family="objective"'),
        ('arms=("plain", "better")', 'arms=("better", "plain")[::-1]'),
        ("(1e-3, 1e-2)", "(1e-3, 2e-2)"),
        ('"better": 8', '"better": 16'),
        ("recipe.make(task", "recipe.make(window=256, task"),
    ],
)
def test_results_belong_to_the_file_that_was_scored(paper, old, new):
    file, _ = paper
    study.score(file)
    Path(file).write_text(
        PAPER.replace("# which tells the arms apart", "# a comment, and spaces").replace("More of it", "Other")
    )
    assert not results.check(file)
    assert PAPER.replace(old, new) != PAPER
    Path(file).write_text(PAPER.replace(old, new))
    assert "are not those that were scored" in results.check(file)
    commit(file)
    with pytest.raises(UserError, match="not replaced without a reason"):
        study.score(file)


def _edit(content: dict, path: str, value) -> None:
    *outer, last = path.split("/")
    for key in outer:
        content = content[int(key) if isinstance(content, list) else key]
    content[last] = value


EDITS = (
    ("arms/better/seeds/0/spent/learned", 101),
    ("verdict", "shown"),
    ("lines/0/mean", 0.2),
    ("tuning/plain/optimizer.lr=0.01", 0.7),
    ("fixed", "0" * 16),
)


@pytest.mark.parametrize(("path", "value"), EDITS)
def test_a_result_that_is_edited_is_noticed(paper, path, value):
    file, _ = paper
    content = study.score(file)
    _edit(content, path, value)
    results.path_of(file).write_text(json.dumps(content))
    assert "changed by hand" in results.check(file)


def test_figures_with_a_new_checksum_still_have_to_give_the_verdict(paper):
    file, _ = paper
    content = study.score(file)
    content["arms"]["better"]["seeds"]["0"]["figures"]["eval/accuracy"] = 0.9
    content["checksum"] = results.checksum(content)
    results.path_of(file).write_text(json.dumps(content))
    assert "is not the one that follows from its figures" in results.check(file)
    del content["arms"]["better"]["seeds"]["2"]
    content["checksum"] = results.checksum(content)
    results.path_of(file).write_text(json.dumps(content))
    assert "the seeds of better are not" in results.check(file)


def test_settings_that_were_not_the_best_trial_are_noticed(paper):
    file, _ = paper
    content = study.score(file)
    content["arms"]["plain"]["settings"] = {"optimizer.lr": 0.001}
    content["checksum"] = results.checksum(content)
    results.path_of(file).write_text(json.dumps(content))
    assert "the settings of plain are not those that were best" in results.check(file)


def test_results_belong_to_the_recipes_of_the_models_too(paper):
    file, _ = paper
    start = Path(file).parent / "start.py"
    start.write_text("from jaxpost import recipe\n\n\ndef get_config(arg):\n    return recipe.make(steps=3, seed=int(arg))\n")
    Path(file).write_text(PAPER.replace("recipe.make(task", f"recipe.make(model='recipe:{start}:{{seed}}', task"))
    before = results.fixed(file, results.study_of(file))
    start.write_text(start.read_text().replace("steps=3", "steps=4"))
    assert results.fixed(file, results.study_of(file)) != before


def test_an_arm_that_trains_nothing_is_not_tuned(paper):
    file, calls = paper
    free = "recipe.make(stages=('f',), model='X', f={'do': 'evaluate', 'evals': {}})"
    text = PAPER.replace(
        'arms=("plain", "better"),', 'arms=("plain", "better", "free"),\n    unequal={"free": "trains nothing"},'
    )
    text = text.replace('"optimizer.lr"', '"sft.optimizer.lr"').replace("task=", "stages=('sft',), sft={}, task=")
    Path(file).write_text(
        text.replace("    return recipe.make", f"    if arg == 'free':\n        return {free}\n    return recipe.make")
    )
    commit(file)
    content = study.score(file)
    assert len(calls) == 2 * (2 + 3) + 3 and content["tuning"]["free"] == {} and content["arms"]["free"]["settings"] == {}
    assert results.check(file) == ""


def test_a_run_is_made_again_where_its_code_or_its_model_changed_and_not_for_another_claim(paper):
    file, calls = paper
    start = Path(file).parent / "start.py"
    start.write_text("from jaxpost import recipe\n\n\ndef get_config(arg=''):\n    return recipe.make(steps=3)\n")
    text = PAPER.replace("recipe.make(task", f"recipe.make(model='recipe:{start}', task")

    def runs_of(written):
        Path(file).write_text(written)
        before = len(calls)
        study.pilot(file)
        return len(calls) - before

    first = runs_of(text)
    assert first and not runs_of(text.replace("margin=0.1", "margin=0.2")) and not runs_of("# a comment\n" + text)
    assert runs_of(text + "\n\ndef more():\n    return 1\n") == first
    start.write_text(start.read_text().replace("steps=3", "steps=4"))
    assert runs_of(text) == first


def test_a_tuned_setting_that_an_arm_lacks_is_named_before_anything_runs(paper):
    file, calls = paper
    Path(file).write_text(PAPER.replace("optimizer.lr", "sft.optimizer.lr"))
    commit(file)
    with pytest.raises(UserError, match="arm plain: its recipe has no 'sft.optimizer.lr'"):
        study.score(file)
    assert not calls


def test_superseded_claims_keep_their_figures(paper):
    file, _ = paper
    first = study.score(file)
    reason = 'superseded=("2026-11-30: the margin was that of another size",), tune='
    Path(file).write_text(PAPER.replace("margin=0.1", "margin=0.04").replace("tune=", reason))
    commit(file)
    second = study.score(file)
    assert second["verdict"] == "shown" and not results.check(file)
    (kept,) = second["history"]
    assert kept["verdict"] == "partly" and kept["arms"] == first["arms"] and "another size" in kept["reason"]


def test_a_sweep_runs_every_combination_and_compares(paper, tmp_path, monkeypatch):
    _, calls = paper
    config = recipe.make(task="arithmetic", batch_size=8)
    text = study.sweep(config, tmp_path / "w", study._varied(["optimizer.lr=1e-3,1e-2", "window=64,128"]), seeds=2)
    assert len(calls) == 8 and (tmp_path / "w" / "compare.html").exists()
    head, *lines = text.splitlines()
    assert head.split()[:4] == ["runs", "optimizer.lr", "window", "seeds"] and len(lines) == 5
    assert study.sweep(config, tmp_path / "w", {"optimizer.lr": [1e-3, 1e-2], "window": [64, 128]}, seeds=2) == text
    assert len(calls) == 8
    with pytest.raises(UserError, match="has no 'optimizer.rate'"):
        study.sweep(config, tmp_path / "w", {"optimizer.rate": [1]}, seeds=1)
    with pytest.raises(UserError, match="--vary=optimizer.lr: give a setting and its values"):
        study._varied(["optimizer.lr"])
    with pytest.raises(UserError, match="is no JSON list"):
        study._varied(["data=[a.jsonl"])
    with pytest.raises(UserError, match="--seeds=0: give 1 or more"):
        study.sweep(config, tmp_path / "w", {"window": [64]}, seeds=0)


def test_results_do_not_change_when_a_setting_is_added_to_the_defaults(paper, monkeypatch):
    file, _ = paper
    before = results.fixed(file, results.study_of(file))
    monkeypatch.setitem(recipe.DEFAULTS, "a_new_setting", 3)
    assert results.fixed(file, results.study_of(file)) == before


# ---- what is spent, by real runs of a small model


@pytest.mark.slow
def test_the_budget_has_what_was_learned_generated_and_scored(tmp_path):
    """GRPO with a reference, then an epoch of DPO on pairs that the model draws."""
    chosen = small.settings(
        tmp_path,
        stages=("rl", "drawn", "dpo"),
        held_out=0.0,
        rl={"source": "rollouts", "objective": {"name": "policy_gradient.grpo", "beta": 0.1}, "steps": 2},
        drawn={"do": "generate", "rows": "pairs", "task": {"name": str(tmp_path / "task.py"), "examples": 40}},
        dpo={"data": "@drawn", "objective": {"name": "preference.sigmoid"}, "epochs": 1},
    )
    outputs, again = (train.outputs(recipe.make(**chosen), tmp_path / "w") for _ in range(2))
    rl, drawn, dpo = (outputs[name].spent for name in ("rl", "drawn", "dpo"))
    steps = [row for row in read_rows(tmp_path / "w/metrics.jsonl") if "loss" in row]
    by_stage = {name: [row for row in steps if row["stage"] == name] for name in ("rl", "dpo")}
    assert rl["generated"] == sum(round(16 * row["completions/mean_length"]) for row in by_stage["rl"])
    assert rl["learned"] == rl["scored"] == by_stage["rl"][-1]["num_tokens"] > rl["generated"] and rl["steps"] == 2
    assert drawn.keys() == {"generated"} and 40 * 4 <= drawn["generated"] <= 40 * 4 * 6
    # The reference scores the data once, which is what an epoch learns from.
    assert dpo["learned"] == dpo["scored"] == by_stage["dpo"][-1]["num_tokens"] and dpo["generated"] == 0
    assert {name: output.spent for name, output in again.items()} == {name: output.spent for name, output in outputs.items()}
