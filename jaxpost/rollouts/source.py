"""Rollouts as a batch source: RL is SFT on data made a second ago.

Called with the train state, the source gives the next rows to learn from. It completes the next prompts with the current
weights, has rewards judge each completion on the host as it ends, while the device makes the others, and turns the rewards of
all of them into advantages. What any other model says of the completions is a column: a reference's log-probabilities, a
critic's values.

A rollout batch may serve several optimizer steps (`minibatches` times `epochs`), and may be trained on later than it was made
(`lag`): with a lag of 1 its rewards have a whole step of the device's time to be found.

Everything is a function of the weights, the seed and `position`: which prompt comes next, how many times was sampled, which
part of the batch is due. Only what older weights made cannot be made again: a batch that is not used up, or waits, when a
checkpoint is written goes to a file in `folder`. Of a batch that a kill interrupted, what had ended is found again in another;
the rest is made again, bit for bit. Every process has the whole batch, judges its share of it, and gives its own rows.
"""

import collections
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.rollouts import layout, resume
from jaxpost.rollouts.learning import Lessons
from jaxpost.rollouts.scores import Scores, differing, gathered
from jaxpost.rollouts.scoring import Scorer
from jaxpost.sampling.decode import Completions, Finished, ready, stream, together
from jaxpost.step import combine

SECONDS = 20.0  # between two writings of what has ended: what a kill costs


