"""Contrastive losses against a direct computation over the whole batch: value and gradient, however the batch is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small
import stubs
import thin

from jaxpost import sharding
from jaxpost.config.resolve import resolve
from jaxpost.data.row_types import lists
from jaxpost.declare import declared, objective
from jaxpost.errors import UserError
from jaxpost.metrics import values
from jaxpost.models import families, loading, own_leaves
from jaxpost.models.transformer import Transformer
from jaxpost.objectives import contrastive, documents, unpaired
from jaxpost.step import gradients, make_evaluation, with_prepared
from jaxpost.types import Term

KEY = jax.random.PRNGKey(0)
ROUNDING = 1e-5


def batch_of(name, plan=stubs.LISTS, together=3):
    columns = declared(resolve(name, "objectives"), "columns")
    return stubs.pack(stubs.documents(1, plan, together, columns))


def spans(batch):
    """[(row, columns, role, id, number of its list)] of every document, in order."""
    each, number = [], -1
    for i in range(stubs.ROWS):
        for n in range(1, batch["segments"][i].max() + 1):
            columns = batch["segments"][i] == n
            role, name = batch["roles"][i][columns][0], batch["ids"][i][columns][0]
            number += role == 1
            each.append((i, columns, int(role), int(name), number))
    return each


def embedded(params, batch, pooling, normalise):
    hidden = stubs.forward(params, batch).hidden
    each = []
    for i, columns, *_ in spans(batch):
        own = np.flatnonzero(columns)
        tokens = hidden[i, own] if pooling != "latent" else attended(hidden[i, own], **params["latent"])
        each.append(tokens[-1] if pooling == "last" else jnp.mean(tokens, axis=0))
    vectors = jnp.stack(each)
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True) if normalise else vectors


def attended(tokens, vectors, up, down, xp=jnp):
    """Of each token: the latents, weighed by the softmax of its products with them, through two layers with GELU."""
    weights = xp.exp(tokens @ vectors.T / np.sqrt(tokens.shape[1]))
    inner = weights @ vectors / weights.sum(1, keepdims=True) @ up
    return inner * (1 + jax.scipy.special.erf(inner / np.sqrt(2))) / 2 @ down


def info_nce(params, batch, *, temperature=0.05, learned=False, symmetric=False, pooling="last", normalise=True, latents=0):
    """The whole loss, written down by queries and passages."""
    scale = jnp.exp(params["contrastive"]["log_scale"][0]) if learned else 1 / temperature
    vectors, docs = embedded(params, batch, pooling, normalise), spans(batch)
    query = {number: k for k, (*_, role, _, number) in enumerate(docs) if role == 1}
    answers = {}  # what is known to answer each query id
    for *_, role, name, number in docs:
        if role == 2:
            answers.setdefault(number, set()).add(name)
    ids = [d[3] for d in docs]

    def is_negative(q, d):
        same_query = docs[d][2] == 2 and ids[query[docs[d][4]]] == ids[q]
        return docs[d][2] > 1 and not same_query and ids[d] not in answers[docs[q][4]]

    scores, every = scale * vectors @ vectors.T, range(len(docs))
    positives = [k for k in every if docs[k][2] == 2]
    asked = [query[docs[p][4]] for p in positives]
    among = np.array([[d == p or is_negative(q, d) for d in every] for p, q in zip(positives, asked, strict=True)])
    askers = np.array(
        [[o == q or (docs[o][2] == 1 and is_negative(o, p)) for o in every] for p, q in zip(positives, asked, strict=True)]
    )
    own, asked, positives = (
        scores[np.array(asked), np.array(positives)],
        scores[np.array(asked)],
        scores[:, np.array(positives)].T,
    )
    loss = jax.nn.logsumexp(jnp.where(among, asked, -jnp.inf), axis=1) - own
    if symmetric:
        loss = (loss + jax.nn.logsumexp(jnp.where(askers, positives, -jnp.inf), axis=1) - own) / 2
    return jnp.mean(loss)


def same(grads, expected):
    def leaf(path, a, b):
        gap, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert gap <= ROUNDING * size + 1e-12, f"{sharding.path_name(path)}: {gap:.1e} of {size:.1e}"

    jax.tree_util.tree_map_with_path(leaf, jax.device_get(grads), jax.device_get(expected))


def split(name, params, batch, microbatches=1, **options):
    frozen = jax.tree.map(lambda _: None, params)
    method = resolve({"name": name, **options}, "objectives")
    return jax.jit(lambda p, b: gradients(stubs.forward, method, p, frozen, b, KEY, microbatches))(params, batch)


OPTIONS = [
    {},
    {"symmetric": True, "pooling": "mean", "temperature": 0.5},
    {"learned": True, "symmetric": True, "temperature": 0.1},
    {"normalise": False, "temperature": 1.0},
    {"pooling": "latent", "latents": 3, "temperature": 0.5},
]


def latents(count=3):
    rng = np.random.default_rng(5)
    shapes = {"vectors": (count, stubs.WIDTH), "up": (stubs.WIDTH,) * 2, "down": (stubs.WIDTH,) * 2}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("options", thin.slow_after(2, OPTIONS), ids=lambda o: "-".join(o) or "plain")
def test_the_gradient_is_that_of_the_whole_loss_whatever_the_microbatches(options):
    batch, params = batch_of("contrastive.info_nce"), stubs.init()
    assert len({d[3] for d in spans(batch) if d[2] > 1}) < sum(d[2] > 1 for d in spans(batch)), "some passages are the same"
    if options.get("learned"):
        params["contrastive"] = {"log_scale": jnp.array([np.log(10.0)], jnp.float32)}
    if "latents" in options:
        params["latent"] = latents()
    value, expected = jax.jit(jax.value_and_grad(functools.partial(info_nce, batch=batch, **options)))(params)
    for microbatches in (4,) if options else (1, 4, 16):
        loss, grads, measured = split("contrastive.info_nce", params, batch, microbatches, **options)
        assert float(loss) == pytest.approx(float(value), rel=1e-6), "the loss itself, not its linear form"
        same(grads, expected)
    if options.get("learned"):
        assert abs(float(grads["contrastive"]["log_scale"][0])) > 1e-3
        assert values(measured)["temperature"] == pytest.approx(0.1)


def test_groups_of_queries_change_nothing(monkeypatch):
    batch, params = batch_of("contrastive.info_nce"), stubs.init()
    loss, expected, _ = split("contrastive.info_nce", params, batch, symmetric=True)
    monkeypatch.setattr(contrastive, "SCORED", 1)
    again, grads, _ = split("contrastive.info_nce", params, batch, symmetric=True)
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    same(grads, expected)


def test_by_hand():
    """Two lists in a row, whose texts point east or north, at temperature 1: scores are 1 or 0."""
    east, north = [1.0, 0.0], [0.0, 1.0]
    vectors = jnp.array([[[0.0, 0.0], east, east, north, north, north, east]])
    roles = jnp.array([[0, 1, 2, 3, 1, 2, 3]])
    start = jnp.array([[0, 1, 1, 1, 4, 4, 4]])
    ids = jnp.array([[0, 1, 2, 3, 4, 5, 2]])  # the last negative is the first list's positive
    batch = contrastive.Lists(roles, start, ids, jnp.take_along_axis(ids, start, axis=1))
    nats, first = contrastive._nats(vectors, jnp.float32(1.0), batch, False)
    # The first query is told from two of the other three passages, both at a right angle; the second from three.
    assert nats[0, 2] == pytest.approx(np.log(np.e + 2) - 1, rel=1e-6)
    assert nats[0, 5] == pytest.approx(np.log(2 * np.e + 2) - 1, rel=1e-6)
    assert first[0, 2] and not first[0, 5] and nats[0].sum() == nats[0, 2] + nats[0, 5]


def test_losses_within_a_list_are_their_equations():
    batch, params = batch_of("contrastive.distilled"), {**stubs.init(), "latent": latents()}
    docs = spans(batch)
    assert [d[2] for d in docs] == [1, 2, 3] * (len(docs) // 3)
    given = np.array([batch["scores"][i][columns][0] for i, columns, *_ in docs]).reshape(-1, 3)[:, 1:]

    def of_lists(v):
        q, p, n = jnp.moveaxis(v.reshape(-1, 3, v.shape[1]), 1, 0)
        return q, p, n, jnp.sum(q * p, axis=1), jnp.sum(q * n, axis=1)

    def margin(v):
        *_, positive, negative = of_lists(v)
        return jnp.mean(jnp.maximum(0, 0.2 - positive + negative))

    def triplet(v):
        q, p, n, *_ = of_lists(v)
        return jnp.mean(jnp.maximum(0, 1.0 + jnp.linalg.norm(q - p, axis=1) - jnp.linalg.norm(q - n, axis=1)))

    def listwise(v):
        *_, positive, negative = of_lists(v)
        return jnp.mean(jnp.logaddexp(positive, negative) - positive)

    def distilled(v):
        teacher = jax.nn.softmax(given / 0.5)
        student = jax.nn.log_softmax(jnp.stack(of_lists(v)[3:], axis=1))
        return jnp.mean(jnp.sum(teacher * (jnp.log(teacher) - student), axis=1))

    for loss, options in (
        (margin, {}),
        (triplet, {}),
        (listwise, {"temperature": 1.0, "pooling": "mean"}),
        (distilled, {"temperature": 1.0, "teacher_temperature": 0.5}),
        (margin, {"pooling": "latent"}),
    ):
        name = f"contrastive.{loss.__name__}"
        pooling, normalise = options.get("pooling", "last"), True
        if loss is triplet:
            pooling, normalise = "mean", False
        whole = lambda p: loss(embedded(p, batch, pooling, normalise))  # noqa: B023, E731
        value, expected = jax.jit(jax.value_and_grad(whole))(params)
        loss_value, grads, _ = split(name, params, batch, **options)
        assert float(loss_value) == pytest.approx(float(value), rel=1e-6), name
        same(grads, expected)


@pytest.mark.slow
def test_memory_falls_with_the_microbatches(monkeypatch):
    monkeypatch.setattr(contrastive, "SCORED", 2**16)  # a bound of its own, which microbatches do not change
    fields = {**runs.MODEL, "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    model = Transformer(families.architecture({**fields, "max_position_embeddings": 64}))
    params, columns = jax.eval_shape(model.init, KEY), batch_of("contrastive.info_nce")
    batch = {k: jax.ShapeDtypeStruct((64, 64), x.dtype) for k, x in columns.items() if x.ndim}
    frozen, method = jax.tree.map(lambda _: None, params), resolve("contrastive.info_nce", "objectives")

    def bytes_of(microbatches):
        step = jax.jit(lambda p, b: gradients(model.forward, method, p, frozen, b, KEY, microbatches)[:2])
        return step.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    whole, four, sixteen = map(bytes_of, (1, 4, 16))
    assert four < 0.4 * whole and sixteen < 0.4 * four


def test_a_batch_with_more_documents_than_a_row_may_have_does_not_train():
    batch = batch_of("contrastive.info_nce")
    batch["segments"][0, -1] = lists.most(stubs.LENGTH) + 1
    assert not np.isfinite(split("contrastive.info_nce", stubs.init(), batch)[0])


# ---------------------------------------------------------------------------------------------------------- gather


def test_without_a_gather_nothing_is_computed_otherwise():
    batch, params = stubs.pack(stubs.documents(1, columns=unpaired.COLUMNS)), stubs.init()
    prepare = declared(unpaired.kto, "prepare")

    def before(params, batch):
        columns = prepare(stubs.forward, jax.lax.stop_gradient(params), batch, KEY)
        return {**batch, **jax.lax.stop_gradient(columns)}

    now = jax.make_jaxpr(lambda p, b: with_prepared(unpaired.kto, stubs.forward, p, b, KEY, 4))(params, batch)
    assert str(now) == str(jax.make_jaxpr(before)(params, batch))


def test_what_is_gathered_lies_in_the_order_of_the_rows_and_sees_one_microbatch():
    seen = []

    def gather(forward, params, batch, key):
        seen.append(batch["tokens"].shape)
        return {"numbers": batch["rows"] * 10 + batch["temperature"]}

    def prepare(forward, params, batch, key):
        return {"doubled": 2 * batch["numbers"]}

    @objective(prepare=prepare, gather=gather)
    def mine(forward, params, batch, key):
        return {"one": Term(jnp.sum(batch["doubled"]), jnp.float32(1.0))}, {}

    batch = stubs.pack(stubs.documents(1)) | {"rows": np.arange(stubs.ROWS)}
    prepared = with_prepared(mine, stubs.forward, {}, batch, KEY, 4)
    assert prepared["doubled"].tolist() == [2 * (10 * i + 1.25) for i in range(stubs.ROWS)]
    assert set(seen) == {(4, stubs.LENGTH)} and "numbers" not in prepared
    seen.clear()
    figures = [make_evaluation(stubs.forward, mine, microbatches=n)({}, batch, KEY)["loss"] for n in (1, 4)]
    assert set(seen) == {(stubs.ROWS, stubs.LENGTH), (4, stubs.LENGTH)}
    assert len({float(values({"loss": figure})["loss"]) for figure in figures}) == 1
    assert declared(resolve({"name": "router.balanced", "of": "contrastive.info_nce"}, "objectives"), "gather") is not None


def test_a_wrong_gather_and_a_wrong_temperature_are_refused():
    def scalar(forward, params, batch, key):
        return {"mean": jnp.mean(batch["mask"])}

    with pytest.raises(UserError, match="a temperature of 0; give a number above 0"):
        declared(resolve({"name": "contrastive.info_nce", "temperature": 0, "learned": True}, "objectives"), "leaves")
    with pytest.raises(UserError, match="declare prepare=... too"):
        objective(gather=scalar)
    wrong = objective(prepare=lambda forward, params, batch, key: {}, gather=scalar)(lambda forward, params, batch, key: None)
    with pytest.raises(UserError, match=r"gather returns a column mean that is no \[4,...\]"):
        with_prepared(wrong, stubs.forward, {}, stubs.pack(stubs.documents(1)), KEY, 4)


# --------------------------------------------------------------------------------------------------------- pooling


def test_pooling_is_invariant_to_padding_and_names_its_choices():
    rng = np.random.default_rng(0)
    hidden, segments = rng.normal(size=(2, 7, 3)).astype(np.float32), np.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 2, 2, 2]])
    batch = {"segments": segments}
    last = documents.pooled(hidden, batch, pooling="last", count=4)
    mean = documents.pooled(hidden, batch, pooling="mean", count=4)
    assert np.array_equal(last[:, 1:3], [hidden[0, [2, 4]], hidden[1, [3, 6]]]) and not last[:, 3].any()
    np.testing.assert_allclose(mean[0, 1], hidden[0, :3].mean(0), rtol=1e-6)
    np.testing.assert_allclose(mean[1, 2], hidden[1, 4:].mean(0), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(documents.unit(last)[:, 1:3], axis=-1), 1.0, rtol=1e-6)
    assert not np.any(jax.grad(lambda v: documents.unit(v).sum())(jnp.zeros((1, 3))))
    with pytest.raises(UserError, match="pooling='max': give one of last, mean, latent"):
        documents.pooled(hidden, batch, pooling="max")


def test_latent_pooling_is_numpys():
    rng = np.random.default_rng(0)
    hidden, segments = rng.normal(size=(1, 7, 3)), np.array([[1, 1, 1, 2, 2, 0, 0]])
    latent = {name: rng.normal(size=shape) for name, shape in (("vectors", (5, 3)), ("up", (3, 3)), ("down", (3, 3)))}
    own = jax.tree.map(jnp.float32, latent)
    got = documents.pooled(jnp.float32(hidden), {"segments": segments}, pooling="latent", latent=own, count=4)
    for number in (1, 2):
        wanted = attended(hidden[0][segments[0] == number], **latent, xp=np).mean(0)
        np.testing.assert_allclose(got[0, number], wanted, rtol=1e-5, atol=1e-6)
    assert not np.any(got[0, [0, 3]])
    with pytest.raises(UserError, match="the model has no latents"):
        documents.pooled(hidden, {"segments": segments}, pooling="latent")
    with pytest.raises(UserError, match="config.objective.latents: 0"):
        declared(resolve({"name": "contrastive.margin", "pooling": "latent", "latents": 0}, "objectives"), "leaves")
    for name in ("info_nce", "margin", "triplet", "listwise", "distilled"):
        entry = {"name": f"contrastive.{name}", "pooling": "latent", "latents": 12}
        leaves = declared(resolve(entry, "objectives"), "leaves")
        shapes = loading.abstract(small.MODEL, sharding.make_mesh(), None, leaves)["latent"]
        assert {k: x.shape for k, x in shapes.items()} == {"vectors": (12, 32), "up": (32, 32), "down": (32, 32)}
        assert not declared(resolve(f"contrastive.{name}", "objectives"), "leaves")
    drawn = own_leaves.first("latent/up", (200, 50), {"normal": 0.02}, 1)
    assert drawn.dtype == np.float32 and drawn.std() == pytest.approx(0.02, rel=0.05)
    assert np.abs(drawn - own_leaves.first("latent/down", (200, 50), {"normal": 0.02}, 1)).max() > 0.01
