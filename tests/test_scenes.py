"""Scenes: questions are answered as the scene has it, pictures show it, and no test scene is seen before."""

import collections
import functools
import hashlib
import itertools
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from jaxpost import tokenizer as tokenizers
from jaxpost.config.resolve import bind
from jaxpost.data import chat
from jaxpost.errors import UserError
from jaxpost.tasks import scenes
from jaxpost.tasks.arithmetic import hashed

KINDS = ("caption", "count", "colour", "relation", "compare", "order", "place", "region")


def grid_of(text):
    """The objects that the rows of a text name, row by row."""
    objects = []
    for number, line in enumerate(text.splitlines(), 1):
        opening, _, cells = line.partition(": ")
        assert opening == f"row {number}"
        for column, cell in enumerate(cells.split(", "), 1):
            if cell != "empty":
                size, colour, shape = cell.split()
                objects.append({"shape": shape, "colour": colour, "size": size, "row": number, "column": column})
    return objects


def named(objects, name):
    (one,) = [one for one in objects if f"{one['size']} {one['colour']} {one['shape']}" == name]
    return one


def group(objects, name):
    """How many objects a plural means."""
    if name.endswith(" things"):
        return sum(name.split()[0] in (one["colour"], one["size"]) for one in objects)
    return sum(name in (f"{one['shape']}s", f"{one['shape']}es") for one in objects)


def answered(objects, question):
    """The answer to a question, from the objects."""
    if question == "Describe the scene.":
        return ", ".join(
            f"a {one['size']} {one['colour']} {one['shape']} in row {one['row']} column {one['column']}" for one in objects
        )
    if match := re.fullmatch(r"How many (.*) are there\?", question):
        return str(group(objects, match[1]))
    if match := re.fullmatch(r"Which colour is in row (\d) column (\d)\?", question):
        return next(one["colour"] for one in objects if (one["row"], one["column"]) == (int(match[1]), int(match[2])))
    if match := re.fullmatch(r"Is the (.*) (left of|right of|above|below) the (.*)\?", question):
        a, b = named(objects, match[1]), named(objects, match[3])
        key = "column" if match[2].endswith("of") else "row"
        assert a[key] != b[key]
        return "yes" if (a[key] < b[key]) == (match[2] in ("left of", "above")) else "no"
    if match := re.fullmatch(r"Are there more (.*) or more (.*)\?", question):
        a, b = (group(objects, match[i]) for i in (1, 2))
        assert match[1] != match[2] and a + b
        return match[1] if a > b else match[2] if b > a else "equal"
    if match := re.fullmatch(r"Which (colour|shape)s are there, (row by row|column by column)\?", question):
        lines, numbers = match[2].split()[0], range(1, 7)
        other = {"row": "column", "column": "row"}[lines]
        return ", ".join(
            one[match[1]] for i in numbers for j in numbers for one in objects if (one[lines], one[other]) == (i, j)
        )
    if match := re.fullmatch(r"Where is the (.*)\?", question):
        one = named(objects, match[1])
        return f"row {one['row']} column {one['column']}"
    (match,) = re.findall(r"Which box has the (.*)\?", question)
    return " ".join(map(str, named(objects, match)["box"]))


def without_boxes(scene):
    return [{key: value for key, value in one.items() if key != "box"} for one in scene]


def in_test(scene):
    return hashed("scene", *(scenes.caption([one]) for one in scene)) % 10 == 0


@pytest.mark.parametrize("grid, objects", [(3, (2, 3, 4)), (2, 1), (4, (5, 9))])
def test_answers_are_what_the_text_of_the_grid_says(grid, objects):
    kinds = [kind for kind in KINDS if objects != 1 or kind != "relation"]
    task, cells, most = scenes.make(grid=grid, objects=objects, pixels=64, kinds=kinds), collections.Counter(), np.max(objects)
    for index in range(500):
        record = task.record(index, split=("train", "test")[index % 2])
        text, _, question = record["prompt"].rpartition("\n")
        assert question == record["question"] and len(text.splitlines()) == grid
        objects_of_text = grid_of(text)
        assert objects_of_text == without_boxes(record["scene"]) and 1 <= len(objects_of_text) <= most
        boxes = [{"box": one["box"]} for one in record["scene"]]
        assert record["answer"] == answered([a | b for a, b in zip(objects_of_text, boxes, strict=True)], question)
        assert in_test(record["scene"]) == bool(index % 2)
        cells[record["cell"]] += 1
    assert set(cells) == set(kinds) and min(cells.values()) > 30


