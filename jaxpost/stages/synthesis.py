"""A stage that generates by a prompt of its own: a record becomes messages, a completion rows, and filters keep some of them.

    questions={
        "do": "generate", "data": "texts.jsonl",
        "prompt": {"name": "fill", "template": "Write a question about this text, and its answer: {{ text }}"},
        "parser": "tagged", "filters": [{"name": "unlike", "field": "prompt"}], "budget": {"rows": 1000},
    }

Completions are the model's, or those of an OpenAI-compatible server (config.endpoint). They are parsed and filtered in the
order of the prompts, whichever comes first. So what is kept depends neither on `eval_rows` or `concurrency` nor on where a run
was killed. A prompt that reads the rows kept so far gets those of earlier rounds. What was dropped, and why, is in the
artefact's meta.json beside the rows.
"""

import collections
import contextlib
import functools
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxpost import sharding
from jaxpost.config.naming import digest_of
from jaxpost.config.resolve import bind, entries, entry_of, resolve
from jaxpost.data import chat, mixture
from jaxpost.data.readers import Record
from jaxpost.errors import UserError, first_line
from jaxpost.models import loading
from jaxpost.models.identity import identity
from jaxpost.recipe import DEFAULTS, plain
from jaxpost.sampling import decode, processors
from jaxpost.stages import datasets, tasks
from jaxpost.stages.rollouts import sampling
from jaxpost.stages.run import Output, Run, check_room
from jaxpost.storage.artefacts import Artefact, key
from jaxpost.synthesis import calls
from jaxpost.synthesis import endpoint as servers
from jaxpost.synthesis.endpoint import Answer, Request
from jaxpost.synthesis.ledger import START, Draw, Ledger
from jaxpost.synthesis.pool import Pool
from jaxpost.tokenizer import encodes, some_text

LOOK = 256  # records whose prompts are tried before anything is asked
_SAMPLED = ("group", "new", "temperature", "top_p", "stop")
_DRAWN = (*_SAMPLED, "prompt_window", "top_k", "min_p", "processors")


class Synthesis(NamedTuple):
    """A stage that generates by a prompt, checked. spec: the model, None with an endpoint; records: None while an earlier stage
    is still to make them.
    """

    name: str
    settings: Any
    spec: loading.ModelSpec | None
    endpoint: servers.Endpoint | None
    functions: calls.Functions
    records: list[Record] | None
    trial: tuple[dict, ...]


def planned(name: str, s, run: Run) -> Synthesis:
    """Reads the records and resolves the functions. Raises UserError for either, and for settings that give no rows."""
    functions = _functions(name, s)
    endpoint = spec = None
    if s.endpoint:
        endpoint = bind(servers.of, dict(entry_of(plain(s.endpoint), "config.endpoint")), "endpoint")()
        if ids := [one for one in s.rollouts.stop if not isinstance(one, str)]:
            raise UserError(f"config.rollouts.stop: {ids[0]} is a token id, and an endpoint takes texts alone.")
        if jax.process_count() > 1:
            raise UserError(f"config.{name}.endpoint: needs no devices; run this stage alone, in one process.")
    else:
        spec = run.described(s)
        check_room(spec, s.rollouts)
        sampling(spec, s)
    if 0 < s.budget.completions < s.rollouts.group:
        raise UserError(f"config.budget.completions: {s.budget.completions} is less than one prompt's rollouts.group.")
    if s.round != DEFAULTS["round"] and not calls.reads_pool(functions.prompt):
        raise UserError(f"config.round: {s.round} is of no use, since the prompt reads no pool; leave it out.")
    pending = run.pending(s.data)
    records = None if pending else _records(s, run)
    plan = Synthesis(name, s, spec, endpoint, functions, records, ())
    rows = [row for earlier in pending for row in earlier.trial]
    first = [Record(row, f"a row of an earlier stage, {i}") for i, row in enumerate(rows)] if pending else records[:LOOK]
    return plan._replace(trial=_trial(plan, first, _prompts(plan, first)))


def output(plan: Synthesis) -> Output:
    """What later stages are told before there are rows."""
    return Output(pending=True, trial=plan.trial)


