"""Several samples of each problem: does one of k get there (pass@k), how good is the mean one, what does their majority say?

    python -m jaxpost.evaluate --model=FOLDER --task=arithmetic --samples=16 --k=1,4,16

All figures are expectations that n samples give exactly, with no further chance in them:

    mean@n   the mean over the n samples of a problem
    pass@k   whether the best of k samples is right, expected over all ways to take k of the n. With c right ones it is the
             unbiased 1 - C(n-c,k) / C(n,k) of "Evaluating Large Language Models Trained on Code". Of a reward that is no
             verdict the same expectation is that of the best reward, and is called best@k
    maj@k    whether the answer that most of k samples give is right ("Self-Consistency Improves Chain of Thought Reasoning"),
             expected over all ways to take k of the n, and over the answers that tie for the first place. A sample without
             an answer has no vote; where nobody has one it counts as wrong. One sample of an answer that others judge
             differently (a reward may look at more than the answer) counts as their mean

pass@k rises with k by luck alone where an answer can be guessed, and maj@k rises only where the right answer is already the
likeliest one: the two together tell a model that could be taught by its own samples from one that is merely scattered.

The interval `NAME_low` to `NAME_high` is the 95% one of the mean over problems (1.96 standard errors, by the normal
approximation): how far another draw of problems from where these came from, each sampled anew, would move the figure. It holds
the noise of sampling too, since each problem's own figure does. It says nothing where all problems agree, and none is given for
a single problem.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from jaxpost.data import chat
from jaxpost.errors import UserError
from jaxpost.sampling.decode import answers, complete, ready
from jaxpost.types import Params


def best(values: np.ndarray, k: int) -> np.ndarray:
    """[P]: the expected largest of k of the n values [P,n] of each problem, all choices of k being equally likely; of verdicts
    it is pass@k. Raises UserError unless 1 <= k <= n."""
    values = np.sort(np.asarray(values, np.float64), axis=1)
    n = values.shape[1]
    _check(k, n)
    places, taken = np.arange(n + 1)[:, None], np.arange(k)
    # Whether all k come from the i smallest: C(i,k) / C(n,k) as a product of ratios, which neither overflows nor cancels.
    below = np.prod(np.maximum(places - taken, 0) / (n - taken), axis=1)
    return values @ np.diff(below)


def majority(verdicts: np.ndarray, given: Sequence[Sequence[Hashable | None]], k: int) -> np.ndarray:
    """[P]: the expected verdict of the answer that most of k of the n samples gave; see maj@k above.

    verdicts: [P,n]; given: for each problem its n answers, None where there is none. n up to 1000. Raises UserError unless
    1 <= k <= n.
    """
    verdicts = np.asarray(verdicts, np.float64)
    _check(k, verdicts.shape[1])
    return np.array([_majority(row, own, k) for row, own in zip(verdicts, given, strict=True)])


def _majority(verdicts: np.ndarray, given: Sequence[Hashable | None], k: int) -> float:
    judged = defaultdict(list)
    for verdict, answer in zip(verdicts, given, strict=True):
        judged[answer].append(verdict)
    silent = len(judged.pop(None, []))
    counts = {answer: len(own) for answer, own in judged.items()}
    worth = {answer: float(np.mean(own)) for answer, own in judged.items()}
    total = 0.0
    for answer in (a for a in counts if worth[a]):
        others = [counts[a] for a in counts if a != answer]
        for votes in range(1, min(counts[answer], k) + 1):
            total += worth[answer] * math.comb(counts[answer], votes) * _beaten(others, silent, votes, k - votes)
    return total / math.comb(len(verdicts), k)


def _beaten(others: Sequence[int], silent: int, votes: int, rest: int) -> float:
    """In how many ways `rest` more samples come from the silent ones and from the other answers, none of which gets more than
    `votes` of them; a way with t answers of exactly `votes` counts 1 / (t + 1), the share of the one that they tie with."""
    ties = rest // votes
    ways = np.zeros((ties + 1, rest + 1))  # by the number of ties, by how many are taken
    ways[0] = [math.comb(silent, j) for j in range(rest + 1)]
    for count in others:
        grown = np.zeros_like(ways)
        for taken in range(min(count, votes, rest) + 1):
            tied = int(taken == votes)
            grown[tied:, taken:] += math.comb(count, taken) * ways[: ties + 1 - tied, : rest + 1 - taken]
        ways = grown
    return float(np.sum(ways[:, rest] / np.arange(1, ties + 2)))


def _check(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise UserError(f"--k={k}: of {n} samples a problem, 1 to {n} can be taken; give --samples={max(k, 1)} or another k.")


def figures(
    verdicts: np.ndarray,
    given: Sequence[Sequence[Hashable | None]] | None = None,
    *,
    ks: Sequence[int] = (1,),
    weights: Sequence[float] | None = None,
    name: str = "pass",
) -> Iterator[tuple[str, float]]:
    """(mean@n, pass@k and, where `given` has answers, maj@k for each k), each followed by its NAME_low and NAME_high.

    verdicts: [P,n], True or False or a reward; given: as `majority` takes them; weights [P]: of the problems in the mean; name:
    what stands before @k for the best of k. Raises UserError for a k that is not between 1 and n.
    """
    verdicts = np.asarray(verdicts, np.float64)
    weights = np.ones(len(verdicts)) if weights is None else np.asarray(weights, np.float64)
    found = {f"mean@{verdicts.shape[1]}": verdicts.mean(1)}
    found |= {f"{name}@{k}": best(verdicts, k) for k in ks}
    if given is not None:
        found |= {f"maj@{k}": majority(verdicts, given, k) for k in ks}
    for key, values in found.items():
        mean = float(np.average(values, weights=weights))
        yield key, mean
        if (p := len(values)) > 1:
            # Of a weighted mean; with equal weights the usual one, the standard deviation over the root of the number.
            error = math.sqrt(p / (p - 1) * np.sum((weights * (values - mean)) ** 2)) / float(weights.sum())
            yield f"{key}_low", mean - 1.96 * error
            yield f"{key}_high", mean + 1.96 * error


def sampled(
    model,
    params: Params,
    tokenizer,
    records: Sequence[dict],
    judge: Callable[[list[dict], list[str]], Sequence[float]],
    mesh,
    *,
    n: int,
    rows: int,
    options: dict,
    ks: Sequence[int] = (1,),
    extract: Callable[[str], Hashable | None] | None = None,
    name: str = "pass",
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
) -> Iterator[tuple[str, float | list]]:
    """`figures` of n samples of each problem at a temperature, and last ("samples", rows): each sample's prompt, completion,
    answer (the record's), extracted (where there is `extract`), reward and stopped.

    records: dicts with prompt, and maybe answer and a weight. judge: (records, completions) -> their rewards, all in one call,
    nan where none applies: a problem with such a sample is in no figure, and "left_out" says how many there are;
    the records that it gets say under `stopped` whether a stop token or string ended the completion. extract: from a completion
    to its answer, for the majority; name: as `figures` takes it; rows: problems, and completions, at a time, which changes
    nothing; options: template, prompt_window, new and what else `decode.stream` takes, `stop` being the template's if it is not
    there. All processes compute the same. Raises UserError for a k that is not between 1 and n, before anything is sampled.
    """
    for k in ks:
        _check(k, n)
    template, fixed = options["template"], {key: value for key, value in options.items() if key != "template"}
    fixed |= {"temperature": temperature, "seed": seed, "step": step, "tokenizer": tokenizer}
    fixed.setdefault("stop", chat.stop_ids(tokenizer, template))
    prompts, params = [chat.encode_prompt(r["prompt"], tokenizer, template) for r in records], ready(model, params, mesh)
    rows, table = min(rows, len(prompts)), []
    for first in range(0, len(prompts), rows):
        part = prompts[first : first + rows]
        whole = [*part, *[part[0]] * (rows - len(part))]  # one shape, whatever is left, and nothing made for what is not
        work = {"group": n, "slots": rows, "number": first * n, "have": frozenset(range(len(part) * n, rows * n))}
        found = complete(model, params, whole, mesh=mesh, **work, **fixed)
        for i, text in enumerate(answers(found, tokenizer)[: len(part) * n]):
            record = records[first + i // n]
            row = {"prompt": record["prompt"], "completion": text, "answer": record.get("answer", "")}
            row |= {} if extract is None else {"extracted": extract(text)}
            table.append({**row, "stopped": bool(found.stopped[i])})
    told = [{**records[i // n], "stopped": row["stopped"]} for i, row in enumerate(table)]
    rewards = np.array([float(x) for x in judge(told, [row["completion"] for row in table])]).reshape(len(records), n)
    given = None if extract is None else [[row["extracted"] for row in table[i : i + n]] for i in range(0, len(table), n)]
    yield from _of_judged(rewards, given, [r.get("weight", 1.0) for r in records], ks, name)
    yield "samples", [{**row, "reward": float(reward)} for row, reward in zip(table, rewards.reshape(-1), strict=True)]


def _of_judged(
    rewards: np.ndarray, given, weights: Sequence[float], ks: Sequence[int], name: str
) -> Iterator[tuple[str, float]]:
    """`figures` of the problems whose samples all have a reward, and how many have not. Raises UserError where none has."""
    whole = np.flatnonzero(np.isfinite(rewards).all(1))
    if not len(whole):
        raise UserError("--samples: the reward gives None for some sample of every problem; one that applies returns a number.")
    own = None if given is None else [given[i] for i in whole]
    yield from figures(rewards[whole], own, ks=ks, weights=[weights[i] for i in whole], name=name)
    if len(whole) < len(rewards):
        yield "left_out", float(len(rewards) - len(whole))