def test_no_answer_is_likely_beforehand():
    answers = collections.defaultdict(collections.Counter)
    for index in range(4_000):
        record = scenes.make().record(index)
        answers[record["kind"]][record["answer"]] += 1
    assert abs(answers["relation"]["yes"] / answers["relation"].total() - 0.5) < 0.08
    assert set(answers["count"]) >= set("01234")
    for kind, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < 0.55, kind
    assert 0.15 < answers["compare"]["equal"] / answers["compare"].total() < 0.55


def test_a_picture_shows_every_object_in_its_box_and_nothing_else():
    task = scenes.make(view="image", grid=3, objects=(1, 4, 9), kinds=("caption", "region"))
    for index in range(60):
        record = task.record(index)
        image = record["image"]
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and "row 1:" not in record["prompt"]
        coloured, left = image.any(axis=2), image.any(axis=2).copy()
        for one in record["scene"]:
            x0, y0, x1, y1 = one["box"]
            # The picture is cut into cells of 10 pixels, with a margin of one.
            cell = np.s_[10 * one["row"] - 9 : 10 * one["row"] + 1, 10 * one["column"] - 9 : 10 * one["column"] + 1]
            rows, columns = np.nonzero(coloured[cell])
            corner = [10 * one["column"] - 9, 10 * one["row"] - 9]
            assert [x0, y0] == [corner[0] + columns.min(), corner[1] + rows.min()]
            assert [x1, y1] == [corner[0] + columns.max() + 1, corner[1] + rows.max() + 1]
            assert {tuple(pixel) for pixel in image[cell][coloured[cell]].tolist()} == {scenes.COLOURS[one["colour"]]}
            assert (y1 - y0 > 6) == (one["size"] == "large")
            left[y0:y1, x0:x1] = False
        assert not left.any()


@pytest.mark.parametrize("grid, pixels", [(3, 32), (3, 33), (2, 32), (4, 64), (6, 60)])
def test_shapes_digits_and_sizes_look_different(grid, pixels):
    looks = set()
    for shape, how_large in itertools.product((*scenes.SHAPES, *scenes.DIGITS), scenes.SIZES):
        one = {"shape": shape, "colour": "red", "size": how_large, "row": 2, "column": 1}
        looks.add(scenes.picture([one], grid=grid, pixels=pixels).tobytes())
    assert len(looks) == 32


def test_a_seven_and_a_triangle_as_drawn_by_hand():
    scene = [
        {"shape": "7", "colour": "white", "size": "large", "row": 1, "column": 1},
        {"shape": "triangle", "colour": "red", "size": "small", "row": 1, "column": 2},
    ]
    image = scenes.picture(scene, grid=2, pixels=20)
    drawn = ["".join(".#"[bool(pixel.any())] for pixel in row) for row in image[:10]]
    assert drawn == [
        "....................",
        "..######............",
        "......##............",
        "......##......##....",
        "......##......##....",
        "......##.....####...",
        "......##.....####...",
        "......##....######..",
        "......##............",
        "....................",
    ]
    assert not image[10:].any() and scenes.box(scene[0], grid=2, pixels=20) == [2, 1, 8, 9]


def test_captions_are_read_in_any_order_and_by_synonyms():
    scene = [
        {"shape": "circle", "colour": "red", "size": "large", "row": 1, "column": 2},
        {"shape": "7", "colour": "blue", "size": "small", "row": 3, "column": 1},
    ]
    plain = "a large red circle in row 1 column 2, a small blue 7 in row 3 column 1"
    assert scenes.caption(scene) == plain and scenes.read(plain) == scene
    record = {"kind": "caption", "answer": plain}
    for text in ("a tiny blue 7 in row 3 column 1 and a big red disc in row 1 column 2.", f" {plain}\n"):
        assert scenes.read(text) == scene and scenes.reward(record, text) is True
    wrong = ["", plain[:-1], plain.replace("blue", "green"), plain.replace("a large", "the large"), plain.split(", ")[0]]
    wrong += [f"{plain}, {plain}", plain.replace("row 1", "row 2"), plain.replace("7", "circle"), f"{plain} yes", "," * 10_000]
    assert not any(scenes.reward(record, text) for text in wrong)
    for seed in range(20):
        assert scenes.read(scenes.caption(scene, functools.partial(hashed, seed))) == scene


def test_only_the_answer_earns_the_reward():
    task = scenes.make()
    for index in range(200):
        record, made = task.record(index), task.conversation(index)
        assert task.reward(record, task.demonstration(index)) is True and task.reward(record, f"{record['answer']}\n") is True
        assert [m["content"] for m in made["messages"]] == [record["prompt"], record["answer"]] and "prompt" not in made
        same = (r["answer"] for r in map(task.record, itertools.count()) if r["kind"] == record["kind"])
        other = next(answer for answer in same if answer != record["answer"])
        assert not any(task.reward(record, text) for text in ("", other, record["answer"] + " 1", record["question"]))


