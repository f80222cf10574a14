r"""Whether a completion has the required format: true or false.

Give it a small weight beside that of a right answer, or weight 0, which only reports it.
"""

import functools
import re
from collections.abc import Sequence

from jaxpost.errors import UserError
from jaxpost.rewards import answers


def tags(record: dict, completion: str, *, tags: str | Sequence[str] = ("think", "answer"), opened: bool = False) -> bool:
    """Whether the completion is <think>...</think><answer>...</answer>: each tag once, in this order, with white space around.

    opened: as in `think`, for the first tag.
    """
    tags = (tags,) if isinstance(tags, str) else tuple(tags)
    pattern = _parts(tags)
    parts = pattern.split(_whole(record, completion, tags[0], opened))
    inside, outside = parts[2::4], [*parts[:1], *parts[4::4]]
    marks = [f"{slash}{tag}" for tag in tags for slash in ("", "/")]
    return parts[1::2] == marks and len(inside) == len(tags) and not "".join(outside).strip()


def think(record: dict, completion: str, *, opened: bool = False) -> bool:
    """Whether the completion is one <think>...</think> at its beginning and then an answer.

    opened: the chat template writes the first tag at the end of the prompt, so the completion begins inside it. A record's
    prompt that ends in the tag has the same effect.
    """
    parts = _parts(("think",)).split(_whole(record, completion, "think", opened))
    return parts[1::2] == ["think", "/think"] and not parts[0].strip() and bool(parts[4].strip())


def boxed(record: dict, completion: str, *, most: int = 1) -> bool:
    r"""Whether the completion gives its answer in \boxed{...}, as rewards/answers.py reads it, with at most `most` boxes."""
    part = answers.marked(completion)
    return part.kind == "box" and bool(part.text.strip("{} \n")) and completion.count("\\boxed") <= most


def _whole(record: dict, completion: str, tag: str, opened: bool) -> str:
    """The completion, after the tag if its prompt has opened it."""
    prompt = record.get("prompt")
    opened = opened or (isinstance(prompt, str) and prompt.rstrip().endswith(f"<{tag}>"))
    return f"<{tag}>{completion}" if opened else completion


@functools.cache
def _parts(tags: tuple[str, ...]) -> re.Pattern:
    if not tags or not all(isinstance(tag, str) and re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise UserError(f"rewards.format.tags: tags={list(tags)!r}; give names such as think and answer, without the brackets.")
    return re.compile(rf"<(/?(?:{'|'.join(map(re.escape, tags))}))>")
