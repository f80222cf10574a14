"""Completions as a data set: drawn once from the weights that a stage starts from, judged, and then learned from like any file.

    OUT/<key>/part-00000096.jsonl    rows that some of the prompts gave, the 96th the last of them
              meta.json              whose completions, how far they are and what they took; at the end, that all is there

What a row is follows from what the stage's objective learns from:

    pairs                  the best and the worst of a prompt's completions, the second best and the second worst, and so on,
                           for as long as their rewards differ; how much they do is the margin
    labelled, mismatched   every completion, with its reward (0 or 1) for the label
    scored                 every completion, with its reward
    demonstrations         the best one, where it is better than another: rejection sampling

A row of a prompt is there once, and the white space around a completion is left out. So is a completion that no stop token
ended, since the row would give it one that the model did not say. Rows are text, as any data set's, and are tokenised as such:
a tokenizer may write a text in other tokens than the model drew it in. Rows of one prompt follow each other, so what `held_out`
takes may be of prompts that are trained on.

Parts are written every few seconds, and a run that was killed or asked to stop goes on after the last.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from etils import epath

from jaxpost import sharding, writers
from jaxpost.errors import UserError
from jaxpost.host import read_object
from jaxpost.models.transformer import Transformer
from jaxpost.rollouts.scoring import judged
from jaxpost.sampling.decode import Completions, answers, in_chunks
from jaxpost.types import Params

SECONDS = 20.0  # between parts: what a kill costs


class Samples(NamedTuple):
    """A data set that is yet to be made: `group` completions of each of `count` prompts.

    prompt: i -> (record, token ids); rewards: {name: (function, weight)}; shape: what the objective learns from; rows: how many
    completions are made at a time, which changes nothing; seed, step: of the noise; judging: what `scoring.judged` takes;
    options: what `complete` takes.
    """

    model: Transformer
    tokenizer: Any
    prompt: Callable
    rewards: Mapping[str, tuple[Callable, float]]
    shape: str
    count: int
    group: int
    rows: int
    seed: int
    step: int
    judging: dict
    options: dict

    def close(self) -> None:
        """Nothing to end, as for data."""


def make(
    samples: Samples, about: dict, params: Callable[[], Params], out, mesh, stopped: Callable[[], bool] = lambda: False
) -> tuple[list[str], float]:
    """(files with the rows, seconds that it took to make them); whatever is not there yet is made. No files if it was `stopped`
    before all was there.

    about: what tells these samples from others, as JSON; params: gives the weights, if they are needed. All processes call it.
    Raises UserError where no row comes of all completions.
    """
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = epath.Path(out) / key
    done = _progress(folder)
    if not done["all"]:
        if jax.process_index() == 0:
            for part in _parts(folder):
                if int(part.name[5:13]) > done["prompts"]:  # written when the run was killed, and to be made again
                    part.unlink()
        _draw(samples, about, done, params(), folder, mesh, stopped)
        done = _progress(folder)
    if not done["all"]:
        return [], done["seconds"]
    if not done["rows"]:
        if jax.process_index() == 0:
            (folder / "meta.json").unlink()  # what is mended may be none of what the key knows
        raise UserError(
            f"config.source: {samples.count:,} prompts, and in none do completions differ in their reward, so there is nothing "
            "to learn; give more prompts (config.task.examples), a larger group, or a model that is right now and then."
        )
    if jax.process_index() == 0:
        summary = f"{done['rows']:,} rows of {samples.group} completions to each of {samples.count:,} prompts"
        print(f"samples: {summary}, drawn in {done['seconds']:.0f}s; {folder}", file=sys.stderr)
    return [str(part) for part in _parts(folder)], done["seconds"]


def _progress(folder: epath.Path) -> dict:
    """How far a folder is, the first process's view of it. Raises UserError where what says so is damaged."""
    meta, done = folder / "meta.json", {"prompts": 0, "rows": 0, "seconds": 0.0, "all": False}
    if meta.exists():
        try:
            stored = read_object(meta)
            if wrong := [name for name, value in done.items() if type(stored.get(name)) is not type(value)]:
                raise UserError(f"{meta}: has no {wrong[0]}.")
        except UserError as e:
            remedy = f"Bring it back from a copy, or delete {folder}, and its samples are drawn again"
            raise UserError(f"{e} The file is damaged. {remedy}.") from e
        done = {name: stored[name] for name in done}
    return {name: type(value)(sharding.agree(float(value))) for name, value in done.items()}


