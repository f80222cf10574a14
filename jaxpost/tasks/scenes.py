"""Scenes: small pictures of shapes and digits, with captions, questions, places, boxes and orders.

    task=dict(name="scenes", view="text", kinds=("count", "relation"), objects=(2, 3, 4))

A scene has objects on a grid: a shape or a digit, in one of six colours, small or large. With `view="image"` a record has the
picture as `image`, a uint8 array [pixels, pixels, 3]. With `view="text"` the prompt describes the grid row by row, so that a
model of text is asked the same questions, and a record is plain JSON.

The kinds of questions are the cells of the results' table: caption, count, colour (at a place), relation (of two objects),
compare (two groups), order (by rows or columns), place and region (a box). A caption may name the objects in any order and by
synonyms; `read` has its grammar. A box is left, top, right and bottom in pixels, the last two excluded. "The small red ring" is
always a single object, and half of the relations hold.

A hash of the scene decides whether it is for training or testing, in all kinds and in `text`. More objects are harder.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import numpy as np

from jaxpost import tokenizer as tokenizers
from jaxpost.errors import UserError
from jaxpost.tasks import streams
from jaxpost.tasks.arithmetic import hashed

_RGB = (230, 40, 40), (40, 180, 60), (50, 90, 240), (240, 220, 50), (160, 60, 200), (240, 240, 240)
COLOURS = dict(zip(("red", "green", "blue", "yellow", "purple", "white"), _RGB, strict=True))
SIZES = {"small": "tiny", "large": "big"}  # words and their synonyms
SHAPES = {"circle": "disc", "square": "tile", "triangle": "wedge", "cross": "plus", "diamond": "rhombus", "ring": "hoop"}
DIGITS = tuple("0123456789")
_SYNONYMS = SIZES | SHAPES
_VALUES = {"colour": tuple(COLOURS), "size": tuple(SIZES), "shape": tuple(SHAPES)}
# Whether (u, v), to the right and down, belongs to a shape in the square from -1 to 1.
_INSIDE = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: (abs(u) <= 1) & (abs(v) <= 1),
    "triangle": lambda u, v: (2 * abs(u) <= v + 1) & (v <= 1),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.34) & (np.maximum(abs(u), abs(v)) <= 1),
    "diamond": lambda u, v: abs(u) + abs(v) <= 1,
    "ring": lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= 0.3),
}
# Digits of 3 x 5 dots: three bits a row.
_DOTS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717")
_RADII = {"small": 0.28, "large": 0.42}  # of a cell's width

_NAME, _PLACE = "{size} {colour} {shape}", "row {row} column {column}"
_WHOLE = f"a {_NAME} in {_PLACE}"
_PLAIN = {synonym: word for word, synonym in _SYNONYMS.items()}
_WORDS = ["|".join(words) for words in ([*SIZES, *SIZES.values()], COLOURS, [*SHAPES, *SHAPES.values(), "[0-9]"])]
_OBJECT = re.compile("a ({}) ({}) ({}) in row ([1-9]) column ([1-9])".format(*_WORDS))


def make(
    *,
    view: str = "text",
    kinds: str | Sequence[str] = (),
    objects: int | Sequence[int] = (2, 3, 4),
    grid: int = 3,
    pixels: int = 32,
) -> SimpleNamespace:
    """The task with questions of `kinds` (all eight if empty) about scenes of `objects` objects, all equally often.

    view: "text" or "image". objects: 1 to 9. grid: rows and columns, 2 to 6. pixels: of a picture's side, at least 10 a column.
    Raises UserError for values out of range.
    """
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds) or tuple(_QUESTIONS)
    objects = (objects,) if isinstance(objects, int) else tuple(objects)
    _check(view, kinds, objects, grid, pixels)

    def drawn(split, *parts):
        for attempt in itertools.count():
            draw = functools.partial(hashed, "scenes", split, *parts, attempt)
            scene = _drawn(objects[draw("objects") % len(objects)], grid, draw)
            if split == ("test" if hashed("scene", *(_WHOLE.format(**one) for one in scene)) % 10 == 0 else "train"):
                return [{**one, "box": box(one, grid=grid, pixels=pixels)} for one in scene], draw

    def problem(kind, split, seed, index):
        tries = (drawn(split, kind, seed, index, attempt) for attempt in itertools.count())
        scene, (question, answer) = next((scene, asked) for scene, draw in tries if (asked := _QUESTIONS[kind](scene, draw)))
        prompt = f"{described(scene, grid)}\n{question}" if view == "text" else question
        columns = {"prompt": prompt, "answer": answer, "cell": kind, "kind": kind, "question": question, "scene": scene}
        return columns if view == "text" else columns | {"image": picture(scene, grid=grid, pixels=pixels)}

    def text(index, *, seed=0):
        """Document number `index` of a corpus on training scenes: two captions, with synonyms, or a grid and its caption."""
        pairs = (scene, draw), _ = [drawn("train", "text", seed, index, place) for place in range(2)]
        first, second = (f"scene: {caption(*pair)}" for pair in pairs)
        return f"{first}\n{second}" if draw("form") % 2 else f"{described(scene, grid)}\n{first}"

    functions = streams.of_cells(
        "scenes", kinds, problem, cell="kind", same=lambda record: (record["question"], str(record["scene"]))
    )
    return SimpleNamespace(**functions, reward=reward, text=text)


def reward(record, completion) -> bool:
    """Whether a completion is the record's answer and nothing else; a caption may be any of the same scene."""
    read_or_stripped = read if record["kind"] == "caption" else str.strip
    return read_or_stripped(completion) == read_or_stripped(record["answer"])