def make(plan: Synthesis, run: Run) -> Output:
    """Makes the rows that are not there yet, and gives the files."""
    s = plan.settings
    if plan.records is None:
        plan = plan._replace(records=_records(s, run))
        _prompts(plan, plan.records[:LOOK])
    artefact = Artefact(run.root, "rows", about := _about(plan, run))
    if len(set(sharding.each_text(key(about)))) > 1:
        raise UserError(f"{plan.name}: the processes have other records, functions or weights; give every host the same.")
    complete = functools.partial(_by_endpoint, plan, run.root / "answers") if plan.endpoint else _Sampler(plan, run)
    with run.stop.saving(f"{plan.name}, while it generated"):
        progress = produce(plan, artefact, complete, lambda: run.stop.asked)
    spent = {"generated": progress["tokens"]}
    return Output(rows=str(artefact.folder / "part-*.jsonl"), seconds=progress["seconds"], spent=spent)


def _functions(name: str, s) -> calls.Functions:
    if not s.prompt:
        raise UserError(f"config.{name}.prompt: say how a record becomes messages, as 'own' or {{'name': 'fill', ...}}.")
    prompt = resolve(plain(entry_of(s.prompt, "config.prompt")), "prompts")
    parser = resolve(plain(entry_of(s.parser, "config.parser")), "parsers") if s.parser else None
    filters: dict[str, Callable] = {}
    for entry in entries(plain(s.filters), "config.filters"):
        unique = entry if isinstance(entry, str) else entry.get("name", "")
        while unique in filters:
            unique += "'"
        filters[unique] = resolve(entry, "filters")
    return calls.Functions(prompt, parser, filters)


def _records(s, run: Run) -> list[Record]:
    """The records: rows of `data`, or else problems of the task."""
    if s.data:
        parts = mixture.read(plain(run.filled(s).data), "data", s.bad_rows == "skip")
        if any(part.weight is not None for part in parts):
            raise UserError("config.data: every record is asked as often as any other; leave the weights out.")
        if (unread := [line for part in parts for line in part.unread]) and jax.process_index() == 0:
            print(f"records: {len(unread):,} cannot be read and are left out; the first: {unread[0]}", file=sys.stderr)
        return [record for part in parts for record in part.records]
    if not s.task:
        raise UserError("config.data: give records, as a file or @NAME of an earlier stage, or a config.task.")
    task, count = tasks.opened(plain(s.task)), s.task.get("examples", datasets.EXAMPLES)
    if not callable(getattr(task, "record", None)):
        raise UserError(f"config.task: {s.task['name']} has no function record; CONTRIBUTING.md lists what a task has.")
    return [Record(task.record(i, seed=s.seed), f"task {s.task['name']}, problem {i}") for i in range(count)]


def _prompts(plan: Synthesis, records: Sequence[Record]) -> list[list[dict]]:
    """The messages of these records. Raises UserError where a prompt fails, or leaves out all."""
    pool = Pool([record.row for record in records])
    draws = [_drawn(plan, pool, record, number, (0, 0)) for number, record in enumerate(records)]
    prompts = [draw.messages for draw in draws if draw.messages is not None]
    if draws and not prompts:
        raise UserError(f"config.{plan.name}.prompt: none of the first {len(draws)} records can be asked.")
    return prompts


def _trial(plan: Synthesis, records: Sequence[Record], prompts: Sequence[list[dict]]) -> tuple[dict, ...]:
    """Rows such as the parser gives, of its example; none where it has no example. Where the tokenizer lacks tokens for the
    example, a text that it knows stands in the rows instead.
    """
    parser = plan.functions.parser
    example = "1" if parser is None else getattr(getattr(parser, "func", parser), "example", None)
    if example is None or not prompts:
        return ()
    try:
        rows = calls.parsed(parser, example, records[0].row, prompts[0])
    except UserError:
        raise
    except Exception as error:  # of somebody's function
        raise UserError(f"config.parser: it fails on its example with {type(error).__name__}: {first_line(error)}") from error
    if isinstance(rows, str):
        return ()
    return tuple(rows if plan.spec is None else (_spelled(row, plan.spec.tokenizer) for row in rows))


def _spelled(value: Any, tokenizer: Any) -> Any:
    """A row, or a value in it, with a text that the tokenizer knows in place of each that it has no tokens for."""
    if isinstance(value, dict):
        return {key: x if key == "role" else _spelled(x, tokenizer) for key, x in value.items()}
    if isinstance(value, list):
        return [_spelled(x, tokenizer) for x in value]
    return some_text(tokenizer) if isinstance(value, str) and not encodes(tokenizer, value) else value


