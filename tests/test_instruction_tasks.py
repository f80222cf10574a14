"""The playground `instructions`: its splits, its answers computed anew, what its keywords change, and what its texts say."""

import collections
import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from jaxpost import recipe
from jaxpost import tokenizer as tokenizers
from jaxpost.errors import UserError
from jaxpost.stages import tasks as stage_tasks
from jaxpost.tasks import instruction_steps, instructions

ALL = instructions.make()
NAMES = instructions.task_names()
GRIDS = ("select_order", "select_aggregate", "map_order", "select_map_order")
ANIMALS = {"bear", "cat", "cow", "dog", "fish", "goat", "hen", "horse", "mouse", "owl", "pig", "wolf"}
FRUITS = {"apple", "banana", "cherry", "fig", "grape", "guava", "kiwi", "lemon", "mango", "melon", "papaya", "pear"}
COLOURS = {"black", "blue", "brown", "gold", "green", "grey", "pink", "purple", "red", "silver", "white", "yellow"}
NAMED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PAGE = Path(__file__).parent.parent / "docs" / "playgrounds.md"


def insertion(items, before):
    """The items, each put before the first of those so far that it precedes."""
    result = []
    for item in items:
        place = next((i for i, other in enumerate(result) if before(item, other)), len(result))
        result.insert(place, item)
    return result


def without_repeats(items):
    return [item for place, item in enumerate(items) if item not in items[:place]]


def commonest(items):
    counts = [items.count(item) for item in items]
    (item,) = {item for item, count in zip(items, counts, strict=True) if count == max(counts)}
    return item


# The steps again, written for this test.
TRUTH = {
    "copy": lambda x: x,
    "reverse": lambda x: [x[-1 - i] for i in range(len(x))],
    "sort": lambda x: insertion(x, lambda a, b: a < b),
    "descend": lambda x: insertion(x, lambda a, b: a > b),
    "rotate": lambda x: [x[(i + 1) % len(x)] for i in range(len(x))],
    "swap": lambda x: [x[{0: len(x) - 1, len(x) - 1: 0}.get(i, i)] for i in range(len(x))],
    "vowels": lambda x: re.findall("[aeiou]", " ".join(x)),
    "odd": lambda x: [d for d in x if int(d) % 2],
    "large": lambda x: [d for d in x if int(d) > 4],
    "animals": lambda x: [w for w in x if w in ANIMALS],
    "distinct": without_repeats,
    "alternate": lambda x: [item for place, item in enumerate(x, 1) if place % 2],
    "next": lambda x: ["bcdefghijklmnopqrstuvwxyza"["abcdefghijklmnopqrstuvwxyz".index(c)] for c in x],
    "upper": lambda x: [chr(ord(c) - 32) for c in x],
    "increase": lambda x: [f"{int(d) + 1}" for d in x],
    "spell": lambda x: [NAMED[int(d)] for d in x],
    "initial": lambda x: [w[:1] for w in x],
    "group": lambda x: ["animal" if w in ANIMALS else "fruit" if w in FRUITS else "colour" for w in x],
    "count": lambda x: [f"{len(x)}"],
    "first": lambda x: [x[0]],
    "last": lambda x: [x[-1]],
    "most": lambda x: [commonest(x)],
    "parity": lambda x: ["odd" if len(x) & 1 else "even"],
    "compare": lambda x: ["yes" if x[-1] > x[0] else "no"],
}


def truth(steps, text):
    items = text.split()
    for step in steps:
        items = TRUTH[step](items)
    return " ".join(items)


def test_sixty_tasks_in_eight_categories_and_their_grids():
    categories = instructions.categories()
    assert len(NAMES) == len(set(NAMES)) == 60 and [name for names in categories.values() for name in names] == NAMES
    assert {category: len(names) for category, names in categories.items()} == {
        **dict.fromkeys(("order", "select", "map", "aggregate"), 6),
        **{"select_order": 12, "select_aggregate": 12, "map_order": 6, "select_map_order": 6},
    }
    assert set(TRUTH) == {step for name in NAMES for step in name.split("_")} and set(TRUTH) < set(NAMES)
    in_grids = {step for grid in GRIDS for name in categories[grid] for step in name.split("_")}
    assert set(re.findall(r"`(\w+)`", instructions.__doc__.split("only\nfrom a grid, and")[1].split("are in none")[0])) == (
        set(TRUTH) - in_grids
    )
    # What makes a held-out task of a grid inferable: another task of the grid has each of its steps, at the same place.
    for grid in GRIDS:
        for name in categories[grid]:
            for place, step in enumerate(name.split("_")):
                assert any(other.split("_")[place] == step for other in categories[grid] if other != name), name