def caption(scene: Sequence[Mapping], draw: Callable = lambda *parts: 0) -> str:
    """A caption of all objects, with the synonyms and the order that `draw` chooses; without it in plain words, in order."""
    named = []
    for place, one in enumerate(scene):
        words = {key: _SYNONYMS.get(one[key], one[key]) if draw(key, place) % 2 else one[key] for key in ("size", "shape")}
        named.append((draw("named", place), _WHOLE.format(**{**one, **words})))
    return ", ".join(text for _, text in sorted(named, key=lambda pair: pair[0]))


def read(text: str) -> list[dict] | None:
    """The objects of a caption by row and column, in plain words; None if it is none. "," or "and" or both join objects."""
    objects = []
    for part in re.split(", and |, | and ", text.strip().removesuffix(".")):
        if (match := _OBJECT.fullmatch(part)) is None:
            return None
        size, colour, shape, row, column = match.groups()
        one = {"shape": _PLAIN.get(shape, shape), "colour": colour, "size": _PLAIN.get(size, size)}
        objects.append({**one, "row": int(row), "column": int(column)})
    return sorted(objects, key=lambda one: (one["row"], one["column"], str(one)))


def described(scene: Sequence[Mapping], grid: int) -> str:
    """The grid as text, a line a row: "row 1: large red circle, empty, small blue 7"."""
    at = {(one["row"], one["column"]): _NAME.format(**one) for one in scene}
    numbers = range(1, grid + 1)
    return "\n".join(f"row {row}: " + ", ".join(at.get((row, column), "empty") for column in numbers) for row in numbers)


def picture(scene: Sequence[Mapping], *, grid: int = 3, pixels: int = 32) -> np.ndarray:
    """The scene as [pixels, pixels, 3] uint8: objects in their colours on black."""
    image = np.zeros((pixels, pixels, 3), np.uint8)
    for one in scene:
        top, left, mask = _placed(one, grid, pixels)
        image[top : top + len(mask), left : left + len(mask)][mask] = COLOURS[one["colour"]]
    return image


def box(one: Mapping, *, grid: int = 3, pixels: int = 32) -> list[int]:
    """[left, top, right, bottom] of an object's pixels; the last two are excluded."""
    top, left, mask = _placed(one, grid, pixels)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return [int(x) for x in (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)]


def tokenizer():
    """A tokenizer of at most 768 tokens, learned from the texts, questions and answers of the default task."""
    task = make()
    problems = (f"{problem['question']}\n{problem['answer']}" for problem in map(task.record, range(1_000)))
    return tokenizers.learned([*map(task.text, range(1_000)), *problems], 768)


def _placed(one, grid, pixels):
    """(top, left, mask [cell, cell] bool): where an object's cell begins, and the object's pixels in it."""
    cell = pixels // grid
    margin = (pixels - grid * cell) // 2
    return margin + (one["row"] - 1) * cell, margin + (one["column"] - 1) * cell, _mask(one["shape"], one["size"], cell)


@functools.cache
def _mask(shape: str, size: str, cell: int) -> np.ndarray:
    at = (np.arange(cell) + 0.5 - cell / 2) / (_RADII[size] * cell)
    u, v = at[None, :], at[:, None]
    if shape in SHAPES:
        return _INSIDE[shape](u, v)
    dots = np.array([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in _DOTS[int(shape)]], bool)
    rows, columns = ((v + 1) * 2.5).astype(int).clip(0, 4), ((u / 0.6 + 1) * 1.5).astype(int).clip(0, 2)
    return (abs(u) <= 0.6) & (abs(v) <= 1) & dots[rows, columns]


