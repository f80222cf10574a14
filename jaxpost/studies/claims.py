"""What a study claims, and the verdict on it, which is computed from paired differences over seeds and never typed.

A claim gives one number a seed, its effect, which is positive where the claim is right:

    over            the arm's figure less the other arm's
    at_least        the arm's figure less the bound; at_most: the bound less the figure
    equal_within    the arm's figure less the other arm's, which is to lie within the bound
    monotone        the smallest step from one of several arms to the next
    correlates      the rank correlation of two figures over several arms

The verdict follows from the effects' mean and its 95% interval, by Student's t over the seeds:

    shown               the interval lies above 0, and the mean reaches the margin
    partly              the interval lies above 0, and the mean is below the margin
    not at this scale   the interval contains 0
    reversed            the interval lies below 0
    no room             the arm that is compared with lies in the outer tenths of the metric's range, where little can show
    unequal             the arms spent different budgets
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from jaxpost.errors import UserError

BUDGETS = ("tokens", "steps", "seconds")
APART = 0.02  # by which share budgets may differ
SHOWN, PARTLY, OPEN, REVERSED, NO_ROOM, UNEQUAL = "shown", "partly", "not at this scale", "reversed", "no room", "unequal"
KINDS = ("over", "at_least", "at_most", "equal_within", "monotone", "correlates")

# {arm: {seed: {metric: value}}}
Figures = Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of a study, of one of the kinds above.

    arm: the arm that it is about, several for monotone and correlates; over: the arms that it is compared with; metric: the
    figure, the study's own if ""; margin: how large the effect is claimed to be; lower: whether lower figures are better.
    """

    arm: str | tuple[str, ...]
    over: str | tuple[str, ...] = ()
    metric: str = ""
    margin: float = 0.0
    lower: bool = False
    at_least: float | None = None
    at_most: float | None = None
    equal_within: float | None = None
    monotone: bool = False
    correlates: str = ""  # the other figure

    def __post_init__(self):
        kinds = [kind for kind in KINDS if getattr(self, kind) not in (None, False, "", ())]
        if "over" in kinds and "equal_within" in kinds:
            kinds.remove("over")
        if len(kinds) != 1:
            raise UserError(f"Claim({self.arm!r}): give one of {', '.join(KINDS)}; it has {', '.join(kinds) or 'none'}.")
        object.__setattr__(self, "over", (self.over,) if isinstance(self.over, str) else tuple(self.over))
        object.__setattr__(self, "kind", kinds[0])
        several = kinds[0] in ("monotone", "correlates")
        if several == isinstance(self.arm, str) or (several and len(self.arm) < 2):
            raise UserError(f"Claim({self.arm!r}): {kinds[0]} is of {'a tuple of arms' if several else 'one arm'}.")
        if kinds[0] == "equal_within" and not self.over:
            raise UserError(f"Claim({self.arm!r}): equal_within needs `over`, the arm that it equals.")

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that the claim speaks of."""
        return (*((self.arm,) if isinstance(self.arm, str) else self.arm), *self.over)


@dataclasses.dataclass(frozen=True)
class Study:
    """A paper's claims, and what is fixed before they are looked at.

    arms: names, or {name: argument of the file's get_config}; metric: the figure that arms are tuned and compared by; lower:
    whether lower is better; range: its lowest and highest value, None where it has none; equal: what all arms spend alike
    (tokens, steps, seconds); unequal: {arm: why it spends another budget}; seeds: those that are scored; tune: {setting:
    values} that every arm tries on `tuning_seed`; family: of the paper's method; superseded: for each change of the claims
    after a scored run the reason, the first change first.
    """

    arms: Mapping[str, str] | tuple[str, ...]
    metric: str
    claims: tuple[Claim, ...]
    family: str = ""
    equal: str = "tokens"
    unequal: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    tune: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    tuning_seed: int = 100
    lower: bool = False
    range: tuple[float, float] | None = (0.0, 1.0)
    superseded: tuple[str, ...] = ()

    def __post_init__(self):
        arms = self.arms if isinstance(self.arms, Mapping) else {name: name for name in self.arms}
        object.__setattr__(self, "arms", dict(arms))
        if self.equal not in BUDGETS:
            raise UserError(f"Study(equal={self.equal!r}): give one of {', '.join(BUDGETS)}.")
        if self.tuning_seed in self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"Study(seeds={self.seeds}): give different seeds, without the tuning seed {self.tuning_seed}.")
        named = {arm for claim in self.claims for arm in claim.arms} | set(self.unequal)
        if unknown := sorted(named - arms.keys()):
            raise UserError(f"Study: it speaks of the arm {unknown[0]!r}; its arms are {', '.join(arms)}.")

    def metrics(self) -> list[str]:
        """The figures that the study reads, its own first."""
        named = [name for claim in self.claims for name in (claim.metric, claim.correlates) if name]
        return list(dict.fromkeys([self.metric, *named]))

    def spent(self, spent: Mapping[str, float]) -> float:
        """An arm's budget, of what it spent: {learned, generated, scored, steps, seconds}."""
        kinds = ("learned", "generated", "scored") if self.equal == "tokens" else (self.equal,)
        return sum(spent.get(kind, 0) for kind in kinds)


@dataclasses.dataclass(frozen=True)
class Line:
    """A claim's verdict: what it says, the effects of the seeds, their mean with its 95% interval, and the verdict."""

    claim: str
    effects: tuple[float, ...]
    mean: float
    low: float
    high: float
    verdict: str


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of values that are independent draws: the 95% interval of their mean by Student's t."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def judge(study: Study, figures: Figures, spent: Mapping[str, Mapping[int, Mapping[str, float]]]) -> tuple[str, list[Line]]:
    """(the verdict on a study, a Line for each claim and arm that it is compared with).

    figures: {arm: {seed: {metric: value}}}; spent: {arm: {seed: what `Study.spent` takes}}. Raises UserError for a figure that
    is missing or not finite.
    """
    lines = [line for claim in study.claims for line in _lines(study, claim, figures)]
    if unequal := unequal_arms(study, spent):
        lines = [dataclasses.replace(line, verdict=UNEQUAL) for line in lines]
        return f"{UNEQUAL} ({unequal})", lines
    return overall([line.verdict for line in lines]), lines


def overall(verdicts: Sequence[str]) -> str:
    """The verdict on several claims: that of all where they agree, partly where some are shown, else the worst."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    if {SHOWN, PARTLY} & set(verdicts):
        return PARTLY
    return next(verdict for verdict in (REVERSED, NO_ROOM, OPEN) if verdict in verdicts)


def unequal_arms(study: Study, spent: Mapping) -> str:
    """Which arms spent budgets that are further apart than 2% of the largest; "" where all are equal."""
    means = {
        arm: float(np.mean([study.spent(each) for each in by_seed.values()]))
        for arm, by_seed in spent.items()
        if arm not in study.unequal
    }
    if len(means) < 2 or max(means.values()) - min(means.values()) <= APART * max(means.values()):
        return ""
    least, most = min(means, key=means.get), max(means, key=means.get)
    return f"{least} spent {means[least]:,.0f} {study.equal} and {most} {means[most]:,.0f}"


def _lines(study: Study, claim: Claim, figures: Figures) -> list[Line]:
    metric, lines = claim.metric or study.metric, []
    sign = -1.0 if claim.lower or (study.lower and metric == study.metric) else 1.0

    def value(arm: str, seed: int, name: str = metric) -> float:
        number = figures.get(arm, {}).get(seed, {}).get(name)
        if number is None or not math.isfinite(number):
            raise UserError(f"arm {arm}, seed {seed}: has no finite figure {name!r} ({number}).")
        return float(number)

    for text, effect, other in _effects(claim, metric, sign, value):
        effects = tuple(effect(seed) for seed in study.seeds)
        mean, low, high = interval(effects)
        verdict = _verdict(mean, low, high, claim)
        # The metric's cells, and the greedy figure, have its range: their names begin with its own.
        ranged = claim.kind == "over" and metric.startswith(study.metric)
        if ranged and _is_saturated(study, [value(other, s) for s in study.seeds]):
            verdict = NO_ROOM
        lines.append(Line(text, effects, mean, low, high, verdict))
    return lines


def _effects(claim: Claim, metric: str, sign: float, value: Callable) -> list[tuple[str, Callable, str]]:
    """[(what is claimed, seed -> effect, the arm that is compared with)]. value: (arm, seed, a figure's name) -> number."""
    arm, many = claim.arm, ", ".join(claim.arms)
    better, way = ("below", "fall") if sign < 0 else ("above", "rise")
    by = f" by {claim.margin:g}" if claim.margin else ""
    match claim.kind:
        case "over":
            text = f"{arm}'s {metric} lies {better} {{}}'s{by}"
            return [(text.format(b), lambda s, b=b: sign * (value(arm, s) - value(b, s)), b) for b in claim.over]
        case "equal_within":
            text = f"{arm}'s {metric} equals {{}}'s within {claim.equal_within:g}"
            return [(text.format(b), lambda s, b=b: value(arm, s) - value(b, s), b) for b in claim.over]
        case "at_least":
            return [(f"{arm}'s {metric} is at least {claim.at_least:g}", lambda s: value(arm, s) - claim.at_least, "")]
        case "at_most":
            return [(f"{arm}'s {metric} is at most {claim.at_most:g}", lambda s: claim.at_most - value(arm, s), "")]
        case "monotone":
            steps = f"{metric} {way}s along {many}{by}"
            return [(steps, lambda s: float(np.min(sign * np.diff([value(each, s) for each in arm]))), "")]
        case _:

            def correlation(seed: int) -> float:
                first, second = ([value(each, seed, name) for each in arm] for name in (metric, claim.correlates))
                return sign * float(stats.spearmanr(first, second).statistic)

            together = "rises as" if sign > 0 else "falls as"
            return [(f"{metric} {together} {claim.correlates} rises, over {many}", correlation, "")]


def _verdict(mean: float, low: float, high: float, claim: Claim) -> str:
    if (bound := claim.equal_within) is not None:
        return SHOWN if -bound <= low and high <= bound else REVERSED if low > bound or high < -bound else OPEN
    if low > 0:
        return SHOWN if mean >= claim.margin else PARTLY
    return REVERSED if high < 0 else OPEN


def _is_saturated(study: Study, baseline: Sequence[float]) -> bool:
    if study.range is None:
        return False
    low, high = study.range
    return not 0.1 <= (float(np.mean(baseline)) - low) / (high - low) <= 0.9
