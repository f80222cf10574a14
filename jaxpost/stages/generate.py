"""The data set that a stage has the weights it starts from make: a task's completions, judged."""

import zlib
from collections.abc import Callable

from jaxpost.errors import UserError
from jaxpost.rollouts.samples import Samples, rows
from jaxpost.stages import datasets
from jaxpost.stages.rollouts import sampling
from jaxpost.stages.tasks import Rewards, check_rewards, judging, prompts


def samples(name: str, task, judges: Rewards, model, s, objective: Callable, mesh) -> Samples:
    """The data set that a stage has its start weights make. Raises UserError for settings with which it could not be learned
    from.
    """
    if s.rollouts.group < 2:
        raise UserError(f"config.rollouts.group: {s.rollouts.group} leaves nothing to compare; take 2 at least.")
    check_rewards(s, judges, learned=True)
    prompt, shape = prompts(task, judges, model, s, leave_out=False), datasets.shape(objective)
    trial = [row for i in range(8) for row in rows(shape, prompt(i)[0]["prompt"], "12", (1, 0))]
    datasets.check(trial, model, s, objective)
    step = zlib.crc32(name.encode()) >> 1  # that each stage draws others
    return Samples(
        model=model.transformer,
        tokenizer=model.tokenizer,
        prompt=prompt,
        rewards=judges,
        shape=shape,
        count=s.task.get("examples", datasets.EXAMPLES),
        group=s.rollouts.group,
        rows=s.eval_rows,
        seed=s.seed,
        step=step,
        judging=judging(s),
        options=sampling(model, s),
    )
