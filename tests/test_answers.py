"""The grammar of answers: a table of spellings, each with its near misses; what is no number; time; votes."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

from jaxpost.errors import UserError
from jaxpost.evals import pass_at_k
from jaxpost.rewards import answers, formulas, math
from jaxpost.tasks import gsm8k

TABLE = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text().splitlines()]
NO_NUMBERS = [
    "2:5",
    "(2, 5)",
    "4\\sqrt{2}",
    "12\\pi",
    "1010_2",
    "12:00",
    "5 or 6",
    "3-5",
    "1,5",
    "Paris",
    "x + 3",
    "2x",
    "2^{10}",
    "12/05/2020",
    "[2, 5)",
    "\\frac{\\pi}{2}",
    "5!",
    "x > 5",
    "0x1F",
    "3 + 4i",
    "2 hours 30 minutes",
    "1/2/3",
    "|5|",
    "\\pm 3",
    "x = 5, y = 6",
    "\\log 5",
    "5'6\"",
    "5 to 10",
    "#### 2:5",
    "",
]


def test_numeric_judges_the_table_of_spellings():
    rows = [row for row in TABLE if row["kind"] != "refused"]
    wrong = [row for row in rows if math.numeric({"answer": row["gold"]}, row["completion"]) is not row["verdict"]]
    assert not wrong and len(rows) > 1000 and sum(row["verdict"] for row in TABLE) < len(TABLE) / 2


def test_verify_judges_numbers_as_numeric_does():
    # In this process: where both are numbers math-verify is not asked.
    for row in TABLE:
        if row["verdict"]:
            assert answers.value(row["completion"]).equals(answers.value(row["gold"], alone=True)), row


@pytest.mark.parametrize("value", ["7", "-12", "1234567", "0.25", "-3.5"])
@pytest.mark.parametrize(
    "mark", ["\\boxed{%s}", "#### %s", "<answer>%s</answer>", "the answer is %s.", "so %s", "\\boxed{5} no\n#### %s pages"]
)
def test_every_mark_takes_every_number_and_none_of_its_neighbours(mark, value):
    completion = "First 99 and then:\n" + mark % value
    assert math.extract(completion) == value and math.numeric({"answer": value}, completion)
    for other in ("99", "5", value + "1", value.removeprefix("-") if value[0] == "-" else "-" + value):
        assert not math.numeric({"answer": other}, completion)


def test_every_gold_of_the_table_that_is_no_single_number_is_refused():
    for row in TABLE:
        if row["kind"] == "refused":
            assert answers.value(row["gold"], alone=True) is None, row
            with pytest.raises(ValueError, match="no single number"):
                math.numeric({"answer": row["gold"]}, row["completion"])


@pytest.mark.parametrize("gold", NO_NUMBERS)
def test_a_gold_that_is_no_single_number_is_refused_by_numeric(gold, tmp_path):
    with pytest.raises(ValueError, match="no single number; rewards.math.verify"):
        math.numeric({"answer": gold}, "5")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "?", "answer": f"#### {gold.removeprefix('#### ')}"}) + "\n")
    with pytest.raises(UserError, match="line 1: its answer does not end in #### and a single number"):
        gsm8k.make(data=str(path))


PIECES = [
    "1",
    "1 ",
    "\\boxed{",
    "answer is ",
    "answer: 5\n",
    "####",
    "#### a\n",
    "\\frac{",
    "^{",
    "(",
    "5 (",
    "<answer>",
    "-",
    "½",
]


PIECES += ["which is ", "5, which is ", "not 5 or ", "5 of the ", "5->", "5=", "(5)/", "5 and a half ", "$5 M ", "<|a|>", "<|"]
PIECES += [
    "\\begin{",
    "\\frac{km}{h}5",
    "5...",
    "5/-",
    "3 to ",
    "because ",
    "5 because ",
    "f(",
    "twice ",
    "May 5 ",
    "5₂",
    "(x, ",
]


@pytest.mark.parametrize("piece", [*PIECES, "1,111", " ", "<<", "a-1", "answer is a. ", "1/", "5 x"])
def test_the_time_is_at_most_linear_in_the_length(piece):
    begun = time.thread_time()
    text = piece * (64_000 // len(piece))
    for completion in (text, f"#### {text}", f"\\boxed{{{text}}}", f"the answer is {text}"):
        math.numeric({"answer": "7"}, completion)
        math.exact({"answer": "7"}, completion)
        formulas.evaluates(formulas.spoken(completion, whole=False)), formulas.in_words(completion)
    assert time.thread_time() - begun < 2  # a step for each pair of characters would take minutes


def test_the_majority_is_of_values_not_of_spellings():
    texts = ["#### 18", "#### 18.00", "The answer is $18.0", "#### 20", "#### 20"]
    assert pass_at_k.majority([[1, 1, 1, 0, 0]], [[gsm8k.extract(text) for text in texts]], 5).tolist() == [1.0]
    texts = ["\\boxed{12\\pi}", "\\boxed{12}", "", "\\boxed{24/2}", "\\boxed{0.5}", "\\boxed{\\frac12}"]
    assert [gsm8k.extract(text) for text in texts] == ["12\\pi", "12", None, "12", "0.5", "0.5"]


VERIFY = [
    ("3-5", "\\boxed{-2}", "\\boxed{3-5}"),
    ("12 π", "12", "the answer is $12\\pi$"),
    ("12π", "\\boxed{12}", "The answer is 12π."),
    ("(2, 5)", "\\boxed{(5, 2)}", "The answer is (2, 5)."),
    ("1010_{2}", "\\boxed{1010}", "The answer is 1010_2."),
    ("4√2", "\\boxed{4}", "\\boxed{2\\sqrt{8}}"),
    ("0.\\overline{3}", "\\boxed{0.3}", "\\boxed{\\frac13}"),
    ("0.1666...", "\\boxed{0.1666}", "\\boxed{1/6}"),
    ("5‰", "\\boxed{5}", "\\boxed{5‰}"),
    ("May 5", "\\boxed{5}", "The answer is May 5."),
    ("5xy", "\\boxed{5}", "\\boxed{5yx}"),
    ("0x1F", "\\boxed{0}", "\\boxed{0x1F}"),
    ("5", "The answer is at least 5.", "The answer is $\\sqrt{25}$."),
    ("5", "\\boxed{5 \\text{ or more}}", "\\boxed{\\sqrt{25}\\text{ cm}}"),
    ("even", "\\boxed{\\text{odd}}", "\\boxed{\\text{even}}"),
    ("\\text{Monday}", "Tuesday", "Monday"),
    ("6", "\\boxed{5 = 6}", "\\boxed{x = \\sqrt{36}}"),
]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
@pytest.mark.parametrize(("gold", "wrong", "right"), VERIFY)
def test_verify_compares_golds_as_what_they_are(gold, wrong, right):
    assert not math._same(gold, wrong) and math._same(gold, right) and math._same(gold, f"\\boxed{{{gold}}}")


def test_a_marked_formula_keeps_the_dollars_that_open_it():
    assert answers.marked("So the answer is $4\\sqrt{2}$.").text == "$4\\sqrt{2}$."
