"""The first tokens of completions, given by somebody else than the policy: `rollouts.given` names a function of

    (record, demonstration [n] int32, *, progress, key, member, its settings) -> [m] int32

which is called for each completion that is asked, and gives what it begins with, maybe nothing. record: the problem's;
demonstration: the ids of the task's answer to it; progress: the share of the stage's steps that are done, in [0,1); key: uint32
[2], of the prompt and of how many times completions were sampled, the same in a group (np.random.default_rng(key) takes it);
member: which of its group the completion is, from 0. A function that has no use for progress, key or member leaves them out of
its signature; without `member` all completions of a group begin alike.

Given tokens are decoded one a turn behind the prompt, which is read once for its group. They are in no policy mask and count in
no denominator of rollouts; the column `demonstrations` marks them, for an objective that imitates (the term `sft`).
"""

from collections.abc import Mapping

import numpy as np


def share(
    record: Mapping, demonstration: np.ndarray, *, progress: float, key: np.ndarray, start: float = 1.0, end: float = 0.0
) -> np.ndarray:
    """The first tokens of the demonstration. Their expected share of it goes from `start` to `end` by a cosine over the stage.

    How many tokens it has is binomial, so that lengths vary as the share does. Source: "UFT: Unifying Supervised and
    Reinforcement Fine-Tuning".
    """
    mean = end + (start - end) * (1 + np.cos(np.pi * progress)) / 2
    return demonstration[: np.random.default_rng(key).binomial(len(demonstration), np.clip(mean, 0.0, 1.0))]
