"""The random pairs that tests/test_preference.py and the generator of its golden values share, and the losses on them.

Fifty batches of four pairs; a batch is a dict of float64 arrays over [pair, side, token], the chosen first. Tokens beyond a
completion's length are zero.
"""

import numpy as np

BATCHES, N, T = 50, 4, 4


def batch(seed: int) -> dict[str, np.ndarray]:
    """One batch: lengths [N,2], and logps, ref_logps, own [N,2,T] (own: log sum_v p(v)^2 at each token's place); margins [N];
    labels [N,2] for single answers, 1, 0 or -1.
    """
    rng = np.random.default_rng([7, seed])
    lengths = rng.integers(1, T + 1, (N, 2))
    there = np.arange(T) < lengths[..., None]
    logps = np.where(there, -rng.exponential(2.0, (N, 2, T)) - 0.05, 0.0)
    ref_logps = np.where(there, np.minimum(logps + rng.normal(size=(N, 2, T)), -0.01), 0.0)
    own = np.where(there, -rng.exponential(2.0, (N, 2, T)) - 0.05, 0.0)
    labels = rng.permutation([1, 1, 1, 0, 0, -1, -1, -1] if seed % 5 else [1, 0, 0, 0, 0, 0, -1, -1]).reshape(N, 2)
    found = {"logps": logps, "ref_logps": ref_logps, "own": own, "margins": rng.exponential(size=N)}
    # As float32 numbers, so that both sides begin with the same.
    return {k: v.astype(np.float32).astype(np.float64) for k, v in found.items()} | {"lengths": lengths, "labels": labels}


def ours(name: str, **options) -> dict:
    """A config entry of a loss over pairs."""
    return {"name": f"preference.{name}", **options}


# name -> our config entry, and TRL's DPO settings for the same (None: another trainer's, or the paper's closed form).
LOSSES = {
    "sigmoid": (ours("sigmoid", beta=0.3), {"loss_type": ["sigmoid"], "beta": 0.3}),
    "hinge": (ours("hinge", beta=0.3), {"loss_type": ["hinge"], "beta": 0.3}),
    "ipo": (ours("ipo", beta=0.1), {"loss_type": ["ipo"], "beta": 0.1}),
    "exo_pair": (ours("exo_pair", beta=0.3, smoothing=1e-3), {"loss_type": ["exo_pair"], "beta": 0.3, "label_smoothing": 1e-3}),
    "nca_pair": (ours("nca_pair", beta=0.3), {"loss_type": ["nca_pair"], "beta": 0.3}),
    "robust": (ours("robust", beta=0.3, smoothing=0.2), {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.2}),
    "bco_pair": (ours("bco_pair", beta=0.3), {"loss_type": ["bco_pair"], "beta": 0.3}),
    "sppo_hard": (ours("sppo_hard", beta=0.05), {"loss_type": ["sppo_hard"], "beta": 0.05}),
    "aot": (ours("aot", beta=0.3, smoothing=0.1), {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.1}),
    "aot_unpaired": (
        ours("aot_unpaired", beta=0.3, smoothing=0.1),
        {"loss_type": ["aot_unpaired"], "beta": 0.3, "label_smoothing": 0.1},
    ),
    "apo_zero": (ours("apo_zero", beta=0.3), {"loss_type": ["apo_zero"], "beta": 0.3}),
    "apo_down": (ours("apo_down", beta=0.3), {"loss_type": ["apo_down"], "beta": 0.3}),
    "discopop": (ours("discopop", beta=0.1, tau=0.05), {"loss_type": ["discopop"], "beta": 0.1, "tau": 0.05}),
    "sigmoid_norm": (ours("sigmoid_norm"), {"loss_type": ["sigmoid_norm"], "beta": 5.0}),
    "sft": (ours("sft"), {"loss_type": ["sft"], "beta": 0.1}),
    "weighted": (
        ours(
            "weighted",
            losses={"sigmoid": {"weight": 0.8, "beta": 0.2}, "bco_pair": {"weight": 0.2, "beta": 0.2}, "sft": 1.5},
        ),
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.5], "beta": 0.2},
    ),
    "forward_kl": (
        ours("divergence", kind="forward_kl", of=ours("sigmoid_norm", beta=0.3)),
        {"loss_type": ["sigmoid_norm"], "beta": 0.3, "divergence": "forward_kl"},
    ),
    "js": (
        ours("divergence", of=ours("ipo", beta=0.5)),
        {"loss_type": ["ipo"], "beta": 0.5, "divergence": "js_divergence"},
    ),
    "alpha": (
        ours("divergence", kind="alpha", alpha=0.7, of=ours("sigmoid", beta=0.3)),
        {"loss_type": ["sigmoid"], "beta": 0.3, "divergence": "alpha_divergence", "alpha": 0.7},
    ),
    "length_desensitised": (
        ours("length_desensitised", alpha=0.3, of=ours("sigmoid", beta=0.3)),
        {"loss_type": ["sigmoid"], "beta": 0.3, "ld_alpha": 0.3},
    ),
    "length_desensitised_aot": (
        ours("length_desensitised", alpha=0.3, of=ours("aot_unpaired", beta=0.3)),
        {"loss_type": ["aot_unpaired"], "beta": 0.3, "ld_alpha": 0.3},
    ),
    "wpo": (ours("wpo", of=ours("sigmoid", beta=0.3)), {"loss_type": ["sigmoid"], "beta": 0.3, "use_weighting": True}),
    "simpo": (ours("simpo", beta=2.0, gamma=0.8), None),
    "cpo": (ours("cpo", beta=0.3, alpha=0.7), None),
    "orpo": (ours("orpo", beta=0.3), None),
    "smoothed": (ours("smoothed", beta=0.3, smoothing=0.2), None),
    "offset": (ours("offset", beta=0.3), None),
    "kto": ({"name": "unpaired.kto", "beta": 0.3, "desirable": 1.2, "undesirable": 0.7}, None),
    "apo_zero_unpaired": ({"name": "unpaired.apo_zero", "beta": 0.3, "desirable": 1.2, "undesirable": 0.7}, None),
    "bco": ({"name": "unpaired.bco", "beta": 0.3}, None),
}