def test_records_are_a_function_of_seed_and_index():
    records = [ALL.record(i) for i in range(200)]
    assert records == [instructions.make().record(i) for i in range(200)]
    assert sum(one != ALL.record(i, seed=1) for i, one in enumerate(records)) > 190
    drawn = instructions.make(shots=1, negatives=1, format=list(instructions.FORMATS), length=(3, 9))
    prints = "\n".join(json.dumps(drawn.record(i, split=split, seed=2)) for i in range(20) for split in ("train", "test"))
    prints += "".join(ALL.text(i) for i in range(40))
    # A change of this changes every run that was ever recorded.
    assert hashlib.sha256(prints.encode()).hexdigest()[:16] == "b0dc1509d0fe6586"
    counts = collections.Counter(ALL.record(i)["task"] for i in range(6000))
    assert set(counts) == set(NAMES) and min(counts.values()) > 50 and max(counts.values()) < 150


@pytest.mark.parametrize("length", [(3, 3), (3, 6), (12, 12)])
def test_answers_are_right_and_no_step_can_be_left_out(length):
    for one in instructions.make(length=length).test_records(6):
        steps, items = one["steps"], one["input"].split()
        assert one["task"] == one["cell"] == "_".join(steps) and one["task"] in instructions.categories()[one["category"]]
        assert one["answer"] == truth(steps, one["input"]) and not one["held_out"]
        for place in range(len(steps)):
            rest = truth(steps[:place] + steps[place + 1 :], one["input"])
            assert rest != one["answer"] or one["task"] == "copy"
        assert length[0] <= len(items) == one["length"] <= length[1] and one["difficulty"] == len(items) * len(steps)
        shape = {"letters": "[a-z]", "digits": "[0-9]", "words": "|".join(ANIMALS | FRUITS | COLOURS)}[one["kind"]]
        assert all(re.fullmatch(shape, item) for item in items)
        assert one["prompt"] == f"{one['definition']}\nInput: {one['input']}\nOutput:"
        assert json.loads(json.dumps(one)) == one


def test_inputs_do_not_give_answers_of_a_few_classes_away():
    for name, classes in (("compare", {"yes", "no"}), ("parity", {"odd", "even"}), ("vowels_count", {"1", "2", "3"})):
        answers = collections.Counter(one["answer"] for one in instructions.make(tasks=name).test_records(150))
        assert all(answers[one] >= 0.15 * answers.total() for one in classes), (name, answers)
    kinds = collections.Counter(one["kind"] for one in instructions.make(tasks="reverse").test_records(150))
    assert all(30 < kinds[kind] < 70 for kind in ("letters", "digits", "words"))


def shown_inputs(text):
    return re.findall(r"^Input: (.*)$", text, re.M)


def test_no_test_input_is_trained_on_shown_or_read():
    task = instructions.make(tasks=("order", "select", "most"), length=(3, 3), shots=2, negatives=1)
    test = {one["input"] for one in task.test_records(60)}
    trained = {text for i in range(1500) for text in shown_inputs(task.record(i)["prompt"])}
    read = {text for i in range(1500) for text in shown_inputs(task.text(i))}
    of_digits = [{text for text in texts if text[0].isdigit()} for texts in (test, trained | read)]
    assert 70 < len(of_digits[0]) < 130 and 700 < len(of_digits[1]) <= 900  # of 1000: one in ten
    assert len(trained) > 3000 and len(read) > 3000 and not test & (trained | read)
    asked = [shown_inputs(one["prompt"]) for one in task.test_records(10)]
    assert {own for *_, own in asked} <= test and not test & {text for *shown, _ in asked for text in shown}
    assert {task.record(i, split="test")["input"] for i in range(300)} & test


