"""On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion.

    z = z_L + a (z_T - z_S),    a such that KL(softmax(z) || softmax(z_L)) = KL(softmax(z_T) || softmax(z_S)) at each token

Claim: a large model L that is shifted by a small model's tuning, from S to T, solves more of the task when the shift's strength
a is computed for each token than with the best constant strength. Its nearest relative is proxy tuning, where a is constant.
"""

import jax
import jax.numpy as jnp

from jaxpost import recipe
from jaxpost.studies import Claim, Study

STUDY = Study(
    arms=("dynamic", "static", "expert"),
    metric="eval/task/accuracy_greedy",
    claims=(Claim("dynamic", over=("static", "expert"), margin=0.02),),
    family="decoding",
    equal="steps",
    tune={"model.mix.most": (0.5, 1.0, 2.0)},
)
LARGE = "recipe:configs/tiny.py"
TASK = {"name": "instructions", "tasks": ("count", "odd_last", "large_first"), "length": (3, 5)}


def divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(softmax p || softmax q) of logits [R,V], [R]."""
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def strength(large: jax.Array, tuned: jax.Array, small: jax.Array, *, most: float = 2.0, halvings: int = 20) -> jax.Array:
    """The strength a [R,1] of 0 to `most` whose shift of the large model is as far as the tuned model's from the small one.

    The shift grows with a, so bisection finds it: after n halvings within most / 2^(n + 1).
    """
    shift, target = tuned - small, divergence(tuned, small)[:, None]

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        short = divergence(large + middle * shift, large)[:, None] < target
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    low = jnp.zeros_like(target)
    low, high = jax.lax.fori_loop(0, halvings, halve, (low, low + most))
    return (low + high) / 2


def dynamic(large, tuned, small, *, most: float = 2.0):
    """The paper's fusion of logits [R,V]; most: the largest strength."""
    return large + strength(large, tuned, small, most=most) * (tuned - small)


def static(large, tuned, small, *, most: float = 1.0):
    """Proxy tuning: the same strength at every token."""
    return large + most * (tuned - small)


def expert(large, tuned, small, *, most: float = 1.0):
    """The small tuned model alone."""
    return tuned


def get_config(arg="dynamic"):
    arm, _, seed = arg.partition("-")
    tiny = recipe.opened("configs/tiny.py")
    if arm == "small":
        shape = {**tiny.model.to_dict(), "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
        return recipe.opened("configs/tiny.py", model=shape, steps=700)
    small = f"recipe:{__file__}:small"
    if arm == "tuned":
        shared = {"rollouts": {"prompt_window": 48, "new": 12}, "eval_per_cell": 1, "optimizer": {"lr": 1e-3, "warmup": 10}}
        return recipe.make(
            model=small, task={**TASK, "examples": 8000}, window=96, batch_size=8, steps=200, seed=int(seed), **shared
        )
    tested = {"name": "accuracy", "task": TASK, "per_cell": 150, "new": 8, "rows": 450}
    model = {
        "name": "fused",
        "of": [LARGE, f"recipe:{__file__}:tuned-{{seed}}", small],
        "mix": {"name": f"{__file__}:{arm}", "most": 1.0},
    }
    return recipe.make(stages=("figures",), model=model, figures={"do": "evaluate", "evals": {"task": tested}})
