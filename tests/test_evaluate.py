"""Evaluation's arithmetic: weights, cells, means over batches of unequal size, and which token is scored with which context."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import runs
import sampler_cases

import jaxpost
from jaxpost import api, evaluate, sharding
from jaxpost.errors import UserError
from jaxpost.evals import accuracy, held_out, intervals, perplexity
from jaxpost.metrics import Mean
from jaxpost.models import hf
from jaxpost.sampling import decode
from jaxpost.sampling.decode import Completions
from jaxpost.stages.evaluation import first_of_each_cell
from jaxpost.tasks import arithmetic
from jaxpost.tokenizer import save

TEXT = arithmetic.tokenizer()
RECORDS = [
    {"prompt": "1+1", "answer": "2", "cell": "easy", "weight": 0.5},
    {"prompt": "2+1", "answer": "3", "cell": "hard", "weight": 0.2},
    {"prompt": "2+2", "answer": "4", "cell": "hard", "weight": 0.2},
]
REPLIES = {1.0: {"1+1": "2", "2+1": "4", "2+2": "4"}, 0.0: {"1+1": "7", "2+1": "3", "2+2": "4"}}


MODEL = types.SimpleNamespace(transformer=sampler_cases.MODEL, params={"layers": ()}, tokenizer=TEXT, mesh=None)


def answering(calls):
    """A stand-in for `complete` that replies by REPLIES and stops every completion."""

    def complete(
        model, params, prompts, *, mesh, tokenizer, prompt_window, new, stop, temperature, seed, number, group, have, chain=()
    ):
        calls.append((len(prompts), temperature, seed, number))
        tokens, lengths = np.zeros((len(prompts), new), np.int32), []
        for row, ids in zip(tokens, prompts, strict=True):
            question = TEXT.decode(ids).removeprefix("<|user|>").removesuffix("<|assistant|>")
            reply = TEXT(REPLIES[temperature][question] + "<|end|>", add_special_tokens=False)["input_ids"]
            row[: len(reply)] = reply
            lengths.append(len(reply))
        count = len(prompts) - len(have)  # what pads the last part is not completed
        lengths = np.array(lengths)[:count]
        return Completions(tokens[:count], lengths, np.zeros(tokens.shape)[:count], np.ones(count, bool), lengths - 1)

    return complete


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_accuracy_weighs_the_whole_and_counts_in_the_cells(monkeypatch, rows):
    calls = []
    monkeypatch.setattr(decode, "complete", answering(calls))
    options = {"prompt_window": 6, "new": 4, "template": None}
    judges = {"right": (arithmetic.reward, 1.0)}
    figures = accuracy.graded(MODEL, RECORDS, judges, rows=rows, options=options)
    values = dict(figures)
    samples = values.pop("samples")
    assert [row["problem"] for row in samples] == [0, 1, 2] * 2 and [row["cell"] for row in samples[:2]] == ["easy", "hard"]
    samples = first_of_each_cell(samples)
    assert set(values) == set(accuracy.names(RECORDS, judges))
    # Of a reward that does not say that it is a verdict, the mean is no accuracy, whatever values it happens to have.
    judges = {"right": (lambda *x: arithmetic.reward(*x), 1.0)}
    plain = accuracy.graded(MODEL, RECORDS, judges, rows=rows, options=options)
    plain = {name: value for name, value in plain if name != "samples"}
    for kind in ("accuracy", "accuracy_greedy"):
        cells = {f"/{cell}": [1.0] * sum(r["cell"] == cell for r in RECORDS) for cell in ("easy", "hard")}
        for part, weights in ({"": [r["weight"] for r in RECORDS]} | cells).items():
            name = f"{kind}{part}"
            interval = values.pop(f"{name}_low"), values.pop(f"{name}_high")
            assert interval == intervals.wilson(values[name], weights)
    errors = {name: plain.pop(name) for name in list(plain) if name.endswith("_se")}
    assert values.pop("reward_se") == errors["reward_se"] and set(errors) == {
        f"reward{kind}{part}_se" for kind in ("", "_greedy") for part in ("", "/hard")
    }
    assert values.pop("reward") == values["accuracy"] == plain["reward"]
    assert plain == {name.replace("accuracy", "reward"): value for name, value in values.items()}
    assert values == pytest.approx(
        {
            "accuracy": 0.7 / 0.9,
            "accuracy/easy": 1.0,
            "accuracy/hard": 0.5,
            "accuracy_greedy": 0.4 / 0.9,
            "accuracy_greedy/easy": 0.0,
            "accuracy_greedy/hard": 1.0,
        }
    )
    calls = calls[: len(calls) // 2]
    assert [(s["prompt"], s["completion"], s["reward"], s["kind"]) for s in samples] == [
        ("1+1", "2", 1.0, "sampled"),
        ("2+1", "4", 0.0, "sampled"),
        ("1+1", "7", 0.0, "greedy"),
        ("2+1", "3", 1.0, "greedy"),
    ]
    # One shape whatever is left over, and always the same noise: each problem's own, however many are asked at a time.
    assert {n for n, *_ in calls} == {rows} and {seed for *_, seed, _ in calls} == {accuracy.NOISE}
    assert [number for _, temperature, _, number in calls if temperature] == list(range(0, len(RECORDS), rows))


@pytest.mark.parametrize(
    ("share", "weights", "expected"),
    [  # the worked example of 95% intervals: 8 of 10, and both ends, whose other bound is z^2 / (n + z^2)
        (0.8, [1.0] * 10, (0.4902, 0.9433)),
        (0.0, [2.0] * 10, (0.0, 1.96**2 / (10 + 1.96**2))),
        (1.0, [1.0] * 10, (10 / (10 + 1.96**2), 1.0)),
        (0.8, [1.0] * 10 + [0.0] * 5, (0.4902, 0.9433)),
    ],
)
def test_wilson_intervals_by_hand(share, weights, expected):
    assert intervals.wilson(share, weights) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("verdict", [False, True])
def test_a_completion_that_a_reward_does_not_apply_to_is_in_no_mean(monkeypatch, verdict):
    def reward(record, completion):
        return None if record["prompt"] == "2+1" else 1.0

    reward.__annotations__["return"] = bool if verdict else float
    monkeypatch.setattr(decode, "complete", answering([]))
    options = {"prompt_window": 6, "new": 4, "template": None}
    judges = {"one": (reward, 1.0), "none": (lambda record, completion: None, 0.0)}
    judging = {"workers": 0}
    figures = accuracy.graded(MODEL, RECORDS, judges, rows=3, options=options, judging=judging)
    values = {name: value for name, value in figures if name != "samples" and not name.endswith("_se")}
    assert np.isnan([values.pop("rewards/none"), values.pop("rewards/none_greedy")]).all()
    bounds = [values.pop(f"accuracy{kind}{side}") for kind in ("", "_greedy") for side in ("_low", "_high") if verdict]
    assert bounds == pytest.approx(
        [0.3055, 1.0] * 2 if verdict else [], abs=1e-4
    )  # Wilson's, of the two that count, by their weights
    bounds = {name: values.pop(name) for name in list(values) if name.endswith(("_low", "_high"))}
    assert set(bounds) == {
        f"accuracy{kind}/{cell}{side}"
        for kind in ("", "_greedy")
        for cell in ("easy", "hard")
        for side in ("_low", "_high")
        if verdict
    }
    assert set(values.values()) == {1.0} and len(values) == 8 + verdict


def test_held_out_divides_once():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batches = [{"tokens": np.zeros((2, 1), np.int32)}, {"tokens": np.ones((2, 1), np.int32)}]

    def judged(params, batch, key):
        first = int(batch["tokens"][0, 0]) == 0
        return {"loss": Mean(np.float32(6.0), np.float32(3.0)) if first else Mean(np.float32(1.0), np.float32(1.0))}

    model = types.SimpleNamespace(params=None, mesh=mesh)
    assert dict(held_out.loss(model, batches, judged, batch_size=2)) == {"loss": 7 / 4}


# ---------------------------------------------------------------------------------------------------------- Perplexity


def pieces(masks, window):
    examples = [{"tokens": np.arange(len(m)), "mask": np.array(m, bool)} for m in masks]
    return [(p["tokens"].tolist(), p["tokens"][p["mask"]].tolist()) for p in perplexity.slide(examples, window)]


def test_each_token_is_scored_once_with_half_a_window_of_context():
    ten = [0, *[1] * 9]
    assert pieces([ten], 10) == [([*range(10)], [*range(1, 10)])]
    assert pieces([ten], 4) == [
        ([0, 1, 2, 3], [1, 2, 3]),
        ([2, 3, 4, 5], [4, 5]),
        ([4, 5, 6, 7], [6, 7]),
        ([6, 7, 8, 9], [8, 9]),
    ]
    assert pieces([ten], 7) == [([*range(7)], [*range(1, 7)]), ([4, 5, 6, 7, 8, 9], [7, 8, 9])]
    # A prompt longer than the window is context, and scored nowhere; a document of one token has nothing to score.
    assert pieces([[0, 0, 0, 0, 0, 1], [0]], 4) == [([2, 3, 4, 5], [5])]
    assert pieces([[0, 1, 1]], 2) == [([0, 1], [1]), ([1, 2], [2])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model's folder, its predictions far from uniform."""
    where = tmp_path_factory.mktemp("model")
    fields = {**runs.MODEL, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
    model = jaxpost.load(fields)
    hf.save(where, model.params, model.transformer.arch, fields)
    save(TEXT, where)
    return where


def by_hand(model: api.Model, documents: list[tuple[list[int], int]], window: int) -> tuple[float, int]:
    """(nats, tokens) of (ids, how many of them are only read), each token scored by a call of its own."""
    total, count = 0.0, 0
    for ids, read in documents:
        for place in range(max(read, 1), len(ids)):
            # Windows begin at 0, then where the one before has half a window left.
            hop = window - window // 2
            start = 0 if place < window else ((place - window) // hop + 1) * hop
            logits = np.asarray(
                model.logits([ids[start:place] + [0] * (window - place + start)])[0, place - start - 1], np.float64
            )
            total -= logits[ids[place]] - np.log(np.exp(logits).sum())
            count += 1
    return total, count


def test_perplexity_of_a_file_is_that_of_each_token_by_hand(folder, tmp_path, capsys):
    end = TEXT.eos_token_id
    rows = [{"text": "12+34-56x7"}, {"text": "8x9"}, {"prompt": "1+1-0+3", "completion": "5"}, arithmetic.conversation(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = api.load(folder)
    ids = lambda text: TEXT(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    turns = TEXT.apply_chat_template(rows[3]["messages"], return_dict=False)
    answer = len(rows[3]["messages"][1]["content"]) + 1
    documents = [([*ids("12+34-56x7"), end], 1), ([*ids("8x9"), end], 1), ([*ids("1+1-0+35"), end], 7)]
    documents.append((turns, len(turns) - answer))
    for window in (6, 16):
        figures = dict(perplexity.perplexity(model, data=str(tmp_path / "rows.jsonl"), window=window))
        total, count = by_hand(model, documents, window)
        assert figures["tokens"] == count == 10 + 3 + 2 + answer
        # Sums of some 20 terms in float32.
        assert figures["nll"] == pytest.approx(total / count, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
        # The error of a ratio of sums over documents, which are what is drawn.
        each = np.array([by_hand(model, [document], window) for document in documents])
        error = np.sqrt(4 / 3 * np.sum((each[:, 0] - figures["nll"] * each[:, 1]) ** 2)) / count
        assert figures["nll_se"] == pytest.approx(error, rel=1e-4)
        assert figures["perplexity_high"] == pytest.approx(math.exp(figures["nll"] + 1.96 * error), rel=1e-4)
    (tmp_path / "other.jsonl").write_text('{"q": "1+1-0+3", "a": "5"}\n{"q": ""}\n{"q": "1",\n')
    options = {"columns": "prompt=q,completion=a", "bad_rows": "skip"}
    other = dict(perplexity.perplexity(model, data=str(tmp_path / "other.jsonl"), window=16, **options))
    assert other["documents"] == 1 and other["tokens"] == 2 and "other.jsonl: 2 skipped; the first: " in capsys.readouterr().err
    text = arithmetic.tokenizer()
    text.add_tokens(["<picture>"])
    (tmp_path / "seen.jsonl").write_text('{"text": "1<picture>"}')
    with pytest.raises(
        UserError, match=r"seen.jsonl: has the token '<picture>' \(id 17\), and the model has a vocabulary of 17"
    ):
        next(perplexity.perplexity(dataclasses.replace(model, tokenizer=text), data=str(tmp_path / "seen.jsonl")))
    with pytest.raises(UserError, match="^window=65: give 2 to 64"):
        next(perplexity.perplexity(model, data=str(tmp_path / "rows.jsonl"), window=65))


def test_accuracy_of_a_task_by_name(folder, monkeypatch, tmp_path):
    sizes = {}

    def complete(model, params, prompts, *, prompt_window, new, have, **_):
        sizes.update(prompt_window=prompt_window, new=new, rows=len(prompts))
        tokens = np.zeros((len(prompts) - len(have), new), np.int32)
        tokens[:, :1], ones = TEXT("2")["input_ids"], np.ones(len(tokens), int)
        return Completions(tokens, ones, np.zeros(tokens.shape), np.zeros(len(tokens), bool), ones)

    monkeypatch.setattr(decode, "complete", complete)
    (tmp_path / "judge.py").write_text("def two(record, completion) -> 'bool':\n    return completion == '2'")
    figures = dict(
        accuracy.accuracy(api.load(folder), task="arithmetic", per_cell=1, reward=f"{tmp_path}/judge.py:two", rows=4)
    )
    assert figures["accuracy"] == figures["accuracy_greedy/x3"] == 1.0 and figures["problems"] == 9 and len(figures) == 28 + 36
    # <|user|>, seven characters of the longest problem, <|assistant|>; and as much of 64 as the model's positions leave.
    assert sizes == {"prompt_window": 9, "new": 55, "rows": 4}
    (tmp_path / "judge.py").write_text("def none(record, completion):\n    return None if completion is not None else 0.0")
    figures = dict(
        accuracy.accuracy(api.load(folder), task="arithmetic", per_cell=1, reward=f"{tmp_path}/judge.py:none", rows=4)
    )
    assert np.isnan(figures["reward"])  # it has nothing to say of these completions
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}')
    with pytest.raises(UserError, match="^task=prompts: has no reward of its own; name one, as reward=FILE.py:reward"):
        dict(accuracy.accuracy(api.load(folder), task={"name": "prompts", "data": f"{tmp_path}/p.jsonl"}))
    own = dict(accuracy.accuracy(api.load(folder), task="arithmetic", per_cell=1, rows=4, new=5))
    assert sizes["new"] == 5
    records = arithmetic.test_records(1)
    right = [r["answer"] == "2" for r in records]
    assert own["accuracy"] == pytest.approx(np.average(right, weights=[r["weight"] for r in records]))


def test_the_number_of_problems_and_some_completions_are_printed(capsys):
    rows = [{"prompt": "1+1", "completion": f"answer {i}", "reward": 1.0} for i in range(9)]
    evaluate._show("arithmetic: 209 test problems; the first completions", rows)
    printed = capsys.readouterr().err
    assert (
        printed.startswith("arithmetic: 209 test problems; the first completions:\n")
        and "answer 5" in printed
        and "answer 6" not in printed
    )


def test_the_command_prints_one_object(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "12+34"}\n')

    def command(*arguments):
        environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(runs.ROOT)}
        words = [sys.executable, "-m", "jaxpost.evaluate", f"--model={folder}", *arguments]
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)

    file = str(tmp_path / "rows.jsonl")
    named = json.dumps({"text": {"name": "perplexity", "data": file, "window": 8}})
    model = json.dumps({"name": "patched", "of": str(folder), "patch": {}})  # a recipe's model, which is the folder's
    done = command(f"--data={file}", f"--evals={named}", f"--model={model}")
    figures = json.loads(done.stdout)
    assert figures["text/nll"] == pytest.approx(figures["nll"]) and figures["text/tokens"] == 5
    assert done.returncode == 0 and figures["tokens"] == 5 and figures["perplexity"] == pytest.approx(math.exp(figures["nll"]))
    assert figures["documents"] == 1 and "rows.jsonl: 1 documents, 5 scored tokens" in done.stderr
    none = command()
    assert none.returncode == 2 and none.stderr.startswith(
        "error: nothing to evaluate on: give --data=FILE, --task=NAME, --lm_eval=TASK or"
    )
