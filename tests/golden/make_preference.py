"""Writes the golden values that tests/test_preference.py holds the preference losses to, computed by TRL's own trainers.

    pip install torch trl==1.16
    python tests/golden/make_preference.py

preference.npz: for each loss of tests/preference_cases.py its value on every batch [50], and its gradient with respect to the
log-probability of each token [50,N,2,T]; float32. TRL's loss functions are called unbound, on an object that has what they
read, and a model that answers with the given log-probabilities. What TRL has not is the paper's closed form.
"""

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import preference_cases as cases

HERE = Path(__file__).parent


class Answers(torch.nn.Module):
    """A model that gives the same log-probabilities to whatever it is asked; [2N,T], chosen first."""

    is_gradient_checkpointing = False

    def __init__(self, logps, own=None):
        super().__init__()
        zeros = torch.zeros_like(logps)
        self.said = SimpleNamespace(
            log_probs=logps, log_sum_sq_probs=own, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros_like(logps, dtype=bool)
        )

    def forward(self, **_):
        return self.said


def _stacked(x):
    """[N,2,...] -> [2N,...], the chosen first, as TRL lays a batch out."""
    return torch.cat([x[:, 0], x[:, 1]])


def _completions(case):
    """[2N,T+1] bool: one token of prompt, then the completion."""
    lengths = _stacked(torch.from_numpy(case["lengths"]))
    return F.pad(torch.arange(cases.T)[None] < lengths[:, None], (1, 0))


def _trainer(**settings):
    accelerator = SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x, device="cpu")
    own = {"_metrics": {"train": defaultdict(list)}, "accelerator": accelerator, "aux_loss_enabled": False}
    return SimpleNamespace(**own, _total_train_tokens=0, _tp_size=1, precompute_ref_logps=False, **settings)


def dpo(case, logps, ref, settings):
    """TRL's DPO loss."""
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = _trainer(
        model=Answers(logps),
        ref_model=Answers(_stacked(ref)),
        beta=settings["beta"],
        loss_types=settings["loss_type"],
        loss_weights=settings.get("weights", [1.0]),
        label_smoothing=settings.get("label_smoothing", 0.0),
        f_divergence_type=settings.get("divergence", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("alpha"),
        ld_alpha=settings.get("ld_alpha"),
        use_weighting=settings.get("use_weighting", False),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.get("tau")),
    )
    mask = _completions(case).long()
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    own = _stacked(torch.from_numpy(case["own"])).to(logps.dtype)
    return DPOTrainer._compute_loss(trainer, Answers(_stacked(logps), own), inputs, False)


def kto(case, logps, ref, loss_type):
    """TRL's KTO loss, of the documents labelled 1 or 0, with the others for its baseline."""
    from trl.trainer.kto_trainer import KTOTrainer

    labels, sums, refs = torch.from_numpy(case["labels"]).ravel(), logps.sum(-1).ravel(), ref.sum(-1).ravel()
    mask = F.pad(torch.arange(cases.T)[None] < torch.from_numpy(case["lengths"]).reshape(-1, 1), (1, 0)).long()
    kept, other = labels >= 0, labels < 0
    settings = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7, "loss_type": loss_type}
    trainer = _trainer(model=Answers(logps), **settings, calculate_KL=loss_type == "kto")
    trainer.precompute_ref_logps, trainer._compute_kl_logps = True, lambda *_: sums[other]
    inputs = {"input_ids": mask[kept], "attention_mask": mask[kept], "completion_mask": mask[kept]}
    inputs |= {"label": labels[kept] == 1, "ref_logps": refs[kept], "ref_KL_logps": refs[other]}
    return KTOTrainer._compute_loss(trainer, Answers(logps.flatten(0, 1)[kept]), inputs, False)


def cpo(case, logps, ref, loss_type):
    """TRL's CPO or SimPO, whose NLL its caller adds."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    c, r = logps.sum(-1).T
    if loss_type == "simpo":
        (n, m), settings = torch.from_numpy(case["lengths"]).T, {"beta": 2.0, "simpo_gamma": 0.8}
        c, r, nll = c / n, r / m, 0.0
    else:
        nll, settings = -0.7 * c.sum() / case["lengths"][:, 0].sum(), {"beta": 0.3}
    trainer = SimpleNamespace(
        alpha=0.0, label_smoothing=0.0, loss_type=loss_type, accelerator=SimpleNamespace(device="cpu"), **settings
    )
    return CPOTrainer.cpo_loss(trainer, c, r)[0].mean() + nll


def orpo(case, logps, ref, _):
    """TRL's odds ratio, and the likelihood over the completion (its own counts the prompt too)."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    c, r = logps.sum(-1).T
    n, m = torch.from_numpy(case["lengths"]).T
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    # It computes in float32, whatever comes in.
    return -c.sum() / n.sum() - ORPOTrainer.odds_ratio_loss(trainer, c / n, r / m)[0].mean()


def closed_form(case, logps, ref, name):
    """What TRL has not, from the papers."""
    c, r = (logps - ref).sum(-1).T
    if name == "smoothed":
        return -(0.8 * F.logsigmoid(0.3 * (c - r)) + 0.2 * F.logsigmoid(-0.3 * (c - r))).mean()
    if name == "offset":
        return -F.logsigmoid(0.3 * (c - r) - torch.from_numpy(case["margins"])).mean()
    labels, rewards = torch.from_numpy(case["labels"]).ravel(), 0.3 * (logps - ref).sum(-1).ravel()
    good, bad = rewards[labels == 1], rewards[labels == 0]
    shift = ((good.mean() + bad.mean()) / 2).detach()
    return -torch.cat([F.logsigmoid(good - shift), F.logsigmoid(shift - bad)]).mean()


OTHERS = {
    **{"simpo": (cpo, "simpo"), "cpo": (cpo, "sigmoid"), "orpo": (orpo, None)},
    **{"kto": (kto, "kto"), "apo_zero_unpaired": (kto, "apo_zero_unpaired")},
    **{name: (closed_form, name) for name in ("smoothed", "offset", "bco")},
}


def reference(name: str, seed: int) -> tuple[float, np.ndarray]:
    """(value, gradient [N,2,T]) of a loss on a batch."""
    case, (_, settings) = cases.batch(seed), cases.LOSSES[name]
    function, settings = (dpo, settings) if settings else OTHERS[name]
    # TRL's alpha divergence knows no float64.
    dtype = torch.float32 if name == "alpha" else torch.float64
    logps = torch.from_numpy(case["logps"]).to(dtype).requires_grad_()
    loss = function(case, logps, torch.from_numpy(case["ref_logps"]).to(dtype), settings)
    loss.backward()
    there = np.arange(cases.T) < case["lengths"][..., None]
    return loss.item(), np.where(there, logps.grad.numpy(), 0.0)


def main() -> None:
    found = {}
    for name in cases.LOSSES:
        values, gradients = zip(*(reference(name, seed) for seed in range(cases.BATCHES)), strict=True)
        found[name] = np.array(values, np.float32)
        found[f"{name}/gradient"] = np.array(gradients, np.float32)
    np.savez_compressed(HERE / "preference.npz", **found)


if __name__ == "__main__":
    main()
