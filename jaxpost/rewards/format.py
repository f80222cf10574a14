r"""Whether a completion has the shape that was asked for: true or false, for a small weight beside that of a right answer, or
for weight 0, which only counts.
"""

import functools
import re
from collections.abc import Sequence

from jaxpost.errors import UserError


def tags(record: dict, completion: str, *, tags: str | Sequence[str] = ("think", "answer")) -> bool:
    """Whether the completion is <think>...</think><answer>...</answer>: each tag opened and closed once, in this order, and
    nothing but white space outside of them.
    """
    tags = (tags,) if isinstance(tags, str) else tuple(tags)
    parts = _parts(tags).split(completion)
    inside, outside = parts[2::4], [*parts[:1], *parts[4::4]]
    marks = [f"{slash}{tag}" for tag in tags for slash in ("", "/")]
    return parts[1::2] == marks and len(inside) == len(tags) and not "".join(outside).strip()


def think(record: dict, completion: str) -> bool:
    """Whether the completion is one <think>...</think> at its beginning and then an answer."""
    parts = _parts(("think",)).split(completion)
    return parts[1::2] == ["think", "/think"] and not parts[0].strip() and bool(parts[4].strip())


def boxed(record: dict, completion: str, *, most: int = 1) -> bool:
    r"""Whether the completion gives an answer in \boxed{...}, at most so many times."""
    return 1 <= completion.count("\\boxed{") <= most and re.search(r"\\boxed\{ *[^ {}]", completion) is not None


@functools.cache
def _parts(tags: tuple[str, ...]) -> re.Pattern:
    if not tags or not all(isinstance(tag, str) and re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise UserError(f"rewards.format.tags: tags={list(tags)!r}; give names such as think and answer, without the brackets.")
    return re.compile(rf"<(/?(?:{'|'.join(map(re.escape, tags))}))>")