def _about(plan: Synthesis, run: Run) -> dict:
    """What decides the rows."""
    s, f = plan.settings, plan.functions
    about = {
        "records": mixture.digest_of_rows(record.row for record in plan.records),
        "functions": [digest_of(f.prompt), digest_of(f.parser), *(digest_of(one) for one in f.filters.values())],
        "budget": plain(s.budget),
        "seed": s.seed,
        "skip": s.bad_rows == "skip",
        "round": s.round if calls.reads_pool(f.prompt) else 0,
    }
    if plan.endpoint:
        server = {"model": plan.endpoint.model, "options": plan.endpoint.options}
        return about | server | {"rollouts": {name: plain(s.rollouts[name]) for name in _SAMPLED}}
    origin = run.starting(plan.spec, s)
    about |= {"weights": identity(origin, s.seed), "template": datasets.template(origin, s), "dtype": s.dtype}
    about |= {"tokenizer": digest_of(plan.spec.tokenizer.backend_tokenizer.to_str()), "step": _step(plan.name)}
    about |= {"rollouts": {name: plain(s.rollouts[name]) for name in _DRAWN}}
    return about | processors.identity(sampling(plan.spec, s)["chain"])


def _step(name: str) -> int:
    return zlib.crc32(name.encode()) >> 1  # so that two stages draw different completions


# ---- draws: which record is asked when


def _drawn(plan: Synthesis, pool: Pool, record: Record, number: int, repeat: tuple[int, int]) -> Draw:
    """A record with its messages. Raises UserError for one that cannot be asked, unless such records are left out."""
    s = plan.settings
    pool.key = np.random.SeedSequence([s.seed, number]).generate_state(2)
    try:
        messages = calls.messages(plan.functions.prompt, record.row, pool, record.place)
        if plan.spec is not None:
            _ids(plan, messages, record.place)
    except UserError:
        if s.bad_rows != "skip":
            raise
        messages = None
    return Draw(number, record, messages, repeat, pool.key)


def _ids(plan: Synthesis, messages: list[dict], place: str) -> np.ndarray:
    """The token ids of messages. Raises UserError for those that are longer than the prompt's window."""
    s = plan.settings
    try:
        ids = chat.encode_prompt(messages, plan.spec.tokenizer, datasets.template(plan.spec, s))
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    if not 0 < len(ids) <= s.rollouts.prompt_window:
        raise UserError(
            f"{place}: its prompt has {len(ids)} tokens; config.rollouts.prompt_window takes {s.rollouts.prompt_window}. Make "
            "that longer, or leave such records out: config.bad_rows='skip'."
        )
    return ids


def _draws(plan: Synthesis, pool: Pool, start: int) -> Iterator[list[Draw]]:
    """Draws from the one with this number on, a round at a time where prompts read the pool, else one by one."""
    records, s = plan.records, plan.settings
    budgeted, seen, before = any(plain(s.budget).values()), {}, []
    for record in records:
        text = json.dumps(record.row, sort_keys=True, default=str)
        before.append(seen.get(text, 0))
        seen[text] = before[-1] + 1
    size = s.round if calls.reads_pool(plan.functions.prompt) else 1
    for first in range(start, sys.maxsize if budgeted else len(records), size):
        numbers = range(first, first + size if budgeted else min(first + size, len(records)))
        places = [divmod(number, len(records)) for number in numbers]
        yield [
            _drawn(plan, pool, records[i], number, (again, before[i]))
            for number, (again, i) in zip(numbers, places, strict=True)
        ]


# ---- where completions come from: (draws, prompts asked before) -> the answers to each draw, in order