def test_held_out_tasks_are_tested_and_never_trained_or_read():
    task = instructions.make(held_out_tasks=("reverse", "vowels_sort", "map_order"))
    held_out = {"reverse", "vowels_sort", *instructions.categories()["map_order"]}
    assert {one["task"] for i in range(3000) for one in [task.record(i)]} == set(NAMES) - held_out
    assert not any(task.record(i)["held_out"] for i in range(50))
    tested = task.test_records(1)
    assert [one["task"] for one in tested] == NAMES and {one["task"] for one in tested if one["held_out"]} == held_out
    few = instructions.make(tasks="order,vowels", held_out_tasks="vowels_sort")
    assert [one["task"] for one in few.test_records(1)] == [*instructions.categories()["order"], "vowels", "vowels_sort"]
    phrases = [phrase.format(items=kind) for phrase in instruction_steps.WORDINGS["reverse"] for kind in ("letters", "words")]
    read = "\n".join(task.text(i) for i in range(3000)).lower()
    assert not any(phrase in read for phrase in phrases) and "rotate the letters" in read
    assert any(phrase in "\n".join(ALL.text(i) for i in range(3000)).lower() for phrase in phrases)


def test_test_records_are_different_and_extended():
    few, many = ALL.test_records(3), ALL.test_records(8)
    for name in NAMES:
        first, longer = ([one for one in records if one["task"] == name] for records in (few, many))
        assert first == longer[:3] and len({one["input"] for one in longer}) == 8
    assert ALL.test_records(3, seed=1) != few


@pytest.mark.parametrize("format", instructions.FORMATS)
def test_only_the_answer_in_its_format_is_rewarded(format):
    task = instructions.make(format=format, negatives=2)
    ways = {"plain": "{}", "tags": "<answer>{}</answer>", "json": '{{"answer": "{}"}}', "sentence": "The answer is {}."}
    for i in range(150):
        one, answer = task.record(i, seed=4), task.record(i, seed=4)["answer"]
        row = task.conversation(i, seed=4)
        user, assistant = row.pop("messages")
        assert user == {"role": "user", "content": one["prompt"]} and row == {k: v for k, v in one.items() if k != "prompt"}
        assert assistant["content"] == task.demonstration(i, seed=4) == ways[format].format(answer)
        for other, way in ways.items():
            text = f" {way.format(answer)}\n"
            assert task.reward(one, text) is (other == format) and task.formatted(one, text) is (other == format)
            assert task.answered(one, text) and task.extract(text) == answer
        wrongs = [pair["output"] for pair in one["mistakes"] if pair["output"] != answer]
        for wrong in [*wrongs, f"{answer} {answer}", answer[:-1], answer.swapcase() if answer.isalpha() else "a", ""]:
            text = ways[format].format(wrong)
            assert not task.reward(one, text) and not task.answered(one, text) and (task.formatted(one, text) or not wrong)
    loose = {"tags": "<answer> {}\n</answer>", "json": '{{\n "answer":"{}"}}'}.get(format, ways[format]).format(answer)
    assert task.reward(one, loose) and not task.reward(one, f"{loose} {loose}") and not task.reward(one, f"So {loose}")


def test_rewards_are_total():
    one, draw = instructions.make(tasks="map").record(0), random.Random(0)
    odd = [
        '{"answer": 3}',
        '{"answer": ["a"]}',
        '{"answer"',
        "[" * 900,
        '{"a":' * 190,
        "{" + "9" * 900,
        "<answer>",
        "The answer is",
    ]
    odd += ["".join(draw.choice('{}[]"<>/answer: .é\ud800\n') for _ in range(draw.randrange(40))) for _ in range(2000)]
    for text in (*odd, "a " * 10_000, ""):
        assert ALL.reward(one, text) is False and ALL.formatted(one, text) in (True, False)
        assert ALL.extract(text) is None or text.strip()


