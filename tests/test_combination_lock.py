"""The combination lock: what a code is, what is kept apart, and demonstrations that are wrong as often as asked."""

import pytest

from jaxpost.errors import UserError
from jaxpost.tasks import lock


def test_a_code_is_the_secret_digit_of_each_letter():
    task, secret = lock.make(), lock.digits(0)
    assert sorted(secret.values()) == list("0123456789") and secret != lock.digits(1)
    for i in range(50):
        record = task.record(i, seed=3)
        assert record["answer"] == "".join(secret[letter] for letter in record["prompt"])
        assert record["cell"] == len(record["prompt"]) and task.demonstration(i, seed=3) == record["answer"]
        assert lock.reward(record, f" {record['answer']}\n") and not lock.reward(record, record["answer"] + "0")
        assert not lock.reward(record, str((int(record["answer"][0]) + 1) % 10) + record["answer"][1:])


def test_locks_of_their_own_differ_and_each_is_a_permutation():
    records = [lock.make(depths=(8,), lock=None).record(i) for i in range(40)]
    pairs = [dict(zip(r["prompt"], r["answer"], strict=True)) for r in records]
    for record, digits in zip(records, pairs, strict=True):
        assert len(set(digits.values())) == len(digits)
        assert all(digits[letter] == digit for letter, digit in zip(record["prompt"], record["answer"], strict=True))
    assert len({digits.get("a") for digits in pairs}) > 5


def test_a_share_of_demonstrations_has_one_wrong_digit():
    task = lock.make(depths=(3, 4), corrupt=0.3)
    wrong = []
    for i in range(1000):
        answer, shown = task.record(i)["answer"], task.conversation(i)["messages"][1]["content"]
        wrong.append(sum(a != b for a, b in zip(answer, shown, strict=True)))
    assert set(wrong) == {0, 1} and abs(sum(wrong) / 1000 - 0.3) < 0.06  # four standard errors


def test_test_problems_are_different_and_in_no_training():
    task = lock.make(depths=(1, 2, 3))
    tested = task.test_records(20, seed=1)
    prompts = [r["prompt"] for r in tested]
    assert len(set(prompts)) == len(prompts) and [r["cell"] for r in tested].count(3) == 20
    assert tested[-20:][:5] == lock.make(depths=(3,)).test_records(5, seed=1)
    assert not set(prompts) & {task.record(i)["prompt"] for i in range(2000)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: lock.make(depths=(9,)), "depths=(9,): give different numbers from 1 to 8"),
        (lambda: lock.make(depths=()), "depths=()"),
        (lambda: lock.make(corrupt=2), "corrupt=2"),
        (lambda: lock.make().record(0, split="dev"), "split='dev': lock has"),
        (lambda: lock.make().test_records(0), "per_cell=0"),
    ],
)
def test_what_is_wrong_is_named(wrong, message):
    with pytest.raises(UserError) as error:
        wrong()
    assert message in str(error.value)
