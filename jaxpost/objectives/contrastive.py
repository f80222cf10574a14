"""Contrastive losses: embeddings of a query and of passages, drawn together or apart.

A row of data is a list (data/row_types/lists.py): a query q, positives p that answer it, negatives n that do not. s(q, p) is
the inner product of their embeddings, a cosine unless normalise is False. A document's embedding is pooled from the final
hidden states of its tokens (`documents.pooled`): pooling="last", "mean" or "latent", with so many `latents` to learn.

    objective={"name": "contrastive.info_nce", "temperature": 0.02}
    objective={"name": "contrastive.distilled", "pooling": "mean"}

All read tokens, segments and the columns roles and ids [B,S], which are constant over a document. info_nce compares the rows of
the whole batch. Its loss and the loss's gradient by each embedding are computed once, from embeddings that are made a
microbatch at a time. Then each microbatch embeds its documents again and follows that gradient. This is exact, and is the
method of "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache). The other losses stay within a
list.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.data.row_types.lists import NEGATIVE, POSITIVE, QUERY, most
from jaxpost.declare import Column, objective
from jaxpost.errors import UserError
from jaxpost.metrics import Mean, masked_mean
from jaxpost.objectives import documents
from jaxpost.types import Batch, Term

COLUMNS = {"roles": Column("BS", "int32"), "ids": Column("BS", "int32")}
SCORES = COLUMNS | {"scores": Column("BS", "float32")}
MASKS = ("segments",)  # all tokens of a document make its embedding
TEMPERATURE = 0.05
LATENTS = 512  # the paper's
LOWEST = -1e30  # the logarithm of nothing, finite so that its gradient is 0
SCORED = 2**22  # scores of queries by passages that a device holds at a time: 16 MiB


class Lists(NamedTuple):
    """The documents of a batch, [B,N] each: N - 1 is the most that a row may have, and document 0 is its padding.

    start: the number of the query that a document belongs to, of a query its own. ids, queries: digests of the document's id
    and of its query's.
    """

    roles: jax.Array
    start: jax.Array
    ids: jax.Array
    queries: jax.Array

    @property
    def positive(self) -> jax.Array:
        """[B,N] bool."""
        return self.roles == POSITIVE

    @property
    def negative(self) -> jax.Array:
        """[B,N] bool: the lists' own negatives."""
        return self.roles == NEGATIVE

    @property
    def together(self) -> jax.Array:
        """[B,N,N] bool: whether two documents of a row are of the same list."""
        real = self.roles > 0
        return (self.start[:, :, None] == self.start[:, None, :]) & real[:, :, None] & real[:, None, :]

    def of_query(self, values: jax.Array) -> jax.Array:
        """values [B,N,...] of queries -> [B,N,...], at each document those of its query."""
        return jnp.take_along_axis(values, self.start.reshape(*self.start.shape, *[1] * (values.ndim - 2)), axis=1)


def _lists(batch: Batch) -> Lists:
    count = most(batch["segments"].shape[1]) + 1
    roles, ids = (documents.whole(batch[name], batch, count) for name in ("roles", "ids"))
    numbers = jnp.where(roles == QUERY, jnp.arange(count), 0)
    start = jax.lax.cummax(numbers, axis=1)
    return Lists(roles, start, ids, jnp.take_along_axis(ids, start, axis=1))


def _vectors(forward: Callable, params, batch: Batch, pooling: str, normalise: bool) -> jax.Array:
    """[B,N,D] float32: the documents' embeddings."""
    room = most(batch["segments"].shape[1])
    hidden = forward(params, batch).hidden
    vectors = documents.pooled(hidden, batch, pooling=pooling, latent=params.get("latent"), count=room + 1)
    # Packing keeps to `most`. In a batch of other origin more documents would go unnoticed; nan stops the run.
    vectors = jnp.where(jnp.max(batch["segments"]) > room, jnp.nan, vectors)
    return documents.unit(vectors) if normalise else vectors


def _similarities(vectors: jax.Array, lists: Lists) -> jax.Array:
    """[B,N]: s(q, d) of each document d and the query q of its list."""
    return jnp.sum(lists.of_query(vectors) * vectors, axis=-1)


def _of_pooling(*, pooling: str = "last", latents: int = LATENTS, **_) -> dict:
    """The parameters of the pooling, as `declare.objective` takes them."""
    return documents.latents(latents) if pooling == "latent" else {}


