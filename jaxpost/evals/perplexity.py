"""Perplexity of a data file:  exp(nll),  nll the mean of -log p over all scored tokens of the file.

    evals={"wiki": {"name": "perplexity", "data": "FILE.jsonl", "window": 1024}}
    python -m jaxpost.evaluate --model=FOLDER --data=FILE.jsonl

The file's shape says which tokens are scored, as in training: of `text` all (but each document's first, which nothing
precedes), of a conversation the assistant's, of prompt and completion the completion's, stop tokens included. Every document is
read by itself, so packing several into a row only saves time. One that is longer than the window is read in windows that
overlap by half: each token is scored once, the first window's all and then those of each window's second half, which have
between half a window and a whole one of context. Figures of different windows therefore differ: a longer window gives more
context and a lower perplexity.

Tokens of a document are no independent draws, so the standard error is that of a ratio of sums over documents.
"""

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from jaxpost import sharding
from jaxpost.data import encoding, mixture, source
from jaxpost.errors import UserError
from jaxpost.evals.intervals import Z
from jaxpost.objectives.logprobs import token_scores
from jaxpost.tokenizer import check_ids

# What a window is where none is asked for, unless the model takes less.
WINDOW = 1024


def perplexity(
    model: Any,
    *,
    data: str,
    window: int | None = None,
    train_on: str = "assistant",
    template: str | None = None,
    columns: str | Mapping[str, str] = "",
    bad_rows: str = "stop",
    rows: int = 8,
) -> Iterator[tuple[str, float | int]]:
    """(perplexity, nll in nats a token, tokens that were scored, documents, entropy, mean_token_accuracy) of a data file; of
    several documents also nll_se and the 95% interval perplexity_low to perplexity_high.

    model: api.Model. window: tokens read at a time, None for the model's positions or WINDOW, whichever is less; rows: how many
    windows at once, which changes nothing. columns and bad_rows are what a recipe's are.
    Raises UserError for whatever is wrong with the file, and for a window the model does not take.
    """
    encoded, window = _encoded(model, data, window, train_on, template, columns, bad_rows)
    pieces = slide([encoded.examples[i] for i in range(len(encoded.lengths))], window)
    sums = _sums(model, pieces, len(encoded.lengths), window, rows, data)
    counts = sums.pop("tokens")
    nll, total = -sums["logps"].sum() / counts.sum(), float(counts.sum())
    yield from {"perplexity": math.exp(nll), "nll": float(nll), "tokens": int(total)}.items()
    yield "documents", len(encoded.lengths)
    yield "entropy", float(sums["entropy"].sum() / total)
    yield "mean_token_accuracy", float(sums["correct"].sum() / total)
    if (n := int((counts > 0).sum())) > 1:
        error = math.sqrt(n / (n - 1) * np.sum((sums["logps"] + nll * counts) ** 2)) / total
        yield "nll_se", error
        yield "perplexity_low", math.exp(nll - Z * error)
        yield "perplexity_high", math.exp(nll + Z * error)


def _encoded(
    model, data: str, window=None, train_on="assistant", template=None, columns="", bad_rows="stop", rows=0
) -> tuple[encoding.Encoded, int]:
    """The file's examples, uncut, and the window. Raises what `perplexity` raises; of the model no weights are needed."""
    model.need_tokenizer()
    most = model.max_positions
    window = min(WINDOW, most) if window is None else window
    if not 2 <= window <= most:
        raise UserError(f"window={window}: give 2 to {most} tokens, which is what the model takes.")
    (part,) = mixture.read([data], "data", bad_rows == "skip")
    options = {"columns": mixture.pairs(columns, "columns"), "bad_rows": bad_rows}
    # Cut by `slide`, not by the encoder, to which no example is too long.
    encoded = encoding.encode_all(part.records, model.tokenizer, template, train_on, window=2**31 - 1, **options)
    if (skipped := encoded.report["skipped"] + len(part.unread)) and jax.process_index() == 0:
        print(f"{data}: {skipped:,} skipped; the first: {(part.unread or [encoded.reason])[0]}", file=sys.stderr)
    check_ids(encoded.highest, model.transformer.vocab, model.tokenizer, data)
    return encoded, window


perplexity.check = _encoded


def slide(examples: Sequence[dict], window: int) -> list[dict]:
    """Examples ({tokens, mask}: [n]) cut into pieces of at most `window` tokens, in which each masked token is once; each piece
    says by `documents` [n] which example it is of.

    Pieces of one example overlap by half a window, masked in the later one only past the overlap. Pieces without a masked token
    are left out. window: 2 or more.
    """
    pieces = []
    for number, example in enumerate(examples):
        tokens, mask = example["tokens"], example["mask"]
        end = 0
        while end < len(tokens):
            start = max(0, end - window // 2)
            stop = min(start + window, len(tokens))
            fresh = mask[start:stop] & (np.arange(start, stop) >= max(end, 1))
            if fresh.any():
                documents = np.full(stop - start, number, np.int32)
                pieces.append({"tokens": tokens[start:stop], "mask": fresh, "documents": documents})
            end = stop
    return pieces


def _sums(model, pieces: Sequence[dict], count: int, window: int, rows: int, name: str) -> dict[str, np.ndarray]:
    """{tokens, logps, entropy, correct}: [count], of each document the number of scored tokens and the sums of their scores."""
    rows += -rows % (model.mesh.shape["data"] * model.mesh.shape["fsdp"])
    packed = source.rows(pieces, [len(p["tokens"]) for p in pieces], window, seed=0)
    batches = source.Batches(packed, rows, seed=0, shuffle=False, epochs=1, local=sharding.local_rows(model.mesh, rows))
    sums: dict[str, Any] = {}
    with sharding.use(model.mesh):
        # Shown on a terminal alone: it may take minutes.
        for _ in tqdm.tqdm(range(len(batches)), desc=name, unit="batch", disable=None):
            scores = _scores(model.transformer, model.params, sharding.distribute(batches(), model.mesh, rows))
            scores = {k: np.asarray(x) for k, x in scores.items()}
            scored, documents = scores.pop("mask"), scores.pop("documents")
            for key, values in {"tokens": scored, **scores}.items():
                batch_sums = np.bincount(documents[scored], weights=values[scored].astype(np.float64), minlength=count)
                sums[key] = sums.get(key, 0.0) + batch_sums
    return sums


@functools.partial(jax.jit, static_argnums=0)
def _scores(transformer, params, batch) -> dict[str, jax.Array]:
    """What the model says of each token, with the batch's mask and documents: [B,S] each, whole on every process."""
    scores = token_scores(transformer.forward(params, batch), batch) | {k: batch[k] for k in ("mask", "documents")}
    return {k: sharding.shard(x, "SG") for k, x in scores.items()}
