"""The progress of a run: a bar on a terminal, else a line now and then, with speed and time left."""

import sys
import time

import jax
import jax.numpy as jnp
import tqdm

from jaxpost.models.families import Architecture

# Peak dense bfloat16 FLOP/s a device, by the start of jax's device_kind. From the makers' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,  # half a chip: each of its two cores is a device
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}

# The figures of a rollout step that are shown in place of the loss, and their labels.
ROLLED = {
    "reward": "reward",
    "completions/mean_length": "length",
    "kl": "kl",
    "frac_reward_zero_std": "tied groups",  # the share of groups whose rewards are all equal, which teach nothing
}


def figure(name: str, value: float) -> str:
    """A figure as text: an evaluation's accuracy in percent, any other with four digits."""
    return f"{value:.0%}" if name.startswith("eval/accuracy") else f"{value:.4g}"


def model_flops(arch: Architecture, tokens: float, trained: float, pairs: float, frozen: float = 0.0) -> float:
    """FLOPs that a training step's mathematics needs, forward and backward:

        6 * (weights of the layers) * tokens  +  6 * D * V * trained  +  12 * L * N * H * pairs

    The weights of a mixture's layers include only the experts that a token is sent to. tokens: without padding; trained: those
    in the mask, the only ones that need the head; pairs: the (query, key) pairs of causal attention, each token's position + 1,
    which become all pairs for a model that sees whole documents (sliding windows are ignored); frozen: the share of the weights
    that do not train, which count 4 times instead of 6, as they need no gradient. Recomputation does not count. MFU is this
    divided by the step's time and the devices' peak.
    """
    pairs = 2 * pairs - tokens if arch.attend == "whole" else pairs  # n^2 of a document in place of n (n + 1) / 2
    head = arch.vocab * arch.width
    layers = arch.parameters(active=True) - head * (1 if arch.tied else 2)
    return (6 - 2 * frozen) * (layers * tokens + head * trained) + 12 * arch.layers * arch.heads * arch.head_width * pairs


def peak_flops() -> float:
    """Peak FLOP/s of all devices together: by data sheet, else (as for a CPU) by timing one large product."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAKS.items():
        if kind.startswith(name):
            return peak * jax.device_count()
    x = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(4):
        x = product(x)
    x.block_until_ready()
    # Simulated devices share one processor, so the product counts once.
    return 4 * 2 * 1024**3 / (time.perf_counter() - start)


class Progress:
    """The bar of one stage, or its lines where stderr is no terminal. `budget`: training seconds after which the stage ends."""

    def __init__(self, stage: str, steps: int, done: int, quiet: bool, budget: float):
        self.stage, self.steps, self.quiet, self.budget = stage, steps, quiet, budget
        self.first = None  # (step, seconds) of the first line that came after a step
        self.terminal = sys.stderr.isatty() and not quiet
        self.bar = tqdm.tqdm(total=steps, initial=done, desc=stage, disable=not self.terminal, unit="step")

    def advance(self) -> None:
        """Advances the bar by a step."""
        self.bar.update(1)

    def show(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Shows the step's main figures; seconds: of training so far, from which the time left is estimated."""
        graded = ("eval/accuracy", "eval/accuracy_greedy", "eval/reward", "eval/reward_greedy")
        # A policy gradient's loss is near zero by construction; its completions show how training goes.
        main = ROLLED if "reward" in values else {"loss": "loss"}
        shown = {**main, **{name: name for name in ("eval/loss", *graded, "tokens_per_second", "mfu")}}
        if values.get("eval/reward") == values.get("eval/accuracy"):  # a verifier's reward is its accuracy
            shown.pop("eval/reward")
        text = "  ".join(f"{label} {figure(name, values[name])}" for name, label in shown.items() if name in values)
        if self.quiet or not text:
            return
        if self.terminal:
            self.bar.set_postfix_str(text)
            tqdm.tqdm.write(f"{self.stage} {step}/{self.steps}  {text}", file=sys.stderr)
        else:
            # The first step is mostly compilation, so it does not count for the estimate.
            first, since = self.first or (step, seconds)
            self.first = (first, since) if first else None
            rate = (seconds - since) / (step - first) if step > first else None
            left = None if rate is None else min(rate * (self.steps - step), self.budget - seconds)
            remaining = "" if left is None else f"  left {max(left, 0):.0f}s"
            print(f"{self.stage} {step}/{self.steps}  {text}{remaining}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()
