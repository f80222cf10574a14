"""Rollouts as a batch source: RL is SFT on data made a second ago.

Called with the train state, the source gives the next rows to learn from. It completes the next prompts with the current
weights, has rewards judge each completion on the host as it ends, while the device makes the others, and hands the batch
through the steps that the settings name (`rollouts/steps.py`), which turn rewards into advantages. What any other model has to
say of the completions is a column: a reference's log-probabilities, a critic's values.

A rollout batch may serve several optimizer steps (`minibatches` times `epochs`), and may be trained on later than it was drawn
(`lag`): with a lag of 1 its rewards have a whole step of the device's time to be found.

Everything is a function of the weights, the seed and `position`: which prompt comes next, how many times was sampled, which
part of the batch is due. Only what older weights drew cannot be drawn again: a batch that is not used up, or waits, when a
checkpoint is written goes to a file in `folder`. Of a batch that a kill interrupted, what had ended is found again in another;
the rest is drawn again, bit for bit. Every process has the whole batch, judges its share of it, and gives its own rows.
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
from jaxpost.rollouts.batch import RolloutBatch, figures, restored, rows
from jaxpost.rollouts.scores import Pending
from jaxpost.rollouts.scoring import Scorer
from jaxpost.rollouts.steps import annotate
from jaxpost.sampling.decode import Finished, ready, stream, together
from jaxpost.step import combine

SECONDS = 20.0  # between two writings of what has ended: what a kill costs


class Rows(NamedTuple):
    """The shape of training batches: so many rows, completions of at most `new` tokens behind prompts of at most
    `prompt_window`, `group` a prompt. pairs: a row is a pair; shared: a row has its prompt once, and the group behind it;
    corrected: the sampler's probabilities are a column too; gives: so are `sampled` and `demonstrations`.
    """

    batch_size: int
    group: int
    prompt_window: int
    new: int
    pairs: bool = False
    shared: bool = False
    corrected: bool = False
    gives: bool = False

    @property
    def together(self) -> int:
        """Completions in a row."""
        return 2 if self.pairs else self.group if self.shared else 1

    @property
    def per_prompt(self) -> int:
        """Rows that one prompt gives."""
        return 1 if self.pairs or self.shared else self.group

    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The columns of a whole batch as shapes, without those that annotators make."""
        size = layout.length(self.prompt_window, self.new, self.together, self.shared)
        kinds = {"tokens": "int32", "segments": "int32", "positions": "int32", "mask": "bool"}
        kinds |= {"branches": "int32"} if self.shared else {}
        kinds |= {"margins": "float32"} if self.pairs else {"old_logps": "float32", "advantages": "float32"}
        kinds |= {"sampler_logps": "float32"} if self.corrected else {}
        kinds |= {"sampled": "bool", "demonstrations": "bool"} if self.gives else {}
        shapes = {k: jax.ShapeDtypeStruct((self.batch_size, size), np.dtype(dtype)) for k, dtype in kinds.items()}
        scalars = {} if self.pairs else {"temperature": np.float32, "fresh": np.bool_}
        return shapes | {k: jax.ShapeDtypeStruct((), np.dtype(dtype)) for k, dtype in scalars.items()}


class RolloutConfig(NamedTuple):
    """How rollouts are made; all of it is settings.

    prompt: i -> (record, token ids) of the i-th prompt of an endless sequence, or None for one to be left out; demonstration: i
    -> the ids of the answer to it, where the task has them; given: a function of rollouts/given.py, or None; rewards: {name:
    (function, weight)}; steps: functions of rollouts/steps.py, `annotate` among them; rows: the training batches, in so many
    microbatches; length: the steps of the stage, of which progress is counted; sampling: what `stream` takes; columns: the
    names under which records say which of the model's adapters they take.
    """

    model: Any
    tokenizer: Any
    mesh: Any
    prompt: Callable
    demonstration: Callable | None
    given: Callable | None
    rewards: Mapping[str, tuple[Callable, float]]
    steps: Sequence[Callable]
    rows: Rows
    microbatches: int
    seed: int
    minibatches: int
    epochs: int
    lag: int
    length: int
    judging: Mapping
    sampling: Mapping
    columns: tuple[str, ...] = ()


