"""Several samples of each problem: does one of k get there (pass@k), how good is the mean one, what does their majority say?

The arithmetic of `accuracy` with `samples`. All figures are expectations that n samples give exactly, with no further chance
in them:

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
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from jaxpost.errors import UserError
from jaxpost.evals.intervals import Z, standard_error


def best(values: np.ndarray, k: int) -> np.ndarray:
    """[P]: the expected largest of k of the n values [P,n] of each problem, all choices of k being equally likely; of verdicts
    it is pass@k. Raises UserError unless 1 <= k <= n."""
    values = np.sort(np.asarray(values, np.float64), axis=1)
    n = values.shape[1]
    check(k, n)
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
    check(k, verdicts.shape[1])
    return np.array([_majority(row, answers, k) for row, answers in zip(verdicts, given, strict=True)])


def _majority(verdicts: np.ndarray, answers: Sequence[Hashable | None], k: int) -> float:
    judged = defaultdict(list)
    for verdict, answer in zip(verdicts, answers, strict=True):
        judged[answer].append(verdict)
    silent = len(judged.pop(None, []))
    counts = {answer: len(values) for answer, values in judged.items()}
    worth = {answer: float(np.mean(values)) for answer, values in judged.items()}
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


def check(k: int, n: int) -> None:
    """Raises UserError unless 1 <= k <= n."""
    if not 1 <= k <= n:
        raise UserError(f"k={k}: of {n} samples a problem, 1 to {n} can be taken; give samples={max(k, 1)} or another k.")


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
    by_problem = {f"mean@{verdicts.shape[1]}": verdicts.mean(1)}
    by_problem |= {f"{name}@{k}": best(verdicts, k) for k in ks}
    if given is not None:
        by_problem |= {f"maj@{k}": majority(verdicts, given, k) for k in ks}
    for key, values in by_problem.items():
        yield key, (mean := float(np.average(values, weights=weights)))
        if len(values) > 1:
            error = standard_error(values, weights)
            yield from {f"{key}_low": mean - Z * error, f"{key}_high": mean + Z * error}.items()


def figures_of_whole(
    rewards: np.ndarray, given: Sequence | None, *, ks: Sequence[int], weights: Sequence[float], name: str
) -> Iterator[tuple[str, float]]:
    """`figures` of the problems whose samples all have a reward (none is nan), and as "left_out" how many have not. Raises
    UserError where none has.
    """
    whole = np.flatnonzero(np.isfinite(rewards).all(1))
    if not len(whole):
        raise UserError("samples: the reward gives None for some sample of every problem; one that applies returns a number.")
    answers = None if given is None else [given[i] for i in whole]
    yield from figures(rewards[whole], answers, ks=ks, weights=[weights[i] for i in whole], name=name)
    if len(whole) < len(rewards):
        yield "left_out", float(len(rewards) - len(whole))