def columns(s, pairs: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a stage's batches as shapes, of its settings s: those that every objective gets, of pairs or not."""
    together = 2 if pairs else s.rollouts.group if s.shared_prefix else 1
    size = layout.length(s.rollouts.prompt_window, s.rollouts.new, together, s.shared_prefix)
    kinds = {"tokens": "int32", "segments": "int32", "positions": "int32", "mask": "bool"}
    kinds |= {"branches": "int32"} if s.shared_prefix else {}
    kinds |= {"margins": "float32"} if pairs else {"old_logps": "float32", "advantages": "float32"}
    kinds |= {"sampler_logps": "float32"} if s.rollouts.correction and not pairs else {}
    found = {k: jax.ShapeDtypeStruct((s.batch_size, size), np.dtype(dtype)) for k, dtype in kinds.items()}
    scalars = {} if pairs else {"temperature": np.float32, "fresh": np.bool_}
    return found | {k: jax.ShapeDtypeStruct((), dtype) for k, dtype in scalars.items()}


class RolloutConfig(NamedTuple):
    """How rollouts are made; all of it is settings.

    prompt: i -> (record, token ids) of the i-th prompt of an endless sequence, or None for one to be left out; rewards: {name:
    (function, weight)}; lessons: what becomes of verdicts; now: programs (params, batch) -> columns, asked of the weights that
    sampled; sampling: what `stream` takes; batch_size: rows of a training batch, in so many microbatches; rounds: how often to
    sample again for groups that teach nothing.
    """

    model: Any
    tokenizer: Any
    mesh: Any
    prompt: Callable
    rewards: Mapping[str, tuple[Callable, float]]
    lessons: Lessons
    now: Sequence[Callable]
    batch_size: int
    microbatches: int
    group: int
    seed: int
    minibatches: int
    epochs: int
    lag: int
    rounds: int
    judging: Mapping
    sampling: Mapping


class Made(NamedTuple):
    """A rollout batch: its prompts' numbers [P] and its completions, the columns [R,S] that models made of them, who judges
    them or what they said, and figures that these do not tell.
    """

    numbers: np.ndarray
    found: Completions
    columns: dict[str, np.ndarray]
    judged: Scorer | Scores
    figures: dict[str, float] = {}


class Rollouts:
    """The source. `samples` holds the latest batch's first groups, for the log, and `table()` gives all of it; `metrics` is
    what its rewards were like.

    frozen: programs (state, batch) -> columns, of weights that do not change; folder: where what cannot be made again is kept.
    Both are set before the first call.
    """

    def __init__(self, making: RolloutConfig):
        self.making, self.frozen, self.folder = making, (), None
        ways = (making.batch_size, making.minibatches, making.lessons.rows_a_prompt)
        self.prompts = ways[0] * ways[1] // ways[2]  # of a rollout batch
        self.steps = making.minibatches * making.epochs  # that it serves
        self.local = slice(*sharding.local_rows(making.mesh, making.batch_size))
        self.drawn = self.left_out = self.calls = 0  # prompts, those left out, and batches of completions, so far
        self.known: dict[int, tuple | None] = {}  # problems of the batches that are here
        self.batch, self.due = None, 0  # the one in use, as columns, and how many steps it has served
        self.waiting: collections.deque[Made] = collections.deque()
        self.samples: list[dict] = []
        self.table: Callable = lambda: []  # of a batch that was restored it is not known
        self.metrics: dict[str, float] = {}

    def __call__(self, state) -> dict[str, np.ndarray]:
        """The next training batch's local rows."""
        if self.batch is None or self.due == self.steps:
            while len(self.waiting) <= self.making.lag:
                self.waiting.append(self._make(state))
            self.batch, self.due = self._learned(self.waiting.popleft()), 0
        rows = self._rows(self.due)[self.local]
        scalars = {} if self.making.lessons.pairs else {"fresh": np.bool_(self.due + self.making.lag == 0)}
        self.due += 1
        return {k: x[rows] if np.ndim(x) else x for k, x in self.batch.items()} | scalars

    def _rows(self, due: int) -> np.ndarray:
        """Which rows of the rollout batch the training batch number `due` has: each epoch deals all of them out anew."""
        epoch, part = divmod(due, self.making.minibatches)
        size = self.making.batch_size
        if self.making.minibatches == 1:
            return np.arange(size)
        order = np.random.default_rng((self.making.seed, self.calls, epoch)).permutation(size * self.making.minibatches)
        return order[part * size : (part + 1) * size]

    # -------------------------------------------------------------------------------------------------- Making a batch

    def _make(self, state) -> Made:
        """A rollout batch by the weights as they are."""
        m = self.making
        params = ready(m.model, combine(state.train, state.frozen), m.mesh)
        made = self._sampled(params, int(state.step))
        if m.rounds:
            made = self._informative(made, params, int(state.step))
        if m.lessons.pairs:
            verdicts = self._verdicts(made)
            found, chosen, figures = m.lessons.paired(made.found, verdicts)
            made = made._replace(found=found, judged=chosen, figures={**made.figures, **figures})
        where = self._layout(made)
        columns = where.columns | {"tokens": where.columns["tokens"] + where.spread(made.found.tokens)}
        if not m.lessons.pairs:
            columns |= {"old_logps": where.spread(made.found.logps), "temperature": np.float32(m.sampling["temperature"])}
        now, whole = combine(state.train, state.frozen), dict(columns)
        for program, weights in (*((p, now) for p in m.now), *((p, state) for p in self.frozen)):
            columns |= self._asked(functools.partial(program, weights), whole)
        return made._replace(columns=columns)

    def _sampled(self, params, step: int) -> Made:
        """Completions of the next prompts, each handed to the rewards as soon as it has ended."""
        m, first, count = self.making, self.drawn, self.prompts * self.making.group
        problems = self._next()
        drawn, scorer = list(problems.values()), Scorer(m.rewards, **m.judging)
        before = {} if self.folder is None else resume.read_partial(self.folder, (step, self.calls, first))
        whole, mark = dict(before), time.monotonic()

        def judge(one: Finished) -> None:
            if one.index % jax.process_count() == jax.process_index():
                record = drawn[one.index // m.group][0] | {"stopped": one.stopped}
                scorer.submit(one.index, record, self._text(one))

        rest = {"seed": m.seed, "step": self.calls, "group": m.group, "have": frozenset(before), "tokenizer": m.tokenizer}
        try:
            for one in before.values():
                judge(one)
            for ended in stream(m.model, params, [ids for _, ids in drawn], mesh=m.mesh, **rest, **m.sampling):
                for one in ended:
                    whole[one.index] = one
                    judge(one)
                if self.folder and time.monotonic() - mark > SECONDS and jax.process_index() == 0:
                    resume.write_partial(self.folder, (step, self.calls, first), whole, m.sampling["new"])
                    mark = time.monotonic()
        except BaseException:
            scorer.close()
            raise
        self.calls += 1
        found = together([whole[i] for i in range(count)], m.sampling["new"])
        return Made(np.array(list(problems)), found, {}, scorer)

    def _next(self) -> dict[int, tuple]:
        """The next prompts by their numbers. Raises UserError where nearly all are left out."""
        found, first, most = {}, self.drawn, 100 * self.prompts + 1000
        while len(found) < self.prompts:
            if self.drawn == first + most:
                raise UserError(f"config.task: of problems {first} to {self.drawn} all but {len(found)} had to be left out.")
            drawn = self._problem(self.drawn)
            found |= {} if drawn is None else {self.drawn: drawn}
            self.left_out += drawn is None
            self.drawn += 1
        return found

    def _problem(self, number: int) -> tuple | None:
        """The problem of this number, asked for once as long as its completions are here."""
        if number not in self.known:
            self.known[number] = self.making.prompt(number)
        return self.known[number]

    def _text(self, one: Finished) -> str:
        return self.making.tokenizer.decode(one.tokens[: one.text_length], clean_up_tokenization_spaces=False)

    def _informative(self, made: Made, params, step: int) -> Made:
        """As many groups as before, of those that are sampled until there are enough whose rewards differ, or `rounds` times
        more; then others fill the batch. What length adds to a reward, or takes from it, makes no difference here.
        """
        kept, level, failures = [], [], 0
        for turn in range(self.making.rounds + 1):
            made = self._sampled(params, step) if turn else made
            verdicts = self._verdicts(made)
            failures += verdicts.failures
            spread = differing(verdicts.totals.reshape(self.prompts, -1))
            groups = [self._group(made, verdicts, i) for i in range(self.prompts)]
            kept += [g for g, differs in zip(groups, spread, strict=True) if differs]
            level += [g for g, differs in zip(groups, spread, strict=True) if not differs]
            if len(kept) >= self.prompts:
                break
        chosen = (kept + level)[: self.prompts]
        figures = {"prompts_sampled": float(len(kept) + len(level)), "prompts_level": float(len(level))}
        found = Completions(*(None if x[0] is None else np.concatenate(x) for x in zip(*(g[1] for g in chosen), strict=True)))
        numbers = np.concatenate([g[0] for g in chosen])
        return Made(numbers, found, {}, Scores.together([g[2] for g in chosen])._replace(failures=failures), figures)

    def _group(self, made: Made, verdicts: Scores, i: int) -> tuple:
        own = slice(i * self.making.group, (i + 1) * self.making.group)
        found = Completions(*(None if x is None else x[own] for x in made.found))
        return made.numbers[i : i + 1], found, verdicts.of(own)

    def _verdicts(self, made: Made) -> Scores:
        if isinstance(made.judged, Scores):
            return made.judged
        return gathered(made.judged, len(made.found.lengths))

    def _layout(self, made: Made) -> layout.Layout:
        prompts = [self._problem(int(i))[1] for i in made.numbers]
        lessons, sampling = self.making.lessons, self.making.sampling
        return layout.laid_out(
            prompts, made.found.lengths, lessons.together, sampling["prompt_window"], sampling["new"], lessons.shared
        )

    def _asked(self, program: Callable, columns: dict) -> dict[str, np.ndarray]:
        """The columns that a program makes of these, as many rows at a time as a microbatch has."""
        size, mesh, parts = self.making.batch_size // self.making.microbatches, self.making.mesh, []
        local = slice(*sharding.local_rows(mesh, size))
        for first in range(0, len(columns["tokens"]), size):
            own = {k: x[first : first + size][local] if np.ndim(x) else x for k, x in columns.items()}
            with sharding.use(mesh):
                made = program(sharding.distribute(own, mesh, size))
            parts.append({k: sharding.everywhere(x) for k, x in made.items()})
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    # ---------------------------------------------------------------------------------------------- Learning from one

    def _learned(self, made: Made) -> dict[str, np.ndarray]:
        """The columns of a batch that has been judged."""
        m, verdicts = self.making, self._verdicts(made)
        learned = m.lessons.compared if m.lessons.pairs else m.lessons.learned
        here = {int(i) for other in (made, *self.waiting) for i in other.numbers}
        self.known = {i: self._problem(i) for i in here}
        tasks = [self.known[int(i)][0].get("cell", "") for i in made.numbers]
        columns, figures, advantages = learned(self._layout(made), made.found, verdicts, made.columns, tasks)
        self.metrics, each = {**made.figures, **figures}, len(made.found.lengths) // len(made.numbers)
        if self.left_out:
            self.metrics["problems_left_out"] = float(self.left_out)
        self.table = functools.partial(self._told, made, verdicts, advantages, each)
        self.samples = self.table(2)
        return columns

    def _told(self, made: Made, verdicts: Scores, advantages: np.ndarray, each: int, prompts: int | None = None) -> list[dict]:
        """The completions of the first so many prompts, or of all, as rows of jaxpost/table.py."""
        rows, m, several = [], self.making, len(verdicts.each) > 1
        for i, number in enumerate(made.numbers[:prompts]):
            prompt = m.tokenizer.decode(self._problem(int(number))[1])
            for b in range(i * each, (i + 1) * each):
                text = m.tokenizer.decode(
                    made.found.tokens[b][: made.found.text_lengths[b]], clean_up_tokenization_spaces=False
                )
                said = {f"rewards/{k}": float(x[b]) for k, x in verdicts.each.items()} if several else {}
                shown = {"prompt": prompt, "completion": text, "reward": float(verdicts.totals[b]), **said}
                rows.append(shown | {"advantage": float(advantages[b])})
        return rows

    # ------------------------------------------------------------------------------------------------------- Going on

    @property
    def position(self) -> dict[str, Any]:
        """What is next; see `keep` for what it does not tell."""
        counts = {"prompts": self.drawn, "left_out": self.left_out, "calls": self.calls, "due": self.due}
        return {**counts, "held": ""}

    @position.setter
    def position(self, value: dict | int) -> None:
        if not value:  # a stage that begins
            return
        self.drawn, self.left_out, self.calls, self.due = (value[k] for k in ("prompts", "left_out", "calls", "due"))
        self.batch, self.waiting = None, collections.deque()
        if value["held"]:
            batch, waiting, told = resume.read(epath.Path(self.folder) / value["held"])
            self.batch, self.metrics, self.samples = batch or None, told["metrics"], told["samples"]
            for made in waiting:
                figures = {k: float(x) for k, x in made.get("figures", {}).items()}
                found, judged = Completions(**made["found"]), Scores(**made["judged"])
                self.waiting.append(Made(made["numbers"], found, made["columns"], judged, figures))

    def keep(self, step: int, others: Sequence[int]) -> dict[str, Any]:
        """The position of a checkpoint at `step`; what older weights made and is still to be learned from is in a file when it
        returns, and those of checkpoints that are gone (not among `others`) are removed.
        """
        used_up = self.batch is None or self.due == self.steps
        if jax.process_index() == 0:
            resume.sweep(self.folder, others)
        if used_up and not self.waiting:
            return self.position
        self.waiting = collections.deque(made._replace(judged=self._verdicts(made)) for made in self.waiting)
        name = resume.held(step)
        if jax.process_index() == 0:
            told = {"metrics": self.metrics, "samples": self.samples}
            resume.write(epath.Path(self.folder) / name, {} if used_up else self.batch, list(self.waiting), told)
        return {**self.position, "held": name}

    def close(self) -> None:
        """Ends the threads of rewards whose verdicts nobody will ask for."""
        for made in self.waiting:
            if isinstance(made.judged, Scorer):
                made.judged.close()
