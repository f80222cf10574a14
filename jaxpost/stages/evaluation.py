"""Evaluations: those of a stage while it trains, and any list of evals on one model.

A stage's own evals are its held-out loss and its task's test problems (figures eval/loss, eval/accuracy, ...); the others are
those of `config.evals`, whose figures are eval/NAME/figure.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxpost import api, recipe
from jaxpost.config.naming import digest_of
from jaxpost.config.resolve import nearest, resolve
from jaxpost.config.unread import shares
from jaxpost.errors import UserError
from jaxpost.evals import accuracy, held_out
from jaxpost.models import loading
from jaxpost.reporting.log import Log
from jaxpost.stages import annotations, datasets
from jaxpost.stages.plan import Plan, scalars
from jaxpost.step import combine, make_evaluation
from jaxpost.types import TrainState

# The settings that decide, besides an eval's own, what a model answers.
ANSWERED = ("model", "tokenizer", "adapter", "dtype", "attention", "attend", "mesh")
OWN = ("loss", "accuracy", "accuracy_greedy", "reward", "reward_greedy", "rewards")  # what a stage's own figures are called

Memory = dict[tuple[str, str, int], tuple[dict, list]]  # (an eval's digest, stage, step) -> (figures, rows)


class Eval(NamedTuple):
    """An eval with its settings: run(model) yields (figure, value) and maybe ("samples", rows); its name, "" for a stage's own;
    a digest of all but the weights that decides its figures, "" where there is none.
    """

    name: str
    run: Callable
    digest: str = ""


def configured(
    entries: Mapping[str, Any],
    model: api.Model,
    *,
    template: str | None = None,
    like: Mapping[str, Any] = types.MappingProxyType({}),
    place: str = "config.evals",
    about: Any = "",
) -> list[Eval]:
    """The evals of entries {name: function's name, or a dict with it and keywords}, checked: an eval with an attribute `check`
    has it called as the eval would be, with a model that may have no weights. An eval that takes a `template`, or a keyword of
    `like`, and names none gets this one. about: what else decides the figures. Raises UserError, with the place, for whatever
    is wrong with an entry.
    """
    if not isinstance(entries, Mapping):
        raise UserError(f"{place}: {entries!r}; give a dict of evals by names of yours, as {{'sums': 'accuracy'}}.")
    evals = []
    for name, entry in entries.items():
        if not re.fullmatch(r"[\w-]+", name) or name in OWN:
            raise UserError(f"{place}: {name!r}; a name has letters, digits, _ and -, and is none of {', '.join(OWN)}.")
        try:
            function = resolve(entry, "evals")
            own = dict(like) if template is None else {"template": template, **like}
            own = {k: x for k, x in own.items() if k in inspect.signature(function).parameters}
            function = functools.partial(function, **{**own, **function.keywords})
            if check := getattr(function.func, "check", None):
                check(model, **function.keywords)
        except UserError as error:
            raise UserError(f"{place}.{name}: {str(error).removeprefix('config: ')}") from error
        evals.append(Eval(name, function, digest_of([function, about])))
    return evals


def run_evals(
    model: api.Model, evals: Sequence[Eval], *, memory: Memory | None = None, weights: tuple[str, int] = ("", 0)
) -> tuple[dict[str, float], list[dict]]:
    """(figures {NAME/figure: value}, rows) of all evals on a model; rows have the eval's name under `eval`. What a stage's own
    evals give has no NAME.

    memory: what evals gave before, into which their results are put; weights: (stage, step) of the model's. Where it has the
    same eval of the same weights, nothing is computed: evals draw no new noise.
    """
    figures, rows = {}, []
    for each in evals:
        key = (each.digest, *weights)
        results = memory.get(key) if memory is not None and each.digest else None
        if results is None:
            values = dict(each.run(model))
            results = values, values.pop("samples", [])
        if memory is not None and each.digest:
            memory[key] = results
        values, own = results
        figures |= {f"{each.name}/{k}" if each.name else k: float(v) for k, v in values.items()}
        rows += [{"eval": each.name, **row} for row in own] if each.name else own
    return figures, rows


def planned(plan: Plan, mesh) -> list[Eval]:
    """All evals of a stage, checked, its own first. Raises UserError for a wrong one, before anything is compiled."""
    s, spec, evals = plan.settings, plan.spec, []
    about = {k: recipe.plain(s[k]) for k in ANSWERED}
    if plan.held_out:
        measure = jax.jit(annotations.evaluation(plan))
        # The objective as it is at the stage's end, so that what anneals is measured alike at all steps.
        batches = [batch | scalars(plan.steps - 1, plan.steps) for batch in plan.held_out]
        own = {"batches": batches, "measure": measure, "batch_size": s.batch_size}
        evals.append(Eval("", functools.partial(held_out.loss, **own)))
    if plan.problems:
        evals.append(Eval("", functools.partial(accuracy.graded, **plan.problems), digest_of([plan.problems, about])))
    template = datasets.template(spec, s) if s.evals else None
    options = {"template": template, "like": pooling_of(plan.objective), "about": about}
    return evals + configured(recipe.plain(s.evals), model_of(spec, None, mesh), **options)


def pooling_of(objective: Callable) -> dict[str, Any]:
    """How an objective makes embeddings: its values of the keywords pooling and normalise, as far as it has them."""
    parameters = inspect.signature(objective).parameters
    return {name: parameters[name].default for name in ("pooling", "normalise") if name in parameters}


def check(plan: Plan, mesh) -> None:
    """Raises UserError for a wrong eval, or a wrong config.best, before anything is compiled."""
    planned(plan, mesh)
    _check_best(plan, mesh)


def _check_best(plan: Plan, mesh) -> None:
    """Checks that a stage's evaluations report the figure that its best checkpoint is chosen by; of `config.evals` only the
    name of the eval is known. The objective is traced for that, not compiled, and only where neither the loss nor the task's
    problems are it. The default stands for no choice.
    """
    best, s, spec = plan.settings.best, plan.settings, plan.spec
    problems = plan.problems or {}
    names = {f"eval/{name}" for name in accuracy.names(problems["records"], problems["rewards"])} if problems else set()
    has_loss = "data" in shares(s.source) and bool(s.held_out or s.eval_data)
    names |= {"eval/loss"} if has_loss else set()
    if best in ("", recipe.DEFAULTS["best"], *names) or _eval_of(best) in s.evals:
        return
    if has_loss:
        params = loading.abstract(spec.transformer, mesh, spec.adapter, spec.leaves)
        batch, key = annotations.of_batches(plan), jax.eval_shape(lambda: jax.random.PRNGKey(0))
        measured = jax.eval_shape(make_evaluation(spec.transformer.forward, plan.objective), params, batch, key)
        names |= {f"eval/{name}" for name in measured}
    if not names and not s.evals:
        raise UserError(
            f"config.best: {best!r}, but {plan.name} has no evaluation; give config.held_out, config.eval_data, config.evals "
            'or a task with test problems, or set config.best="".'
        )
    if best not in names:
        names |= {f"eval/{name}/FIGURE" for name in s.evals}
        raise UserError(f"config.best: {best!r} is no figure of {plan.name}'s evaluations.{nearest(best, names)}")


def _eval_of(figure: str) -> str:
    """The name of the eval that a figure eval/NAME/... is of; "" for a stage's own."""
    return figure.removeprefix("eval/").partition("/")[0] if figure.count("/") > 1 else ""


def model_of(spec: loading.ModelSpec, params, mesh) -> api.Model:
    """The model that evals are called with; it may have no weights (None)."""
    return api.Model(spec.transformer, params, spec.tokenizer, spec.config, mesh, spec.ends, spec.suppressed)


class Evaluation:
    """A stage's evaluations of its state, while it trains.

    memory: results of the evaluations in this process, of each stage those of its last one; origin: the stage whose weights
    this one starts from. At step 0 the weights are the origin's last, so what it was asked in the same way is taken over.
    """

    def __init__(self, plan: Plan, mesh, memory: Memory, origin: str):
        self.plan, self.mesh, self.memory, self.origin = plan, mesh, memory, origin
        self.evals = planned(plan, mesh)

    def __call__(self, state: TrainState, log: Log, step: int) -> dict[str, float]:
        """The figures of the state at a step, {eval/figure: value}, written to the log with the first problem of each cell."""
        log.settle()
        params = combine(state.train if state.ema is None else state.ema, state.frozen)
        figures, rows = self.run(model_of(self.plan.spec, params, self.mesh), step)
        best = self.plan.settings.best
        if _eval_of(best) in self.plan.settings.evals and best not in figures:
            raise UserError(f"config.best: {best!r} is no figure of that eval.{nearest(best, figures)}")
        log.evaluated(step, figures, first_of_each_cell(rows))
        self.plan.source.evaluated(step, figures)
        return figures

    def run(self, model: api.Model, step: int) -> tuple[dict[str, float], list[dict]]:
        """(figures, rows) of a model that has the stage's weights of a step."""
        stage, at = self.plan.name, step
        last = max((n for _, holder, n in self.memory if holder == self.origin), default=None)
        if step == 0 and last is not None:
            stage, at = self.origin, last
        figures, rows = run_evals(model, self.evals, memory=self.memory, weights=(stage, at))
        for key in [key for key in self.memory if key[1] == stage and key[2] != at]:
            del self.memory[key]
        return {f"eval/{name}": value for name, value in figures.items()}, rows


def first_of_each_cell(rows: Sequence[dict]) -> list[dict]:
    """The first row of each eval's cells and kinds (sampled, greedy), in their order."""
    first: dict[tuple, dict] = {}
    for row in rows:
        first.setdefault(tuple(row.get(key) for key in ("eval", "cell", "kind")), row)
    return list(first.values())
