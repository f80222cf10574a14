"""Advantages: how much better a completion did than was to be expected, from rewards [P,G] (P prompts, G completions each).

Each function returns [P,G] float32. A group whose rewards are all equal gets exactly zero.
"""

import numpy as np


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """A_i = R_i - mean of the other G-1 rewards of the group: an unbiased baseline, since it does not depend on completion i.

    Needs G >= 2. Source: "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """
    rewards = np.asarray(rewards, np.float64)
    others = (rewards.sum(1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
    level = np.ptp(rewards, axis=1, keepdims=True) < 1e-8
    return np.where(level, 0.0, rewards - others).astype(np.float32)
