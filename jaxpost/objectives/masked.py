"""Masked language modelling: some tokens of a document are hidden, and the model says from all others what they were.

    L = - sum over hidden places of  log p(token | the document with its hidden places)

It trains encoders, and decoders as encoders: the batch's tokens see their whole document, whatever the model's own `attend`.
"""

import jax
import jax.numpy as jnp

from jaxpost.declare import Column, objective
from jaxpost.errors import UserError
from jaxpost.metrics import masked_mean
from jaxpost.models.heads import vocab
from jaxpost.objectives import documents
from jaxpost.objectives.logprobs import scores_in_place
from jaxpost.types import Batch, Term


def hidden(batch: Batch, key: jax.Array, size: int, *, share: float, replaced: float, random: float) -> tuple:
    """(tokens [B,S] with noise, chosen [B,S] bool: the places that are asked for).

    Each token in the mask is chosen with probability `share`. A chosen one becomes batch["mask_token"] with probability
    `replaced`, any of `size` ids with probability `random`, and else stays. The noise is a function of the key, the document's
    own tokens and the place in it, so it does not depend on where the document lies.
    """
    digests = documents.over_tokens(documents.digests(batch), batch)

    def draw(digest, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, digest), position), (3,))

    pick, kind, which = jnp.moveaxis(jax.vmap(jax.vmap(draw))(digests, batch["positions"]), -1, 0)
    chosen = batch["mask"] & (pick < share)
    other = jnp.minimum((which * size).astype(jnp.int32), size - 1)
    noisy = jnp.where(kind < replaced, batch["mask_token"], jnp.where(kind < replaced + random, other, batch["tokens"]))
    return jnp.where(chosen, noisy, batch["tokens"]), chosen


@objective(rows="masked", columns={"mask_token": Column("BS", "int32")})
def mlm(forward, params, batch, key, *, share: float = 0.15, replaced: float = 0.8, random: float = 0.1):
    """Masked language modelling:  L = - sum_t c_t log p_t / sum_t c_t,  c the chosen places, p at the same place.

    The defaults are BERT's; ModernBERT has share=0.3, replaced=1.0, random=0.0. Reads tokens, mask, mask_token [B,S]; nats a
    chosen token. Evaluation draws the same noise each time. Source: "BERT: Pre-training of Deep Bidirectional Transformers for
    Language Understanding", without its prediction of the next sentence. Raises UserError for shares that are none.
    """
    if not (0 < share <= 1 and min(replaced, random) >= 0 and replaced + random <= 1):
        raise UserError(
            f"config.objective: share={share}, replaced={replaced}, random={random}; share is above 0 and at most 1, and the"
            " other two are parts of it that add up to 1 at most."
        )
    size = vocab(jax.eval_shape(forward, params, batch).head)
    tokens, chosen = hidden(batch, key, size, share=share, replaced=replaced, random=random)
    output = forward(params, {**batch, "tokens": tokens, "bidirectional": batch["segments"] > 0})
    scores = scores_in_place(output, batch, chosen)
    loss = Term(-jnp.sum(scores["logps"]), jnp.sum(chosen.astype(jnp.float32)))
    return {"mlm": loss}, {
        "entropy": masked_mean(scores["entropy"], chosen),
        "mean_token_accuracy": masked_mean(scores["correct"], chosen),
    }
