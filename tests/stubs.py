"""What the contracts are held against: a forward that compiles in a blink, batches packed every way, two toys.

The stub is an embedding, a place in the document and one linear layer, with its head as data: enough that parameters,
positions and documents all matter, at a sixth of a tiny transformer's compile time. Its parameters carry the paths of the
real ones, so the sharding rules apply to it as they are.

The toys stand for the two kinds of objective that see the batch as a whole. `matched` sorts over it: each document's
likelihood is drawn to the value of equal rank among others. `contrast` has in-batch negatives: each document's embedding
should recognise its partner's among all. What they need to know of the other rows, their `prepare` turns into columns.

A row is a list of units, and a unit the documents that stay together: one, or the two of a pair.
"""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import sharding
from jaxpost.declare import Column, objective
from jaxpost.metrics import Max, Std, masked_mean
from jaxpost.objectives.logprobs import token_scores
from jaxpost.types import Head, Output, Term

VOCAB, WIDTH, INNER, ROWS, LENGTH, TEACHER, TOP = 32, 8, 16, 16, 16, 6, 4
SIZES = {"D": WIDTH, "V": VOCAB, "K": TOP}  # of the axes of columns

# Lengths of the documents of each row; the sums leave padding, and rows left out are padding altogether.
PLAN = (
    (5, 7, 3),
    (9, 6),
    (4, 4, 4),
    (15,),
    (3, 8),
    (6, 5, 5),
    (7, 2),
    (12, 3),
    (2, 2, 2, 2),
    (10,),
    (8, 7),
    (3, 3, 6),
    (11, 4),
)


# The same for pairs, the chosen before the rejected.
PAIRS = (
    (5, 7),
    (9, 6),
    (4, 4, 4, 4),
    (8, 3),
    (3, 8),
    (6, 5),
    (7, 2, 3, 3),
    (12, 3),
    (2, 2, 2, 2),
    (10, 5),
    (8, 7),
    (3, 3, 6, 4),
    (11, 4),
)


# The same for lists, a query before a positive and a negative.
LISTS = (
    (5, 4, 7),
    (2, 3, 2, 4, 2, 2),
    (9, 3, 4),
    (3, 8, 3),
    (2, 2, 2, 2, 3, 2),
    (6, 5, 5),
    (7, 2, 3),
    (4, 5, 3),
    (3, 3, 6),
    (2, 11, 2),
    (4, 4, 4),
)


def init(seed: int = 0) -> dict:
    """Parameters of the stub, float32, at a scale where no softmax is flat; scalar heads and a teacher's are among them."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": {"weight": (VOCAB, WIDTH)},
        "place": {"weight": (LENGTH, WIDTH)},
        "mlp": {"up": {"kernel": (WIDTH, INNER)}, "down": {"kernel": (INNER, WIDTH)}},
        "head": {"weight": (VOCAB, WIDTH)},
        "reward_head": {"kernel": (WIDTH, 1)},
        "value_head": {"kernel": (WIDTH, 1)},
        "teacher_head": {"weight": (VOCAB, TEACHER)},
    }
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


def forward(params, batch) -> Output:
    """Output of the stub; `params` may hold a `nudge` [B,S,D], which is added to the hidden states."""
    used = sharding.gather(params)
    x = used["embed"]["weight"][batch["tokens"]] + used["place"]["weight"][batch["positions"]]
    x = jnp.tanh(x @ used["mlp"]["up"]["kernel"]) @ used["mlp"]["down"]["kernel"] / 4 + params.get("nudge", 0.0)
    return Output(x, Head(used["head"]["weight"]), router=_router(x, batch["segments"]))


def _router(x, segments):
    """Two layers of four experts: the first and the last four channels are the router's logits, and two experts are chosen."""
    logits = jnp.stack([x[..., :4], x[..., 4:]], axis=1)
    real = (segments > 0).astype(x.dtype)[:, None, :, None]
    picks = jax.nn.one_hot(jax.lax.top_k(logits, 2)[1], 4).sum(axis=-2)
    return {"probs": jnp.sum(jax.nn.softmax(logits) * real, axis=2), "picks": jnp.sum(picks * real, axis=2)}


