"""Advantages: how much better than expected a completion, or one of its tokens, turned out.

Each function is (rewards [P,G], tokens, *, its settings) -> advantages, for P prompts with G completions each. It gets the
whole rollout batch of all processes, since baselines depend on other completions. tokens: a dict of arrays [P*G,N], aligned to
the completions (row p G + g is completion g of prompt p): mask (bool), old_logps, and if the objective reads them ref_logps and
values; and `tasks`, the prompts' P task names.

It returns [P,G], constant over a completion, or {column: [P*G,N]} with a number for each token. Computations are in float64,
results in float32. A reward of nan (no reward applied) is in no statistic, and its completion's advantage is 0. If a group's
rewards are tied, or it has only one, estimates that compare within the group are exactly 0, not rounding noise divided by a
tiny deviation.
"""

import numpy as np

from jaxpost.errors import UserError
from jaxpost.rollouts.scores import LEVEL, differing


def _rewards(rewards) -> tuple[np.ndarray, np.ndarray]:
    """(rewards [P,G] float64, 0 where there is none; valid [P,G] bool: where there is one)."""
    rewards = np.asarray(rewards, np.float64)
    valid = np.isfinite(rewards)
    return np.where(valid, rewards, 0.0), valid


def _compared(rewards: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[P,G] bool: where there is a reward, in a group whose rewards are not tied."""
    return valid & differing(np.where(valid, rewards, np.nan))[:, None]


def _centred(rewards: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Rewards minus their group's mean; exactly 0 in tied groups."""
    mean = rewards.sum(1) / np.maximum(valid.sum(1), 1)
    return np.where(_compared(rewards, valid), rewards - mean[:, None], 0.0)


def _scaled(values: np.ndarray, deviation: np.ndarray, eps: float) -> np.ndarray:
    """values over (deviation + eps), float32; 0 stays 0."""
    return np.where(values == 0, 0.0, values / np.maximum(deviation + eps, np.finfo(float).tiny)).astype(np.float32)


def _deviation(values: np.ndarray, ddof: int) -> float:
    """The standard deviation of the values; infinite for too few, so that a quotient is 0."""
    return float(values.std(ddof=ddof)) if len(values) > ddof else np.inf


def centred(rewards: np.ndarray, tokens: dict) -> np.ndarray:
    """A_i = R_i - mean of the group. Its policy gradient is (G-1)/G times the exact one in expectation.

    Source: "Understanding R1-Zero-Like Training: A Critical Perspective".
    """
    return _centred(*_rewards(rewards)).astype(np.float32)


def group(rewards: np.ndarray, tokens: dict, *, eps: float = 1e-4, ddof: int = 1) -> np.ndarray:
    """A_i = (R_i - mean) / (std + eps) of the group, std over G - ddof. Invariant to the scale of rewards, but for eps.

    TRL has eps 1e-4 and ddof 1, verl 1e-6 and 1, OpenRLHF 1e-9 and 1, open-instruct 1e-8 and 0. Source: "DeepSeekMath: Pushing
    the Limits of Mathematical Reasoning in Open Language Models".
    """
    rewards, valid = _rewards(rewards)
    std = np.array([_deviation(r[t], ddof) for r, t in zip(rewards, valid, strict=True)])
    return _scaled(_centred(rewards, valid), std[:, None], eps)


def batch_std(rewards: np.ndarray, tokens: dict, *, eps: float = 1e-4) -> np.ndarray:
    """A_i = (R_i - mean of the group) / (std of all rewards of the batch + eps), unbiased.

    It differs from group in giving groups with a larger spread more weight. TRL's scale_rewards="batch". Source: "Tricks or
    Traps? A Deep Dive into RL for LLM Reasoning".
    """
    rewards, valid = _rewards(rewards)
    return _scaled(_centred(rewards, valid), _deviation(rewards[valid], 1), eps)


def task_std(rewards: np.ndarray, tokens: dict, *, eps: float = 1e-6) -> np.ndarray:
    """A_i = (R_i - mean of the group) / (std of all rewards of the prompt's task in the batch + eps), unbiased.

    It differs from batch_std in normalising tasks of different scales separately. tokens["tasks"]: the prompts' P tasks; raises
    UserError without them. Source: "QwenLong-L1.5: Post-Training Recipe for Long-Context Reasoning and Memory Management".
    """
    if "tasks" not in tokens:
        raise UserError("advantages task_std: nothing says which task a prompt is of; take advantages batch_std.")
    rewards, valid = _rewards(rewards)
    tasks = np.asarray(tokens["tasks"])
    of_task = {task: _deviation(rewards[tasks == task][valid[tasks == task]], 1) for task in set(tasks.tolist())}
    std = np.array([of_task[task] for task in tasks.tolist()])
    return _scaled(_centred(rewards, valid), std[:, None], eps)


def _k1(tokens: dict) -> np.ndarray:
    """log policy / reference of each sampled token, 0 elsewhere. Its mean is the KL; in the reward it has the KL's gradient."""
    gap = np.asarray(tokens["old_logps"], np.float64) - np.asarray(tokens["ref_logps"], np.float64)
    return np.where(tokens["mask"], gap, 0.0)


def leave_one_out(rewards: np.ndarray, tokens: dict, *, beta: float = 0.0) -> np.ndarray:
    """A_i = R_i - mean of the other rewards of the group, each R minus beta times its completion's sum of k1.

    The baseline is unbiased, since it does not depend on completion i. beta: the KL to the reference (reads ref_logps). Source:
    "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """
    rewards, valid = _rewards(rewards)
    if beta:
        rewards = np.where(valid, rewards - beta * _k1(tokens).sum(1).reshape(rewards.shape), 0.0)
    count = valid.sum(1, keepdims=True)
    return (_centred(rewards, valid) * count / np.maximum(count - 1, 1)).astype(np.float32)


def opo(rewards: np.ndarray, tokens: dict) -> np.ndarray:
    """A_i = R_i - sum_j n_j R_j / sum_j n_j over the group, n the lengths: nearly the baseline of minimal variance.

    Source: "On-Policy RL with Optimal Reward Baseline".
    """
    rewards, valid = _rewards(rewards)
    lengths = np.where(valid, np.asarray(tokens["mask"]).sum(1).reshape(rewards.shape), 0)
    mean = (lengths * rewards).sum(1) / np.maximum(lengths.sum(1), 1)
    return np.where(_compared(rewards, valid), rewards - mean[:, None], 0.0).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- Of each token


def _whitened(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """values [R,N] with mean 0 and deviation 1 over the batch's tokens in the mask; 0 elsewhere, and if all are tied."""
    kept = values[mask]
    if not len(kept) or np.ptp(kept) < LEVEL:
        return np.zeros(mask.shape, np.float32)
    return np.where(mask, (values - kept.mean()) / np.sqrt(max(kept.var(), 1e-8)), 0.0).astype(np.float32)


def _token_rewards(rewards: np.ndarray, valid: np.ndarray, tokens: dict, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """(r_t = 1[t last] R - beta k1_t, the mask), both [P*G,N]; the mask leaves out completions without a reward."""
    mask = np.asarray(tokens["mask"], bool) & valid.reshape(-1, 1)
    token_rewards = -beta * _k1(tokens) if beta else np.zeros(mask.shape)
    rows = np.flatnonzero(mask.any(1))
    token_rewards[rows, mask.shape[1] - 1 - mask[rows, ::-1].argmax(1)] += rewards.ravel()[rows]
    return np.where(mask, token_rewards, 0.0), mask


def _backwards(deltas: np.ndarray, mask: np.ndarray, decay: float) -> np.ndarray:
    """x_t = deltas_t + decay x_s, s the next token in the mask: tokens between them, such as a tool's answer, are skipped."""
    returns, carried = np.zeros(deltas.shape), np.zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        carried = np.where(mask[:, t], deltas[:, t] + decay * carried, carried)
        returns[:, t] = carried
    return np.where(mask, returns, 0.0)


def reinforce_pp(rewards: np.ndarray, tokens: dict, *, beta: float = 0.01, gamma: float = 1.0) -> dict:
    """A_t = sum_s>=t gamma^(s-t) r_s, whitened over all tokens of the batch;  r_t = 1[t last] R - beta k1_t.

    It compares with the whole batch instead of the group, and allows G = 1. beta: the KL to the reference (reads ref_logps).
    Source: "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization".
    """
    scores, mask = _token_rewards(*_rewards(rewards), tokens, beta)
    return {"advantages": _whitened(_backwards(scores, mask, gamma), mask)}


def reinforce_pp_baseline(rewards: np.ndarray, tokens: dict, *, beta: float = 0.01) -> dict:
    """reinforce_pp of rewards minus their group's mean.

    The whitening's mean is over tokens, so tied groups have an advantage near 0, not exactly 0.
    """
    rewards, valid = _rewards(rewards)
    scores, mask = _token_rewards(_centred(rewards, valid), valid, tokens, beta)
    return {"advantages": _whitened(_backwards(scores, mask, 1.0), mask)}


def gae(rewards: np.ndarray, tokens: dict, *, gamma: float = 1.0, decay: float = 0.95, beta: float = 0.05) -> dict:
    """A_t = d_t + gamma decay A_t+1,  d_t = r_t + gamma V_t+1 - V_t,  r_t = 1[t last] R - beta k1_t;  returns_t = A_t + V_t.

    V: tokens["values"], 0 after the end; decay is the paper's lambda. Advantages are whitened over all tokens of the batch;
    returns use those before whitening. Tokens outside the mask are skipped. beta: the KL to the reference (reads ref_logps).
    Source: "High-Dimensional Continuous Control Using Generalized Advantage Estimation".
    """
    scores, mask = _token_rewards(*_rewards(rewards), tokens, beta)
    values = np.where(mask, np.asarray(tokens["values"], np.float64), 0.0)
    after, carried = np.zeros(values.shape), np.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        after[:, t] = carried
        carried = np.where(mask[:, t], values[:, t], carried)
    estimates = _backwards(scores + gamma * after - values, mask, gamma * decay)
    return {"advantages": _whitened(estimates, mask), "returns": np.where(mask, estimates + values, 0.0).astype(np.float32)}