# ------------------------------------------------------------------------------------------------ The whole batch


def leaves(*, temperature: float = TEMPERATURE, learned: bool = False, **pooled) -> dict:
    """The parameter of a learned temperature, log 1/t, and those of the pooling, as `declare.objective` takes them."""
    scale = {"contrastive/log_scale": ("1", math.log(_inverse(temperature)))} if learned else {}
    return scale | _of_pooling(**pooled)


def _inverse(temperature: float) -> float:
    if not temperature > 0:
        raise UserError(f"config.objective: a temperature of {temperature!r}; give a number above 0.")
    return 1 / temperature


def _scale(params, temperature: float, learned: bool) -> jax.Array | float:
    """1 / temperature; a learned one is at most 100."""
    if not learned:
        return _inverse(temperature)
    return jnp.exp(jnp.minimum(params["contrastive"]["log_scale"][0], math.log(100.0)))


def _gathered(forward, params, batch, key, *, pooling: str = "last", normalise: bool = True):
    """vectors [b,N,D]: the documents' embeddings."""
    return {"vectors": _vectors(forward, params, batch, pooling, normalise)}


def _coupled(
    forward, params, batch, key, *, temperature: float = TEMPERATURE, learned: bool = False, symmetric: bool = False
) -> dict:
    """Of all rows: each positive's loss `nats` [B,N] and whether it is the first of all passages, `first`; the gradient `pull`
    [B,N,D] of the sum of losses by each embedding; its derivative by the scale, an equal share in each row, `slope` [B].
    """
    lists, scale = _lists(batch), jnp.float32(_scale(params, temperature, learned))

    def loss(vectors, scale):
        return _nats(vectors, scale, lists, symmetric)

    nats, back, first = jax.vjp(loss, batch["vectors"], scale, has_aux=True)
    pull, slope = back(jnp.ones_like(nats))
    rows = len(nats)
    return {"nats": nats, "first": first, "pull": pull, "slope": jnp.full(rows, slope / rows)}


def _nats(vectors: jax.Array, scale: jax.Array, lists: Lists, symmetric: bool) -> tuple[jax.Array, jax.Array]:
    """([B,N] the loss of each positive and 0 elsewhere, whether its score is above those of all negatives)."""
    own = scale * _similarities(vectors, lists)
    from_query, highest, from_passage = _against(vectors, scale, lists)
    nats = jax.nn.softplus(lists.of_query(from_query) - own)
    if symmetric:
        nats = (nats + jax.nn.softplus(from_passage - own)) / 2
    return jnp.where(lists.positive, nats, 0.0), own > lists.of_query(highest)


