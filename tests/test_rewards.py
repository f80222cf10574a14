"""Every reward under one contract, by discovery, and each kind against values worked out by hand."""

import contextlib
import dataclasses
import importlib.util
import json
import random
import sys
import time
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from test_instructions import CASES

from jaxpost.config import resolve
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.rewards import answers, format, math, model, text
from jaxpost.rollouts.scoring import judged
from jaxpost.tasks import arithmetic

# Keywords that a reward cannot do without, and the records that it needs; a constraint's stand in its own test file.
OPTIONS = {f"instructions.{kind}": arguments for kind, (arguments, _, _) in CASES.items()} | {"text.cosine": {"max_len": 50}}
RECORD = {"prompt": "say", "answer": "72", "constraints": [{"kind": k, **a} for k, (a, _, _) in CASES.items()]}
NEEDS = {"math.verify": "math_verify", "gym.score": "reasoning_gym"}
REWARDS = sorted(set(resolve.known("rewards")) - {"model.score"})  # which has a test of its own, since it needs a model
HERE = [r for r in REWARDS if r not in NEEDS]


def installed(package):
    return importlib.util.find_spec(package) is not None


needs_math_verify = pytest.mark.skipif(not installed("math_verify"), reason="math-verify is not installed")


def strings():
    """Arbitrary text: any code points, lone surrogates too, thick with what the rewards look for; and what parsers fear."""
    rng = random.Random(0)
    pieces = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "}",
        "####",
        "answer is",
        "1",
        ",",
        ".",
        "/",
        "%",
        "-",
    ]
    pieces += [
        "\n",
        " ",
        "*",
        "**",
        "[",
        "]",
        "<<",
        ">>",
        '"',
        "“",
        "```",
        "{",
        "P.S.",
        "1.",
        "- ",
        "word",
        "WORD",
        "\\frac{1}{",
        "e9",
    ]
    for _ in range(60):
        yield "".join(
            rng.choice(pieces) if rng.random() < 0.7 else chr(rng.randrange(sys.maxunicode + 1))
            for _ in range(rng.randrange(80))
        )
    yield from ("", " ", "\x00", "\ud800", "İ", "ǅ", "٣", "½", "1/0", "1e999999999", "9" * 5000, "0/0%", "-", "$")
    yield from (piece * 20_000 for piece in pieces)
    yield from (
        a * 5_000 + b * 5_000 for a, b in ((" ", "x"), ("\n ", "."), ('."', " "), ("<<a", "b"), ("*a", " "), ("1 ", "1,111"))
    )


STRINGS = list(strings())


@pytest.mark.parametrize("name", HERE)
def test_every_reward_is_total_deterministic_and_bounded_in_time(name):
    reward, record = resolve.resolve({"name": name, **OPTIONS.get(name, {})}, "rewards"), json.dumps(RECORD)
    given, begun = json.loads(record), time.thread_time()
    first = [reward(given, text) for text in STRINGS]
    # Of this thread's own time, so that a busy machine does no harm. 1.7 s were needed at most; a step for each pair of
    # characters of the longest string, 280,000, would take an hour.
    assert time.thread_time() - begun < 40
    assert all(value is None or np.isfinite(float(value)) for value in first) and json.dumps(given) == record
    assert [reward(given, text) for text in STRINGS[:80]] == first[:80]


def test_the_discovery_finds_all_of_them():
    assert {"math.exact", "format.tags", "gym.score", "text.length", "instructions.words"} < set(REWARDS)
    assert not any(name.startswith("sandbox") for name in REWARDS)


