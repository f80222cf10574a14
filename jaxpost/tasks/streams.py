"""The functions of a task whose problems are drawn cell by cell: an endless stream, demonstrations, and test problems."""

import functools
from collections.abc import Callable, Hashable, Sequence

from jaxpost.errors import UserError
from jaxpost.tasks.arithmetic import SPLITS, hashed


def of_cells(
    task: str, cells: Sequence, problem: Callable, *, cell: str, same: Callable[[dict], Hashable]
) -> dict[str, Callable]:
    """{name: function} of a task's record, conversation, demonstration and test_records.

    problem: (one of `cells`, split, seed, index) -> a record with prompt and answer; cell: the word by which a cell is drawn;
    same: what two equal problems have in common.
    """

    def record(index, *, split="train", seed=0):
        """Problem number `index` of an endless stream, all cells equally often. Raises UserError for an unknown split."""
        if split not in SPLITS:
            raise UserError(f"split={split!r}: {task} has the splits {' and '.join(SPLITS)}")
        return problem(cells[hashed(cell, split, seed, index) % len(cells)], split, seed, index)

    def conversation(index, *, seed=0):
        """The answer to training problem `index`, as `messages`; the other columns are those of its record."""
        columns = record(index, seed=seed)
        turns = [{"role": "user", "content": columns.pop("prompt")}, {"role": "assistant", "content": columns["answer"]}]
        return {"messages": turns, **columns}

    def demonstration(index, *, seed=0):
        """The answer to training problem `index`."""
        return record(index, seed=seed)["answer"]

    def test_records(per_cell, *, seed=0):
        """`per_cell` different test problems of each cell, or fewer if there are hardly more. A larger one extends the list."""
        if per_cell < 1:
            raise UserError(f"per_cell={per_cell}: at least one test problem a cell is needed")
        asked = (functools.partial(problem, one, "test", seed) for one in cells)
        return [record for ask in asked for record in _different(ask, per_cell, same)]

    return {function.__name__: function for function in (record, conversation, demonstration, test_records)}


def _different(ask: Callable[[int], dict], count: int, same: Callable) -> list[dict]:
    chosen: dict = {}
    for index in range(20 * count):  # bounded: the last of few possible problems may take forever to draw
        problem = ask(index)
        chosen.setdefault(same(problem), problem)
        if len(chosen) == count:
            break
    return list(chosen.values())