class _Sampler:
    """Completions by the stage's model, whose weights are read at the first call."""

    def __init__(self, plan: Synthesis, run: Run):
        self.plan, self.run, self.params = plan, run, None

    def __call__(self, draws: Iterable[Draw], before: int) -> Iterator[list[Answer]]:
        plan, s, mesh = self.plan, self.plan.settings, self.run.mesh
        if self.params is None:
            origin = self.run.starting(plan.spec, s)
            self.params = decode.ready(plan.spec.transformer, loading.weights(origin, mesh, s.seed), mesh)
        prompts = (_ids(plan, draw.messages, draw.record.place) for draw in draws)
        noise = {"seed": s.seed, "step": _step(plan.name), "number": before * s.rollouts.group, "group": s.rollouts.group}
        options = {"tokenizer": plan.spec.tokenizer, **noise, **sampling(plan.spec, s)}
        rows = max(1, s.eval_rows // s.rollouts.group)
        for _, completions in decode.in_chunks(plan.spec.transformer, self.params, prompts, mesh=mesh, rows=rows, **options):
            texts = decode.answers(completions, plan.spec.tokenizer)
            stopped, lengths = completions.stopped.tolist(), completions.lengths.tolist()
            each = [Answer(*one, "" if ended else "cut off") for *one, ended in zip(texts, lengths, stopped, strict=True)]
            yield from (each[i : i + s.rollouts.group] for i in range(0, len(each), s.rollouts.group))


def _by_endpoint(plan: Synthesis, folder: epath.Path, draws: Iterable[Draw], before: int) -> Iterator[list[Answer]]:
    """Completions by the endpoint; what it has answered before lies in the folder."""
    s, r = plan.settings, plan.settings.rollouts
    shared = {"temperature": r.temperature, "max_tokens": r.new, "top_p": r.top_p if r.top_p < 1 else None}
    shared |= {"stop": list(r.stop) or None}

    def requests(draw: Draw) -> list[Request]:
        seeds = [np.random.SeedSequence([s.seed, *draw.repeat, j]).generate_state(1)[0] >> 1 for j in range(r.group)]
        return [Request(draw.messages, int(seed), draw.record.place) for seed in seeds]

    return servers.answers(plan.endpoint, map(requests, draws), shared, folder, s.bad_rows == "skip")


# ---- the loop


def produce(plan: Synthesis, artefact: Artefact, complete: Callable, stopped: Callable[[], bool]) -> dict[str, float]:
    """Makes the rows that are not there yet, until all are there or `stopped`; how far it is then.

    complete: (draws, prompts asked before) -> the answers to each, in order. All processes call it and do the same; the
    first one writes. Raises UserError where nothing is kept, and keeps what is there where anything else stops it.
    """
    progress, done = artefact.resume(**START)
    if done:
        return progress
    ledger = Ledger(plan, artefact, progress)
    try:
        ended = _filled(ledger, complete, stopped)
    finally:
        ledger.write()
        ledger.bar.close()
    if ended and not ledger.progress["rows"]:
        if jax.process_index() == 0:
            artefact.forget()  # what mends it may be nothing that the digest knows, as a file that a filter reads
        raise UserError("\n  ".join([f"config.{ledger.line()}; there is nothing to learn.", *ledger.tally.lines()[:10]]))
    if ended and jax.process_index() == 0:
        artefact.finish(rows=ledger.progress["rows"], dropped=ledger.tally.dropped)
        print("\n  ".join([f"{ledger.line()}; {artefact.folder}", *ledger.tally.lines()]), file=sys.stderr)
    return {name: type(value)(sharding.agree(float(value))) for name, value in ledger.progress.items()}


def _filled(ledger: Ledger, complete: Callable, stopped: Callable[[], bool]) -> bool:
    """Asks, and takes what is answered, until the synthesis has ended; False where it was stopped before."""
    pooled = calls.reads_pool(ledger.plan.functions.prompt)
    rounds: Iterator[Iterable[Draw]] = _draws(ledger.plan, ledger.pool, ledger.progress["draws"])
    if not pooled:  # prompts do not depend on rows, so nothing ends a round
        rounds = iter([itertools.chain.from_iterable(rounds)])
    while not ledger.ended() and (draws := next(rounds, None)) is not None:
        waiting: collections.deque[Draw] = collections.deque()
        with contextlib.closing(complete(_sent(draws, waiting, ledger), ledger.progress["prompts"])) as each:
            for answers in each:
                while (draw := waiting.popleft()).messages is None:
                    ledger.leave_out(draw)
                ledger.take(draw, answers)
                if ledger.ended():
                    break
                if not pooled:
                    ledger.commit()
                    ledger.write_if_due()
                if stopped():
                    return False
        while waiting and waiting[0].messages is None and not ledger.ended():
            ledger.leave_out(waiting.popleft())
        ledger.commit()
        ledger.write_if_due()
    return True


def _sent(draws: Iterable[Draw], waiting: collections.deque, ledger: Ledger) -> Iterator[Draw]:
    """The draws that are asked, as many as the budget has completions for; `waiting` gets these and those that are left out."""
    left, in_vain = ledger.prompts_left(), 0
    for draw in draws if left else ():
        waiting.append(draw)
        in_vain = in_vain + 1 if draw.messages is None else 0
        if draw.messages is not None:
            yield draw
            left -= 1
        if not left or in_vain > len(ledger.plan.records):
            return