def _parts(folder: epath.Path) -> list[epath.Path]:
    return sorted(folder.glob("part-*.jsonl")) if folder.exists() else []


def _draw(samples: Samples, about: dict, done: dict, params: Params, folder: epath.Path, mesh, stopped) -> None:
    """Makes what is not there yet; the first process judges and writes."""
    first, each, records = done["prompts"], max(1, samples.rows // samples.group), []

    def prompts() -> Iterator[np.ndarray]:
        for i in range(first, samples.count):
            record, ids = samples.prompt(i)
            records.append(record)
            yield ids

    noise = {"seed": samples.seed, "step": samples.step, "number": first * samples.group, "group": samples.group}
    options = {"rows": each, "tokenizer": samples.tokenizer, **noise, **samples.options}
    chunks = in_chunks(samples.model, params, prompts(), mesh=mesh, **options)
    held, mark = [], time.monotonic()
    for where, completions in tqdm.tqdm(
        chunks, desc="sampling", unit="batch", disable=None, total=-(-(samples.count - first) // each)
    ):
        at = first + where.stop
        ends = at == samples.count or stopped()
        if jax.process_index() == 0:
            held += _judged_rows(samples, records[where], completions)
            now = time.monotonic()
            if ends or now - mark >= SECONDS:
                seconds = done["seconds"] + now - mark
                done = {"prompts": at, "rows": done["rows"] + len(held), "seconds": seconds, "all": at == samples.count}
                _write(folder, held, {**about, **done})
                held, mark = [], now
        if ends:
            break
    sharding.agree(0.0)  # nobody reads before all is written


def _judged_rows(samples: Samples, records: Sequence[dict], completions: Completions) -> list[dict]:
    """The rows that these problems' completions give, `group` of each."""
    texts, data = answers(completions, samples.tokenizer), []
    ended = np.flatnonzero(completions.stopped)
    judgeable = [records[j // samples.group] | {"stopped": True} for j in ended]
    scores = judged(samples.rewards, judgeable, [texts[j].strip() for j in ended], **samples.judging)
    for i, record in enumerate(records):
        own = [(texts[j].strip(), score.total) for j, score in zip(ended, scores, strict=True) if j // samples.group == i]
        own = [(text, total) for text, total in own if np.isfinite(total)]  # a completion that no reward applies to is no row
        data += rows(samples.shape, record["prompt"], [text for text, _ in own], [total for _, total in own])
    return data


def _write(folder: epath.Path, held: list[dict], meta: dict) -> None:
    """A part, if it has rows, and then how far all of them are."""
    folder.mkdir(parents=True, exist_ok=True)
    if held:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held)
        writers.replace(folder / f"part-{meta['prompts']:08d}.jsonl", lines.encode())
    writers.replace(folder / "meta.json", json.dumps(meta, default=str).encode())


def rows(shape: str, prompt: str | list, texts: Sequence[str], rewards: Sequence[float]) -> list[dict]:
    """The rows that a prompt's completions give, as a file of this shape has them; see the module's docstring.

    Raises UserError for a reward that is no label where one is needed.
    """
    unique = {json.dumps(row): row for row in ROWS[shape](texts, np.asarray(rewards, float))}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"prompt": turns, **row} for row in unique.values()]


def _turn(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def _pairs(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    order = np.argsort(-rewards, kind="stable")
    for best, worst in zip(order, order[::-1], strict=True):
        if rewards[best] <= rewards[worst]:
            return
        gap = float(rewards[best] - rewards[worst])
        yield {"chosen": _turn(texts[best]), "rejected": _turn(texts[worst]), "margin": gap}


def _best(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    best = int(np.argmax(rewards)) if len(rewards) else 0
    if len(rewards) and np.ptp(rewards) > 0 and texts[best]:  # nobody is taught to say nothing
        yield {"completion": _turn(texts[best])}


def _scored(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    for text, reward in zip(texts, rewards, strict=True):
        yield {"completion": _turn(text), "score": float(reward)}


def _judged(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    for text, reward in zip(texts, rewards, strict=True):
        if reward not in (0.0, 1.0):
            raise UserError(f"config.reward: {reward} of {text[:60]!r} is no label; the objective needs a reward of 0 or 1.")
        yield {"completion": _turn(text), "label": bool(reward)}


# The shapes that completions can have.
ROWS = {"pairs": _pairs, "demonstrations": _best, "labelled": _judged, "mismatched": _judged, "scored": _scored}
