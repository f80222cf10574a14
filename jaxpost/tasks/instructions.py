"""Instructions: sixty small tasks on lists of letters, digits and words, each defined in four wordings.

    task=dict(name="instructions", tasks=("order", "select", "select_order"), held_out_tasks="vowels_sort", length=(3, 5))

    Keep the vowels, then sort the letters.
    Input: t e k a
    Output:

A task is one to three steps, and its name joins theirs: `vowels_sort` is `vowels`, then `sort`. The 24 steps are tasks by
themselves: six each order the list, select from it, map its items, or aggregate it to one item. The other 36 tasks are in
grids: `select_order`, `select_aggregate` and `map_order` have every pair of a few first and a few last steps, and
`select_map_order` has three steps. A definition joins the phrases of the steps. So a task of a grid can be held out and
inferred: each of its steps is a task by itself, and is part of other tasks of the grid. A single step can be inferred only
from a grid, and `copy`, `descend`, `swap`, `alternate`, `increase`, `group`, `most`, `parity` and `compare` are in none.

A hash of the input decides whether it is for training or testing (about one in ten), whatever the task. Held-out tasks have
test problems and no training problems. The examples in prompts have inputs for training. Inputs are drawn such that without
one of its steps a task would give another answer (except `copy`), and such that a task which selects first keeps about half
of the items. `difficulty` is the length of the input times the number of steps. A cell of the results' table is a task.

`text` is for the pretraining of a base model: single steps, by several inputs of one or several of one input, and facts about
the items. It has no test inputs, no held-out tasks and, where a single step is trained, no task of several.
"""

import itertools
import json
import re
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

from jaxpost import tokenizer as tokenizers
from jaxpost.config.resolve import nearest
from jaxpost.errors import UserError
from jaxpost.tasks.arithmetic import SPLITS, hashed
from jaxpost.tasks.instruction_steps import CATEGORIES, ITEMS, STEPS, TASKS, applied, definition, fact

# format -> (how a prompt asks for it, how an answer is written in it).
FORMATS = {
    "plain": ("", "{}"),
    "tags": ("Put the answer between <answer> and </answer>.", "<answer>{}</answer>"),
    "json": ('Give the answer as JSON under the key "answer".', '{{"answer": "{}"}}'),
    "sentence": ('Begin with "The answer is" and end with a full stop.', "The answer is {}."),
}

_CATEGORY = {name: category for category, names in CATEGORIES.items() for name in names}


def task_names() -> list[str]:
    """The names of the sixty tasks, those of a category together."""
    return list(TASKS)


def categories() -> dict[str, tuple[str, ...]]:
    """category -> the names of its tasks."""
    return dict(CATEGORIES)


def make(
    *,
    tasks: Sequence[str] | str = (),
    held_out_tasks: Sequence[str] | str = (),
    length: Sequence[int] = (3, 6),
    definitions: Sequence[int] = (0, 1, 2, 3),
    shots: int = 0,
    negatives: int = 0,
    format: Sequence[str] | str = "plain",
) -> SimpleNamespace:
    """The task of these tasks, all equally often.

    tasks: names or categories; none are all. held_out_tasks: those that are tested and never trained. length: the fewest and
    the most items of an input, 3 to 12. definitions: the wordings to draw from, 0 to 3; none leaves the definition out. shots:
    examples with right answers in a prompt; negatives: examples with wrong ones after them. format: how an answer is written,
    one of `FORMATS` or several to draw from.

    A record has prompt, input, answer (without its format), definition, wording, format, task, category, steps, kind (of
    items), length, difficulty, held_out, and under `examples` and `mistakes`, where there are any, {input, output} of each.
    Raises UserError for what is unknown or out of range.
    """
    names = _names(tasks, held_out_tasks)
    options = {"trained": names["train"], **_options(length, definitions, shots, negatives, format)}

    def record(index, *, split="train", seed=0):
        """Problem number `index` of an endless stream."""
        if split not in SPLITS:
            raise UserError(f"split={split!r}: instructions has the splits {' and '.join(SPLITS)}")
        name = names[split][hashed("task", split, seed, index) % len(names[split])]
        return _record(name, split, seed, index, **options)

    def conversation(index, *, seed=0):
        """The demonstration of training problem `index`, as `messages`; the other columns are those of its record."""
        columns = record(index, seed=seed)
        turns = {"user": columns.pop("prompt"), "assistant": written(columns["answer"], columns["format"])}
        return {"messages": [{"role": role, "content": content} for role, content in turns.items()], **columns}

    def test_records(per_cell, *, seed=0):
        """`per_cell` test problems of each task, or fewer where there are hardly more. A larger one extends each list."""
        return [problem for name in names["test"] for problem in _different(name, per_cell, seed, options)]

    def demonstration(index, *, seed=0):
        """The right answer to training problem `index`, in its format."""
        return conversation(index, seed=seed)["messages"][1]["content"]

    functions = (record, conversation, test_records, demonstration, reward, answered, formatted, extract)
    return SimpleNamespace(**{f.__name__: f for f in functions}, text=partial(_text, options=options))


