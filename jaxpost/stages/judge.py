"""A stage's evaluations of its state, while it trains: held-out loss, and a task's test problems."""

import jax

from jaxpost import annotations, evaluate, recipe
from jaxpost.errors import UserError
from jaxpost.log import Log
from jaxpost.models import loading
from jaxpost.naming import digest_of
from jaxpost.resolve import nearest
from jaxpost.stages.plan import Plan
from jaxpost.step import combine, make_evaluation
from jaxpost.types import TrainState

# The settings that decide, besides the problems, what the answers are.
ANSWERED = ("model", "tokenizer", "adapter", "dtype", "attention", "mesh")


def check_best(plan: Plan, mesh) -> None:
    """Checks that a stage's evaluations report the figure that its best checkpoint is chosen by. The objective is traced for
    that, not compiled, and only where neither the loss nor the task's problems are it. The default stands for no choice.
    """
    best, s = plan.settings.best, plan.settings
    names = set(evaluate.names(plan.problems["records"], plan.problems["rewards"])) if plan.problems else set()
    held_out = s.source != "rollouts" and bool(s.held_out or s.eval_data)
    names |= {"eval/loss"} if held_out else set()
    if best in ("", recipe.DEFAULTS["best"], *names):
        return
    if held_out:
        found = plan.spec
        params = loading.abstract(found.transformer, mesh, found.adapter, found.leaves)
        batch, key = annotations.of_batches(plan), jax.eval_shape(lambda: jax.random.PRNGKey(0))
        names |= {
            f"eval/{k}" for k in jax.eval_shape(make_evaluation(found.transformer.forward, plan.objective), params, batch, key)
        }
    if not names:
        raise UserError(
            f"config.best: {best!r}, but {plan.name} has no evaluation; give config.held_out, config.eval_data or a task with "
            'test problems, or set config.best="".'
        )
    if best not in names:
        raise UserError(f"config.best: {best!r} is no figure of {plan.name}'s evaluations.{nearest(best, names)}")


class Judge:
    """The stage's evaluations of a state: held-out loss, and a task's test problems.

    graded: {stage: (what decides the answers, figures, samples)} of each stage's last evaluation in this process, where this
    stage's own are put; origin: the stage whose weights this one starts from. Where the same problems are asked in the same
    way, the origin's figures are those of step 0: the weights are the same, and so is the noise.
    """

    def __init__(self, plan: Plan, mesh, graded: dict, origin: str):
        self.plan, self.mesh, self.graded, self.origin = plan, mesh, graded, origin
        self.evaluate = jax.jit(annotations.evaluation(plan))

    def __call__(self, state: TrainState, log: Log, step: int) -> dict[str, float]:
        """The figures of the state at a step, written to the log."""
        log.settle()
        params, values, samples = combine(state.train if state.ema is None else state.ema, state.frozen), {}, []
        if self.plan.held_out:
            values |= dict(
                evaluate.held_out(self.evaluate, params, self.plan.held_out, self.mesh, self.plan.settings.batch_size)
            )
        if self.plan.problems:
            figures, samples = self._graded(params, step)
            values |= figures
        log.evaluated(step, values, samples)
        return values

    def _graded(self, params, step: int) -> tuple[dict[str, float], list[dict]]:
        """(figures, samples) of the task's test problems."""
        identity = _asked(self.plan)
        before, *same = self.graded.get(self.origin, (None,))
        if step or before != identity:
            figures = dict(evaluate.graded(self.plan.spec.transformer, params, mesh=self.mesh, **self.plan.problems))
            same = [figures, figures.pop("samples")]
        self.graded[self.plan.name] = (identity, *same)
        return same[0], same[1]


def _asked(plan: Plan) -> str:
    """A digest of all but the weights that decides how a stage's test problems are answered and judged."""
    problems = {k: x for k, x in plan.problems.items() if k != "tokenizer"}
    return digest_of([problems, {k: recipe.plain(plan.settings[k]) for k in ANSWERED}])
