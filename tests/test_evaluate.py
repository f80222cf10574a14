"""Evaluation's arithmetic: weights, cells, and means over batches of unequal size."""

import jax
import numpy as np
import pytest

from jaxpost import evaluate, sharding
from jaxpost.metrics import Mean
from jaxpost.sampling.decode import Completions
from jaxpost.tasks import arithmetic

TEXT = arithmetic.tokenizer()
RECORDS = [
    {"prompt": "1+1", "answer": "2", "cell": "easy", "weight": 0.5},
    {"prompt": "2+1", "answer": "3", "cell": "hard", "weight": 0.2},
    {"prompt": "2+2", "answer": "4", "cell": "hard", "weight": 0.2},
]
REPLIES = {1.0: {"1+1": "2", "2+1": "4", "2+2": "4"}, 0.0: {"1+1": "7", "2+1": "3", "2+2": "4"}}


def answering(calls):
    """A stand-in for `complete` that replies by REPLIES and stops every completion."""

    def complete(model, params, prompts, *, mesh, prompt_window, new, stop, temperature, seed, step):
        calls.append((len(prompts), temperature, seed, step))
        tokens, lengths = np.zeros((len(prompts), prompt_window + new), np.int32), []
        for row, ids in zip(tokens, prompts, strict=True):
            question = TEXT.decode(ids).removeprefix("<|user|>").removesuffix("<|assistant|>")
            reply = TEXT(REPLIES[temperature][question] + "<|end|>", add_special_tokens=False)["input_ids"]
            row[: len(ids) + len(reply)] = [*ids, *reply]
            lengths.append(len(reply))
        return Completions(tokens, np.array(lengths), np.zeros(tokens.shape), np.ones(len(prompts), bool))

    return complete


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_accuracy_weighs_the_whole_and_counts_in_the_cells(monkeypatch, rows):
    calls = []
    monkeypatch.setattr(evaluate, "complete", answering(calls))
    options = {"prompt_window": 6, "new": 4, "template": None}
    found = evaluate.accuracy(None, None, TEXT, RECORDS, arithmetic.reward, None, rows=rows, options=options, step=7)
    values = dict(found)
    samples = values.pop("samples")
    assert values == pytest.approx(
        {
            "eval/accuracy": 0.7 / 0.9,
            "eval/accuracy/easy": 1.0,
            "eval/accuracy/hard": 0.5,
            "eval/accuracy_greedy": 0.4 / 0.9,
            "eval/accuracy_greedy/easy": 0.0,
            "eval/accuracy_greedy/hard": 1.0,
        }
    )
    assert [(s["prompt"], s["completion"], s["reward"], s["kind"]) for s in samples] == [
        ("1+1", "2", 1.0, "sampled"),
        ("2+1", "4", 0.0, "sampled"),
        ("1+1", "7", 0.0, "greedy"),
        ("2+1", "3", 1.0, "greedy"),
    ]
    # One shape whatever is left over, and noise of its own for every part of the problems and every step.
    assert {n for n, *_ in calls} == {rows} and all(step == 7 for *_, step in calls)
    assert len({seed for _, temperature, seed, _ in calls if temperature}) == len(calls) / 2


def test_held_out_divides_once():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batches = [{"tokens": np.zeros((2, 1), np.int32)}, {"tokens": np.ones((2, 1), np.int32)}]

    def judged(params, batch, key):
        first = int(batch["tokens"][0, 0]) == 0
        return {"loss": Mean(np.float32(6.0), np.float32(3.0)) if first else Mean(np.float32(1.0), np.float32(1.0))}

    assert dict(evaluate.held_out(judged, None, batches, mesh, 2)) == {"eval/loss": 7 / 4}