def reward(record, completion) -> bool:
    """Whether the completion is the record's answer in the record's format, and nothing else. Never raises."""
    return _read(completion) == (record["format"], record["answer"])


def answered(record, completion) -> bool:
    """Whether the completion is the record's answer in any format."""
    return _read(completion)[1] == record["answer"]


def formatted(record, completion) -> bool:
    """Whether the completion is in the record's format, whatever it answers."""
    return _read(completion)[0] == record["format"]


def extract(completion: str) -> str | None:
    """The answer in a completion of any format; None if there is none."""
    return _read(completion)[1] or None


def prompt(record) -> str:
    """The prompt of a record: its definition, how to write the answer, its examples, its mistakes and its input."""
    lines = [f"{record['definition']} {FORMATS[record['format']][0]}".strip()]
    for key, label in (("examples", "Output"), ("mistakes", "Wrong output")):
        for pair in record.get(key, ()):
            lines.append(f"Input: {pair['input']}\n{label}: {written(pair['output'], record['format'])}")
    return "\n".join([*filter(None, lines), f"Input: {record['input']}\nOutput:"])


def written(answer: str, format: str) -> str:
    """An answer in a format."""
    return FORMATS[format][1].format(answer)


def _read(completion):
    """(format, answer) of a completion. Whatever is in no other format is plain."""
    text = " ".join(completion.split()) if len(completion) <= 1000 else ""
    for format, pattern in (("tags", r"<answer>([^<>]*)</answer>"), ("sentence", r"The answer is ([^.]*)\.")):
        if match := re.fullmatch(pattern, text):
            return format, match[1].strip()
    try:
        value = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and value.keys() == {"answer"} and isinstance(value["answer"], str):
        return "json", " ".join(value["answer"].split())
    return "plain", text


def _names(tasks, held_out_tasks):
    """{split: names of its tasks}, in the order of `TASKS`."""
    known = [*TASKS, *CATEGORIES]
    chosen, held_out = (
        [name for name in TASKS if name in names or _CATEGORY[name] in names]
        for names in (_listed("tasks", tasks, known) or TASKS, _listed("held_out_tasks", held_out_tasks, known))
    )
    if not set(chosen) - set(held_out):
        raise UserError("task instructions, held_out_tasks: no task is left to train; hold out fewer, or give other tasks")
    tested = {*chosen, *held_out}
    return {"train": [name for name in chosen if name not in held_out], "test": [name for name in TASKS if name in tested]}


def _options(length, definitions, shots, negatives, format):
    """The keywords of `_record`, checked."""
    length, definitions = _numbers("length", length, range(3, 13)), _numbers("definitions", definitions, range(4))
    (shots,), (negatives,) = _numbers("shots", [shots], range(9)), _numbers("negatives", [negatives], range(9))
    if len(length) != 2 or length[0] > length[1]:
        raise UserError(f"task instructions, length={length}: give two numbers, the fewest and the most items")
    if not (formats := _listed("format", format, FORMATS)):
        raise UserError(f"task instructions, format: give one of {', '.join(FORMATS)}")
    return {"length": length, "definitions": definitions, "shots": shots, "negatives": negatives, "formats": formats}


def _listed(key, names, known):
    names = names.split(",") if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"task instructions, {key}: there is no {unknown[0]!r}.{nearest(str(unknown[0]), known)}")
    return names


def _numbers(key, numbers, allowed):
    if isinstance(numbers, int) or not all(type(number) is int and number in allowed for number in numbers):
        raise UserError(f"task instructions, {key}={numbers!r}: give whole numbers of {allowed[0]} to {allowed[-1]}")
    return tuple(numbers)


def _record(name, split, seed, index, *, trained, length, definitions, shots, negatives, formats):
    parts = (name, split, seed, index)
    kind, format, wording = (
        choices[hashed(what, *parts) % len(choices)] if choices else None
        for what, choices in (("kind", STEPS[TASKS[name][0]].takes), ("format", formats), ("wording", definitions))
    )
    items, answer = _solved(name, kind, length, split, *parts, "own")
    examples = {}
    for number in itertools.count():
        if len(examples) == shots + negatives:
            break
        shown, output = _solved(name, kind, length, "train", *parts, number)
        if shown != items:
            examples.setdefault(tuple(shown), output)
    columns = {"task": name, "category": _CATEGORY[name], "steps": list(TASKS[name]), "cell": name, "kind": kind}
    columns |= {"definition": definition(name, kind, wording) if definitions else "", "wording": wording}
    columns |= {"input": " ".join(items), "answer": " ".join(answer), "format": format}
    columns |= {"length": len(items), "difficulty": len(items) * len(TASKS[name]), "held_out": name not in trained}
    pairs = list(examples.items())
    wrong = [(shown, _mistake(name, kind, shown, output, *parts)) for shown, output in pairs[shots:]]
    for key, group in (("examples", pairs[:shots]), ("mistakes", wrong)):
        if group:
            columns[key] = [{"input": " ".join(shown), "output": " ".join(output)} for shown, output in group]
    return {"prompt": prompt(columns), **columns}


