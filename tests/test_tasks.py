"""GSM8K, countdown and the stories: problems that are kept apart, rewards that are right and total, prompts that fit."""

import json
import random
import types
from fractions import Fraction
from pathlib import Path

import pytest

from jaxpost import recipe
from jaxpost import tokenizer as tokenizers
from jaxpost.config import resolve
from jaxpost.data import chat
from jaxpost.errors import UserError
from jaxpost.rewards import math
from jaxpost.stages import datasets, tasks
from jaxpost.tasks import arithmetic, countdown, gsm8k, stories

ROWS = [
    {
        "question": f"A farm has {i} cows. How many legs?",
        "answer": f"There are {i}*4=<<{i}*4={4 * i}>>{4 * i} legs.\n#### {4 * i}",
    }
    for i in range(60)
]


HELD = [9, 25, 40, 47, 54, 58]


def written(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def noise(count, seed=0):
    draw = random.Random(seed)
    letters = "0123456789+-*/()= <>answer.\n×²\ud7ff😀"
    return ["".join(draw.choice(letters) for _ in range(draw.randrange(24))) for _ in range(count)]


# --------------------------------------------------------------------------------------------------------------- GSM8K


def test_gsm8k_reads_rows_into_problems_and_worked_solutions(tmp_path):
    task = gsm8k.make(data=written(tmp_path, ROWS))
    record = task.test_records(1)[0]
    cows = int(record["question"].split()[3])
    assert record == {
        "prompt": f"A farm has {cows} cows. How many legs?\n{gsm8k.INSTRUCTION}",
        "question": f"A farm has {cows} cows. How many legs?",
        "answer": str(4 * cows),
        "solution": f"There are {cows}*4={4 * cows} legs.\n#### {4 * cows}",
    }
    made, first = task.conversation(7, seed=3), task.record(7, seed=3)
    assert [m["role"] for m in made["messages"]] == ["user", "assistant"]
    assert [m["content"] for m in made["messages"]] == [first["prompt"], first["solution"]]
    assert task.demonstration(7, seed=3) == first["solution"] and task.reward(first, task.demonstration(7, seed=3))
    assert made["answer"] == first["answer"] and not {"prompt", "solution"} & made.keys()
    assert task.reward(record, made["messages"][1]["content"]) == (first["answer"] == record["answer"])
    assert task.reward(record, f"so\n#### {4 * cows}.0") and not task.reward(record, f"#### {4 * cows + 1}")
    assert [task.extract(text) for text in ("it is $1,080", "#### 7 cows", "none")] == ["1080", "7", None]


def test_gsm8k_goes_through_all_rows_in_an_order_of_each_seed_and_pass(tmp_path):
    task = gsm8k.make(data=written(tmp_path, ROWS))
    held = [r["question"] for r in task.test_records(1000)]
    count = len(ROWS) - len(held)
    # A change of these would train runs on what was held out of those before.
    assert sorted(int(question.split()[3]) for question in held) == HELD
    passes = [[task.record(i, seed=s)["question"] for i in range(a, a + count)] for s, a in ((0, 0), (0, count), (1, 0))]
    for own in passes:
        assert set(own) | set(held) == {r["question"] for r in ROWS} and not set(own) & set(held)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    # The split is the question's: another order of the file holds out the same.
    other = gsm8k.make(data=written(tmp_path, ROWS[::-1]))
    assert {r["question"] for r in other.test_records(1000)} == set(held)
    assert other.test_records(3) == other.test_records(5)[:3]
    assert {task.record(i, split="test")["question"] for i in range(len(held))} == set(held)


def test_gsm8k_trains_on_no_question_of_its_test_file(tmp_path):
    test = [{**ROWS[5], "question": ROWS[5]["question"].upper() + "  "}, {"question": "New?", "answer": "#### 1"}]
    task = gsm8k.make(data=written(tmp_path, ROWS), test=written(tmp_path, test, "test.jsonl"))
    assert {r["answer"] for r in task.test_records(9)} == {"20", "1"}
    assert {task.record(i)["question"] for i in range(59)} == {r["question"] for r in ROWS} - {ROWS[5]["question"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "?"}], "rows.jsonl, line 1: has no texts `question` and `answer`"),
        (
            [ROWS[0], {"question": "?", "answer": "18"}],
            "rows.jsonl, line 2: its answer does not end in #### and a single number",
        ),
        ([{"question": "?", "answer": "#### many"}], "does not end in #### and a single number"),
        (ROWS[:1], "no row is left for the (train|test) split"),
    ],
)
def test_gsm8k_names_what_is_wrong_with_its_files(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        gsm8k.make(data=written(tmp_path, rows))


def test_a_task_takes_its_keys_from_the_config(tmp_path):
    keys = {"data": written(tmp_path, ROWS)}
    assert len(resolve.bind(gsm8k.make, keys, "task gsm8k")().test_records(2)) == 2
    with pytest.raises(UserError, match="task gsm8k needs data"):
        resolve.bind(gsm8k.make, {}, "task gsm8k")
    with pytest.raises(UserError, match="takes no option 'dat'. Did you mean 'data'"):
        resolve.bind(gsm8k.make, {"dat": ""}, "task gsm8k")


def test_a_task_that_was_made_of_its_keys_gives_demonstrations(tmp_path):
    settings = recipe.make(task={"name": "gsm8k", "data": written(tmp_path, ROWS), "examples": 4}, split_seed=3)
    task = tasks.task(settings)
    (part,) = datasets.sources(task, settings)
    assert [record.row for record in part.records] == [task.conversation(i, seed=3) for i in range(4)]
    settings = recipe.make(task={"name": "arithmetic", "corrupt": 0.0, "examples": 50})
    (part,) = datasets.sources(tasks.task(settings), settings)
    assert not any(record.row["corrupted"] for record in part.records)


def test_a_bound_on_problems_draws_the_first_ones_round_and_round():
    model = types.SimpleNamespace(tokenizer=arithmetic.tokenizer(), transformer=types.SimpleNamespace(vocab=17), adapter={})

    def prompts(problems, too_long="drop", window=12):
        task = {"name": "arithmetic", "problems": problems}
        settings = recipe.make(task=task, too_long=too_long, rollouts={"prompt_window": window}, seed=3)
        module = tasks.task(settings)
        return tasks.prompts(module, tasks.rewards(module, "arithmetic"), model, settings, leave_out=True)

    drawn = [prompts(3)(i)[0] for i in range(7)]
    assert drawn == [arithmetic.record(i % 3, seed=3) for i in range(7)]
    assert prompts(0)(6)[0] == arithmetic.record(6, seed=3)
    for wrong in (-1, 1.5, True):
        with pytest.raises(UserError, match=f"config.task.problems: {wrong}; give how many problems to draw"):
            prompts(wrong)
    with pytest.raises(UserError, match="config.task.problems: all of the first 2 problems are left out"):
        prompts(2, window=1)


def test_the_verifier_agrees_with_every_row_of_gsm8k(shared):
    path = str(shared / "data" / "gsm8k" / "train.jsonl")
    task = gsm8k.make(data=path)
    raw = {row["question"].strip(): row["answer"] for row in map(json.loads, Path(path).read_text().splitlines())}
    held = task.test_records(10_000)
    records = held + [task.record(i) for i in range(len(raw) - len(held))]
    assert len(raw) == 7473 and {r["question"] for r in records} == raw.keys() and 600 < len(held) < 900
    for record in records:
        last = raw[record["question"]].rpartition("####")[2].strip()
        right = Fraction(last.replace(",", ""))
        assert Fraction(record["answer"].replace(",", "")) == right == Fraction(task.extract(record["solution"]))
        assert task.reward(record, record["solution"]) and task.reward(record, raw[record["question"]])
        assert task.reward(record, f"The answer is {last}.")
        for wrong in (right + 1, right / 100 if right else 7, -right or 1, right * 10 or 2):
            assert not task.reward(record, f"{record['solution'].rpartition('####')[0]}#### {float(wrong):.4f}")
        assert "<<" not in record["solution"] and "#### " in record["solution"]


# ----------------------------------------------------------------------------------------------------------- Countdown

SIX = countdown.make(sizes=(2, 3, 6), largest=20)


def test_countdown_problems_have_the_solution_that_they_were_made_with():
    seen = set()
    for index in range(600):
        record = SIX.record(index, seed=2)
        numbers, target = record["numbers"], record["target"]
        assert record["cell"] == str(len(numbers)) and all(1 <= n <= 20 for n in numbers) and 1 <= target <= 999
        # Python's own reading, of a text that this test made and no model did.
        assert eval(record["answer"].replace("/", "//")) == target == countdown.value(record["answer"], numbers)
        assert SIX.reward(record, record["answer"]) and SIX.reward(
            record, f"So <answer> {record['answer']} = {target} </answer>"
        )
        assert str(target) in record["prompt"] and f" and {numbers[-1]}." in record["prompt"]
        made = SIX.conversation(index, seed=2)
        assert made["messages"][0] == {"role": "user", "content": record["prompt"]} and "prompt" not in made
        assert SIX.reward(record, made["messages"][1]["content"]) and SIX.reward(record, SIX.demonstration(index, seed=2))
        seen |= {record["cell"], *(sign for sign in "+-*/(" if sign in record["answer"])}
    assert seen == {"2", "3", "6", *"+-*/("}
    assert SIX.record(3) == SIX.record(3) != SIX.record(3, seed=1)


def test_brief_countdown_is_numbers_alone_and_has_a_token_for_each_character():
    brief, words = countdown.make(sizes=(3,), largest=20, brief=True), countdown.tokenizer()
    for i in range(50):
        long, short = countdown.make(sizes=(3,), largest=20).record(i), brief.record(i)
        assert {**long, "prompt": short["prompt"]} == short
        assert short["prompt"] == f"{','.join(map(str, short['numbers']))}={short['target']}"
        assert brief.reward(short, brief.demonstration(i)) and brief.demonstration(i) == short["answer"]
        text = short["prompt"] + short["answer"]
        assert len(words(text)["input_ids"]) == len(text)
    assert {record["prompt"].count(",") for record in brief.test_records(5)} == {2}


def test_countdown_keeps_test_problems_out_of_training():
    task = countdown.make(sizes=(2, 3), largest=10)

    def key(record):
        return (*sorted(record["numbers"]), record["target"])

    test = [key(r) for r in task.test_records(40)]
    assert len(set(test)) == len(test) and sum(len(k) == 4 for k in test) == 40
    assert 0 < sum(len(k) == 3 for k in test) < 40  # of two numbers there are not so many
    trained = {key(task.record(i)) for i in range(6000)}
    assert not trained & set(test) and not trained & {key(task.record(i, split="test")) for i in range(500)}
    pairs = {k for k in trained | set(test) if len(k) == 3}
    assert 0.04 < sum(len(k) == 3 for k in test) / len(pairs) < 0.2
    assert {k[-1] for k in test if len(k) == 3} & {k[-1] for k in trained}  # a target alone decides nothing
    few, many = task.test_records(5), task.test_records(40)
    assert few == many[:5] + many[-40:-35]


@pytest.mark.parametrize(
    ("expression", "numbers", "expected"),
    [
        ("2+3*4", [2, 3, 4], 14),
        ("(2+3)*4", [4, 3, 2], 20),
        ("20-3-4", [20, 3, 4], 13),
        ("20/5/2", [2, 5, 20], 2),
        ("7/2", [2, 7], Fraction(7, 2)),
        ("8/(3-8/3)", [3, 3, 8, 8], 24),
        (" ( ( 5 ) ) ", [5], 5),
        ("6×3÷2−1", [6, 3, 2, 1], 8),
        ("2+3", [2, 3, 4], None),  # a number left out
        ("2+3+3", [2, 3], None),  # one twice
        ("23", [2, 3], None),
        ("2 3 +", [2, 3], None),
        ("2 (3)", [2, 3], None),
        ("(2)(3)", [2, 3], None),
        ("()2+3", [2, 3], None),
        ("-2+3", [2, 3], None),
        ("2+-3", [2, 3], None),
        ("2**3", [2, 3], None),
        ("2//3", [2, 3], None),
        ("(2+3", [2, 3], None),
        ("2+3)", [2, 3], None),
        ("2+3+", [2, 3], None),
        ("2.0+3", [2, 3], None),
        ("2+3;", [2, 3], None),
        ("2+３", [2, 3], None),
        ("3/(2-2)", [2, 2, 3], None),
        ("", [], None),
        ("1234567890", [1234567890], None),
        ("(" * 400 + "5" + ")" * 400, [5], 5),
        ("(" * 2000 + "5" + ")" * 2000, [5], None),
    ],
)
def test_countdown_reads_expressions_itself(expression, numbers, expected):
    assert countdown.value(expression, numbers) == expected


def test_countdown_judges_any_text():
    record = {"numbers": [3, 8, 25], "target": 1}
    good = ["25-3*8", "3*8-25 <answer>25-8*3</answer> done", "25 - (3*8) = 1", "<answer>2</answer><answer>25-3*8</answer>"]
    bad = ["25-3*8=2", "25-3*8=1=1", "the answer is 25-3*8", "<answer>25-3*8</answer><answer>1</answer>", "1", "", "3*8-25"]
    assert [countdown.reward(record, text) for text in good + bad] == [True] * len(good) + [False] * len(bad)
    assert not countdown.reward({"numbers": [7, 2], "target": 3}, "7/2")
    for text in noise(3000):
        assert countdown.reward(record, text) in (True, False)
    assert [countdown.extract(t) for t in (" 2 + 3 ", "<answer> 4×5 </answer>!", "", "1" * 2000)] == ["2+3", "4*5", None, None]


# ------------------------------------------------------------------------------------------------------------- Stories

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ bos_token if m.role == 'assistant' }}{% endfor %}"