def test_test_problems_are_different_and_extended_and_text_is_of_other_scenes():
    task = scenes.make()
    few, many = task.test_records(3), task.test_records(20)
    for kind in KINDS:
        own = [record for record in many if record["cell"] == kind]
        assert len({record["prompt"] for record in own}) == len(own) == 20
        assert own[:3] == [record for record in few if record["cell"] == kind]
    assert task.test_records(3, seed=1) != few
    forms = collections.Counter()
    for index in range(400):
        lines = task.text(index).splitlines()
        described = [line.removeprefix("scene: ") for line in lines if line.startswith("scene: ")]
        assert not any(in_test(scenes.read(caption)) for caption in described)
        if len(lines) > 2:
            assert len(described) == 1 and grid_of("\n".join(lines[:-1])) == scenes.read(described[0])
        forms[len(described)] += 1
    assert set(forms) == {1, 2} and min(forms.values()) > 150
    with pytest.raises(UserError, match="per_cell=0"):
        task.test_records(0)
    # All test scenes of one object, where there are fewer than were asked for.
    parts = itertools.product(scenes.SIZES, scenes.COLOURS, [*scenes.SHAPES, *scenes.DIGITS], (1, 2), (1, 2))
    every = [dict(zip(("size", "colour", "shape", "row", "column"), part, strict=True)) for part in parts]
    small = scenes.make(kinds="colour", objects=1, grid=2).test_records(100)
    assert len(small) == sum(in_test([one]) for one in every) == 69


def test_a_picture_is_the_only_thing_that_a_view_changes():
    seen, read = scenes.make(view="image", pixels=48), scenes.make(view="text", pixels=48)
    for index in range(20):
        a, b = seen.record(index), read.record(index)
        assert np.array_equal(a.pop("image"), scenes.picture(a["scene"], pixels=48))
        assert a.pop("prompt") == a["question"] and b.pop("prompt").endswith(f"\n{b['question']}")
        assert a == b == json.loads(json.dumps(b))


def test_what_is_drawn_stays_the_same():
    task = scenes.make(view="image")
    drawn = [[task.record(i), task.record(i, split="test", seed=1)] for i in range(20)]
    images = b"".join(record.pop("image").tobytes() for pair in drawn for record in pair)
    text = json.dumps([drawn, [task.text(i) for i in range(20)]]).encode()
    assert [hashlib.sha256(part).hexdigest()[:16] for part in (text, images)] == ["a082b9fca2d09af6", "f0adafcf9c41231d"]


def test_problems_fit_a_small_window():
    tokenizer, task = scenes.tokenizer(), scenes.make()
    assert len(tokenizer) <= 768
    for index in range(80):
        ids = tokenizers.encode(tokenizer, task.text(index))
        assert 20 <= len(ids) <= 120 and tokenizer.decode(ids) == task.text(index)
        record = task.record(index)
        asked = len(chat.encode_prompt(record["prompt"], tokenizer, None))
        assert asked + len(tokenizers.encode(tokenizer, record["answer"])) < 120


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"view": "sound"}, "task scenes, view='sound': give text or image"),
        ({"kinds": ("count", "smell")}, r"kinds: \['smell'\] unknown or named twice; there is caption, count"),
        ({"kinds": ("count", "count")}, r"kinds: \['count', 'count'\] unknown or named twice"),
        ({"grid": 1}, "grid=1: give 2 to 6"),
        ({"grid": 4}, "pixels=32: 4 columns take 40 or more"),
        ({"objects": 5, "grid": 2}, r"objects=\(5,\): give numbers from 1 to 4"),
        ({"objects": ()}, "give numbers from 1 to 9"),
        ({"objects": 1}, "a relation takes two"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        bind(scenes.make, keys, "task scenes")()


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="split='dev': scenes has the splits train and test"):
        scenes.make().record(0, split="dev")


def test_the_page_shows_real_samples():
    page = (Path(__file__).parent.parent / "docs" / "playgrounds.md").read_text()
    task = scenes.make()
    first = {kind: next(r for r in map(task.record, itertools.count()) if r["kind"] == kind) for kind in KINDS}
    assert textwrap.indent(f"{first['count']['prompt']}\n{first['count']['answer']}", "    ") in page
    for record in first.values():
        assert f"| `{record['kind']}` | {record['question']} | {record['answer']} |" in page
    assert textwrap.indent(f"{task.text(0)}\n\n{task.text(1)}", "    ") in page
