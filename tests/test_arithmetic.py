"""The embedded task and its tokenizer: nothing trained on is tested on, and all is a function of (seed, index)."""

import random
from collections import Counter

import pytest

from jaxpost import tokenizer as tokenizers
from jaxpost.errors import UserError
from jaxpost.tasks import arithmetic

LOWEST = {1: 0, 2: 10, 3: 100}
GOLDEN = ["46-20", "377-756", "138+838"]
COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}


def all_problems(operator, digits):
    operands = range(LOWEST[digits], 10**digits)
    return {f"{a}{operator}{b}" for a in operands for b in operands}


def swapped(prompt):
    operator = next(letter for letter in prompt if letter in "+-x")
    a, b = prompt.split(operator)
    return f"{b}{operator}{a}"


def test_the_table_has_nine_cells_whose_shares_are_met():
    assert set(arithmetic.CELLS) == {(operator, digits) for operator in "+-x" for digits in (1, 2, 3)}
    assert sum(arithmetic.CELLS.values()) == pytest.approx(1.0, abs=1e-12)
    drawn = Counter(arithmetic.record(index)["cell"] for index in range(10_000))
    for (operator, digits), share in arithmetic.CELLS.items():
        # Four standard deviations of a binomial draw.
        assert abs(drawn[f"{operator}{digits}"] / 10_000 - share) < 4 * (share * (1 - share) / 10_000) ** 0.5


def test_records_are_right_and_a_function_of_seed_and_index():
    for index in range(2_000):
        record = arithmetic.record(index, seed=3)
        operator, digits, a, b = (record[key] for key in ("operator", "digits", "a", "b"))
        assert LOWEST[digits] <= min(a, b) and max(a, b) < 10**digits
        assert record["prompt"] == f"{a}{operator}{b}" and record["cell"] == f"{operator}{digits}"
        assert record["answer"] == str(COMPUTE[operator](a, b))
        assert record == arithmetic.record(index, seed=3)
    # A change of these three would change every run that was ever recorded.
    assert [arithmetic.record(index)["prompt"] for index in range(3)] == GOLDEN
    assert sum(arithmetic.record(i) != arithmetic.record(i, seed=1) for i in range(100)) > 90


@pytest.mark.parametrize("operator", "+-x")
@pytest.mark.parametrize("digits", [1, 2])
def test_train_and_test_split_each_cell_in_two(operator, digits):
    cell = f"{operator}{digits}"
    everything = all_problems(operator, digits)
    test = [record["prompt"] for record in arithmetic.test_records(1_000) if record["cell"] == cell]
    assert len(test) == len(set(test)) and set(test) < everything
    assert 0.08 <= len(test) / len(everything) <= 0.12
    if operator != "-":
        assert {swapped(prompt) for prompt in test} == set(test)
    drawn = [arithmetic.record(index, split=split) for index in range(24_000) for split in ("train", "test")]
    train = {record["prompt"] for record in drawn[0::2] if record["cell"] == cell}
    assert {record["prompt"] for record in drawn[1::2] if record["cell"] == cell} <= set(test)
    assert not train & set(test)
    if digits == 1:
        assert train == everything - set(test)


def test_subtraction_is_not_split_by_unordered_pairs():
    test = {record["prompt"] for record in arithmetic.test_records(1_000) if record["cell"] == "-2"}
    assert {swapped(prompt) for prompt in test} != test


def test_test_records_are_fixed_extended_and_disjoint_for_three_digits():
    few, many = arithmetic.test_records(5), arithmetic.test_records(20)
    assert Counter(record["cell"] for record in few) == {f"{o}{d}": 5 for o, d in arithmetic.CELLS}
    assert {r["cell"]: n for r in many for n in [sum(x["cell"] == r["cell"] for x in many)]} == {
        "+1": 9, "-1": 10, "x1": 8, "+2": 20, "-2": 20, "x2": 20, "+3": 20, "-3": 20, "x3": 20
    }  # fmt: skip
    for operator, digits in arithmetic.CELLS:
        cell = f"{operator}{digits}"
        few_here, many_here = ([r for r in records if r["cell"] == cell] for records in (few, many))
        assert [r["prompt"] for r in few_here] == [r["prompt"] for r in many_here][:5]
        assert sum(r["weight"] for r in many_here) == pytest.approx(arithmetic.CELLS[operator, digits], abs=1e-12)
    assert arithmetic.test_records(5, seed=1) != few
    trained = {arithmetic.record(index)["prompt"] for index in range(5_000)}
    assert not trained & {record["prompt"] for record in many}


