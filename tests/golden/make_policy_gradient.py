"""Writes the golden values that tests/test_policy_gradient.py holds the policy gradients to, computed by TRL's own trainers.

    pip install torch trl==1.16
    python tests/golden/make_policy_gradient.py

policy_gradient.npz: for each method of tests/policy_gradient_cases.py that TRL has, its loss on every batch [50], and its
gradient with respect to the log-probability and to the entropy of each token [50,2,N,T]; float32. TRL's loss functions are
called unbound, on an object that has what they read and answers with the given log-probabilities.
"""

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import policy_gradient_cases as cases

HERE = Path(__file__).parent


def _trainer(logps, entropy, settings: dict) -> SimpleNamespace:
    accelerator = SimpleNamespace(
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, **_: x,
        num_processes=1,
        sync_gradients=True,
    )
    epsilon = settings.get("epsilon", 0.2)
    args = {
        "use_bias_correction_kl": settings.get("use_bias_correction_kl", True),
        "delta": settings.get("delta"),
        "sapo_temperature_pos": settings.get("sapo_temperature_pos", 1.0),
        "sapo_temperature_neg": settings.get("sapo_temperature_neg", 1.05),
        "steps_per_generation": 1,
        **{"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
    }
    own = {
        "epsilon_low": settings.get("epsilon_low", epsilon),
        "epsilon_high": settings.get("epsilon_high", epsilon),
        "beta": settings.get("beta", 0.0),
        "loss_type": settings.get("loss_type"),
        "importance_sampling_level": settings.get("importance_sampling_level", "token"),
        "max_completion_length": settings.get("max_completion_length"),
        "top_entropy_quantile": settings.get("top_entropy_quantile", 1.0),
        "off_policy_mask_threshold": settings.get("off_policy_mask_threshold"),
        "entropy_coef": settings.get("entropy_coef", 0.0),
        "_entropy_bonus_enabled": "entropy_coef" in settings,
        "use_adaptive_entropy": False,
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
        "use_vllm": False,
    }
    return SimpleNamespace(
        **own,
        args=SimpleNamespace(**args),
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
    )


def reference(name: str, seed: int) -> tuple[float, np.ndarray]:
    """(loss, gradient [2,N,T] by log-probability and by entropy) of TRL's method on a batch."""
    from trl import GRPOTrainer, RLOOTrainer

    case, settings = cases.batch(seed), cases.TRL[name][1]
    logps, entropy = (torch.from_numpy(case[k]).requires_grad_() for k in ("logps", "entropy"))
    old, mask = torch.from_numpy(case["old_logps"]), torch.from_numpy(case["mask"])
    trainer = _trainer(logps, entropy, settings)
    ids = torch.ones_like(mask, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask.long()}
    inputs |= {"advantages": torch.from_numpy(case["advantages"]), "ref_per_token_logps": torch.from_numpy(case["ref_logps"])}
    if settings.get("trainer") == "rloo":
        loss = RLOOTrainer._compute_loss(trainer, None, inputs | {"old_logps": old.sum(1)})
        # A completion that is not learned from has a ratio of one there, which adds a constant to the loss: left out.
        loss = loss + inputs["advantages"][~mask.any(1)].sum() / cases.N
    else:
        trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
        trainer.get_gamma_weights = GRPOTrainer.get_gamma_weights
        trainer.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
        inputs |= {"old_per_token_logps": old, "num_items_in_batch": mask.sum()}
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    found = [np.zeros(mask.shape) if x.grad is None else x.grad.numpy() for x in (logps, entropy)]
    return loss.item(), np.where(case["mask"], np.stack(found), 0.0)


def main() -> None:
    found = {}
    for name in cases.TRL:
        values, gradients = zip(*(reference(name, seed) for seed in range(cases.BATCHES)), strict=True)
        found[name] = np.array(values, np.float32)
        found[f"{name}/gradient"] = np.array(gradients, np.float32)
    np.savez_compressed(HERE / "policy_gradient.npz", **found)


if __name__ == "__main__":
    main()
