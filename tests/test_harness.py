"""lm-eval through its one adapter: what it reports is what a direct computation gives, token by token.

The checkpoint is a real one (stories260k, with a tokenizer whose text begins with a token of its own); the tasks are files made
here, one for each of lm-eval's three questions.
"""

import json
import math

import numpy as np
import pytest

import jaxpost
from jaxpost.errors import UserError

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
from lm_eval.api.instance import Instance

from jaxpost.evals import harness

DOCUMENTS = [
    {"q": "Once upon a time, there was a little girl named", "choices": ["Lily", "rock", "the"], "gold": 0},
    {"q": "Tom and Sam went to the park to", "choices": ["moon", "play", "was"], "gold": 1},
    {"q": "The sun was shining and the sky was", "choices": ["blue", "very sad and", "eat"], "gold": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {data}.cache
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list:
"""
CHOICE = "doc_to_choice: choices"
UNTIL = 'generation_kwargs: {until: [" ", "."], max_gen_toks: 12, do_sample: false}'


@pytest.fixture(scope="module")
def model(shared):
    return jaxpost.load(shared / "models" / "stories260k")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Paths of the three task files."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    kinds = [
        ("choice", "multiple_choice", "{{q}}", "{{gold}}", CHOICE, ("acc", "acc_norm")),
        ("rolling", "loglikelihood_rolling", "", "{{q}}", "", ("byte_perplexity", "bits_per_byte")),
        ("until", "generate_until", "{{q}}", "{{choices[gold]}}", UNTIL, ("exact_match",)),
    ]
    for name, kind, text, target, more, metrics in kinds:
        task = TASK.format(name=name, data=data, kind=kind, text=text, target=target, more=more)
        (folder / f"{name}.yaml").write_text(task + "".join(f"  - metric: {m}\n" for m in metrics))
    return [str(folder / f"{name}.yaml") for name, *_ in kinds]


@pytest.fixture(scope="module")
def direct(model):
    """(log-probability, whether greedy) of the ids after the first `read`, from the model's logits in float64."""

    def compute(ids, read):
        logits = np.asarray(model.logits([ids + [0] * (64 - len(ids))]), np.float64)[0, : len(ids) - 1]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = np.array(ids[1:])
        own = logps[np.arange(len(targets)), targets][read - 1 :]
        return own.sum(), bool((logps.argmax(-1) == targets)[read - 1 :].all())

    return compute


@pytest.mark.slow
def test_each_question_is_answered_as_computed_directly(model, tasks, direct):
    results = harness.evaluate(model, tasks, rows=2)
    text = model.tokenizer
    right, normed, total, size, exact = [], [], 0.0, 0, []
    for row in DOCUMENTS:
        context = text(row["q"])["input_ids"]
        assert context[0] == text.bos_token_id
        sums = [direct(text(f"{row['q']} {c}")["input_ids"], len(context))[0] for c in row["choices"]]
        right.append(np.argmax(sums) == row["gold"])
        normed.append(np.argmax(np.array(sums) / [len(c) for c in row["choices"]]) == row["gold"])
        total += direct(context, 1)[0]
        size += len(row["q"].encode())
        ids = list(context)
        for _ in range(12):
            ids.append(int(np.asarray(model.logits([ids + [0] * (64 - len(ids))]))[0, len(ids) - 1].argmax()))
        answer = text.decode(ids[len(context) :])
        exact.append(min(answer.split(" ")[0], answer.split(".")[0], key=len) == row["choices"][row["gold"]])
    assert sum(normed) > 0 and 0 < sum(right) < 3 and 0 < sum(exact) < 3  # so that a figure can be wrong
    assert results["choice"]["acc"] == pytest.approx(np.mean(right)) and results["choice"]["acc_norm"] == pytest.approx(
        np.mean(normed)
    )
    # Sums of some thirty log-probabilities in float32.
    assert results["rolling"]["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert results["rolling"]["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert results["until"]["exact_match"] == pytest.approx(np.mean(exact))


def instances(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def test_a_likelihood_and_whether_it_is_greedy(model, direct):
    adapter, text = harness.Adapter(model, rows=2), model.tokenizer
    pairs = [("Once upon a time, there was a little girl named", " Lily"), ("", "The dog"), ("Tom and ", "Sam")]
    results = adapter.loglikelihood(instances("loglikelihood", *pairs))
    for (context, continuation), (total, greedy) in zip(pairs, results, strict=True):
        ids = text(context + continuation)["input_ids"]
        wanted = direct(ids, len(text(context.rstrip())["input_ids"]))
        # 5e-6: a likelihood near 1 has a logarithm near 0, whose rounding is that of the logits, about 10.
        assert total == pytest.approx(wanted[0], rel=1e-5, abs=5e-6) and greedy == wanted[1]
    assert [greedy for _, greedy in results] == [True, False, False]
    # The beginning-of-text token once, whether the tokenizer adds it or a template has written it out.
    assert adapter.tok_encode("<s>The dog") == adapter.tok_encode("The dog") == text("The dog")["input_ids"]


def test_a_text_longer_than_the_model_is_read_in_windows(model):
    """One window's 512 tokens after the beginning-of-text token, then the last ones after as much context as there is room."""
    adapter, text = harness.Adapter(model, rows=2), model.tokenizer
    story = "Tom and Sam went to the park to play. " * 60
    ids = text(story, add_special_tokens=False)["input_ids"]
    most = model.transformer.arch.max_positions
    assert most < len(ids) < 2 * most

    def scores(window):
        return np.asarray(model.scores(np.array([window]))["logps"], np.float64)[0]

    rest = len(ids) - most
    wanted = scores([text.bos_token_id, *ids[:most]])[1:].sum() + scores(ids[-most - 1 :])[-rest:].sum()
    assert adapter.loglikelihood_rolling(instances("loglikelihood_rolling", (story,)))[0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_what_a_task_asks_of_generation_is_honoured_or_refused(model):
    adapter = harness.Adapter(model)

    def complete(context, **manner):
        return adapter.generate_until(instances("generate_until", (context, manner)))[0]

    whole = complete("Tom and Sam", max_gen_toks=20)
    assert (
        complete("Tom and Sam", max_new_tokens=20, until=["zzz", "e"], temperature=0.7, top_p=0.5)
        == whole.split("e")[0]
        != whole
    )
    assert complete("Tom and Sam", max_gen_toks=20, do_sample=True, temperature=3.0) != whole
    assert complete("Lily. " * 600 + "Tom and Sam", max_gen_toks=2)  # the context loses its beginning
    with pytest.raises(UserError, match="asks for top_p, which"):
        complete("Tom", do_sample=True, top_p=0.5)
    with pytest.raises(UserError, match="512 new tokens leave no room for a context in 512"):
        complete("Tom", max_gen_toks=512)
    with pytest.raises(UserError, match="lm_eval=no_such_task: no file, and lm-eval knows no task"):
        harness.evaluate(model, ["no_such_task"])