def test_prompts_show_right_examples_then_wrong_ones_then_the_input():
    task = instructions.make(shots=3, negatives=2, length=(3, 4), format=("plain", "tags"))
    for one in (*(task.record(i) for i in range(150)), *task.test_records(2)):
        lines = one["prompt"].splitlines()
        asks = "" if one["format"] == "plain" else " Put the answer between <answer> and </answer>."
        assert lines[0] == one["definition"] + asks and lines[-2:] == [f"Input: {one['input']}", "Output:"]
        assert len({pair["input"] for pair in one["examples"] + one["mistakes"]} | {one["input"]}) == 6
        shown = []
        for label, pairs in (("Output", one["examples"]), ("Wrong output", one["mistakes"])):
            for pair in pairs:
                assert (pair["output"] == truth(one["steps"], pair["input"])) is (label == "Output") and pair["output"]
                way = "<answer>{}</answer>" if asks else "{}"
                shown += [f"Input: {pair['input']}", f"{label}: {way.format(pair['output'])}"]
        assert lines[1:-2] == shown and instructions.prompt(one) == one["prompt"]
    bare = instructions.make(shots=1, definitions=())
    assert all(bare.record(i)["prompt"].startswith("Input: ") and bare.record(i)["definition"] == "" for i in range(20))
    assert "examples" not in ALL.record(0) and "mistakes" not in ALL.record(0)


def test_each_definition_is_of_one_task_and_wordings_can_be_chosen():
    define = instructions.definition
    assert [define("animals_initial_sort", "words", wording) for wording in range(4)] == [
        "Keep the animals, then replace each word by its initial, then sort the letters.",
        "First drop every fruit and colour. Then shorten every word to one letter. Then put the letters in ascending order.",
        "Take only the animals. After that, change all words to their first letters. After that, arrange the letters from the "
        "lowest to the highest.",
        "Leave out the fruits and colours and write the letters that the words begin with and write the letters so that they "
        "rise.",
    ]
    assert (
        define("swap", "digits", 0) == "Swap the first and the last digit."
        and define("odd", "digits", 1) == "Drop every even digit."
    )
    for kind in instruction_steps.ITEMS:
        fitting = [name for name in NAMES if kind in instruction_steps.STEPS[name.split("_")[0]].takes]
        texts = [define(name, kind, wording) for name in fitting for wording in range(4)]
        assert len(set(texts)) == len(texts) and len(fitting) > 15
        assert all(re.fullmatch(r"[A-Z][^{}]*[^.]\.", text) for text in texts)
    for chosen in ((2,), (0, 3)):
        task = instructions.make(definitions=chosen)
        records = [task.record(i) for i in range(80)]
        assert {one["wording"] for one in records} == set(chosen)
        assert all(one["definition"] == define(one["task"], one["kind"], one["wording"]) for one in records)


@pytest.fixture(scope="module")
def tokenizer():
    return instructions.tokenizer()


FACTS = {
    r"(\w+) is an? (animal|fruit|colour)": lambda word, group: (
        word in {"animal": ANIMALS, "fruit": FRUITS, "colour": COLOURS}[group]
    ),
    r"(\w+) begins with (\w)": lambda word, letter: word[0] == letter,
    r"(\w) is a (vowel|consonant)": lambda letter, sort: (letter in "aeiou") == (sort == "vowel"),
    r"after (\w) comes (\w)": lambda a, b: a + b in "abcdefghijklmnopqrstuvwxyza",
    r"the capital letter of (\w) is (\w)": lambda a, b: a.upper() == b,
    r"(\d) is spelled (\w+)": lambda digit, name: NAMED[int(digit)] == name,
    r"(\d) is (odd|even)": lambda digit, sort: ("even", "odd")[int(digit) % 2] == sort,
    r"(\d) plus one is (\d+)": lambda a, b: int(a) + 1 == int(b),
}


def test_texts_are_short_true_and_of_single_steps(tokenizer):
    facts, definitions = collections.Counter(), {}
    for name in NAMES[:24]:
        for kind in instruction_steps.STEPS[name].takes:
            definitions |= {instructions.definition(name, kind, wording): name for wording in range(4)}
    tasks, lengths, several = collections.Counter(), [], 0
    for text in (ALL.text(i) for i in range(1500)):
        lengths.append(len(tokenizers.encode(tokenizer, text)))
        first, *rest = text.splitlines()
        if not rest:
            for fact in text.removesuffix(".").split(". "):
                ((form, match),) = [(form, match) for form in FACTS if (match := re.fullmatch(form, fact))]
                facts[form] += 1
                assert FACTS[form](*match.groups()), fact
        elif not first.startswith("Input: "):
            name, inputs = None, shown_inputs(text)
            several += len(inputs) > len(set(inputs))
            for line in text.splitlines():
                label, _, rest = line.partition(": ")
                if label == "Input":
                    expected = truth([name], rest)
                elif label == "Output":
                    assert instructions.extract(rest) == expected
                else:
                    name = definitions[line.partition(".")[0] + "."]
                    tasks[name] += 1
    assert 300 < several < 450  # two documents of eight
    assert set(facts) == set(FACTS) and set(tasks) == set(NAMES[:24]) and min(lengths) >= 15 and max(lengths) <= 120


