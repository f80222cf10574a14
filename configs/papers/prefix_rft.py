"""Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling.

    L = Dr. GRPO's over drawn tokens  -  sum of A log p over uncertain prefix tokens / (completions * longest)

One completion of each group begins with the first part of the demonstration, which gets shorter as training goes on; the policy
goes on from there, and the group's advantage A of that completion is the prefix tokens' too. Claim: with the same problems,
demonstrations and number of tokens that beats reinforcement alone and imitation alone. HPT, its nearest relative, imitates
whole demonstrations, and only where every completion fails; here a prefix is learned as far as it leads to a reward. HPT is
scored on the same problems in hpt.py.

The lock of hpt.py, with its start and its other arms. The prefix's share of the demonstration is drawn from [low, 0.95], and
low falls from 0.95 to about 0.1 by a cosine, since the tokens are spent before its last steps. Uncertain are the fifth of all
prefix tokens with the highest entropy. Left out: the entropy bonus, and the bound on the ratio, which one step a batch never
reaches.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import recipe
from jaxpost.declare import Column, part
from jaxpost.objectives.estimator import constant, estimator, inside
from jaxpost.objectives.surrogates import PolicyBatch
from jaxpost.studies import Claim, Study
from jaxpost.types import Term

STUDY = Study(
    arms=("prefix_rft", "grpo", "sft"),
    metric="eval/accuracy",
    claims=(Claim("prefix_rft", over=("grpo", "sft"), margin=0.05),),
    family="objective",
    seeds=(0, 1, 2, 3, 4),
    tune={"optimizer.lr": (3e-4, 6e-4, 1e-3, 2e-3)},
)


def beginning(record, demonstration, *, progress, key, member, highest: float = 0.95, lowest: float = 0.05):
    """The first tokens of the demonstration [n] int32 for the first completion of a group, at least one and at most n - 1."""
    if member:
        return demonstration[:0]
    low = lowest + (highest - lowest) * (1 + np.cos(np.pi * progress)) / 2
    share = np.random.default_rng(key).uniform(low, highest)
    return demonstration[: int(np.clip(share * len(demonstration), 1, len(demonstration) - 1))]


def _uncertain(batch: PolicyBatch, *, share: float = 0.2, **_) -> dict:
    entropies = jnp.where(batch.columns["demonstrations"], batch.entropy, jnp.nan)
    return {"uncertain": batch.columns["demonstrations"] & (batch.entropy >= jnp.nanquantile(entropies, 1 - share))}


@part(columns={"demonstrations": Column("BS", "bool")}, masks=("demonstrations",), prepare=_uncertain)
def prefix(batch: PolicyBatch, *, longest: int, share: float = 0.2, coefficient: float = 1.0) -> Term:
    """-A log policy over the `share` of all prefix tokens with the highest entropy, on the scale of Dr. GRPO's loss."""
    advantages = jax.lax.stop_gradient(batch.columns["advantages"])
    loss = jnp.where(batch.columns["uncertain"], -advantages * batch.logps, 0.0)
    return constant(loss, batch.columns, longest=longest)._replace(sum=jnp.sum(loss))


@estimator
def prefix_rft(*, longest: int = 3000, share: float = 0.2):
    """Dr. GRPO without a bound on its ratio, and `prefix`. longest: the rollouts' limit of new tokens."""
    method = inside({"name": "policy_gradient.dr_grpo", "longest": longest, "low": 1e9, "high": 1e9})
    return method._replace(terms=(partial(prefix, longest=longest, share=share),))


def get_config(arg="prefix_rft"):
    if arg != "prefix_rft":
        return recipe.opened(f"configs/papers/hpt.py:{recipe.chosen({'grpo': 'grpo', 'sft': 'sft'}, arg)}")
    base = recipe.opened("configs/papers/hpt.py:grpo")
    objective = {"name": f"{__file__}:prefix_rft", "longest": base.objective.longest}
    return recipe.opened(base, objective=objective, rollouts={"given": f"{__file__}:beginning"}, steps=250)