class Rollouts:
    """The source (jaxpost/sources.py). `samples` holds the latest batch's first groups, `rows` all of it; `metrics` is what its
    rewards were like.

    annotators: functions (state, batch) -> columns that the step `annotate` asks; folder: where what cannot be drawn again is
    kept. Both are set before the first call.
    """

    def __init__(self, config: RolloutConfig):
        self.config, self.annotators, self.folder = config, (), None
        size = config.rows.batch_size
        self.prompts = size * config.minibatches // config.rows.per_prompt  # of a rollout batch
        self.serves = config.minibatches * config.epochs  # steps that it serves
        self.local = slice(*sharding.local_rows(config.mesh, size))
        at = next((i for i, step in enumerate(config.steps) if getattr(step, "func", step) is annotate), -1) + 1
        self.at_once, self.later = config.steps[:at], config.steps[at:]
        self.drawn = self.left_out = self.calls = 0  # prompts, those left out, and batches of completions, so far
        self.batch, self.due = None, 0  # the one in use, as columns, and how many steps it has served
        self.waiting: collections.deque[RolloutBatch] = collections.deque()
        self.state, self.params = None, None  # while a batch is drawn: the weights that draw it
        self.samples: list[dict] = []
        self.table: Callable = lambda: []  # of a batch that was restored it is not known
        self.metrics: dict[str, float] = {}
        self.spent: collections.Counter[str] = collections.Counter()

    def __call__(self, state) -> dict[str, np.ndarray]:
        """The next training batch's local rows."""
        self.spent = collections.Counter()
        if self.batch is None or self.due == self.serves:
            while len(self.waiting) <= self.config.lag:
                self.waiting.append(self._made(state))
            self.batch, self.due = self._learned(self.waiting.popleft()), 0
        chosen = self._rows(self.due)[self.local]
        scalars = {} if self.config.rows.pairs else {"fresh": np.bool_(self.due + self.config.lag == 0)}
        self.due += 1
        return {k: x[chosen] if np.ndim(x) else x for k, x in self.batch.items()} | scalars

    @property
    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The columns of a whole training batch as shapes, without those that annotators make."""
        return self.config.rows.columns()

    @property
    def rows(self) -> list[dict]:
        """The latest batch's completions as rows of jaxpost/reporting/table.py."""
        return self.table()

    @property
    def stop(self) -> tuple[int, ...]:
        """The ids that end a completion."""
        return tuple(self.config.sampling.get("stop", ()))

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Nothing here follows evaluations."""

    def _rows(self, due: int) -> np.ndarray:
        """Which rows of the rollout batch the training batch number `due` has: each epoch deals all of them out anew."""
        epoch, part = divmod(due, self.config.minibatches)
        size = self.config.rows.batch_size
        if self.config.minibatches == 1:
            return np.arange(size)
        order = np.random.default_rng((self.config.seed, self.calls, epoch)).permutation(size * self.config.minibatches)
        return order[part * size : (part + 1) * size]

    # -------------------------------------------------------------------------------------------------- Drawing a batch

    def _made(self, state) -> RolloutBatch:
        """A rollout batch by the weights as they are, up to its annotations."""
        c = self.config
        self.state, self.params = state, ready(c.model, combine(state.train, state.frozen), c.mesh)
        try:
            return functools.reduce(lambda batch, step: step(batch), self.at_once, self.sample())
        finally:
            self.state = self.params = None

    def sample(self) -> RolloutBatch:
        """Completions of the next prompts by the weights that draw now, each handed to the rewards as soon as it has ended."""
        c, key, group = self.config, (int(self.state.step), self.calls, self.drawn), self.config.rows.group
        problems = self._next()
        records, prompts = ([problem[i] for problem in problems.values()] for i in (0, 1))
        before = {} if self.folder is None else resume.read_partial(self.folder, key)
        scorer, ended, mark = Scorer(c.rewards, **c.judging), dict(before), time.monotonic()

        def judge(one: Finished) -> None:
            if one.index % jax.process_count() == jax.process_index():
                record = records[one.index // group] | {"stopped": one.stopped}
                scorer.submit(one.index, record, self._text(one.tokens[: one.text_length]))

        noise = {"seed": c.seed, "step": self.calls, "group": group, "have": frozenset(before), "tokenizer": c.tokenizer}
        prefixes = {} if c.given is None else {"given": self._given(problems)}
        prefixes |= {"columns": {name: [record[name] for record in records] for name in c.columns}} if c.columns else {}
        try:
            for one in before.values():
                judge(one)
            for some in stream(c.model, self.params, prompts, mesh=c.mesh, **noise, **prefixes, **c.sampling):
                for one in some:
                    ended[one.index] = one
                    judge(one)
                if self.folder and time.monotonic() - mark > SECONDS and jax.process_index() == 0:
                    resume.write_partial(self.folder, key, ended, c.rows.new)
                    mark = time.monotonic()
        except BaseException:
            scorer.close()
            raise
        self.calls += 1
        completions, all_of_them = together([ended[i] for i in range(len(ended))], c.rows.new), np.ones(len(ended), bool)
        self.spent["generated"] += int(completions.lengths.sum())
        judged = Pending(scorer, len(ended))
        return RolloutBatch(
            prompts, records, np.array(list(problems)), completions, judged, all_of_them, all_of_them, source=self
        )

    def _next(self) -> dict[int, tuple]:
        """The next problems by their numbers. Raises UserError where nearly all are left out."""
        problems, first, most = {}, self.drawn, 100 * self.prompts + 1000
        while len(problems) < self.prompts:
            if self.drawn == first + most:
                raise UserError(f"config.task: of problems {first} to {self.drawn} all but {len(problems)} had to be left out.")
            problem = self.config.prompt(self.drawn)
            problems |= {} if problem is None else {self.drawn: problem}
            self.left_out += problem is None
            self.drawn += 1
        return problems

    def _given(self, problems: Mapping[int, tuple]) -> list[np.ndarray]:
        """The first tokens of each completion."""
        c, takes = self.config, {}
        takes["progress"] = min(int(self.state.step) / max(c.length, 1), 1.0)
        prefixes = []
        for number, (record, _) in problems.items():
            key = np.random.SeedSequence((c.seed, self.calls, number)).generate_state(2)
            group = c.given(record, self.demonstration(number), key=key, group=c.rows.group, **takes)
            prefixes += [np.asarray(ids, np.int32) for ids in group]
        return prefixes

    def demonstration(self, number: int) -> np.ndarray:
        """The ids of the task's answer to a problem."""
        return self.config.demonstration(number)

    def _text(self, tokens: np.ndarray) -> str:
        return self.config.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def _layout(self, batch: RolloutBatch) -> layout.Layout:
        shape = self.config.rows
        about = (shape.together, shape.prompt_window, shape.new, shape.shared)
        where = layout.laid_out(batch.prompts, batch.completions.lengths, *about)
        real, rows = where.columns["segments"] > 0, len(where.columns["segments"]) // len(batch.prompts)
        for name in self.config.columns:
            numbers = np.repeat(np.array([record[name] for record in batch.records], np.float32), rows)
            where.columns[name] = np.where(real, numbers[:, None], np.float32(0))
        return where

    def annotate(self, batch: RolloutBatch) -> dict[str, np.ndarray]:
        """{name: [R,N,...]} of what the annotators make of the completions, laid out as rows, by the weights that drew them."""
        where = self._layout(batch)
        columns = where.columns | {"tokens": where.columns["tokens"] + where.spread(batch.completions.tokens)}
        if not self.config.rows.pairs:
            temperature = np.float32(self.config.sampling["temperature"])
            columns |= {"old_logps": where.spread(batch.completions.logps), "temperature": temperature}
        self.spent["scored"] += len(self.annotators) * int(np.sum(where.columns["segments"] > 0))
        annotations = {}
        for annotator in self.annotators:
            annotations |= self._computed(functools.partial(annotator, self.state), columns)
        return {k: where.collect(x) for k, x in annotations.items()}

    def _computed(self, program: Callable, columns: dict) -> dict[str, np.ndarray]:
        """The columns that a program makes of these, as many rows at a time as a microbatch has."""
        size, mesh, parts = self.config.rows.batch_size // self.config.microbatches, self.config.mesh, []
        local = slice(*sharding.local_rows(mesh, size))
        for first in range(0, len(columns["tokens"]), size):
            chunk = {k: x[first : first + size][local] if np.ndim(x) else x for k, x in columns.items()}
            with sharding.use(mesh):
                chunk = program(sharding.distribute(chunk, mesh, size))
            parts.append({k: sharding.everywhere(x) for k, x in chunk.items()})
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    # ---------------------------------------------------------------------------------------------- Learning from one

    def _learned(self, drawn: RolloutBatch) -> dict[str, np.ndarray]:
        """The columns of a batch that has been judged."""
        shape, batch = self.config.rows, functools.reduce(lambda batch, step: step(batch), self.later, drawn)
        if batch.completions is not drawn.completions:
            raise UserError("config.rollouts.steps: a step after annotate changed which completions there are; put it before.")
        columns = rows(batch, self._layout(batch), pairs=shape.pairs, gives=shape.gives)
        if not shape.pairs:
            columns["temperature"] = np.float32(self.config.sampling["temperature"])
        self.metrics = batch.figures if "reward" in batch.figures else {**batch.figures, **figures(batch)}
        if shape.gives:
            self.metrics["completions/given_ratio"] = float(batch.given.sum() / batch.real.sum())
        if self.left_out:
            self.metrics["problems_left_out"] = float(self.left_out)
        self.table = functools.partial(self._table, batch)
        self.samples = self.table(2)
        return columns

    def _table(self, batch: RolloutBatch, prompts: int | None = None) -> list[dict]:
        """The completions of the first so many prompts, or of all, as rows of jaxpost/reporting/table.py."""
        table, scores, group, completions = [], batch.scores, batch.group, batch.completions
        worth = _worth(batch)
        for i, ids in enumerate(batch.prompts[:prompts]):
            prompt = self.config.tokenizer.decode(ids)
            for b in range(i * group, (i + 1) * group):
                text = self._text(completions.tokens[b][: completions.text_lengths[b]])
                row = {"prompt": prompt, "completion": text, "reward": float(scores.totals[b])}
                row |= {f"rewards/{k}": float(x[b]) for k, x in scores.each.items()} if len(scores.each) > 1 else {}
                row["advantage"] = float(worth[b])
                row |= {"given": self._text(completions.tokens[b][batch.given[b]])} if self.config.rows.gives else {}
                table.append(row)
        return table

    # ------------------------------------------------------------------------------------------------------- Going on

    @property
    def position(self) -> dict[str, Any]:
        """What is next; see `keep` for what it does not hold."""
        counts = {"prompts": self.drawn, "left_out": self.left_out, "calls": self.calls, "due": self.due}
        return {**counts, "held": ""}

    @position.setter
    def position(self, value: dict | int) -> None:
        if not value:  # a stage that begins
            return
        self.drawn, self.left_out, self.calls, self.due = (value[k] for k in ("prompts", "left_out", "calls", "due"))
        self.batch, self.waiting = None, collections.deque()
        if value["held"]:
            batch, waiting, about = resume.read(epath.Path(self.folder) / value["held"])
            self.batch, self.metrics, self.samples = batch or None, about["metrics"], about["samples"]
            for stored in waiting:
                problems = [self.config.prompt(int(number)) for number in stored["numbers"]]
                self.waiting.append(restored(stored, problems).replace(source=self))

    def keep(self, step: int, steps: Sequence[int]) -> dict[str, Any]:
        """The position of a checkpoint at `step`; what older weights drew and is still to be learned from is in a file when it
        returns, and those of checkpoints that are gone (not among `steps`) are removed.
        """
        used_up = self.batch is None or self.due == self.serves
        if jax.process_index() == 0:
            resume.sweep(self.folder, steps)
        if used_up and not self.waiting:
            return self.position
        name, waiting = resume.held(step), [batch.stored() for batch in self.waiting]  # all processes wait for the scores
        if jax.process_index() == 0:
            about = {"metrics": self.metrics, "samples": self.samples}
            resume.write(epath.Path(self.folder) / name, {} if used_up else self.batch, waiting, about)
        return {**self.position, "held": name}

    def close(self) -> None:
        """Ends the threads of rewards whose scores nobody will ask for."""
        for batch in self.waiting:
            if isinstance(batch.judged, Pending):
                batch.judged.close()


def _worth(batch: RolloutBatch) -> np.ndarray:
    """[R]: each completion's mean advantage; of pairs how much better it is than their mean."""
    if "advantages" not in batch.columns:
        rewards = np.nan_to_num(batch.rewards).reshape(len(batch.numbers), -1)
        return (rewards - rewards.mean(1, keepdims=True)).reshape(-1)
    advantages = np.where(batch.real, batch.columns["advantages"], 0.0)
    return advantages.sum(1) / np.maximum(batch.completions.lengths, 1)