def test_stories_keep_the_words_of_a_test_apart_and_leave_none_out():
    test = stories.test_records(10_000)
    own = {tuple(r["words"]) for r in test}
    assert len(own) == len(test) and 650 < len(test) < 950
    trained = {tuple(stories.record(i)["words"]) for i in range(20_000)}
    assert not trained & own and {w for words in trained for w in words} == {w for words in own for w in words}
    for words, many in zip(zip(*trained, strict=True), (stories.ANIMALS, stories.THINGS, stories.ADJECTIVES), strict=True):
        assert len(many) == len(set(many)) == 20 and set(words) == set(many)
    assert {tuple(stories.record(i, split="test")["words"]) for i in range(50)} <= own
    assert test[:7] == stories.test_records(7) != stories.test_records(7, seed=1)
    again = [stories.record(4, seed=9), stories.record(5, seed=9), stories.record(4, seed=8)]
    assert stories.record(4, seed=9) == again[0] not in again[1:]


@pytest.mark.parametrize(
    ("text", "stopped", "share"),
    [
        (" The cat was happy in its boat.", True, 1.0),
        (" The CAT was Happy.\nIts boat swam away. \n", True, 1.0),
        (" The cat was happy in its boat.", False, 0.75),
        (" The cat was happy in its boat", True, 0.75),
        (" The cats were unhappy. Its boat", True, 0.25),
        (" It was a dog.", True, 0.25),
        (" It was a dog.", False, 0.0),
        ("", True, 0.0),
    ],
)
def test_stories_are_judged_word_by_word_and_by_their_end(text, stopped, share):
    record = stories._record(("cat", "boat", "happy"))
    assert record["prompt"] == "Once upon a time, there was a happy cat. One day, the cat saw a boat."
    assert stories.reward({**record, "stopped": stopped}, text) == share
    assert stories.satisfied({**record, "stopped": stopped}, text) is (share == 1.0)
    if stopped:
        assert stories.reward(record, text) == share