def _against(vectors: jax.Array, scale: jax.Array, lists: Lists) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three [B,N] of the scaled scores of queries with their negatives: of each query log-sum-exp over its negatives, and the
    highest; of each positive log-sum-exp over the queries that it is a negative of.

    Queries are taken a group of rows at a time, and their scores are computed again for the gradient.
    """
    rows, count, _ = vectors.shape
    limit = SCORED * sharding.batch_ways()
    groups = next((g for g in range(1, rows) if rows % g == 0 and (rows * count) ** 2 // g <= limit), rows)

    def deal(x):
        return x.reshape(rows // groups, groups, *x.shape[1:]).swapaxes(0, 1)

    def group(to_queries, part):
        queries, own = part
        scores = scale * jnp.einsum("gnd,bmd->gnbm", queries, vectors, precision="highest")
        scores = jnp.where(_negatives(own, lists), scores, LOWEST)
        to_these = jax.nn.logsumexp(jnp.where(lists.positive, scores, LOWEST), axis=(0, 1))
        return jnp.logaddexp(to_queries, to_these), (jax.nn.logsumexp(scores, axis=(2, 3)), jnp.max(scores, axis=(2, 3)))

    nothing = jnp.full((rows, count), LOWEST)
    from_passage, parts = jax.lax.scan(jax.checkpoint(group), nothing, jax.tree.map(deal, (vectors, lists)))
    from_query, highest = (x.swapaxes(0, 1).reshape(rows, count) for x in parts)
    return from_query, jax.lax.stop_gradient(highest), from_passage


def _negatives(own: Lists, lists: Lists) -> jax.Array:
    """[g,N,B,N] bool: whether a passage of the batch is a negative of a query of a group's rows. Positives of the same query
    are none, nor are passages with the id of one of its list's positives.
    """
    answers = (own.queries[:, :, None, None] == lists.queries) & lists.positive
    same = (own.ids[:, :, None, None] == lists.ids) & own.positive[:, :, None, None]
    copies = jnp.einsum("gnp,gpbm->gnbm", own.together.astype(jnp.float32), same.astype(jnp.float32)) > 0
    return (own.roles == QUERY)[:, :, None, None] & (lists.roles > QUERY) & ~answers & ~copies


@objective(rows="lists", columns=COLUMNS, masks=MASKS, leaves=leaves, prepare=_coupled, gather=_gathered)
def info_nce(
    forward,
    params,
    batch,
    key,
    *,
    temperature: float = TEMPERATURE,
    learned: bool = False,
    symmetric: bool = False,
    pooling: str = "last",
    latents: int = LATENTS,
    normalise: bool = True,
):
    """InfoNCE:  L = - log e^{s(q,p)/t} / (e^{s(q,p)/t} + sum over n of e^{s(q,n)/t}),  a mean over the batch's positives.

    n: the negatives of q's own list, and the passages of all other lists in the global batch. Left out are other positives of
    the same query, and passages with the id of one of its list's positives: these answer q too. temperature: t; with
    learned=True only its first value, and 1/t, at most 100, is a parameter ("Learning Transferable Visual Models From Natural
    Language Supervision"). symmetric: the mean of this and of the same with the roles of queries and positives exchanged, where
    negatives play no part. normalise=False with temperature 1 is DPR's inner product. Source: "Representation Learning with
    Contrastive Predictive Coding".
    """
    lists, vectors = _lists(batch), _vectors(forward, params, batch, pooling, normalise)
    scale = jnp.float32(_scale(params, temperature, learned))
    # The value is the loss, the gradient that of its linear form: what is subtracted is equal, and constant.
    along = jnp.sum(batch["pull"] * (vectors - jax.lax.stop_gradient(vectors)))
    along += jnp.sum(batch["slope"]) * (scale - jax.lax.stop_gradient(scale))
    metrics = {"accuracy": masked_mean(batch["first"], lists.positive)} | _similarity_metrics(vectors, lists)
    if learned:
        metrics["temperature"] = Mean(1 / scale, jnp.float32(1.0))
    return {"info_nce": Term(jnp.sum(batch["nats"]) + along, _count(lists.positive))}, metrics


def _similarity_metrics(vectors: jax.Array, lists: Lists) -> dict:
    similarities = jax.lax.stop_gradient(_similarities(vectors, lists))
    of = {"similarity/positive": lists.positive, "similarity/negative": lists.negative}
    return {name: masked_mean(similarities, documents) for name, documents in of.items()}


def _count(real: jax.Array) -> jax.Array:
    return jnp.sum(real.astype(jnp.float32))


# --------------------------------------------------------------------------------------------------- Within a list


def _pairs(lists: Lists) -> jax.Array:
    """[B,N,N] bool: a positive, and a negative of its list."""
    return lists.together & lists.positive[:, :, None] & lists.negative[:, None, :]


def _compared(vectors: jax.Array, lists: Lists, far: jax.Array, margin: float) -> tuple[dict, dict]:
    """Terms and metrics of  max(0, margin + far(p) - far(n)),  a mean over the lists' pairs of a positive and a negative."""
    real = _pairs(lists)
    loss = jnp.where(real, jax.nn.relu(margin + far[:, :, None] - far[:, None, :]), 0.0)
    metrics = {"accuracy": masked_mean(far[:, :, None] < far[:, None, :], real)} | _similarity_metrics(vectors, lists)
    return {"margin": Term(jnp.sum(loss), _count(real))}, metrics


@objective(rows="lists", columns=COLUMNS, masks=MASKS, leaves=_of_pooling)
def margin(
    forward,
    params,
    batch,
    key,
    *,
    margin: float = 0.2,
    pooling: str = "last",
    latents: int = LATENTS,
    normalise: bool = True,
):
    """Margin ranking:  L = max(0, margin - s(q,p) + s(q,n)),  a mean over the pairs of a list's positives and negatives.

    It differs from info_nce in having no gradient where a pair is in order by more than its margin. Source: "Large Scale Online
    Learning of Image Similarity Through Ranking".
    """
    lists, vectors = _lists(batch), _vectors(forward, params, batch, pooling, normalise)
    return _compared(vectors, lists, -_similarities(vectors, lists), margin)


@objective(rows="lists", columns=COLUMNS, masks=MASKS, leaves=_of_pooling)
def triplet(
    forward,
    params,
    batch,
    key,
    *,
    margin: float = 1.0,
    pooling: str = "mean",
    latents: int = LATENTS,
    normalise: bool = False,
):
    """Triplets:  L = max(0, margin + |q - p| - |q - n|),  a mean over the pairs of a list's positives and negatives.

    It differs from margin in Euclidean distances. Sources: "FaceNet: A Unified Embedding for Face Recognition and Clustering",
    whose distances are squared; as here in "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks".
    """
    lists, vectors = _lists(batch), _vectors(forward, params, batch, pooling, normalise)
    squares = jnp.sum((lists.of_query(vectors) - vectors) ** 2, axis=-1)
    return _compared(vectors, lists, jnp.sqrt(jnp.maximum(squares, 1e-12)), margin)


def _log_shares(scores: jax.Array, passages: jax.Array, together: jax.Array) -> jax.Array:
    """[B,N]: the logarithm of each passage's share in the softmax over its list's passages; 0 for other documents."""
    among = together & passages[:, None, :]
    return jnp.where(passages, scores - jax.nn.logsumexp(jnp.where(among, scores[:, None, :], LOWEST), axis=2), 0.0)


@objective(rows="lists", columns=COLUMNS, masks=MASKS, leaves=_of_pooling)
def listwise(
    forward,
    params,
    batch,
    key,
    *,
    temperature: float = TEMPERATURE,
    pooling: str = "last",
    latents: int = LATENTS,
    normalise: bool = True,
):
    """A softmax over one list:  L = - log e^{s(q,p)/t} / (e^{s(q,p)/t} + sum over its own n of e^{s(q,n)/t}).

    It differs from info_nce in comparing nothing with other rows. Source: "Learning to Rank: From Pairwise Approach to Listwise
    Approach".
    """
    lists, vectors = _lists(batch), _vectors(forward, params, batch, pooling, normalise)
    scores = _similarities(vectors, lists) * _inverse(temperature)
    own = lists.together & lists.negative[:, None, :]
    rest = jax.nn.logsumexp(jnp.where(own, scores[:, None, :], LOWEST), axis=2)
    real = lists.positive & jnp.any(own, axis=2)
    loss = jnp.where(real, jax.nn.softplus(rest - scores), 0.0)
    metrics = {"accuracy": masked_mean(scores > jnp.max(jnp.where(own, scores[:, None, :], LOWEST), axis=2), real)}
    return {"listwise": Term(jnp.sum(loss), _count(real))}, metrics | _similarity_metrics(vectors, lists)


@objective(rows="lists", columns=SCORES, masks=MASKS, leaves=_of_pooling)
def distilled(
    forward,
    params,
    batch,
    key,
    *,
    temperature: float = TEMPERATURE,
    teacher_temperature: float = 1.0,
    pooling: str = "last",
    latents: int = LATENTS,
    normalise: bool = True,
):
    """List-wise distillation:  L = KL(softmax(y / u) || softmax(s(q, .) / t)) over a list's passages, a mean over lists.

    y: the teacher's scores, the column `scores` [B,S]; u: teacher_temperature. It differs from listwise in soft labels, so it
    needs no negatives: which passage is a positive does not matter. Source: "In-Batch Negatives for Knowledge Distillation with
    Tightly-Coupled Teachers for Dense Retrieval", without the negatives in the batch.
    """
    lists, vectors = _lists(batch), _vectors(forward, params, batch, pooling, normalise)
    passages = lists.roles > QUERY
    given = documents.whole(batch["scores"], batch, lists.roles.shape[1])
    teacher = _log_shares(given * _inverse(teacher_temperature), passages, lists.together)
    student = _log_shares(_similarities(vectors, lists) * _inverse(temperature), passages, lists.together)
    term = Term(jnp.sum(jnp.exp(teacher) * (teacher - student)), _count(lists.roles == QUERY))
    return {"distilled": term}, _similarity_metrics(vectors, lists)