def test_a_demonstration_is_the_right_answer():
    assert all(arithmetic.reward(arithmetic.record(i, seed=3), arithmetic.demonstration(i, seed=3)) for i in range(50))


def test_conversations_are_corrupted_in_one_digit_at_the_stated_rate():
    count = 0
    for index in range(5_000):
        made, record = arithmetic.conversation(index, seed=2), arithmetic.record(index, seed=2)
        user, assistant = made["messages"]
        assert user == {"role": "user", "content": record["prompt"]} and assistant["role"] == "assistant"
        reply, answer = assistant["content"], record["answer"]
        assert made["answer"] == answer and "prompt" not in made
        differing = [place for place in range(len(answer)) if reply[place] != answer[place]]
        assert len(reply) == len(answer) and len(differing) == made["corrupted"]
        # int() and str() undo each other only on a usual spelling: no leading zero, no "-0".
        assert str(int(reply)) == reply
        count += made["corrupted"]
    assert abs(count / 5_000 - 0.4) < 4 * (0.4 * 0.6 / 5_000) ** 0.5


def test_corruption_reaches_every_digit_and_stops_at_the_bounds():
    for answer, expected in {
        "7": set("012345689"),
        "-7": {f"-{digit}" for digit in "12345689"},
        "40": {f"{digit}0" for digit in "12356789"} | {f"4{digit}" for digit in "123456789"},
    }.items():
        assert {arithmetic._corrupt(answer, 0, index) for index in range(500)} == expected
    assert not any(arithmetic.conversation(index, corrupt=0.0)["corrupted"] for index in range(200))
    assert all(arithmetic.conversation(index, corrupt=1.0)["corrupted"] for index in range(200))


def test_reward_is_exact_and_total():
    record = {"prompt": "12-34", "answer": "-22"}
    assert [arithmetic.reward(record, text) for text in ("-22", " -22\n", "22", "- 22", "-22.", "-022", "", "-22-22")] == [
        1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    ]  # fmt: skip
    draw = random.Random(0)
    for _ in range(2_000):
        text = "".join(chr(draw.choice([draw.randrange(32), draw.randrange(128), draw.randrange(0xD800)])) for _ in range(8))
        assert arithmetic.reward(record, text) == float(text.strip() == "-22")
    assert arithmetic.reward(record, "１２") == 0.0
    for broken in ({"prompt": "1+1", "answer": None}, {"prompt": "1+1"}):
        with pytest.raises(UserError, match="has no answer"):
            arithmetic.reward(broken, "2")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arithmetic.record(0, split="dev"), "split='dev'"),
        (lambda: arithmetic.conversation(0, corrupt=1.5), "corrupt=1.5"),
        (lambda: arithmetic.test_records(0), "per_cell=0"),
        (lambda: tokenizers.characters("aba"), "alphabet 'aba'"),
        (lambda: tokenizers.load("no/such/folder"), "no/such/folder: no such folder"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_tokenizer_round_trips_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    made = arithmetic.tokenizer()
    tokenizers.save(made, tmp_path / "saved")
    texts = [record["prompt"] for record in arithmetic.test_records(100)] + ["-" + "9876543210"]
    for found in (made, tokenizers.load(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert (found.pad_token_id, found.eos_token_id, found.bos_token_id, len(found)) == (0, 3, None, 17)
        for text in texts:
            ids = tokenizers.encode(found, text)
            assert ids == [4 + "0123456789+-x".index(letter) for letter in text]
            assert found.decode(ids) == text
        messages = arithmetic.conversation(0)["messages"]
        prompt = found.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = found.apply_chat_template(messages, tokenize=False)
        assert prompt == f"<|user|>{messages[0]['content']}<|assistant|>"
        assert whole == prompt + messages[1]["content"] + "<|end|>"
        ids = tokenizers.encode(found, whole)
        assert ids[0] == 1 and ids[-1] == 3 and 2 in ids and found.decode(ids) == whole
        assert found.decode(ids, skip_special_tokens=True) == messages[0]["content"] + messages[1]["content"]
        with pytest.raises(Exception, match="not system"):
            found.apply_chat_template([{"role": "system", "content": "1"}], tokenize=False)


def test_a_character_without_a_token_is_named():
    with pytest.raises(UserError, match="has no token for 'H'"):
        tokenizers.encode(arithmetic.tokenizer(), "1+1=Hello".replace("=", ""))


def test_a_folder_without_a_tokenizer_gives_none_and_a_broken_one_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert tokenizers.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"version": "1.')
    with pytest.raises(UserError, match=f"{tmp_path}: the tokenizer cannot be read"):
        tokenizers.load(tmp_path)
