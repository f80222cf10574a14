"""The random rollouts that tests/test_policy_gradient.py and the generator of its golden values share, and the methods on them.

Fifty batches of six completions; a batch is a dict of float64 arrays over [completion, token]. What lies beyond a completion's
length is zero, and in every fifth batch the last completion is not learned from at all.
"""

import numpy as np

BATCHES, N, T = 50, 6, 5


def batch(seed: int) -> dict[str, np.ndarray]:
    """One batch: mask [N,T]; logps, old_logps, ref_logps, entropy, values, old_values, returns [N,T]; advantages [N], constant
    over a completion; token_advantages [N,T].

    Ratios are spread so that every clip acts, those of the tokens and those of whole completions alike.
    """
    rng = np.random.default_rng([11, seed])
    mask = np.arange(T) < rng.integers(1, T + 1, (N, 1))
    mask[-1] &= seed % 5 > 0
    logps = -rng.exponential(2.0, (N, T)) - 0.05
    spread = rng.choice([1e-4, 0.05, 0.5], (N, 1))
    found = {
        "logps": logps,
        "old_logps": logps + spread * rng.normal(size=(N, T)),
        "ref_logps": logps + 0.5 * rng.normal(size=(N, T)),
        "entropy": rng.exponential(size=(N, T)),
        "values": rng.normal(size=(N, T)),
        "returns": rng.normal(size=(N, T)),
        "token_advantages": rng.normal(size=(N, T)),
    }
    found["old_values"] = found["values"] + 0.3 * rng.normal(size=(N, T))
    found = {k: np.where(mask, v, 0.0) for k, v in found.items()} | {"advantages": rng.normal(size=N)}
    # As float32 numbers, so that both sides begin with the same.
    return {k: v.astype(np.float32).astype(np.float64) for k, v in found.items()} | {"mask": mask}


def ours(name: str, **options) -> dict:
    """A config entry of a policy gradient."""
    return {"name": f"policy_gradient.{name}", **options}


def variant(of: str, **options) -> dict:
    """A config entry of a method with other parts."""
    return ours("variant", of=of if isinstance(of, dict) else f"policy_gradient.{of}", **options)


def plus(term: str, coefficient: float = 1.0) -> dict:
    """A config entry of the plain gradient with a term."""
    return variant("reinforce", added_terms={term: coefficient})


def _grpo(loss_type, **settings):
    return {"loss_type": loss_type, **settings}


# name -> our config entry, and the settings of TRL's GRPOTrainer for the same.
TRL = {
    "trl": (ours("trl"), _grpo("dapo")),
    "trl_kl": (ours("trl", beta=0.3, delta=1.6), _grpo("dapo", beta=0.3, delta=1.6)),
    "grpo": (ours("grpo", beta=0.3), _grpo("grpo", beta=0.3, use_bias_correction_kl=False)),
    "dr_grpo": (ours("dr_grpo", longest=7), _grpo("dr_grpo", max_completion_length=7)),
    "dapo": (ours("dapo"), _grpo("dapo", epsilon_high=0.28)),
    "gspo": (
        ours("gspo", low=0.03, high=0.04),
        _grpo("grpo", importance_sampling_level="sequence", epsilon=0.03, epsilon_high=0.04),
    ),
    "luspo": (
        variant("gspo", aggregation="sequence_sum", surrogate={"name": "gspo", "low": 0.1, "high": 0.2}),
        _grpo("luspo", importance_sampling_level="sequence", epsilon=0.1, epsilon_high=0.2),
    ),
    "cispo": (ours("cispo", cap=1.1), _grpo("cispo", epsilon_high=1.1)),
    "sapo": (ours("sapo", positive=1.3, negative=2.0), _grpo("sapo", sapo_temperature_pos=1.3, sapo_temperature_neg=2.0)),
    "vespo": (variant("dapo", surrogate="vespo"), _grpo("vespo")),
    "kl_k3_ratio": (
        variant(ours("grpo", beta=0.0), added_terms={"kl_k3_ratio": 0.5}),
        _grpo("grpo", beta=0.5, use_bias_correction_kl=True),
    ),
    "top_entropy": (
        variant("trl", weightings={"top_entropy": {"share": 0.4}}, added_terms={"entropy": 0.7, "kl_k3_ratio": 0.2}),
        _grpo("dapo", top_entropy_quantile=0.4, entropy_coef=0.7, beta=0.2),
    ),
    "off_policy": (
        variant("dapo", weightings={"off_policy": {"most": 0.05}}),
        _grpo("dapo", epsilon_high=0.28, off_policy_mask_threshold=0.05),
    ),
    "rloo": (ours("rloo", low=0.1, high=0.3), {"trainer": "rloo", "epsilon_low": 0.1, "epsilon_high": 0.3}),
}

# Whatever can be together, in one.
NEAR = ("kl_k1_ratio", "kl_k2", "kl_k3_ratio", "kl_k1_return", "k1_in_loss", "k3_in_loss")
EVERYTHING = variant(
    "ppo",
    weightings={"top_entropy": {"share": 0.5}, "off_policy": {}},
    added_terms=dict.fromkeys(NEAR, 1.0) | {"entropy": 0.1, "entropy_target": {"target": 9.0}},
)
