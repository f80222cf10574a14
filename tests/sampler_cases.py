"""What the tests of the sampler share: a small model, prompts, one way to sample, and the training forward's word on it.

Every way that a test samples in has one of few shapes, and all ask for everything, so that few programs are compiled. What a
forward says is held against what was recorded in one place (`judged`), and where two ways to sample part, `gaps` says how near
to the boundary between two tokens the number lay that they were drawn by.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import sharding
from jaxpost.models.families import Architecture
from jaxpost.models.heads import logits
from jaxpost.models.transformer import Transformer
from jaxpost.sampling import slots
from jaxpost.sampling.decode import complete, stream

# Weights at a scale where the next token is neither certain nor uniform.
MODEL = Transformer(
    Architecture(vocab=17, width=16, mlp_width=32, layers=2, heads=4, kv_heads=2, head_width=8, max_positions=64, init_std=0.4)
)
WINDOW, NEW, STOP, GROUP, SEED = 6, 10, 3, 3, 1
COUNT = 5  # prompts, of 1 to 5 tokens: neither devices nor slots divide them, or their completions


@functools.cache
def weights():
    return MODEL.init(jax.random.PRNGKey(1))


@functools.cache
def prompts() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(2)
    return tuple(rng.integers(4, 17, 1 + i).astype(np.int32) for i in range(COUNT))


@functools.cache
def mesh(*sizes: int):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def asked(chosen=None, *, sizes=(1, 1, 1), model=MODEL, params=None, **changes) -> tuple[tuple, dict]:
    """Arguments of `complete` and `stream`, with four turns a segment unless told otherwise."""
    where, params = mesh(*sizes), weights() if params is None else params
    with sharding.use(where):
        params = jax.device_put(jax.device_get(params), sharding.stored(where, params))
    plain = {"prompt_window": WINDOW, "new": NEW, "stop": (STOP,), "group": GROUP, "seed": SEED, "turns": 4}
    return (model, params, prompts() if chosen is None else chosen), {"mesh": where, **plain, **changes}


def sampled(*chosen, **changes):
    arguments, options = asked(*chosen, **changes)
    return complete(*arguments, **options)


def streamed(*chosen, **changes):
    """[[Finished]] by segment."""
    arguments, options = asked(*chosen, **changes)
    return list(stream(*arguments, **options))


def assert_same(found, other, rows=slice(None)):
    """Bit for bit."""
    for name in found._fields:
        np.testing.assert_array_equal(getattr(found, name)[rows], getattr(other, name)[rows], err_msg=name)


@functools.partial(jax.jit, static_argnames=("model",))
def _scores(model, params, columns):
    out = model.forward(params, columns)
    return logits(out.hidden, out.head)


def judged(found, *, model=MODEL, params=None, chosen=None, group=GROUP) -> np.ndarray:
    """[B,N,V] float64: the training forward's logits of each token of the completions, zeros after."""
    chosen = prompts() if chosen is None else chosen
    owners = [chosen[i // group] for i in range(len(found.lengths))]
    size = max(map(len, chosen)) + found.tokens.shape[1]
    tokens, place = np.zeros((len(owners), size), np.int32), np.arange(size)[None]
    for row, prompt, own, n in zip(tokens, owners, found.tokens, found.lengths, strict=True):
        row[: len(prompt) + n] = [*prompt, *own[:n]]
    inside = place < np.array([len(p) for p in owners])[:, None] + found.lengths[:, None]
    columns = {"tokens": tokens, "segments": inside.astype(np.int32), "positions": np.where(inside, place, 0)}
    scores = np.asarray(_scores(model, weights() if params is None else params, columns), np.float64)
    wanted = np.zeros((*found.tokens.shape, scores.shape[-1]))
    for i, (prompt, n) in enumerate(zip(owners, found.lengths, strict=True)):
        wanted[i, :n] = scores[i, len(prompt) - 1 : len(prompt) - 1 + n]
    return wanted


def logps(scores: np.ndarray, found, temperature: float = 1.0) -> np.ndarray:
    """[B,N]: what the logits [B,N,V] say of the completions' tokens, zeros after."""
    scores = scores / temperature
    every = (
        scores - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True)) - scores.max(-1, keepdims=True)
    )
    own = np.take_along_axis(every, found.tokens[..., None], axis=-1)[..., 0]
    return np.where(np.arange(found.tokens.shape[1]) < found.lengths[:, None], own, 0.0)


def uniforms(numbers, places, seed=SEED) -> np.ndarray:
    """The numbers in [0,1) by which these completions' tokens at these places are drawn in step 0."""
    key = jax.random.fold_in(jax.random.PRNGKey(seed), 0)
    return np.asarray(slots._uniform(key, jnp.asarray(numbers), jnp.asarray(places)), np.float64)


def gaps(found, other, seed=SEED, temperature=1.0, **about) -> list[float]:
    """Of each completion of `other` that is another than in `found`: how far, where they part, the number that the token was
    drawn by lies from a boundary between two tokens, by the training forward.
    """
    scores, apart = judged(found, **about) / temperature, []
    for i in np.flatnonzero((found.tokens != other.tokens).any(axis=1)):
        n = int(np.flatnonzero(found.tokens[i] != other.tokens[i])[0])
        chances = np.exp(scores[i, n] - scores[i, n].max())
        apart.append(float(np.abs(np.cumsum(chances / chances.sum()) - uniforms([i], [n], seed)).min()))
    return apart
