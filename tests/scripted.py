"""A rollout source whose sampler is a script, so that what becomes of completions needs no model.

Completion i of the batch number n says what `says(n, i)` gives, its tokens' log-probabilities are told by `logp`, and it ends
in another order than it was asked for.
"""

import functools
from types import SimpleNamespace

import numpy as np

from jaxpost import sharding
from jaxpost.rollouts import advantages, source, steps
from jaxpost.sampling.decode import Finished
from jaxpost.stages import rollouts as drawn
from jaxpost.tasks import arithmetic

TOKENIZER = arithmetic.tokenizer()
STOP = TOKENIZER.eos_token_id
PROMPT_WINDOW, NEW, GROUP, ROWS = 6, 4, 2, 8
OPEN: list[source.Rollouts] = []  # those that were made and are to be closed


def prompt(i: int) -> tuple[dict, np.ndarray]:
    """A problem whose number is in its text and its record."""
    return {"prompt": f"{i}+", "number": i}, np.array(TOKENIZER.encode(f"{i}+"), np.int32)


def demonstration(i: int) -> np.ndarray:
    """The answer to a problem: two sevens."""
    return np.array([*TOKENIZER.encode("77")[-2:], STOP], np.int32)


def says(batch: int, i: int) -> str:
    """One digit, or for every fifth two and then nothing that stops."""
    return str((7 * batch + 3 * i) % 10) * (1 if i % 5 else 2)


def logp(weights: float, batch: int, i: int, n: int) -> np.ndarray:
    """Of so many tokens; another for each, and for each weights."""
    return -(weights + 1 + 0.25 * batch + i / 64 + np.arange(n) / 512).astype(np.float32)


def sampler(says=says, asked=None, killed=lambda batch, ended: None):
    """What stands for decode.stream. asked: a list that takes (batch, what it had already) of each call; killed(batch, how many
    have ended) may raise.
    """

    def stream(model, params, prompts, *, mesh, seed, step, group, have=frozenset(), given=(), **_):
        if asked is not None:
            asked.append((step, have))
        left, ended = [i for i in range(len(prompts) * group) if i not in have], len(have)
        for some in (left[1::2], [], left[::-2] if len(left) % 2 else left[-2::-2]):
            found = []
            for i in some:
                text = says(step, i)
                ids = [TOKENIZER.encode(letter)[-1] for letter in text]
                stopped = len(text) == 1
                begun = [int(x) for x in given[i]] if len(given) else []
                tokens = np.array([*begun, *ids, *[STOP] * stopped], np.int32)[:NEW]
                whole = logp(params, step, i, len(tokens))
                found.append(Finished(i, tokens, whole, stopped, len(tokens) - stopped, len(begun)))
            ended += len(found)
            killed(step, ended)
            yield found

    return stream


def state(weights: float = 0.0, step: int = 0) -> SimpleNamespace:
    """A train state whose parameters are one number."""
    return SimpleNamespace(train=np.float32(weights), frozen=None, step=step)


SETTINGS = {"overlong": 0, "truncated": 0.0, "mask_truncated": False, "drop_level": False, "correction": ""}


def listed(pairs: bool = False, advantages=advantages.centred, resample: int = 0, cap: float = 2.0, **settings) -> list:
    """The steps that these settings ask for, as functions."""
    r = {**SETTINGS, **settings, "resample": resample, "correction_cap": cap}
    options = {name: {k: r[key] for k, key in keys.items() if k} for name, keys in drawn._SETTINGS.items()}
    options["advantages"] = {"of": advantages}
    return [functools.partial(getattr(steps, name), **options.get(name, {})) for name in drawn.default(r, pairs)]


def rollouts(monkeypatch, stream=None, annotators=(), **changes) -> source.Rollouts:
    """The source over the script. changes: of source.RolloutConfig, of its rows, or of its steps' settings."""
    monkeypatch.setattr(source, "stream", stream or sampler())
    monkeypatch.setattr(source, "ready", lambda model, params, mesh: float(params))
    settings = {k: changes.pop(k) for k in [*SETTINGS, "resample", "cap", "advantages"] if k in changes}
    pairs, corrected = changes.get("pairs", False), bool(settings.get("correction"))
    shape = {"batch_size": ROWS, "group": GROUP, "prompt_window": PROMPT_WINDOW, "new": NEW, "corrected": corrected}
    shape |= {k: changes.pop(k) for k in source.Rows._fields if k in changes}
    default = {
        "model": None,
        "tokenizer": TOKENIZER,
        "mesh": sharding.make_mesh(),
        "prompt": prompt,
        "demonstration": None,
        "given": None,
        "rewards": {"even": (lambda record, text: float(int(text[-1]) % 2 == 0), 1.0)},
        "steps": listed(pairs, **settings),
        "rows": source.Rows(**shape),
        "microbatches": 1,
        "seed": 0,
        "minibatches": 1,
        "epochs": 1,
        "lag": 0,
        "length": 10,
        "judging": {},
        "sampling": {"prompt_window": PROMPT_WINDOW, "new": NEW, "temperature": 0.5, "stop": (STOP,)},
    }
    OPEN.append(source.Rollouts(source.RolloutConfig(**{**default, **changes})))
    OPEN[-1].annotators = annotators
    return OPEN[-1]


def completions(batch: dict) -> list[tuple[str, str]]:
    """(prompt, completion) of each of a batch's documents that has a token in the mask."""
    found = []
    for row in range(len(batch["tokens"])):
        for document in range(1, batch["segments"][row].max(initial=0) + 1):
            own = batch["segments"][row] == document
            asked, said = own & ~batch["mask"][row], own & batch["mask"][row]
            if said.any():
                found.append((TOKENIZER.decode(batch["tokens"][row][asked]), TOKENIZER.decode(batch["tokens"][row][said])))
    return found
