"""From a record to the messages that are asked: (record, *, ...) -> a text, or a list of {"role", "content"}.

A prompt may take a second argument with a default, `pool` (pool.Pool): all records, the rows kept in earlier rounds, and a key
for what it draws. Then prompts are made a round at a time (config.round).
"""

import functools
from collections.abc import Mapping

import jinja2
import jinja2.sandbox
import numpy as np

from jaxpost.errors import UserError, first_line
from jaxpost.synthesis.pool import Pool


def own(record: Mapping) -> list[dict] | str:
    """The record's own `prompt`, or its `messages` without an answer at their end: so another model answers a file's prompts.

    Raises UserError for a record that has neither.
    """
    prompt = record.get("prompt", record.get("messages"))
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict) and prompt[-1].get("role") == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        raise UserError(f"there is no prompt and there are no messages; the record has {', '.join(record)}")
    return prompt


def fill(record: Mapping, *, template: str, system: str = "") -> list[dict]:
    """A user's message from a Jinja template of the record's keys, as "Write a question about this text: {{ text }}".

    system: a template of a system message before it. Raises UserError for a template that is no Jinja, and for a key that the
    record lacks.
    """
    turns = [("system", system)] * bool(system) + [("user", template)]
    return [{"role": role, "content": _filled(source, dict(record))} for role, source in turns]


def with_examples(
    record: Mapping,
    pool: Pool | None = None,
    *,
    template: str,
    system: str = "",
    records: int = 6,
    rows: int = 2,
    field: str = "instruction",
) -> list[dict]:
    """As `fill`, with `examples` in the template: texts under `field` of so many other records, and of so many kept rows.

    Where there are fewer kept rows, records take their places; the examples are shuffled. As in "Self-Instruct: Aligning
    Language Models with Self-Generated Instructions", whose template numbers six tasks of people and two of the model. Raises
    UserError besides for a record or row that has no text under `field`.
    """
    rng = np.random.default_rng(pool.key)
    kept = _drawn(rng, pool.rows, rows, field)
    others = _drawn(rng, [other for other in pool.records if other != record], records + rows - len(kept), field)
    examples = [*others, *kept]
    examples = [examples[i] for i in rng.permutation(len(examples))]
    return fill({**record, "examples": examples}, template=template, system=system)


def _drawn(rng: np.random.Generator, rows: list, count: int, field: str) -> list[str]:
    """`count` of the rows' texts, or all that there are, drawn without replacement."""
    drawn = [rows[i] for i in rng.choice(len(rows), min(count, len(rows)), replace=False)] if rows else []
    if lacking := [row for row in drawn if not isinstance(row.get(field), str)]:
        raise UserError(f"prompts.with_examples: there is no text under {field!r} in a row of {', '.join(lacking[0])}.")
    return [row[field] for row in drawn]


def _filled(source: str, values: dict) -> str:
    try:
        return _template(source).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the template is no Jinja, by its line {error.lineno}: {error}") from error
    except Exception as error:  # a template may raise anything
        raise UserError(f"the template cannot be filled: {first_line(error)}; the record has {', '.join(values)}") from error


@functools.lru_cache(maxsize=16)
def _template(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(source)