def _solved(name, kind, length, split, *parts):
    """(input, answer), lists of items, where no step can be left out."""
    steps = TASKS[name]
    shorter = [(*steps[:place], *steps[place + 1 :]) for place in range(len(steps) if name != "copy" else 0)]
    count = length[0] + hashed("length", *parts) % (length[1] - length[0] + 1)
    for draw in itertools.count():
        items = _items(STEPS[steps[0]], kind, count, *parts, draw)
        if ("test" if hashed("instructions", *items) % 10 == 0 else "train") == split:
            answer = applied(steps, items)
            if answer and all(applied(others, items) != answer for others in shorter):
                return items, answer


def _items(step, kind, count, *parts):
    """`count` items, as the first step needs them: about half of those that it selects, or with repeats."""
    numbers = [hashed("item", *parts, place) for place in range(count)]
    pool = ITEMS[kind]
    if step.repeats:
        pool = [pool[number % len(pool)] for number in numbers[: count // 2 + 1]]
        return [pool[number // len(ITEMS[kind]) % len(pool)] for number in numbers]
    pools = ([item for item in pool if item in step.half], [item for item in pool if item not in step.half])
    chosen = [pools[number % 2] if step.half else pool for number in numbers]
    return [pool[number // 2 % len(pool)] for number, pool in zip(numbers, chosen, strict=True)]


def _mistake(name, kind, items, answer, *parts):
    """What another task of the category makes of the input; where all make the answer of it, the answer cut short."""
    tasks = (other for other in CATEGORIES[_CATEGORY[name]] if kind in STEPS[TASKS[other][0]].takes)
    outputs = [output for output in (applied(TASKS[other], items) for other in tasks) if output and output != answer]
    return outputs[hashed("mistake", *parts) % len(outputs)] if outputs else answer[:-1]


def _different(name, count, seed, options):
    """The first `count` test problems of a task with different inputs, or fewer of few possible ones."""
    if count < 1:
        raise UserError(f"per_cell={count}: at least one test problem a cell is needed")
    records = {}
    for index in range(20 * count):
        record = _record(name, "test", seed, index, **options)
        records.setdefault(record["input"], record)
        if len(records) == count:
            break
    return list(records.values())


def _text(index, *, seed=0, options):
    """Plain document number `index`: facts (two of eight), several tasks' answers for one input (two), or several examples of
    one task, with its definition (three) or without (one)."""
    number = hashed("document", seed, index)
    form, number = number % 8, number // 8
    if form < 2:
        return " ".join(fact(hashed("fact", seed, index, place)) for place in range(4 + number % 5))
    names = [name for name in options["trained"] if len(TASKS[name]) == 1] or options["trained"]
    name = names[number % len(names)]
    if form < 4:
        return "\n".join(_answers(name, names, seed, index, options))
    options = options | {"shots": 12 // options["length"][1] - (form == 4), "negatives": 0}
    options |= {"formats": list(FORMATS) if form == 4 else ["plain"]} | ({"definitions": ()} if form == 7 else {})
    record = _record(name, "train", seed, f"text {index}", **options)
    return f"{record['prompt']} {written(record['answer'], record['format'])}"


def _answers(name, names, seed, index, options):
    """A task and others with their answers for one input, in no format: fewer of a longer input."""
    parts = ("answers", seed, index)
    kinds = STEPS[TASKS[name][0]].takes
    kind = kinds[hashed("kind", *parts) % len(kinds)]
    items, _ = _solved(name, kind, options["length"], "train", *parts)
    others = [other for other in names if kind in STEPS[TASKS[other][0]].takes and applied(TASKS[other], items)]
    others.sort(key=lambda other: (other != name, hashed(other, *parts)))
    for other in others[: max(1, 12 // len(items))]:
        wordings = options["definitions"]
        words = definition(other, kind, wordings[hashed("wording", other, *parts) % len(wordings)]) if wordings else ""
        row = {"definition": words, "format": "plain", "input": " ".join(items)}
        yield f"{prompt(row)} {' '.join(applied(TASKS[other], items))}"


def tokenizer():
    """A tokenizer of 768 tokens, learned from the playground's own texts."""
    task = make()
    return tokenizers.learned([task.text(index) for index in range(2000)], 768)