def _check(view, kinds, objects, grid, pixels):
    unknown, most = [kind for kind in kinds if kind not in _QUESTIONS or kinds.count(kind) > 1], min(9, grid * grid)
    wrong = {
        f"view={view!r}: give text or image": view not in ("text", "image"),
        f"kinds: {unknown} unknown or named twice; there is {', '.join(_QUESTIONS)}": unknown,
        f"grid={grid}: give 2 to 6 rows and columns": grid not in range(2, 7),
        f"pixels={pixels}: {grid} columns take {10 * grid} or more; give these": pixels < 10 * grid,
        f"objects={objects}: give numbers from 1 to {most}": not objects or not {*objects} <= {*range(1, most + 1)},
        f"objects={objects}: a relation takes two; give more, or other kinds": {*objects} == {1} and "relation" in kinds,
    }
    if message := next((message for message, holds in wrong.items() if holds), ""):
        raise UserError(f"task scenes, {message}")


def _drawn(count: int, grid: int, draw: Callable) -> list[dict]:
    """A scene of `count` objects, row by row."""
    cells = sorted(itertools.product(range(1, grid + 1), repeat=2), key=lambda cell: draw("cell", *cell))
    scene = []
    for place, (row, column) in enumerate(sorted(cells[:count])):
        values = _VALUES | ({"shape": DIGITS} if draw("digit", place) % 4 == 0 else {})
        one = {key: words[draw("drawn", key, place) % len(words)] for key, words in values.items()}
        scene.append({**one, "row": row, "column": column})
    return scene


def _group(key, value):
    return f"{value} things" if key != "shape" else f"{value}es" if value.endswith("s") else f"{value}s"


def _unique(scene, draw):
    """The objects whose names no other has, in an order by `draw`."""
    names = [_NAME.format(**one) for one in scene]
    unique = {name: one for name, one in zip(names, scene, strict=True) if names.count(name) == 1}
    return [unique[name] for name in sorted(unique, key=lambda name: draw("unique", name))]


# Questions: (scene, draw) -> (question, answer), or None where the scene does not suit.
def _count(scene, draw):
    key = tuple(_VALUES)[draw("key") % 3]
    present = [one[key] for one in scene]
    values = present if draw("present?") % 3 else _VALUES[key]
    value = values[draw("value") % len(values)]
    return f"How many {_group(key, value)} are there?", str(present.count(value))


def _colour(scene, draw):
    one = scene[draw("place") % len(scene)]
    return f"Which colour is in {_PLACE.format(**one)}?", one["colour"]


def _relation(scene, draw):
    if len(unique := _unique(scene, draw)) < 2:
        return None
    a, b = unique[:2]
    axes = [axis for axis in (("column", "left of", "right of"), ("row", "above", "below")) if a[axis[0]] != b[axis[0]]]
    axis, before, after = axes[draw("axis") % len(axes)]
    answer = ("yes", "no")[draw("answer") % 2]
    relation = before if (a[axis] < b[axis]) == (answer == "yes") else after
    return f"Is the {_NAME.format(**a)} {relation} the {_NAME.format(**b)}?", answer


def _compare(scene, draw):
    key = ("colour", "shape")[draw("key") % 2]
    present = [one[key] for one in scene]
    absent = sorted({*_VALUES[key]} - {*present}, key=lambda value: draw("absent", value))[:1]
    values = sorted({*present, *absent}, key=lambda value: draw("compared", value))[:2]
    (a, first), (b, second) = ((_group(key, value), present.count(value)) for value in values)
    return f"Are there more {a} or more {b}?", "equal" if first == second else a if first > second else b


def _order(scene, draw):
    key, line = ("colour", "shape")[draw("key") % 2], ("row", "column")[draw("line") % 2]
    ordered = sorted(scene, key=lambda one: (one[line], one["row"], one["column"]))
    return f"Which {key}s are there, {line} by {line}?", ", ".join(one[key] for one in ordered)


def _of_one(question, answer, scene, draw):
    one = next(iter(_unique(scene, draw)), None)
    return one and (question.format(_NAME.format(**one)), answer(one))


_QUESTIONS = {
    "caption": lambda scene, draw: ("Describe the scene.", caption(scene)),
    "count": _count,
    "colour": _colour,
    "relation": _relation,
    "compare": _compare,
    "order": _order,
    "place": functools.partial(_of_one, "Where is the {}?", lambda one: _PLACE.format(**one)),
    "region": functools.partial(_of_one, "Which box has the {}?", lambda one: " ".join(map(str, one["box"]))),
}
