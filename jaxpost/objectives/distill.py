"""Distillation: match a teacher's distribution at each token.

p is the teacher's distribution at a learned token and q the student's, both from logits divided by `temperature`. Losses are
means over the learned tokens of the global batch, in nats, not rescaled by the temperature squared.

A teacher is frozen, so its predictions are columns. Over the full vocabulary these are its last hidden states, `teacher_hidden`
[B,S,Dt] float32, and its unembedding, a frozen leaf that these objectives declare (`leaves`). Both come from the model named by
`teacher`. Logits of both models are computed in chunks. Stored top-k needs no teacher in training: `teacher_tokens` [B,S,K]
int32 and `teacher_logps` [B,S,K] float32, which `jaxpost.annotate` writes. Each column is about the token at its own place: the
state that predicts it, and the likeliest tokens there.
"""

import functools

import jax
import jax.numpy as jnp

from jaxpost.declare import Column, objective
from jaxpost.errors import UserError
from jaxpost.metrics import masked_mean
from jaxpost.models.heads import logits as logits_of
from jaxpost.objectives.logprobs import at_tokens
from jaxpost.types import Head, Term

HEAD = "teacher_head"
STORED = {"teacher_tokens": Column("BSK", "int32"), "teacher_logps": Column("BSK", "float32")}


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p || q) of log-probabilities [R,N] -> [R]; outcomes without mass under p contribute 0."""
    return jnp.sum(jnp.exp(p) * jnp.where(p > -jnp.inf, p - q, 0.0), axis=-1)


def _forward(p, q, beta):
    return _kl(p, q)


def _reverse(p, q, beta):
    return _kl(q, p)


def _jensen_shannon(p, q, beta):
    beta = beta[:, None]
    middle = jnp.logaddexp(p + jnp.log(beta), q + jnp.log1p(-beta))
    return beta[:, 0] * _kl(p, middle) + (1 - beta[:, 0]) * _kl(q, middle)


def _outputs(loss: jax.Array, q: jax.Array, teacher_mode: jax.Array) -> dict:
    constant = jax.lax.stop_gradient(q)
    entropy = -jnp.sum(jnp.exp(constant) * constant, axis=-1)
    return {"loss": loss, "entropy": entropy, "agreement": jnp.argmax(constant, axis=-1) == teacher_mode}


def _full(divergence, logits, columns, head) -> dict:
    teacher = logits_of(columns["teacher_hidden"], head) / columns["temperature"][:, None]
    p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits / columns["temperature"][:, None])
    return _outputs(divergence(p, q, columns["beta"]), q, jnp.argmax(p, axis=-1))


# over_head caches its compiled parts by function: one object each.
_FULL = {name: functools.partial(_full, d) for name, d in (("f", _forward), ("r", _reverse), ("js", _jensen_shannon))}


def _tail(logps: jax.Array) -> jax.Array:
    """[R,1]: the log-probability of all tokens outside the top K; logps [R,K]."""
    total = jnp.minimum(jax.nn.logsumexp(logps, axis=-1, keepdims=True), 0.0)
    return jnp.where(total < 0, jnp.log(-jnp.expm1(jnp.where(total < 0, total, -1.0))), -jnp.inf)


def _over_top(logits, columns) -> dict:
    q = jax.nn.log_softmax(logits / columns["temperature"][:, None])
    tokens, stored = columns["teacher_tokens"], columns["teacher_logps"]
    rows = jnp.arange(len(tokens))[:, None]
    p, top = stored, jnp.take_along_axis(q, tokens, axis=-1)
    if tokens.shape[-1] < q.shape[-1]:
        # The student's tail is summed: 1 minus the rest would be rounding error where the tail is small.
        rest = jax.nn.logsumexp(q.at[rows, tokens].set(-jnp.inf), axis=-1, keepdims=True)
        p, top = jnp.concatenate([stored, _tail(stored)], axis=-1), jnp.concatenate([top, rest], axis=-1)
    best = jnp.argmax(stored, axis=-1, keepdims=True)
    return _outputs(_kl(p, top), q, jnp.take_along_axis(tokens, best, axis=-1)[:, 0])


def _distilled(output, batch, fn, columns: dict, constants: tuple = ()) -> tuple[dict, dict]:
    """Term and metrics of fn over the learned tokens."""
    mask = batch["mask"]
    scores = at_tokens(fn, output, columns=jax.lax.stop_gradient(columns), mask=mask, constants=constants)
    loss = Term(jnp.sum(scores["loss"]), jnp.sum(mask.astype(jnp.float32)))
    return {"distill": loss}, {k: masked_mean(scores[k], mask) for k in ("entropy", "agreement")}


def _full_loss(forward, params, batch, name: str, temperature: float, beta: float = 0.0) -> tuple[dict, dict]:
    columns = {"teacher_hidden": batch["teacher_hidden"], "temperature": jnp.float32(temperature), "beta": jnp.float32(beta)}
    head = Head(jax.lax.stop_gradient(params[HEAD]["weight"]))
    return _distilled(forward(params, batch), batch, _FULL[name], columns, (head,))


def _hidden(teacher: str = "", **_) -> dict:
    return {"teacher_hidden": Column("BSD", "float32", by="hidden", weights=teacher)}


def _leaves(teacher: str = "", **_):
    if not teacher:
        raise UserError(
            "config.objective.teacher: name the teacher, a folder of Hugging Face's files or a name on the hub: its head is "
            "needed. distill.top_k reads what was stored and needs none."
        )
    return {f"{HEAD}/weight": ("VT", teacher)}


@objective(columns=_hidden, leaves=_leaves)
def forward_kl(forward, params, batch, key, *, teacher: str = "", temperature: float = 1.0):
    """L = KL(p || q) = sum_v p_v log(p_v / q_v).

    Mass-covering: the student covers all of the teacher's distribution. teacher: a folder of Hugging Face's files, or a name on
    the hub. Reads mask and teacher_hidden. Source: "Distilling the Knowledge in a Neural Network", without its factor of the
    temperature squared.
    """
    return _full_loss(forward, params, batch, "f", temperature)


@objective(columns=_hidden, leaves=_leaves)
def reverse_kl(forward, params, batch, key, *, teacher: str = "", temperature: float = 1.0):
    """L = KL(q || p) = sum_v q_v log(q_v / p_v).

    It differs from forward_kl in being mode-seeking: the student avoids what the teacher finds unlikely. Reads mask and
    teacher_hidden. Source: "MiniLLM: Knowledge Distillation of Large Language Models", its token-level term.
    """
    return _full_loss(forward, params, batch, "r", temperature)


@objective(columns=_hidden, leaves=_leaves)
def jensen_shannon(forward, params, batch, key, *, teacher: str = "", beta: float = 0.5, temperature: float = 1.0):
    """L = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q,  0 < beta < 1.

    Between forward_kl (L / beta as beta goes to 0) and reverse_kl (L / (1 - beta) as it goes to 1), and bounded. Reads mask and
    teacher_hidden. Raises UserError for another beta. Source: "On-Policy Distillation of Language Models: Learning from
    Self-Generated Mistakes".
    """
    if not 0 < beta < 1:
        raise UserError(f"config.objective.beta: {beta!r}; it is between 0 (distill.forward_kl) and 1 (distill.reverse_kl).")
    return _full_loss(forward, params, batch, "js", temperature, beta)


@objective(columns=STORED)
def top_k(forward, params, batch, key, *, temperature: float = 1.0):
    """L = KL(p || q) over the teacher's K likeliest tokens and one outcome for all others together.

    It differs from forward_kl in reading stored columns. It is a lower bound of forward_kl, by the data-processing inequality,
    and equal where K is the vocabulary. teacher_logps are log-probabilities at this temperature, over the whole vocabulary.
    Reads mask, teacher_tokens, teacher_logps. Source: that of forward_kl.
    """
    columns = {k: batch[k] for k in STORED} | {"temperature": jnp.float32(temperature)}
    return _distilled(forward(params, batch), batch, _over_top, columns)