def test_stories_are_short_for_the_model_that_they_are_for(shared):
    tokenizer = tokenizers.load(shared / "models" / "stories260k")
    for record in stories.test_records(10_000):
        ids = chat.encode_prompt(record["prompt"], tokenizer, TEMPLATE)
        assert ids[0] == 1 and len(ids) < 48 and tokenizer.decode(ids[1:]) == record["prompt"]
    assert set(chat.stop_ids(tokenizer, TEMPLATE)) == {1, 2}  # the stories' own end is the token that they begin with
    assert TEMPLATE in stories.__doc__


# -------------------------------------------------------------------------------------------------------- All of them


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stories.record(0, split="dev"), "split='dev': stories has"),
        (lambda: stories.test_records(0), "per_cell=0"),
        (lambda: SIX.record(0, split="dev"), "split='dev': countdown has"),
        (lambda: SIX.test_records(0), "per_cell=0"),
        (lambda: countdown.make(sizes=()), "sizes=()"),
        (lambda: countdown.make(sizes=(3, 3)), "sizes="),
        (lambda: countdown.make(sizes=(7,)), "sizes="),
        (lambda: countdown.make(largest=9), "largest=9"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        call()


def test_gsm8k_refuses_other_splits_and_no_problems(tmp_path):
    task = gsm8k.make(data=written(tmp_path, ROWS))
    with pytest.raises(UserError, match="split='dev': gsm8k has"):
        task.record(0, split="dev")
    with pytest.raises(UserError, match="per_cell=0"):
        task.test_records(0)
    assert task.reward is math.numeric