@pytest.mark.parametrize(
    ("answer", "completion", "same"),
    [
        ("Paris", " paris. ", True),
        ("Paris", "It is Paris", False),
        ("New York", "The answer is **New\n York**.", True),
        ("x + 1", "so \\boxed{x + 1}, done", True),
        ("{1, 2}", "\\boxed{{1, 2}}", True),
        ("even", "\\boxed{\\text{Even}}", True),
        ("\\text{New York}", "\\boxed{\\mathbf{\\text{New York}}}", True),
        ("R", "\\mathbb{R}", False),
        ("no", "<think>yes</think><answer> No </answer>", True),
        ("no", "<answer>no</answer> but <answer>yes</answer>", False),
        ("Some steps\n#### 7", "#### 7", True),
        (7, "7", True),
        ("ﬁve", "five", True),
        ("", "", True),
        ("a", "", False),
    ],
)
def test_exact(answer, completion, same):
    assert math.exact({"answer": answer}, completion) is same


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("72", "72"),
        ("3, and 1,234,567", "1234567"),
        ("1,2,3", None),
        ("12-5", None),
        ("it is -5.", "-5"),
        ("−7", "-7"),
        ("10–12", None),
        ("-$1,000.50!", "-1000.5"),
        ("$-3", "-3"),
        (".5", "0.5"),
        ("3.14.15", None),
        ("50 %", "50"),
        ("3 / 4 cups", "0.75"),
        ("\\frac{3}{7}", "3/7"),
        ("$-\\dfrac34$", "-0.75"),
        ("2\\frac{1}{2}", "2.5"),
        ("1{,}000\\%", "1000"),
        ("1.5e3.", "1500"),
        ("no number", None),
        # Marks: their order, the last of a kind, and which number of theirs.
        ("\\boxed{1} #### 2\n<answer>3</answer> the answer is 4. 5", "3"),
        ("<answer>3</answer> \\boxed{1}\n#### 2 apples of 9\nthe answer is 4. 5", "2"),
        ("<answer>3</answer> the answer is 4. 5", "3"),
        ("the answer is 4. 5", "4"),
        ("**Answer:** 6 of 7", "6"),
        ("\\boxed{1} or \\boxed{x = 2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{1", None),
        ("1 \\boxed{none}", None),
        ("1 ####", None),
        ("#### 1 #### 2\n3", "2"),
        ("the answer is 1. no, the answer is 2", "2"),
    ],
)
def test_extract(completion, found):
    assert math.extract(completion) == found


@pytest.mark.parametrize(
    ("answer", "completion", "same"),
    [
        ("1234", "$1,234.00", True),
        ("0.1", "1/10", True),
        (0.1, "0.1", True),
        ("0.3333", "1/3", False),
        ("1/3", "\\boxed{\\frac{2}{6}}", True),
        ("2.5", "2 1/2", True),
        ("-2.5", "-2 1/2", True),
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("50", "50%", True),
        ("0.5", "50%", True),
        ("50%", "0.5%", False),
        ("50", "5000%", True),
        ("50", "0.5", False),
        ("1500", "1.5e3", True),
        ("7", "1/0", False),
        ("7", "1e99999999", False),
        ("7", "7" * 600, False),
        ("-7", "7", False),
        ("9007199254740993", "9007199254740992", False),  # which are one float
        ("She has 3 * 24 = <<3*24=72>>72\n#### 72", "3 times 24 is 72.", True),
        ("7", "none", False),
    ],
)
def test_numeric(answer, completion, same):
    assert math.numeric({"answer": answer}, completion) is same


def test_numbers_are_exact_fractions():
    spelled = {
        "1 1/2": Fraction(3, 2),
        "-.25": Fraction(-1, 4),
        "$1,000": Fraction(1000),
        "1e-3": Fraction(1, 1000),
        "3/4": Fraction(3, 4),
    }
    assert {k: answers.value(k).value for k in spelled} == spelled


@pytest.mark.parametrize("reward", [math.exact, math.numeric, math.verify])
def test_a_record_without_an_answer_is_the_users_to_mend(reward):
    with pytest.raises(UserError, match="`answer` column"):
        reward({"prompt": "1+1"}, "2")


def test_an_answer_that_is_no_number_is_one_failure():
    with pytest.raises(ValueError, match="is no single number") as caught:
        math.numeric({"answer": "Paris"}, "2")
    assert not isinstance(caught.value, UserError)


@needs_math_verify
@pytest.mark.parametrize(
    ("answer", "completion", "same"),
    [
        ("1/2", "so \\boxed{0.5}", True),
        ("\\frac{1}{2}", "it is $\\frac{2}{4}$", True),
        ("x^2 - 1", "\\boxed{(x-1)(x+1)}", True),
        ("x^2 - 1", "\\boxed{(x-1)(x+2)}", False),
        ("steps\n#### 72", "I get 72.", True),
        ("so it is $\\frac{1}{2}$.", "0.5", True),
        ("5 apples", "\\boxed{5}", True),
        ("by $2$ rules it is\n#### x^2 - 1", "\\boxed{(x-1)(x+1)}", True),
        ("72", "", False),
    ],
)
def test_verify(answer, completion, same):
    assert math.verify({"answer": answer}, completion) is same


@needs_math_verify
def test_a_verifier_that_hangs_is_killed_in_time_and_the_next_is_judged():
    records, texts = [{"answer": "9"}, {"answer": "9"}], ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{3^2}"]
    verify = resolve.resolve({"name": "math.verify", "seconds": 1.0}, "rewards")
    first, second = judged({"verify": (verify, 1.0)}, records, texts, threads=1)
    assert "TimeoutError" in first.failures[0] and "more than 1 s" in first.failures[0] and second.total == 1.0