def test_the_items_are_single_tokens(tokenizer):
    assert len(tokenizer) <= 768
    words = [*ANIMALS, *FRUITS, *COLOURS, *NAMED[:10], "animal", "fruit", "colour", "odd", "even", "yes", "no"]
    assert [word for word in words if len(tokenizers.encode(tokenizer, word)) > 1] == []
    for one in instructions.make(format=list(instructions.FORMATS), shots=1).test_records(1):
        text = f"{one['prompt']} {instructions.written(one['answer'], one['format'])}"
        assert tokenizer.decode(tokenizers.encode(tokenizer, text)) == text


def test_a_recipe_names_its_keywords():
    settings = recipe.make(task={"name": "instructions", "tasks": ("order",), "held_out_tasks": "sort", "shots": 1})
    task = stage_tasks.task(settings)
    assert {task.record(i)["task"] for i in range(100)} == {"copy", "reverse", "descend", "rotate", "swap"}
    judges = stage_tasks.rewards(task, "instructions", {"right": "task", "form": {"name": "task.formatted", "weight": 0}})
    assert {name: (judge(task.record(0), task.demonstration(0)), weight) for name, (judge, weight) in judges.items()} == {
        "right": (True, 1.0),
        "form": (True, 0.0),
    }


def test_the_page_shows_what_the_playground_gives():
    page = PAGE.read_text()
    section = page.split("## instructions")[1].split("\n## ")[0]
    for category, names in instructions.categories().items():
        assert f"`{category}`" in section and all(f"`{name}`" in section for name in names if len(name.split("_")) == 1)
    samples = instructions.make(format=("plain", "tags"), shots=1)
    shown = [samples.record(index) for index in (0, 1, 3)]
    shown = [f"{one['prompt']} {instructions.written(one['answer'], one['format'])}" for one in shown]
    for text in (*shown, *(ALL.text(index) for index in (5, 9))):
        assert "\n".join(f"    {line}" for line in text.splitlines()) in section


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"tasks": "revers"}, "tasks: there is no 'revers'. Did you mean 'reverse'?"),
        ({"tasks": ("order", 3)}, "tasks: there is no 3."),
        ({"held_out_tasks": ("ordr",)}, "held_out_tasks: there is no 'ordr'. Did you mean 'order'?"),
        ({"tasks": "map,sort", "held_out_tasks": ("sort", "map")}, "no task is left to train"),
        ({"length": (2, 5)}, "length=(2, 5): give whole numbers of 3 to 12"),
        ({"length": (5, 4)}, "length=(5, 4): give two numbers"),
        ({"length": 5}, "length=5: give whole numbers"),
        ({"length": (3.0, 4)}, "length=(3.0, 4): give whole numbers"),
        ({"definitions": (4,)}, "definitions=(4,): give whole numbers of 0 to 3"),
        ({"shots": 9}, "shots=[9]: give whole numbers of 0 to 8"),
        ({"negatives": -1}, "negatives=[-1]: give"),
        ({"format": "xml"}, "format: there is no 'xml'. Known: json, plain, sentence, tags"),
        ({"format": ()}, "format: give one of plain, tags, json, sentence"),
    ],
)
def test_bad_keywords_are_named(keywords, message):
    with pytest.raises(UserError, match=re.escape(message)):
        instructions.make(**keywords)
    with pytest.raises(UserError, match="split='dev': instructions has"):
        ALL.record(0, split="dev")
    with pytest.raises(UserError, match="per_cell=0"):
        ALL.test_records(0)
