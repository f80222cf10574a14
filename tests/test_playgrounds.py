"""The four playgrounds together: what the base model of studies learns from, and is asked."""

import collections

import pytest

from jaxpost.errors import UserError
from jaxpost.tasks import playgrounds, world
from jaxpost.tokenizer import encode

NAMES = ("instructions", "world", "languages", "scenes")


def test_problems_and_documents_are_of_each_playground_equally_often():
    task = playgrounds.make()
    cells = collections.Counter(task.record(i)["cell"] for i in range(400))
    assert set(cells) == set(NAMES) and min(cells.values()) > 70
    documents = [task.conversation(i) for i in range(400)]
    chats = [document for document in documents if "messages" in document]
    assert 100 < len(chats) < 165 and all(set(document) == {"text"} for document in documents if "messages" not in document)
    assert documents == [task.conversation(i) for i in range(400)] != [task.conversation(i, seed=1) for i in range(400)]


@pytest.mark.parametrize(("chats", "kinds"), [(0, {"text"}), (100, {"messages"})])
def test_the_share_of_chats_is_the_settings(chats, kinds):
    task = playgrounds.make(chats=chats)
    assert {key for i in range(40) for key in task.conversation(i)} == kinds


def test_answers_are_judged_by_their_own_playground():
    task = playgrounds.make()
    problems = task.test_records(6)
    assert collections.Counter(problem["cell"] for problem in problems) == dict.fromkeys(NAMES, 6)
    assert all(task.reward(problem, problem["answer"]) is True for problem in problems)
    assert not any(task.reward(problem, "another answer") for problem in problems)
    assert task.test_records(3) == [problem for name in NAMES for problem in _of(problems, name)[:3]]


def _of(problems, name):
    return [problem for problem in problems if problem["cell"] == name]


def test_no_test_problem_is_learned_from():
    task = playgrounds.make(chats=100)
    asked = {problem["prompt"] for problem in task.test_records(20)}
    assert not asked & {task.conversation(i)["messages"][0]["content"] for i in range(2000)}


def test_each_playground_shows_as_many_of_its_own_cells_as_there_is_room_for():
    problems = _of(playgrounds.make().test_records(8), "scenes")
    assert collections.Counter(problem["kind"] for problem in problems) == dict.fromkeys(
        ("caption", "count", "colour", "relation"), 2
    )


def test_documents_fit_the_base_models_window():
    words, task = playgrounds.tokenizer(), playgrounds.make()
    assert len(words) == playgrounds.TOKENS
    documents = [task.conversation(i) for i in range(300)]
    texts = [one.get("text") or "".join(turn["content"] for turn in one["messages"]) for one in documents]
    assert max(len(encode(words, text)) for text in texts) < 120


def test_names_of_its_own_country_have_as_many_tokens_as_those_of_others():
    words, own = playgrounds.tokenizer(), playgrounds.playgrounds()["world"]
    of_own, of_other = (
        sum(len(encode(words, name)) for name in land.people) / len(land.people) for land in (own, world.make(country=77))
    )
    assert abs(of_own - of_other) < 0.4 and of_own > 2


@pytest.mark.parametrize("chats", [-1, 101, 0.5, True])
def test_a_share_that_is_no_percentage_is_refused(chats):
    with pytest.raises(UserError, match="give a percentage"):
        playgrounds.make(chats=chats)
