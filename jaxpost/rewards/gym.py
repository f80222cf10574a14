"""Reasoning Gym: its procedural data sets as tasks, each with the reward that its authors wrote (extra [rewards]).

    from jaxpost.rewards import gym
    jaxpost.train(config, task=gym.task("chain_sum", max_terms=3))      from Python

    record, test_records, reward = gym.task("chain_sum", max_terms=3)   a file my_task.py of this line and the import, for
                                                                        config.task = dict(name="my_task.py")

A hash of the problem decides whether it is for training or testing (about one in ten), so that no choice of seeds leaks one
into the other.

Data sets run in a child process (sandbox.py). Some judge by evaluating what the model wrote, or search for long: the child is
killed in time. Some depend on the order of Python's sets, which is the same in every child. A record holds a problem's number,
from which `score` makes the problem again, since a problem's metadata may not fit into JSON.

A completion's answer is the text of its last <answer>...</answer>, or all of it.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpost.config.resolve import nearest
from jaxpost.errors import UserError, first_line
from jaxpost.rewards import sandbox

SPLITS = ("train", "test")
_DRAWS = 1000  # attempts to draw a problem of a split
_PLACES = 2**31
_MAKING = 60.0  # seconds to make a problem


class Task(NamedTuple):
    """The functions of a task (config.task) for one data set of Reasoning Gym."""

    record: Callable
    test_records: Callable
    reward: Callable


def task(name: str, **config: Any) -> Task:
    """The task of a data set, with the data set's own settings; `size` only matters to the few that are a list of problems.

    A record has prompt, answer (one of possibly several), cell (the data set's name) and gym, from which `score` makes the
    problem again. Raises UserError for an unknown data set or setting, and where reasoning-gym is not installed.
    """
    settings = json.dumps(config, sort_keys=True)
    if trouble := _in_child("_trouble", name, settings):
        raise UserError(f"rewards.gym.task: {trouble}")
    return Task(functools.partial(_record, name, settings), functools.partial(_test_records, name, settings), score)


def score(record: dict, completion: str, *, seconds: float = 5.0) -> float:
    """The data set's score of the completion's answer, 0 to 1.

    Raises UserError for a record that is not from `task`, TimeoutError when the time runs out, and RuntimeError with what the
    data set raised.
    """
    if not isinstance(origin := record.get("gym"), dict):
        raise UserError("rewards.gym.score: the record is not from rewards.gym.task; take the task's own reward.")
    arguments = [origin["name"], origin["config"], origin["place"], record["prompt"], _answer(completion)]
    return _in_child("_score", *arguments, seconds=seconds)


score.in_process = True  # it runs in its own child process
score.ready = lambda **_: sandbox.warm(module="jaxpost.rewards.gym", package="reasoning_gym")


def _answer(completion: str) -> str:
    end = completion.rfind("</answer>")
    begin = completion.rfind("<answer>", 0, max(end, 0))
    return (completion[begin + len("<answer>") : end] if begin >= 0 else completion).strip()


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def _in_child(function: str, *args: Any, seconds: float = _MAKING) -> Any:
    """The result of a function of this file, called in the child."""
    return sandbox.call(f"jaxpost.rewards.gym:{function}", args=list(args), seconds=seconds, package="reasoning_gym")


def _record(name: str, config: str, index: int, *, split: str = "train", seed: int = 0) -> dict:
    """Problem number `index` of an endless stream; problems may repeat, as draws do."""
    if split not in SPLITS:
        raise UserError(f"split={split!r}: a task of reasoning-gym has the splits {' and '.join(SPLITS)}.")
    for draw in range(_DRAWS):
        place = _hash(name, seed, split, index, draw) % _PLACES
        question, answer = _in_child("_question_and_answer", name, config, place)
        if ("test" if _hash("problem", question) % 10 == 0 else "train") == split:
            gym = {"name": name, "config": config, "place": place}
            return {"prompt": question, "answer": answer, "cell": name, "gym": gym}
    raise UserError(f"rewards.gym.task: {name} with {config} has no problem for the split {split}; widen its settings.")


def _test_records(name: str, config: str, per_cell: int, *, seed: int = 0) -> list[dict]:
    """`per_cell` distinct test problems, or fewer if there are not enough."""
    if per_cell < 1:
        raise UserError(f"per_cell={per_cell}: at least one test problem is needed.")
    drawn = (_record(name, config, i, split="test", seed=seed) for i in range(20 * per_cell))
    distinct: dict[str, dict] = {}
    for record in itertools.takewhile(lambda _: len(distinct) < per_cell, drawn):
        distinct.setdefault(record["prompt"], record)
    return list(distinct.values())


# The functions below run in the child.


@functools.lru_cache(maxsize=64)
def _dataset(name: str, config: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **{"seed": 0, **json.loads(config)})


def _trouble(name: str, config: str) -> str | None:
    """The error in a data set's name or settings, if any."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        return f"reasoning-gym has no data set {name!r}.{nearest(name, DATASETS)}"
    try:
        _dataset(name, config)
    except (TypeError, AssertionError, ValueError) as error:
        return f"{name} does not take {config}: {first_line(error)}"
    return None


def _problem(name: str, config: str, place: int) -> dict:
    dataset = _dataset(name, config)
    try:
        return dataset[place]
    except IndexError:  # a list, not a generator
        return dataset[place % len(dataset)]


def _question_and_answer(name: str, config: str, place: int) -> list[str]:
    problem = _problem(name, config, place)
    return [problem["question"], str(problem["answer"] or "")]


def _score(name: str, config: str, place: int, question: str, answer: str) -> float:
    problem = _problem(name, config, place)
    if problem["question"] != question:
        raise RuntimeError(f"{name} makes another problem number {place} here; is its version the same?")
    return float(_dataset(name, config).score_answer(answer, problem))
