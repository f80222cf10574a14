"""Reasoning Gym: its procedural data sets as tasks, each with the reward that its authors wrote (extra [rewards]).

    from jaxpost.rewards import gym
    jaxpost.train(config, task=gym.task("chain_sum", max_terms=3))      from Python

    record, test_records, reward = gym.task("chain_sum", max_terms=3)   a file my_task.py of this line and the import, for
                                                                        config.task = dict(name="my_task.py")

Which problems are for training and which for testing, about one in ten, a hash of the problem decides, so that no choice of
seeds leaks one into the other.

Data sets are made and asked in a process of its own (sandbox.py). Some judge by evaluating what the model wrote, or search for
long: that process is killed in time. And some depend on the order of Python's sets, which is the same in every such process. A
record holds a problem's number, from which it is made again to be judged, since what is noted about one may be more than JSON.

A completion's answer is what it has between <answer> and </answer>, the last time, or all of it.
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
_DRAWS = 1000  # in search of a problem of a split, before there is taken to be none
_PLACES = 2**31
_MAKING = 60.0  # seconds that a problem may take to be made


class Task(NamedTuple):
    """What config.task may name: the functions of a task, for one data set of Reasoning Gym."""

    record: Callable
    test_records: Callable
    reward: Callable


def task(name: str, **config: Any) -> Task:
    """The task of a data set, with the data set's own settings; `size` only matters to the few that are a list of problems.

    A record has prompt, answer (the author's, one of maybe several), cell (the data set's name) and gym, from which `score`
    makes the problem again. Raises UserError for an unknown data set or setting, and where reasoning-gym is not installed.
    """
    told = json.dumps(config, sort_keys=True)
    if trouble := _asked("_trouble", name, told):
        raise UserError(f"rewards.gym.task: {trouble}")
    return Task(functools.partial(_record, name, told), functools.partial(_test_records, name, told), score)


def score(record: dict, completion: str, *, seconds: float = 5.0) -> float:
    """0 to 1: what the data set makes of the completion's answer.

    Raises UserError for a record that is not from `task`, TimeoutError where the time ran out, and RuntimeError with what the
    data set raised.
    """
    if not isinstance(made := record.get("gym"), dict):
        raise UserError("rewards.gym.score: the record is none of rewards.gym.task's; take the task's own reward.")
    arguments = [made["name"], made["config"], made["place"], record["prompt"], _answer(completion)]
    return _asked("_judged", *arguments, seconds=seconds)


score.in_process = True  # it has a process of its own
score.ready = lambda **_: sandbox.warm(module="jaxpost.rewards.gym", package="reasoning_gym")


def _answer(completion: str) -> str:
    end = completion.rfind("</answer>")
    begin = completion.rfind("<answer>", 0, max(end, 0))
    return (completion[begin + len("<answer>") : end] if begin >= 0 else completion).strip()


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def _asked(function: str, *args: Any, seconds: float = _MAKING) -> Any:
    """What a function of this file gives in the child."""
    return sandbox.call(f"jaxpost.rewards.gym:{function}", args=list(args), seconds=seconds, package="reasoning_gym")


def _record(name: str, config: str, index: int, *, split: str = "train", seed: int = 0) -> dict:
    """Problem number `index` of an endless stream; problems may repeat, as draws do."""
    if split not in SPLITS:
        raise UserError(f"split={split!r}: a task of reasoning-gym has the splits {' and '.join(SPLITS)}.")
    for draw in range(_DRAWS):
        place = _hash(name, seed, split, index, draw) % _PLACES
        question, answer = _asked("_made", name, config, place)
        if ("test" if _hash("problem", question) % 10 == 0 else "train") == split:
            gym = {"name": name, "config": config, "place": place}
            return {"prompt": question, "answer": answer, "cell": name, "gym": gym}
    raise UserError(f"rewards.gym.task: {name} with {config} has no problem for the split {split}; widen its settings.")


def _test_records(name: str, config: str, per_cell: int, *, seed: int = 0) -> list[dict]:
    """`per_cell` distinct test problems, or as many as are found."""
    if per_cell < 1:
        raise UserError(f"per_cell={per_cell}: at least one test problem is needed.")
    drawn = (_record(name, config, i, split="test", seed=seed) for i in range(20 * per_cell))
    distinct: dict[str, dict] = {}
    for record in itertools.takewhile(lambda _: len(distinct) < per_cell, drawn):
        distinct.setdefault(record["prompt"], record)
    return list(distinct.values())


# What follows runs in the child.


@functools.lru_cache(maxsize=64)
def _dataset(name: str, config: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **{"seed": 0, **json.loads(config)})


def _trouble(name: str, config: str) -> str | None:
    """What is wrong with a data set's name or settings, if anything."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        return f"reasoning-gym has no data set {name!r}.{nearest(name, DATASETS)}"
    try:
        _dataset(name, config)
    except (TypeError, AssertionError, ValueError) as error:
        return f"{name} does not take {config}: {first_line(error)}"
    return None


def _problem(name: str, config: str, place: int) -> dict:
    made = _dataset(name, config)
    try:
        return made[place]
    except IndexError:  # a list, not a generator
        return made[place % len(made)]


def _made(name: str, config: str, place: int) -> list[str]:
    problem = _problem(name, config, place)
    return [problem["question"], str(problem["answer"] or "")]


def _judged(name: str, config: str, place: int, question: str, answer: str) -> float:
    problem = _problem(name, config, place)
    if problem["question"] != question:
        raise RuntimeError(f"{name} makes another problem number {place} here; is its version the same?")
    return float(_dataset(name, config).score_answer(answer, problem))