@needs_math_verify
def test_verify_gives_a_verdict_or_an_error_on_any_string():
    for completion in STRINGS[:74]:
        with contextlib.suppress(TimeoutError):
            assert math.verify({"answer": "7"}, completion, seconds=1.0) in (False, True)


@pytest.mark.parametrize(
    ("completion", "tags", "think", "boxed"),
    [
        ("<think>a</think>\n<answer>\\boxed{1}</answer>\n", True, True, True),
        ("<think>a</think> 1", False, True, False),
        ("so: <think>a</think><answer>1</answer>", False, False, False),
        ("<think>a</think><answer>1</answer>.", False, True, False),
        ("<think>a</think>x<answer>1</answer>", False, True, False),
        ("<answer>1</answer><think>a</think>", False, False, False),
        ("<think>a<answer>1</answer></think>", False, False, False),
        ("<think>a</think><answer>1", False, True, False),
        ("<think>a</think><think>b</think><answer>1</answer>", False, False, False),
        ("<think>a</think>", False, False, False),
        ("<think></think><answer></answer>", True, True, False),
        ("\\boxed{1} \\boxed{2}", False, False, False),
        ("\\boxed{ }", False, False, False),
    ],
)
def test_formats(completion, tags, think, boxed):
    assert (format.tags({}, completion), format.think({}, completion), format.boxed({}, completion)) == (tags, think, boxed)


def test_tags_may_be_others():
    assert format.tags({}, "<a>1</a> <b-2>2</b-2>", tags=["a", "b-2"]) and not format.tags({}, "<a></a>", tags=["a", "b"])
    assert format.tags({}, "<think>1</think>", tags="think")
    for tags in ([], "<a>", ["<a>"], [3]):
        with pytest.raises(UserError, match="without the brackets"):
            format.tags({}, "", tags=tags)
    assert format.boxed({}, "\\boxed{1} \\boxed{2}", most=2)


def test_formats_know_a_tag_that_the_prompt_opens():
    for record, options in (({}, {"opened": True}), ({"prompt": "1+1?\n<think>\n"}, {})):
        assert format.think(record, "a</think> 1", **options) and not format.think(record, "<think>a</think> 1", **options)
        assert format.tags(record, "a</think><answer>1</answer>", **options)
        assert not format.tags(record, "<think>a</think><answer>1</answer>", **options)
    assert not format.think({"prompt": "1+1?"}, "a</think> 1")


@pytest.mark.parametrize(
    ("completion", "boxed"),
    [
        ("\\boxed{1} \\boxed{2", False),
        ("\\boxed{2", False),
        ("\\boxed{}", False),
        ("\\boxed{{1, 2}}", True),
        ("\\boxed {7}", True),
    ],
)
def test_boxed_agrees_with_what_is_extracted(completion, boxed):
    assert format.boxed({}, completion) is boxed


