"""On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion.

    z = z_L + a (z_T - z_S),    a such that KL(softmax(z) || softmax(z_L)) = KL(softmax(z_T) || softmax(z_S)) at each token

Claim: a large model L that is shifted by a small model's tuning, from S to T, solves more of a task when the shift's strength a
is computed at each token than with the best constant strength, and more than T or L alone. Its nearest relative is proxy
tuning, where a is constant.

The playgrounds' base is the large model, and the small one has an eighth of its layers' weights and read the same texts. T has
learned six tasks on lists for 120 steps. Both strengths try as many values, the dynamic one as its bound. No arm
trains anything itself; seeds are those of T's training. Left out: several experts at once, and the paper's search by a grid of
strengths, in place of which stands bisection.
"""

import jax
import jax.numpy as jnp

from jaxpost import recipe
from jaxpost.studies import Claim, Study

STUDY = Study(
    arms=("dynamic", "static", "expert", "large"),
    metric="eval/task/accuracy_greedy",
    claims=(Claim("dynamic", over=("static", "expert", "large"), margin=0.02),),
    family="decoding",
    equal="steps",
    tune={"model.mix.most": (0.5, 1.0, 2.0)},
)
LARGE = "recipe:configs/tiny.py"
TASK = {
    "name": "instructions",
    "tasks": ("odd_first", "odd_last", "large_last", "animals_last", "vowels_count", "animals_count"),
    "length": (3, 5),
}


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


def large(large, tuned, small, *, most: float = 1.0):
    """The large model alone."""
    return large


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
            model=small, task={**TASK, "examples": 8000}, window=96, batch_size=8, steps=120, seed=int(seed), **shared
        )
    tested = {"name": "accuracy", "task": TASK, "per_cell": 40, "new": 6, "rows": 240}
    model = {
        "name": "fused",
        "of": [LARGE, f"recipe:{__file__}:tuned-{{seed}}", small],
        "mix": {"name": f"{__file__}:{arm}", "most": 1.0},
    }
    return recipe.make(stages=("figures",), model=model, figures={"do": "evaluate", "evals": {"task": tested}})
