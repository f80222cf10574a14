"""Rewards of TRL's signature, `reward(completions, **columns) -> list`, as rewards of one completion.

    --config.reward=FILE.py:reward        recognised by its argument `completions`

Each completion is judged alone: `completions`, `prompts` and every other column of its record are lists of one. Where the
prompt is a list of messages, the completion is `[{"role": "assistant", "content": text}]`, as in TRL, else the text. A reward
that compares completions must be written for jaxpost, with `many` (rollouts/scoring.py).
"""

import inspect
from collections.abc import Callable

from jaxpost.errors import UserError


def judge(record: dict, completion: str, reward: Callable) -> float:
    """The score of one completion by a reward of TRL's signature.

    Raises TypeError if it returns no list of one, UserError if it reads a column that the record does not have.
    """
    turns = isinstance(record.get("prompt"), list)
    columns = {key: [value] for key, value in record.items() if key not in ("prompt", "prompts", "completions")}
    columns |= {"prompts": [record.get("prompt")]}
    columns |= {"completions": [[{"role": "assistant", "content": completion}] if turns else completion]}
    parameters = inspect.signature(reward).parameters.values()
    required = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]
    if missing := [name for name in required if name not in columns]:
        names = ", ".join(key for key in record if key != "stopped")
        name = getattr(reward, "func", reward).__name__
        raise UserError(
            f"reward {name} reads the column {missing[0]!r}, which the problems do not have; theirs are {names}. "
            f"Of a file of prompts, --config.columns={missing[0]}=NAME takes another column."
        )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        columns = {p.name: columns[p.name] for p in parameters if p.name in columns}
    scores = reward(**columns)
    if not hasattr(scores, "__len__") or len(scores) != 1:
        raise TypeError("gave no list of one score for one completion")
    return scores[0]


def is_trl(reward: Callable) -> bool:
    """Whether a function has TRL's signature."""
    try:
        return "completions" in inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return False
