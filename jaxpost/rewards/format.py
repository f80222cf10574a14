r"""Whether a completion has the shape that was asked for: true or false, for a small weight beside that of a right answer, or
for weight 0, which only counts.
"""

import functools
import re
from collections.abc import Sequence

from jaxpost.errors import UserError
from jaxpost.rewards import answers


def tags(record: dict, completion: str, *, tags: str | Sequence[str] = ("think", "answer"), opened: bool = False) -> bool:
    """Whether the completion is <think>...</think><answer>...</answer>: each tag opened and closed once, in this order, and
    nothing but white space outside of them. opened: as `think` takes it, of the first tag.
    """
    tags = (tags,) if isinstance(tags, str) else tuple(tags)
    pattern = _parts(tags)
    parts = pattern.split(_whole(record, completion, tags[0], opened))
    inside, outside = parts[2::4], [*parts[:1], *parts[4::4]]
    marks = [f"{slash}{tag}" for tag in tags for slash in ("", "/")]
    return parts[1::2] == marks and len(inside) == len(tags) and not "".join(outside).strip()


def think(record: dict, completion: str, *, opened: bool = False) -> bool:
    """Whether the completion is one <think>...</think> at its beginning and then an answer.

    opened: the chat template writes the first tag, at the end of the prompt, so that the completion goes on inside of it. A
    prompt of the record's that ends in the tag says so, too.
    """
    parts = _parts(("think",)).split(_whole(record, completion, "think", opened))
    return parts[1::2] == ["think", "/think"] and not parts[0].strip() and bool(parts[4].strip())


def boxed(record: dict, completion: str, *, most: int = 1) -> bool:
    r"""Whether the completion gives its answer in \boxed{...}, as rewards/answers.py reads it, with at most so many boxes."""
    part = answers.marked(completion)
    return part.kind == "box" and bool(part.text.strip("{} \n")) and completion.count("\\boxed") <= most


def _whole(record: dict, completion: str, tag: str, opened: bool) -> str:
    """The completion with the tag that its prompt has opened."""
    prompt = record.get("prompt")
    opened = opened or (isinstance(prompt, str) and prompt.rstrip().endswith(f"<{tag}>"))
    return f"<{tag}>{completion}" if opened else completion


@functools.cache
def _parts(tags: tuple[str, ...]) -> re.Pattern:
    if not tags or not all(isinstance(tag, str) and re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise UserError(f"rewards.format.tags: tags={list(tags)!r}; give names such as think and answer, without the brackets.")
    return re.compile(rf"<(/?(?:{'|'.join(map(re.escape, tags))}))>")
