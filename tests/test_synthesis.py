"""Rows by a prompt, a parser and filters: the functions keep their contracts, and a stage that is killed anywhere goes on to
the same rows and counts.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import time
import types

import numpy as np
import pytest
import runs
import thin
from completion_server import serving
from test_generate import TOKENIZER, drawn
from test_prompts import LOOP, Reads, other

import jaxpost
from jaxpost import recipe, sharding, tokenizer
from jaxpost.config.resolve import known, resolve
from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.sampling import decode
from jaxpost.stages import synthesis
from jaxpost.stages.run import Run
from jaxpost.storage.artefacts import Artefact
from jaxpost.synthesis import calls, filters, ledger, parsers, prompts
from jaxpost.synthesis.endpoint import Answer
from jaxpost.synthesis.pool import Pool

RECORDS = [{"text": f"text {i}", "instruction": f"say {i} words", "prompt": "q", "id": i} for i in range(12)]
# Keywords that a function needs.
NEEDS = {
    "fill": {"template": "{{ text }}"},
    "with_examples": {"template": "{{ examples | join(', ') }}"},
    "length": {"field": "text", "least": 2, "most": 3},
    "without": {"field": "text", "words": ["Image"]},
    "unique": {"field": "text"},
    "unlike": {"field": "text"},
}
TEXTS = ["", "a b", "<|pipe|>", "1. x\n2. y", '[{"a": 1}]', "[" * 3000, "\ud800", "<question>", "```json\n{}\n```", "x" * 5000]


# ---- the contracts, by discovery


def test_discovery_finds_the_functions():
    assert set(known("prompts")) == {"own", "fill", "with_examples"}
    assert set(known("parsers")) == {"text", "split", "tagged", "numbered", "json_rows"}
    assert set(known("filters")) == {"length", "without", "unique", "unlike"}


@pytest.mark.parametrize("name", known("prompts"))
def test_a_prompt_makes_messages_and_the_same_for_the_same_key(name):
    function = resolve({"name": name, **NEEDS.get(name, {})}, "prompts")
    pool = Pool(RECORDS, [{"instruction": "kept one"}, {"instruction": "kept two"}])
    once, again = (calls.messages(function, RECORDS[0], pool, "row 1") for _ in range(2))
    assert once == again and all(set(turn) == {"role", "content"} for turn in once)


@pytest.mark.parametrize("name", known("parsers"))
def test_a_parser_is_total_and_reads_its_example(name):
    function = resolve({"name": name, "keep": ["id"], **NEEDS.get(name, {})}, "parsers")
    rows = calls.parsed(function, function.func.example, RECORDS[3], [])
    assert isinstance(rows, list) and rows and all(row["id"] == 3 for row in rows)
    for text in TEXTS:
        rows = calls.parsed(function, text, RECORDS[0], [])
        assert (isinstance(rows, str) and rows) or all(isinstance(row, dict) for row in rows)


@pytest.mark.parametrize("name", known("filters"))
def test_a_filter_is_deterministic_and_says_why(name):
    function = resolve({"name": name, **NEEDS[name]}, "filters")
    pool = Pool(RECORDS, [{"text": "an image of a b"}])
    for row in ({"text": "a b"}, {"text": "an image of a b"}, {"text": "a"}, {"other": 1}, {"text": None}):
        once, again = (calls.refused({name: function}, row, pool) for _ in range(2))
        assert once == again and isinstance(once, str)
    assert calls.refused({name: function}, {"text": "quite new"}, pool) == ""
    assert calls.refused({name: function}, {"other": 1}, pool) == "nothing under text"


# ---- values by hand


def test_prompts_by_hand():
    asked = prompts.fill({"a": "x", "n": 2}, template="{{ a }} and {{ n + 1 }}\n", system="Be {{ a }}.")
    assert asked == [{"role": "system", "content": "Be x."}, {"role": "user", "content": "x and 3\n"}]
    for template, message in (("{{ b }}", "'b' is undefined; the record has a, n"), ("{% if %}", "is no Jinja, by its line 1")):
        with pytest.raises(UserError, match=message):
            prompts.fill({"a": "x", "n": 2}, template=template)
    with pytest.raises(UserError, match="cannot be filled"):  # a record is data, and no template reaches Python through it
        prompts.fill({"a": "x"}, template="{{ a.__class__.__mro__ }}")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert prompts.own({"messages": turns}) == turns[:1] and prompts.own({"prompt": "q"}) == "q"
    with pytest.raises(UserError, match="there is no prompt and there are no messages; the record has x"):
        prompts.own({"x": 1})
    with pytest.raises(UserError, match="row 3: the prompt failed with KeyError: 'y'"):
        calls.messages(lambda record: record["y"], {}, Pool([]), "row 3")
    for wrong in (None, [], "", [{"role": "user"}], turns, [{"role": "user", "content": " "}]):
        with pytest.raises(UserError, match="row 3: the prompt gave"):
            calls.messages(lambda record, wrong=wrong: wrong, {}, Pool([]), "row 3")


def test_examples_are_of_other_records_and_of_kept_rows():
    kept = [{"instruction": f"kept {i}"} for i in range(5)]
    for key in range(30):
        pool = Pool(RECORDS, kept)
        pool.key = np.array([key, 0], np.uint32)
        (turn,) = prompts.with_examples(RECORDS[0], pool, template="{{ examples | join(', ') }}", records=3, rows=2)
        examples = turn["content"].split(", ")
        assert len(set(examples)) == 5 and sum(text.startswith("kept") for text in examples) == 2
        assert RECORDS[0]["instruction"] not in examples
    (turn,) = prompts.with_examples(RECORDS[0], Pool(RECORDS), template="{{ examples | length }}", records=3, rows=2)
    assert turn["content"] == "5", "records take the places of rows that are not there yet"
    with pytest.raises(UserError, match="no text under 'words' in a row of text"):
        prompts.with_examples(RECORDS[0], Pool(RECORDS), template="", field="words")


def test_parsers_by_hand():
    record = {"context": "the sky", "id": 7}
    assert parsers.split("Is {{c}} blue?<|pipe|> Yes, {{c}} is.", record, fill={"{{c}}": "context"}, keep=["id"]) == [
        {"prompt": "Is the sky blue?", "completion": "Yes, the sky is.", "id": 7}
    ]
    assert parsers.split("a", record) == parsers.split("a<|pipe|>b<|pipe|>c", record) == "not 2 parts"
    assert parsers.split("a<|pipe|> ", record) == "an empty part"
    two = "<question>a</question>\n<answer>b</answer> and <question>c</question><answer>d\ne</answer>"
    assert parsers.tagged(two, record) == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d\ne"}]
    assert parsers.tagged("<question>a</question> then <answer>b</answer>", record) == "no tags"
    assert parsers.tagged("<q>a</q>", record, tags={"q": "text"}) == [{"text": "a"}]
    listed = parsers.numbered("Here:\n1. a\nb\n 2) c\n3.\n", record)
    assert listed == [{"instruction": "a\nb"}, {"instruction": "c"}]
    fenced = 'Sure:\n```json\n[{"a": 1}, {"a": 2}]\n```\nand\n```\n{"a": 3}\n```'
    assert parsers.json_rows(fenced, record, fields=["a"]) == [{"a": 1}, {"a": 2}, {"a": 3}]
    for text, reason in (
        ("{", "no JSON"),
        ('{"b": NaN}', "no JSON"),
        ("[1]", "JSON without objects"),
        ('{"b": ""}', "JSON without a field"),
    ):
        assert parsers.json_rows(text, record, fields=["b"]) == reason
    assert calls.parsed(None, " yes ", {}, [{"role": "user", "content": "q"}]) == [
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "yes"}]}
    ]
    for wrong in (None, [1], 3, ""):
        with pytest.raises(UserError, match="config.parser: it gave .*; it gives rows"):
            calls.parsed(lambda *_, wrong=wrong: wrong, "x", {}, [])
    assert calls.parsed(lambda *_: {"a": ("x\ud800", 1)}, "x", {}, []) == [{"a": ["x?", 1]}], "as a file gives it back"
    with pytest.raises(UserError, match="a row that JSON cannot hold"):
        calls.parsed(lambda *_: {"a": {1}}, "x", {}, [])


def _rouge_l(one: list, other: list) -> float:
    """By the table of the longest common subsequence."""
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, j in itertools.product(range(len(one)), range(len(other))):
        table[i + 1, j + 1] = table[i, j] + 1 if one[i] == other[j] else max(table[i, j + 1], table[i + 1, j])
    return 2 * table[-1, -1] / (len(one) + len(other)) if one and other else 0.0


def test_rouge_l_is_that_of_the_table():
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, other = (rng.choice(list("abcd"), rng.integers(0, 90)).tolist() for _ in range(2))
        assert filters.rouge_l(one, other) == pytest.approx(_rouge_l(one, other), abs=1e-12)
        assert filters.rouge_l(one, other, 0.7) in (0.0, filters.rouge_l(one, other))


def test_filters_by_hand():
    pool = Pool([{"t": "name five red birds"}], [{"t": "list all the planets"}])
    assert filters.unlike({"t": "Name five blue birds!"}, pool, field="t") == "too similar"  # 3 of 4 words: 0.75
    assert filters.unlike({"t": "name five blue birds"}, pool, field="t", records=False) is True
    assert filters.unlike({"t": "name six blue birds"}, pool, field="t") is True
    assert filters.unique({"t": "list all the planets"}, pool, field="t") == "a duplicate"
    pool.add({"t": "new"})
    assert filters.unique({"t": "new"}, pool, field="t") == "a duplicate"
    assert filters.length({"t": "a"}, field="t", least=2) == "too short"
    assert filters.length({"t": [{"content": "a b c d"}]}, field="t", most=3) == "too long"
    assert filters.without({"t": "An Image."}, field="t", words=["image"]) == "an unwanted word"
    assert calls.refused({"odd": lambda row: False}, {}, pool) == "odd"
    assert calls.refused({"odd": lambda row: np.bool_(True), "why": lambda row, pool: "since"}, {}, pool) == "since"
    with pytest.raises(UserError, match="config.filters: odd gave None"):
        calls.refused({"odd": lambda row: None}, {}, pool)


# ---- a stage that is killed


class Killed(BaseException):
    """The machine is gone."""


def plan(prompt, parser=None, kept=None, count=40, **changes) -> synthesis.Synthesis:
    chosen = {"group": 2, **changes.pop("rollouts", {})}
    s = recipe.make(do="generate", prompt="own", rollouts=chosen, **changes)
    records = [Record({"n": i}, f"line {i + 1}") for i in range(count)]
    functions = calls.Functions(prompt, parser, kept or {})
    return synthesis.Synthesis("x", s, None, None, functions, records, ())


def scripted(kill_at=None, ahead=7, seen=None):
    """Answers to draws, several ahead: what was asked, the draw's number and that of the completion; every ninth is cut off."""

    def complete(draws, before):
        draws, group = iter(draws), 2
        while part := list(itertools.islice(draws, ahead)):
            for draw in part:
                if seen is not None:
                    seen.append(draw.number)
                if draw.number == kill_at:
                    raise Killed
                text = draw.messages[-1]["content"]
                yield [
                    Answer(f"{text}: {7 * draw.number % 23} {j}", 3, "cut off" if draw.number % 9 == 8 else "")
                    for j in range(group)
                ]

    return complete