def test_lengths():
    found = [text.length({}, "w " * n, at_least=3, at_most=4, slack=1) for n in range(8)]
    assert found == [0.0, 0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert [text.length({}, "w " * n, at_most=1) for n in range(3)] == [1.0, 1.0, 0.0]
    with pytest.raises(UserError, match="leave no length"):
        text.length({}, "", at_least=3, at_most=2)


def test_repetition():
    # TRL's example: of the four pairs of five equal words one is new.
    assert text.repetition({}, "a A a a a", ngram_size=2) == -0.75 and text.repetition({}, "a b c d", ngram_size=2) == 0
    assert text.repetition({}, "a b", ngram_size=3) == text.repetition({}, "") == 0.0
    assert text.repetition({}, "a a a", ngram_size=1, max_penalty=-3.0) == pytest.approx(-2.0, rel=1e-12)
    with pytest.raises(UserError, match="ngram_size=0"):
        text.repetition({}, "", ngram_size=0)


def test_cosine():
    def value(words, answer, **options):
        return text.cosine({"answer": "7"}, "w " * (words - 1) + answer, max_len=10, **options)

    # Half way the cosine is 0: the mean of the two ends. Past max_len it stays at its end.
    for words, right, wrong in ((5, 0.75, -0.75), (10, 0.5, -0.5), (20, 0.5, -0.5)):
        assert value(words, "7") == pytest.approx(right, abs=1e-12) and value(words, "8") == pytest.approx(wrong, abs=1e-12)
    assert value(1, "7") > value(2, "7") and value(1, "8") < value(2, "8")
    assert text.cosine({"answer": "7"}, "", max_len=10) == -1.0
    assert value(10, "7", correct={"name": "text.length", "at_most": 3}, max_value_wrong=-0.25) == pytest.approx(
        -0.25, abs=1e-12
    )
    with pytest.raises(UserError, match="max_len=0"):
        text.cosine({"answer": "7"}, "7", max_len=0)


def test_cosine_has_no_say_where_right_and_wrong_have_none(monkeypatch):
    monkeypatch.setattr(math, "numeric", lambda record, completion: None)
    assert text.cosine({"answer": "7"}, "7", max_len=10) is None


@pytest.fixture
def scorer(monkeypatch):
    """A reward model without a folder: the small transformer, a head of numbers, and the arithmetic task's letters."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(small.MODEL.init, jax.random.PRNGKey(0))
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), shapes)
    params["reward_head"] = {"kernel": np.linspace(-1, 1, 32, dtype=np.float32)[:, None]}
    opened = []

    def open_model(folder, mesh):
        opened.append(folder)
        spec = loading.ModelSpec(small.MODEL, None if folder == "mute" else arithmetic.tokenizer(), {}, None)
        return spec, {k: v for k, v in params.items() if folder != "plain" or k != "reward_head"}

    monkeypatch.setattr(loading, "open_model", open_model)
    monkeypatch.setattr(model, "ROWS", 1)  # eight at a time on eight devices
    model._opened.cache_clear()
    yield params, opened
    model._opened.cache_clear()


def test_a_reward_model_that_sees_prompts_whole_judges_as_it_was_trained(scorer, monkeypatch):
    params, _ = scorer
    prefix = dataclasses.replace(small.MODEL, arch=dataclasses.replace(small.ARCH, attend="prefix"))
    spec = loading.ModelSpec(prefix, arithmetic.tokenizer(), {}, None)
    monkeypatch.setattr(loading, "open_model", lambda folder, mesh: (spec, params))
    score = model.score({"prompt": "12+34"}, "46", folder="run")
    ids = np.array([arithmetic.tokenizer().encode("<|user|>12+34<|assistant|>46<|end|>")], np.int32)
    places = np.arange(ids.shape[1])[None]
    batch = {"tokens": ids, "segments": np.ones_like(ids), "positions": places, "mask": places >= ids.shape[1] - 3}
    hidden = prefix.forward(params, jax.tree.map(jnp.asarray, batch)).hidden
    assert score == pytest.approx(float(hidden[0, -1] @ params["reward_head"]["kernel"][:, 0]), abs=1e-5)


def test_a_reward_model_judges_at_the_end_of_the_completion(scorer):
    params, opened = scorer
    records = [{"prompt": p} for p in ("1+1", "12+34", "1+1", "7x8-5", "1+1", "9-9", "3x3", "12-3", "2+2", "5+5")]
    texts = ["2", "46", "11", "51", "1" * 30, "0", "", "9", "4", "10"]
    reward = resolve.resolve({"name": "model.score", "folder": "run"}, "rewards")
    scores = judged({"rm": (reward, 1.0)}, records, texts, failed=-9.0, limit=0.2)
    assert "36 tokens, the reward model takes 20" in scores[4].failures[0] and scores[4].total == -9.0
    words = arithmetic.tokenizer()
    for i, (record, completion) in enumerate(zip(records, texts, strict=True)):
        if i in (1, 6):  # each alone, by hand: the head at the stop token, on the document without padding
            ids = np.array([words.encode(f"<|user|>{record['prompt']}<|assistant|>{completion}<|end|>")], np.int32)
            batch = {"tokens": ids, "segments": np.ones_like(ids), "positions": np.arange(ids.size, dtype=np.int32)[None]}
            hidden = np.asarray(small.MODEL.forward(params, batch).hidden[0, -1])
            # float32 sums of 32 terms in another order.
            assert scores[i].total == pytest.approx(float(hidden @ params["reward_head"]["kernel"][:, 0]), abs=1e-5)
    assert reward(records[1], texts[1]) == pytest.approx(scores[1].total, abs=1e-6)
    turns = [{"role": "user", "content": "12+34"}]
    assert reward({"prompt": turns}, "46") == pytest.approx(scores[1].total, abs=1e-6) and opened == ["run"]
    assert len({round(s.total, 4) for s in scores}) == len(scores)
    with pytest.raises(ValueError, match="36 tokens"):
        reward(records[4], texts[4])


def test_what_is_no_reward_model_is_refused_before_anything_is_judged(scorer):
    for folder, message in (("plain", "no reward head"), ("mute", "no tokenizer")):
        with pytest.raises(UserError, match=message):
            judged({"rm": (resolve.resolve({"name": "model.score", "folder": folder}, "rewards"), 1.0)}, [], [])
    with pytest.raises(UserError, match="under `prompt`"):
        model.score({"answer": "2"}, "2", folder="run")