def documents(seed: int = 0, plan=PLAN, together: int = 1, columns: dict | None = None) -> list[list[list[dict]]]:
    """Rows of units of so many documents: each a dict of equally long columns, with a prompt that is not learned, and the
    columns of rollouts.

    columns: {name: Column} that an objective declares; each document has these too, and no others: those of references, labels
    and teachers as `_frozen` draws them, any other at random. None: all that `_frozen` draws.
    """
    rng = np.random.default_rng(seed)
    rows, number = [], 0
    for lengths in plan:
        row = []
        for i, n in enumerate(lengths):
            mask = np.arange(n) >= rng.integers(1, n)
            if n > 4:
                mask[n // 2] = False
            document = {
                "tokens": rng.integers(0, VOCAB, n).astype(np.int32),
                "positions": np.arange(n, dtype=np.int32),
                "mask": mask,
                # Near the stub's own, as the policy that sampled is: ratios of whole completions are exponentials of sums.
                "old_logps": np.where(mask, rng.normal(-4.0, 0.5, n), 0.0).astype(np.float32),
                "advantages": np.where(mask, rng.normal(), 0.0).astype(np.float32),
                "pairs": np.full(n, number // 2 + 1, np.int32),
            }
            frozen = _frozen(rng, mask)
            if columns is not None:
                frozen |= _listed(n, i % together, (seed, number))
                frozen = {k: frozen.get(k, _drawn(k, c, mask, (seed, number))) for k, c in columns.items()}
            row[-1].append(document | frozen) if i % together else row.append([document | frozen])
            number += 1
        rows.append(row)
    return rows


def _frozen(rng, mask: np.ndarray) -> dict:
    """What frozen models and people say of a document with this mask."""
    n = len(mask)
    likely = np.sort(rng.dirichlet(np.ones(TOP + 1), n)[:, :TOP])[:, ::-1]
    return {
        # Near the stub's own, as a reference is: some methods have the exponential of the difference.
        "ref_logps": np.where(mask, rng.normal(-4.5, 0.5, n), 0.0).astype(np.float32),
        "labels": np.full(n, rng.integers(-1, 2), np.float32),
        "margins": np.full(n, rng.random(), np.float32),
        "values": np.where(mask, rng.normal(size=n), 0.0).astype(np.float32),
        "returns": np.where(mask, rng.normal(size=n), 0.0).astype(np.float32),
        "teacher_hidden": rng.normal(size=(n, TEACHER)).astype(np.float32),
        "teacher_tokens": np.argsort(rng.random((n, VOCAB)))[:, :TOP].astype(np.int32),
        "teacher_logps": np.log(likely).astype(np.float32),
    }


def _listed(n: int, place: int, seed: tuple[int, int]) -> dict:
    """What a list says of its document at a place; some passages of different lists have the same id."""
    rng = np.random.default_rng(seed)
    role, number, score = min(place + 1, 3), rng.integers(1, 12), rng.normal()
    return {
        "roles": np.full(n, role, np.int32),
        "ids": np.full(n, number + 100 * (role == 1), np.int32),
        "scores": np.full(n, score, np.float32),
    }


def _drawn(name: str, column: Column, mask: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """A declared column of a document with this mask, of its dtype and axes: [n, ...], zero where the mask is. What is bool may
    be set anywhere but at the first token, which nothing predicts: it may be a mask itself.
    """
    rng = np.random.default_rng((*seed, zlib.crc32(name.encode())))
    kind, shape = np.dtype(column.dtype), (len(mask), *(SIZES.get(axis, 3) for axis in column.axes[2:]))
    if kind.kind == "b":
        return (rng.random(shape) < 0.5) & (np.arange(len(mask)) > 0).reshape(-1, *[1] * (len(shape) - 1))
    values = rng.normal(size=shape) if kind.kind == "f" else rng.integers(0, VOCAB, shape)
    return np.where(mask.reshape(-1, *[1] * (len(shape) - 1)), values, 0).astype(kind)


def pack(rows: list[list], shape=(ROWS, LENGTH)) -> dict[str, np.ndarray]:
    """A batch of the documents as they lie; an empty row is padding."""
    rows = [list(itertools.chain(*row)) for row in rows]
    like = next(row[0] for row in rows if row)
    batch = {k: np.zeros((*shape, *v.shape[1:]), v.dtype) for k, v in like.items()} | {"segments": np.zeros(shape, np.int32)}
    for i, row in enumerate(rows):
        start = 0
        for number, columns in enumerate(row, 1):
            place = slice(start, start + len(columns["tokens"]))
            for k, v in columns.items():
                batch[k][i, place] = v
            batch["segments"][i, place] = number
            start = place.stop
    return batch | {"temperature": np.float32(1.25)}


def _starts(batch):
    return (batch["positions"] == 0) & (batch["segments"] > 0)


def _by_document(x, batch):
    """x [B,S,...] summed over each token's document."""
    same = (batch["segments"][:, :, None] == batch["segments"][:, None, :]).astype(x.dtype)
    return jnp.einsum("bst,bt...->bs...", same, x)


def _likelihoods(forward, params, batch):
    return _by_document(token_scores(forward(params, batch), batch)["logps"], batch)


def _partners(forward, params, batch, key):
    starts = _starts(batch)
    own, others = (
        jnp.where(starts, x, jnp.inf).ravel()
        for x in (_likelihoods(forward, params, batch), _by_document(jnp.where(batch["mask"], batch["old_logps"], 0.0), batch))
    )
    ranks = jnp.argsort(jnp.argsort(own))
    return {"partners": jnp.where(starts, jnp.sort(others)[ranks].reshape(starts.shape), 0.0)}


@objective(prepare=_partners)
def matched(forward, params, batch, key):
    """Half the squared distance between each document's log-likelihood and the value of its rank among `old_logps`."""
    starts = _starts(batch)
    gap = jnp.where(starts, _likelihoods(forward, params, batch) - batch["partners"], 0.0)
    weight = jnp.sum(starts.astype(jnp.float32))
    metrics = {"gap": masked_mean(jnp.abs(gap), starts), "widest": Max(jnp.max(jnp.where(starts, gap, -jnp.inf)))}
    return {"matched": Term(jnp.sum(gap**2), weight, 0.5)}, metrics | {"spread": Std(jnp.sum(gap), jnp.sum(gap**2), weight)}


def embeddings(forward, params, batch):
    """[B,S,D], at every token its document's: the mean of the hidden states that are learned, on a sphere of radius 2."""
    mask = batch["mask"].astype(jnp.float32)[..., None]
    total = _by_document(forward(params, batch).hidden * mask, batch)
    return 2 * total / jnp.sqrt(jnp.sum(total**2, axis=-1, keepdims=True) + 1e-6)


def recognition(vectors, batch):
    """[B*S], at each document's start: how surprising its partner is among all other documents."""
    starts, pairs = _starts(batch).ravel(), batch["pairs"].ravel()
    flat = vectors.reshape(-1, vectors.shape[-1])
    others = starts[:, None] & starts[None, :] & ~jnp.eye(len(starts), dtype=bool)
    partner = others & (pairs[:, None] == pairs[None, :])
    scores = jnp.where(others, flat @ flat.T, -1e30)
    nats = jax.nn.logsumexp(scores, axis=-1) - jnp.sum(jnp.where(partner, scores, 0.0), axis=-1)
    return jnp.where(jnp.any(partner, axis=-1), nats, 0.0)


def _pull(forward, params, batch, key):
    vectors = embeddings(forward, params, batch)
    starts = _starts(batch)
    total, back = jax.vjp(lambda v: recognition(v, batch), vectors)
    (pull,) = back(jnp.ones_like(total))
    return {"anchors": vectors, "pull": jnp.where(starts[..., None], pull, 0.0), "surprise": total.reshape(starts.shape)}


@objective(prepare=_pull)
def contrast(forward, params, batch, key):
    """In-batch negatives as a sum over rows: the loss's value, and its exact gradient's linear form."""
    starts, vectors = _starts(batch), embeddings(forward, params, batch)
    linear = jnp.sum(batch["pull"] * (vectors - batch["anchors"]), axis=-1)
    nats = jnp.where(starts, batch["surprise"] + linear, 0.0)
    return {"contrast": Term(jnp.sum(nats), jnp.sum(starts.astype(jnp.float32)))}, {"surprise": masked_mean(nats, starts)}


TOYS = {"matched": matched, "contrast": contrast}