def parse(completion, record):
    if record["n"] % 11 == 10:
        raise KeyError("odd")
    return {"text": completion.partition(": ")[2], "asked": completion.partition(":")[0]}


def finished(folder, a_plan, **script) -> tuple[list[dict], dict]:
    artefact = Artefact(folder, "rows", {"of": "x"})
    synthesis.produce(a_plan, artefact, scripted(**script), lambda: False)
    rows = [json.loads(line) for part in sorted(artefact.folder.glob("part-*.jsonl")) for line in part.open()]
    meta = json.loads((artefact.folder / "meta.json").read_text())
    assert meta["done"]
    return rows, meta["facts"]


def alone(record):
    return f"about {record['n']}"


def from_rows(record, pool=None):
    """A prompt that depends on all rows of earlier rounds and on its key."""
    drawn = np.random.default_rng(pool.key).integers(100)
    return f"{record['n']} after {len(pool.rows)} {[row['text'] for row in pool.rows[-2:]]} {drawn}"


KINDS = {
    "each once": (alone, {}),
    "rows": (alone, {"budget": {"rows": 30}}),
    "completions": (alone, {"budget": {"completions": 101}}),
    "tokens": (alone, {"budget": {"tokens": 200}}),
    "rounds": (from_rows, {"round": 8}),
    "rounds of rows": (from_rows, {"round": 8, "budget": {"rows": 33}}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", thin.slow_after(1, [0.0, 1e9]))
def test_a_synthesis_that_is_killed_anywhere_ends_with_the_same_rows_and_counts(tmp_path, monkeypatch, kind, seconds):
    monkeypatch.setattr(ledger, "SECONDS", seconds)  # parts as often as can be, or none but at the end
    prompt, changes = KINDS[kind]
    kept = {"unique": resolve({"name": "unique", "field": "text"}, "filters"), "late": lambda row: row["text"] != "7 1"}

    def this():
        return plan(prompt, parse, kept, **changes)

    rows, facts = finished(tmp_path / "whole", this())
    assert {"cut off", "a duplicate", "late"} & facts["dropped"].keys() and facts["rows"] == len(rows) > 20
    assert len({row["text"] for row in rows}) == len(rows)
    assert finished(tmp_path / "other", this(), ahead=1) == (rows, facts), "how many are asked ahead changes nothing"
    for kill_at in range(0, 48, 5):
        folder, seen = tmp_path / str(kill_at), []
        for at in (kill_at, kill_at + 9):
            try:
                finished(folder, this(), kill_at=at)
            except Killed:
                continue
        assert finished(folder, this(), seen=seen) == (rows, facts)
        if seconds == 0.0 and kind == "each once" and kill_at == 20:
            assert min(seen) == 29, "what was there is not asked again"


@pytest.mark.parametrize("kind", ["each once", "rounds of rows"])
def test_a_synthesis_that_is_asked_to_stop_goes_on_to_the_same_rows(tmp_path, kind):
    prompt, changes = KINDS[kind]
    whole = finished(tmp_path / "whole", plan(prompt, parse, **changes))
    artefact = Artefact(tmp_path / "x", "rows", {"of": "x"})
    for stops_after in (1, 9, 3):
        calls = iter(range(100))
        stopped = synthesis.produce(
            plan(prompt, parse, **changes), artefact, scripted(), lambda calls=calls, last=stops_after: next(calls) == last - 1
        )
        meta = artefact.folder / "meta.json"
        assert not meta.exists() or not json.loads(meta.read_text()).get("done")
    assert stopped["draws"] < 40 and finished(tmp_path / "x", plan(prompt, parse, **changes)) == whole


def test_a_budget_is_kept_to_the_row_and_the_completion(tmp_path):
    def text(completion, record):
        return {"text": completion}

    assert finished(tmp_path / "a", plan(alone, text, budget={"rows": 31}))[1]["rows"] == 31
    rows, facts = finished(tmp_path / "b", plan(alone, text, budget={"completions": 101}))
    assert len(rows) + facts["dropped"]["cut off"][0] == 100, "fifty prompts of two"
    rows, facts = finished(tmp_path / "c", plan(alone, text, budget={"tokens": 100}))
    assert len(rows) + facts["dropped"]["cut off"][0] == 34, "17 prompts of six tokens are the first with a hundred"
    records, once = plan(alone, text), finished(tmp_path / "d", plan(alone, text))
    assert [int(row["text"].split()[1][:-1]) for row in once[0]] == [i for i in range(40) for _ in "ab" if i % 9 != 8]
    assert len(records.records) == 40


def test_a_budget_of_tokens_needs_a_server_that_counts_them(tmp_path):
    def complete(draws, before):
        return ([Answer("x", None)] * 2 for _ in draws)

    for budget, message in (({"tokens": 9}, "config.budget.tokens: the endpoint does not say how many"), ({"rows": 9}, None)):
        artefact = Artefact(tmp_path, "rows", {"of": message})
        if message is None:
            assert synthesis.produce(plan(alone, budget=budget), artefact, complete, lambda: False)["rows"] == 9
            continue
        with pytest.raises(UserError, match=message):
            synthesis.produce(plan(alone, budget=budget), artefact, complete, lambda: False)


def test_a_synthesis_with_nothing_new_ends_and_one_with_nothing_at_all_is_an_error(tmp_path, capsys):
    def same(completion, record):
        return {"text": str(record["n"] % 5)}

    kept = {"unique": resolve({"name": "unique", "field": "text"}, "filters")}
    rows, facts = finished(tmp_path / "a", plan(alone, same, kept, budget={"rows": 50}))
    assert len(rows) == 5 and facts["dropped"]["a duplicate"][0] > 100
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"0 rows kept of 80 completions of 40 prompts; there is nothing to learn.\n.*72 drop"
        ):
            finished(tmp_path / "b", plan(alone, lambda completion, record: "nonsense"))


def test_functions_that_fail_too_often_stop_it_and_now_and_then_are_counted(tmp_path):
    def fails(completion, record):
        return {"text": completion} if record["n"] % 4 else record["none"]

    with pytest.raises(UserError, match="line 5: the parser or a filter failed with KeyError: 'none'. So did 3 of 10 comp"):
        finished(tmp_path / "a", plan(alone, fails))
    rows, facts = finished(tmp_path / "a", plan(alone, fails, rollouts={"failures": 0.5}))
    assert facts["dropped"]["the parser or a filter failed with KeyError"][:2] == [18, "line 1"] and len(rows) == 54
    with pytest.raises(UserError, match="fails: a mistake of the settings"):
        finished(tmp_path / "b", plan(alone, lambda *_: (_ for _ in ()).throw(UserError("fails: a mistake of the settings"))))


def test_records_that_cannot_be_asked_are_left_out_and_counted(tmp_path):
    def some(record):
        return f"about {record['n']}" if record["n"] % 3 else ""

    with pytest.raises(UserError, match="line 1: the prompt gave ''"):
        finished(tmp_path / "a", plan(some))
    for budget in ({}, {"rows": 60}):
        one, seen = tmp_path / str(len(budget)), []
        rows, facts = finished(one, plan(some, parse, bad_rows="skip", budget=budget), seen=seen)
        assert all(number % 40 % 3 for number in seen) and facts["dropped"]["cannot be asked"][1] == "line 1"
        with pytest.raises(Killed):
            finished(tmp_path / f"{len(budget)}k", plan(some, parse, bad_rows="skip", budget=budget), kill_at=20)
        assert finished(tmp_path / f"{len(budget)}k", plan(some, parse, bad_rows="skip", budget=budget)) == (rows, facts)
    with pytest.raises(UserError, match="0 rows kept of 0 completions"):
        finished(tmp_path / "n", plan(lambda record: "", parse, bad_rows="skip", budget={"rows": 3}))


def test_reasons_are_counted_apart_up_to_a_number():
    tally = ledger.Tally()
    for i in range(100):
        tally.add(f"reason {i}", f"line {i}", {"a": i})
    assert len(tally.dropped) == ledger.REASONS + 1 and tally.dropped[ledger.OTHERS] == [60, "line 40", '{"a": 40}']
    assert tally.lines()[0].startswith("60 dropped: other reasons (first line 40: ")


# ---- through the command, by the sampler

RECIPE = """
from jaxpost import recipe
from jaxpost.synthesis import ledger

ledger.SECONDS = 0.0  # a part for each round


def get_config(arg=""):
    return recipe.make(**{settings!r})


def ask(record, pool=None):
    return "{{}}+{{}}".format(record["n"], len(pool.rows) % 10)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_samples_goes_on_to_the_same_rows(tmp_path):
    chosen = settings(
        tmp_path, prompt=f"{tmp_path}/recipe.py:ask", round=4, rollouts={"group": 4, "prompt_window": 12, "new": 4}
    )
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"n": i % 10}) + "\n" for i in range(120)))
    (tmp_path / "recipe.py").write_text(RECIPE.format(settings=chosen))

    def run(workdir, kill_at=None):
        child = runs.start(runs.command(tmp_path / "recipe.py", workdir))
        while kill_at and len(list(workdir.glob("rows/*/part-*"))) < kill_at and child.poll() is None:
            time.sleep(0.005)
        if kill_at:
            assert child.poll() is None, child.stderr.read()
            os.kill(child.pid, signal.SIGKILL)
        _, printed = child.communicate(timeout=200)
        assert child.returncode == (-signal.SIGKILL if kill_at else 0), printed
        return printed

    printed = run(tmp_path / "whole")
    for kill_at in (3, 11, None):
        again = run(tmp_path / "w", kill_at)
    assert read(tmp_path / "w") == read(tmp_path / "whole") and len(read(tmp_path / "w")) > 50
    assert printed.split("rows/")[0].count("dropped") == again.split("rows/")[0].count("dropped") and "cut off" in again
    metas = [json.loads(path.read_text())["facts"] for path in tmp_path.glob("*/rows/*/meta.json")]
    assert metas[0] == metas[1] and len({row["prompt"][0]["content"] for row in read(tmp_path / "w")}) > 30


def settings(folder, **changes) -> dict:
    (folder / "d.jsonl").write_text("".join(json.dumps({"n": i}) + "\n" for i in range(20)))
    stage = {"do": "generate", "prompt": {"name": "fill", "template": "{{ n }}+{{ n }}"}, "data": str(folder / "d.jsonl")}
    stage |= {"rollouts": {"group": 2, "prompt_window": 12, "new": 2}, "eval_rows": 8, **changes}
    return {"stages": ("drawn",), "model": runs.MODEL, "tokenizer": "tasks.arithmetic.tokenizer", "drawn": stage}


@pytest.fixture
def stand_in(monkeypatch):
    """What test_generate draws in the sampler's place, without weights."""
    monkeypatch.setattr(decode, "complete", drawn)
    monkeypatch.setattr(decode, "ready", lambda model, params, mesh: params)
    monkeypatch.setattr(loading, "weights", lambda *_: None)


def read(workdir) -> list[dict]:
    parts = sorted((workdir / "rows").glob("*/part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def test_a_stage_draws_completions_with_its_model(tmp_path, stand_in, capsys):
    jaxpost.train(recipe.make(**settings(tmp_path)), tmp_path / "w")
    rows = read(tmp_path / "w")
    # Completion i is of record i // 2; it says i's last digit, and every fifth goes on.
    expected = [(f"{i // 2}+{i // 2}", str(i % 10)) for i in range(40) if i % 5]
    assert [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows] == expected
    assert "8 dropped: cut off (first d.jsonl, line 1" in capsys.readouterr().err
    jaxpost.train(recipe.make(**settings(tmp_path, eval_rows=2)), tmp_path / "v")
    assert read(tmp_path / "v") == rows, "how many are drawn at a time changes nothing"


def test_records_of_a_task_and_of_an_earlier_stage(tmp_path, stand_in):
    (tmp_path / "mine.py").write_text("def ask(record):\n    return record['prompt']\n")
    task = {"name": "arithmetic", "examples": 6}
    chosen = settings(tmp_path, data="", task=task, prompt=f"{tmp_path}/mine.py:ask")
    chosen["stages"] += ("kept", "again")
    chosen["kept"] = {"do": "select", "data": "@drawn", "with": {"name": "select.random", "keep": 4}}
    ask = {"do": "generate", "data": "@kept", "prompt": "own", "parser": "text", "rollouts": {**chosen["drawn"]["rollouts"]}}
    jaxpost.train(recipe.make(**chosen, again={**ask, "eval_rows": 8}), tmp_path / "w")
    parts = [part.read_text().splitlines() for part in (tmp_path / "w" / "rows").glob("*/part-*.jsonl")]
    counts = sorted(len(part) for part in parts)
    assert counts[0] == 4 and len(counts) == 3
    texts = next(part for part in parts if "text" in json.loads(part[0]))
    assert {json.loads(line)["text"] for line in texts} <= set("0123456789")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": "fil"}, "'fil': jaxpost.synthesis.prompts has no 'fil'. Did you mean 'fill'"),
        ({"prompt": {"name": "fill"}}, "prompts: fill needs template"),
        (
            {"prompt": {"name": "fill", "template": "{{ m }}"}},
            "d.jsonl, line 1: the template cannot be filled: 'm' is undefined",
        ),
        ({"parser": "tagd"}, "'tagd': jaxpost.synthesis.parsers has no 'tagd'. Did you mean 'tagged'"),
        ({"filters": "unique"}, "filters: unique needs field"),
        ({"filters": [{"name": "unik"}]}, "jaxpost.synthesis.filters has no 'unik'"),
        (
            {"rollouts": {"prompt_window": 2, "group": 2, "new": 2}},
            "d.jsonl, line 1: its prompt has 5 tokens; config.rollouts.pro",
        ),
        ({"data": ""}, "config.data: give records"),
        ({"data": {"a.jsonl": 1}}, "a.jsonl"),
        ({"budget": {"completions": 1}}, "config.budget.completions: 1 is less than one prompt's rollouts.group"),
        ({"round": 8}, "config.round: 8 is of no use, since the prompt reads no pool"),
        ({"budget": {"words": 1}}, "unknown key 'words'"),
        (
            {"reward": "text.x"},
            "config.drawn.reward: .* is not read by do='generate', whose rows its prompt, parser and filters make",
        ),
        ({"rows": "pairs"}, "config.drawn.rows: .* is not read"),
        ({"prompt": ""}, "prompts of do='generate'|file of prompts has no reward"),
        ({"endpoint": {"url": "http://x", "modl": "m"}}, "which config.endpoint gives|whose completions config.endpoint gives"),
    ],
)
def test_what_cannot_give_rows_is_refused_before_anything_is_drawn(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        jaxpost.train(recipe.make(**settings(tmp_path, **changes)), tmp_path / "w")
    assert not (tmp_path / "w" / "rows").exists()


def test_settings_of_a_synthesis_are_refused_elsewhere(tmp_path):
    for key, value in (("parser", "text"), ("filters", "unique"), ("round", 3), ("budget", {"rows": 3})):
        with pytest.raises(UserError, match=f"config.x.{key}.* is not read by do='generate'"):
            recipe.stages(recipe.make(stages=("x",), x={"do": "generate", "task": {"name": "arithmetic"}, key: value}))
        with pytest.raises(UserError, match=f"config.{key}.* is not read by source='data'"):
            recipe.stages(recipe.make(**{key: value}))


@pytest.mark.parametrize("asked", ["the model", "an endpoint"])
def test_every_setting_is_read_or_refused(tmp_path, stand_in, asked):
    task = {"name": "arithmetic", "examples": 5}
    fails = iter([True])

    def pooled(record, pool=None):
        return record["prompt"]

    def failing_once(completion, record):
        return {"text": 1 / 0 if next(fails, False) else completion}

    base = {"do": "generate", "prompt": pooled, "parser": failing_once, "task": task}
    base |= {"model": runs.MODEL, "tokenizer": "tasks.arithmetic.tokenizer"} if asked == "the model" else {}
    seen, refused, paths = set(), set(), recipe.flat(recipe.DEFAULTS)
    with serving(lambda body: "1") as server:
        base |= {"endpoint": {"url": server.url, "model": "m"}} if asked == "an endpoint" else {}
        ((name, s),) = recipe.stages(
            recipe.make(**base, rollouts={"new": 2} | ({"prompt_window": 12} if "model" in base else {}))
        )
        stop = types.SimpleNamespace(asked=False, saving=lambda where: contextlib.nullcontext())
        run = Run(tmp_path, tmp_path, sharding.make_mesh(), stop, {}, {})
        synthesis.make(synthesis.planned(name, Reads(s, seen), run), run)
    for path in paths.keys() - LOOP - {"source"}:
        *around, key = path.split(".")
        changed = {key: other(paths[path])}
        try:
            recipe.stages(recipe.make(**base | ({around[0]: changed} if around else changed)))
        except UserError as error:
            refused |= {path} if re.search(f"config.{path}: .*is not read by", str(error)) else set()
    assert (seen & refused, paths.keys() - seen - refused - LOOP - {"source"}) == (set(), set())


def test_a_later_stage_is_checked_by_the_parsers_example(tmp_path, stand_in):
    (tmp_path / "mine.py").write_text(
        "def parse(completion, record):\n    return {'odd': completion}\n\n\nparse.example = '1'\n"
    )
    chosen = settings(tmp_path, parser=f"{tmp_path}/mine.py:parse")
    chosen["stages"] += ("sft",)
    with pytest.raises(UserError, match="a row of an earlier stage, 0: columns not recognised: odd"):
        jaxpost.train(recipe.make(**chosen, sft={"data": "@drawn", "window": 32}), tmp_path / "w")


def test_processes_that_were_given_other_records_are_refused(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(sharding, "each_text", lambda text: [text, "another"])
    with pytest.raises(UserError, match="drawn: the processes have other records, functions or weights"):
        jaxpost.train(recipe.make(**settings(tmp_path)), tmp_path / "w")


def test_a_parser_that_fails_on_its_example_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("def parse(completion, record):\n    return record['x']\n\n\nparse.example = '1'\n")
    with pytest.raises(UserError, match="config.parser: it fails on its example with KeyError: 'x'"):
        jaxpost.train(recipe.make(**settings(tmp_path, parser=f"{tmp_path}/mine.py:parse")), tmp_path / "w")


def test_an_example_that_the_tokenizer_has_no_tokens_for_checks_the_columns(tmp_path):
    run = Run(tmp_path, tmp_path, sharding.make_mesh(), None, {}, {})
    ((name, s),) = recipe.stages(recipe.make(**settings(tmp_path, parser="tagged")))
    ((row),) = synthesis.planned(name, s, run).trial
    assert row.keys() == {"prompt", "completion"} and tokenizer.encodes(TOKENIZER, row["prompt"]) and row["prompt"]
    ((name, s),) = recipe.stages(recipe.make(**settings(tmp_path)))
    assert synthesis.planned(name, s, run).trial[0]["completion"] == [{"role": "assistant", "content": "1"}]


@pytest.mark.parametrize(
    "example, place", [("\n\nparse.example = 'some words'\n", "a row of an earlier stage, 0"), ("", "part-")]
)
def test_a_parsers_columns_are_refused_with_the_name_of_the_stage_that_learns_from_them(tmp_path, stand_in, example, place):
    (tmp_path / "mine.py").write_text("def parse(completion, record):\n    return {'odd': completion}\n" + example)
    chosen = settings(tmp_path, parser=f"{tmp_path}/mine.py:parse")
    chosen["stages"] += ("sft",)
    with pytest.raises(UserError, match=f"^sft: .*{place}.*columns not recognised: odd"):
        jaxpost.train(recipe.make(**chosen, sft={"data": "@drawn", "window": 32}), tmp_path / "w")
    assert bool(example) is not (tmp_path / "w" / "rows").exists()


def test_a_function_of_a_notebook_is_named_in_the_record(tmp_path, stand_in):
    def ask(record):
        return str(record["n"])

    config = recipe.make(**settings(tmp_path, prompt=ask, filters=[lambda row: row["completion"][0]["content"] != "3"]))
    assert config.drawn.prompt["name"].startswith("ask#")
    jaxpost.train(config, tmp_path / "w")
    assert "3" not in {row["completion"][0]["content"] for row in read(tmp_path / "w")}
