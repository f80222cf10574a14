"""Every objective under one contract, by discovery: a new method is covered the moment its file exists.

Each public function of jaxpost.objectives that has an objective's signature, and two toys that need statistics of the whole
batch, is stepped on the same documents laid out differently and split differently. Nothing may change: not the loss, not a
logged metric, not a gradient, not the parameters after three steps. Rounding is allowed 1e-5 of each leaf's norm: sums in
another order, in float32, over a few hundred terms; a wrong denominator is off by percents.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stubs

from jaxpost import metrics, sharding
from jaxpost.config import resolve
from jaxpost.declare import Column, declared
from jaxpost.step import gradients, make_step, with_prepared
from jaxpost.types import Head, Output, TrainState

ROUNDING = 1e-5
RATE = 0.05
RATES = {"preference.sppo_hard": 5e-5}  # whose targets are +-500: a longer step leaves nothing that rounding would not change


def _objectives() -> dict:
    return {name: resolve.find(name, "objectives") for name in resolve.known("objectives")} | stubs.TOYS


OBJECTIVES = _objectives()

# One of each way to read a batch. They are held to each change by itself as well; the others to all changes at once.
REPRESENTATIVES = {
    *("sft.nll", "policy_gradient.grpo", "policy_gradient.ppo", "router.balanced", *stubs.TOYS),
    *("preference.sigmoid", "preference.aot_unpaired", "preference.weighted", "unpaired.kto"),
    *("reward_model.bradley_terry", "distill.forward_kl", "contrastive.info_nce", "masked.mlm"),
}
every_objective = pytest.mark.parametrize(
    "name", [n if n in REPRESENTATIVES else pytest.param(n, marks=pytest.mark.slow) for n in OBJECTIVES]
)
every_representative = pytest.mark.parametrize("name", sorted(REPRESENTATIVES))


@functools.cache
def _meshes():
    return {"one": sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), "eight": sharding.make_mesh(2, 2, 2)}


# The trace keeps the gradient in the optimizer's state, so one compiled step shows loss, metrics, gradients and parameters.
def _tx(name=""):
    return optax.chain(optax.trace(0.0), optax.scale(-RATES.get(name, RATE)))


@functools.cache
def _step(name, microbatches, mesh, columns):
    mesh = _meshes()[mesh]
    places = sharding.stored(mesh, jax.eval_shape(_state))
    step = make_step(stubs.forward, OBJECTIVES[name], _tx(name), microbatches=microbatches)
    return jax.jit(step, out_shardings=(places, sharding.replicated(mesh)))


def _state():
    params, zero = stubs.init(), jnp.zeros((), jnp.int32)
    nothing = jax.tree.map(lambda _: None, params)
    return TrainState(zero, params, nothing, _tx().init(params), None, jax.random.PRNGKey(3), zero, zero)


def _three_steps(name, batches, microbatches=1, mesh="one"):
    """[(metrics, gradients) of each step], parameters; the third batch is the first again."""
    columns = tuple((k, x.shape) for k, x in batches[0].items())
    step, mesh, seen = _step(name, microbatches, mesh, columns), _meshes()[mesh], []
    with sharding.use(mesh):
        state = jax.device_put(_state(), sharding.stored(mesh, _state()))
        for batch in (*batches, batches[0]):
            state, measured = step(state, sharding.distribute(batch, mesh, len(batch["tokens"])))
            seen.append((metrics.values(measured), jax.device_get(state.opt_state[0].trace)))
    assert step._cache_size() == 1, "the step was compiled again for a later batch"
    return seen, jax.device_get(state.train)


def _batches(name, arrange=lambda rows: rows, shape=(stubs.ROWS, stubs.LENGTH)):
    """Two batches as the objective declares them: documents, pairs or lists, with the columns that it reads and no others."""
    layouts = {"pairs": (stubs.PAIRS, 2), "lists": (stubs.LISTS, 3)}
    layout = layouts.get(declared(OBJECTIVES[name], "rows"), (stubs.PLAN, 1))
    columns = declared(OBJECTIVES[name], "columns")
    return [stubs.pack(arrange(stubs.documents(seed, *layout, columns)), shape) for seed in (1, 2)]


@functools.cache
def _plain(name):
    return _three_steps(name, _batches(name))


def _same_leaf(path, a, b):
    gap, size = np.linalg.norm(a - b), np.linalg.norm(b)
    assert gap <= ROUNDING * size + 1e-12, f"{sharding.path_name(path)}: {gap / size:.2e} of its norm"


def _same(found, expected):
    (seen, params), (wanted, wanted_params) = found, expected
    for (measured, grads), (wanted_measured, wanted_grads) in zip(seen, wanted, strict=True):
        assert measured.keys() == wanted_measured.keys()
        for k, v in wanted_measured.items():
            assert measured[k] == pytest.approx(v, rel=ROUNDING, abs=ROUNDING / 10, nan_ok=True), k
        jax.tree_util.tree_map_with_path(_same_leaf, grads, wanted_grads)
    jax.tree_util.tree_map_with_path(_same_leaf, params, wanted_params)


def _reversed_rows(rows):
    return [row[::-1] for row in rows]


def _spread_rows(rows):
    """Padding rows between the others, which come in another order."""
    return [[], *rows[5:], [], *rows[:5]]


def _other_rows(rows):
    """The same units, each in the first row of a new order that has room."""
    bins = []

    def size(unit):
        return sum(len(d["tokens"]) for d in unit)

    for unit in sorted((u for row in rows for u in row), key=lambda u: (-size(u), u[0]["tokens"].sum())):
        room = [b for b in bins if sum(map(size, b)) + size(unit) <= stubs.LENGTH]
        room[0].insert(0, unit) if room else bins.append([unit])
    return bins


def test_discovery_finds_objectives_and_nothing_else():
    assert {"sft.dft", *REPRESENTATIVES} <= OBJECTIVES.keys()
    assert not [n for n in OBJECTIVES if n.startswith(("logprobs.", "pairs.", "documents."))]


def test_batches_have_what_an_objective_declares_and_what_it_does_not_know_stays_as_it_was():
    def first(**columns):
        return stubs.documents(1, columns={k: Column(*c) for k, c in columns.items()})[0][0][0]

    more = {"difficulty": ("BS", "float32"), "shown": ("BS", "bool"), "vector": ("BSD", "float32"), "guess": ("BSK", "int32")}
    document, again = first(**more, ref_logps=("BS", "float32")), first(guess=more["guess"])
    assert {k: (document[k].shape[1:], document[k].dtype) for k in more} == {
        "difficulty": ((), np.float32),
        "shown": ((), np.bool_),
        "vector": ((stubs.WIDTH,), np.float32),
        "guess": ((stubs.TOP,), np.int32),
    }
    assert np.ptp(document["difficulty"][document["mask"]]) > 0 and np.array_equal(document["guess"], again["guess"])
    whole = stubs.documents(1)[0][0][0]  # whose values goldens hold
    assert "labels" in whole and "labels" not in document
    assert all(np.array_equal(document[k], whole[k]) for k in document.keys() & whole.keys())


@every_objective
def test_it_learns_and_order_rows_padding_microbatches_and_devices_at_once_change_nothing(name):
    # Eight devices take the compiler twice as long as one; how a batch is read is what they may disturb.
    mesh = "eight" if name in REPRESENTATIVES else "one"
    batches = _batches(name, lambda rows: _spread_rows(_other_rows(rows)), (stubs.ROWS + 8, stubs.LENGTH + 5))
    _same(_three_steps(name, batches, 2, mesh), _plain(name))
    for measured, grads in _plain(name)[0]:
        assert np.isfinite(list(measured.values())).all(), measured
        assert measured["loss"] != 0 and np.linalg.norm(grads["embed"]["weight"]) > 1e-4


@every_representative
@pytest.mark.parametrize("arrange", [_reversed_rows, _spread_rows])
def test_order_of_documents_and_padding_rows_among_the_others_change_nothing(name, arrange):
    _same(_three_steps(name, _batches(name, arrange)), _plain(name))


@every_representative
def test_the_rows_that_documents_are_packed_into_change_nothing(name):
    _same(_three_steps(name, _batches(name, _other_rows)), _plain(name))


@pytest.mark.slow
@every_representative
def test_right_padding_and_more_padding_rows_change_nothing(name):
    _same(_three_steps(name, _batches(name, shape=(stubs.ROWS + 4, stubs.LENGTH + 5))), _plain(name))


@pytest.mark.slow
@every_representative
@pytest.mark.parametrize(("microbatches", "mesh"), [(4, "one"), (1, "eight"), (2, "eight")])
def test_microbatches_and_devices_change_nothing(name, microbatches, mesh):
    _same(_three_steps(name, _batches(name), microbatches, mesh), _plain(name))


@functools.cache
def _nudged(name):
    def loss_and_gradients(params, batch):
        frozen = jax.tree.map(lambda _: None, params)
        return gradients(stubs.forward, OBJECTIVES[name], params, frozen, batch, jax.random.PRNGKey(0))[:2]

    return jax.jit(loss_and_gradients)


def _last(batch):
    """Each document's last learned token."""
    places = np.arange(stubs.LENGTH)
    last = np.zeros_like(batch["mask"])
    for i, columns in _spans(batch):
        last[i, places[columns & batch["mask"][i]].max()] = True
    return last


# Where a loss looks at fewer hidden states than those that predict the learned tokens: what it looks at, at the least.
LOOKS_AT = {
    "masked": lambda b: b["mask"] & False,  # a part of it, drawn at random
    "unpaired": lambda b: b["mask"] & (b["labels"] >= 0),
    "reward_model": _last,
    "reward_model.process": lambda b: b["mask"] & (b["labels"] >= 0),
    "preference.hinge": lambda b: b["mask"] & False,  # nothing where a pair is in order by more than its margin
    "preference.sft": lambda b: b["mask"] & (b["segments"] % 2 == 1),
    "policy_gradient": lambda b: b["mask"] & False,  # nothing where the ratio is clipped
    "policy_gradient.reinforce": lambda b: b["mask"],
    "contrastive": _last,
    "contrastive.margin": lambda b: b["mask"] & False,
}


@every_objective
def test_no_gradient_where_the_mask_is_zero(name):
    (batch, _), params = _batches(name), stubs.init()
    params["nudge"] = jnp.zeros((stubs.ROWS, stubs.LENGTH, stubs.WIDTH))
    loss, grads = _nudged(name)(params, batch)
    # A hidden state may matter as a learned token's own, or as the one before it that predicts it.
    mask = np.any([batch[column] > 0 for column in declared(OBJECTIVES[name], "masks")], axis=0)
    used = mask | np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    assert not np.any(np.asarray(grads["nudge"])[~used])
    looks = LOOKS_AT.get(name) or LOOKS_AT.get(name.partition(".")[0]) or (lambda b: b["mask"])
    assert np.count_nonzero(np.asarray(grads["nudge"]).any(-1)) >= looks(batch).sum() - 1

    # What is written there does not matter either, bit for bit: padding, and prompts before the last prompt token.
    rng = np.random.default_rng(0)
    noise = {
        "tokens": rng.integers(0, stubs.VOCAB, mask.shape).astype(np.int32),
    }
    noise |= {k: rng.normal(size=v.shape).astype(v.dtype) for k, v in batch.items() if v.dtype == np.float32 and v.ndim > 1}
    other = batch | {k: np.where(used.reshape(*used.shape, *[1] * (v.ndim - 2)), batch[k], v) for k, v in noise.items()}
    assert (other["tokens"] != batch["tokens"]).sum() > (15 if name == "router.balanced" else 50)
    again, _ = _nudged(name)(params, other)
    assert loss == again


@every_objective
def test_weights_come_from_masks_alone(name):
    objective, (batch, _) = OBJECTIVES[name], _batches(name)
    prepared = jax.jit(with_prepared, static_argnums=(0, 1))(
        objective, stubs.forward, stubs.init(), batch, jax.random.PRNGKey(0)
    )

    def weights(params):
        return {k: t.weight for k, t in objective(stubs.forward, params, prepared, jax.random.PRNGKey(0))[0].items()}

    unusable = jax.tree.map(lambda x: x * jnp.nan, stubs.init())
    expected, found = jax.jit(weights)(stubs.init()), jax.jit(weights)(unusable)
    assert found == expected and all(w > 0 for w in expected.values())


def _whole(loss):
    """Value and gradient of a loss of the parameters, written down directly over the whole batch."""
    return jax.jit(jax.value_and_grad(loss))(stubs.init())


def _against(name, direct, batch):
    value, grads = _whole(direct)
    (measured, found), *_ = _plain(name)[0]
    assert measured["loss"] == pytest.approx(float(value), rel=ROUNDING)
    jax.tree_util.tree_map_with_path(_same_leaf, found, jax.device_get(grads))


def _direct_likelihoods(params, batch):
    out = stubs.forward(params, batch)
    logps = jax.nn.log_softmax(out.hidden @ out.head.weight.T / batch["temperature"])
    logps = jnp.take_along_axis(logps[:, :-1], batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return jnp.where(batch["mask"], jnp.pad(logps, ((0, 0), (1, 0))), 0.0)


def _spans(batch):
    """(row, columns) of every document."""
    return [(i, batch["segments"][i] == n) for i in range(stubs.ROWS) for n in range(1, batch["segments"][i].max() + 1)]


def test_a_sort_over_the_batch_has_the_gradient_of_the_sort():
    batch = _batches("matched")[0]

    def direct(params):
        logps = _direct_likelihoods(params, batch)
        own = jnp.stack([jnp.sum(jnp.where(columns, logps[i], 0.0)) for i, columns in _spans(batch)])
        others = np.array([batch["old_logps"][i][columns & batch["mask"][i]].sum() for i, columns in _spans(batch)])
        return 0.5 * jnp.mean((jnp.sort(own) - np.sort(others)) ** 2)

    _against("matched", direct, batch)


def test_in_batch_negatives_have_the_gradient_through_every_row():
    batch = _batches("contrast")[0]

    def direct(params):
        hidden = stubs.forward(params, batch).hidden
        sums = jnp.stack(
            [jnp.sum(jnp.where((columns & batch["mask"][i])[:, None], hidden[i], 0.0), 0) for i, columns in _spans(batch)]
        )
        vectors = 2 * sums / jnp.sqrt(jnp.sum(sums**2, -1, keepdims=True) + 1e-6)
        n = len(vectors)
        scores = jnp.where(np.eye(n, dtype=bool), -jnp.inf, vectors @ vectors.T)
        partner = np.arange(n) ^ 1
        logps = jax.nn.log_softmax(scores, axis=-1)
        return -jnp.sum(jnp.stack([logps[i, partner[i]] for i in range(n) if partner[i] < n])) / n

    _against("contrast", direct, batch)


def test_reinforce_is_the_closed_form():
    batch = _batches("policy_gradient.reinforce")[0]

    def direct(params):
        return -jnp.sum(batch["advantages"] * _direct_likelihoods(params, batch)) / len(_spans(batch))

    _against("policy_gradient.reinforce", direct, batch)


def test_balancing_has_the_gradient_of_its_equation_with_the_load_held():
    batch = _batches("router.balanced")[0]
    real = batch["segments"] > 0

    def direct(params):
        x = stubs.forward(params, batch).hidden
        total = 0.0
        for logits in (x[..., :4], x[..., 4:]):
            order = jnp.argsort(logits, axis=-1)[..., -2:]
            load = jnp.stack([jnp.sum(jnp.any(order == e, axis=-1) & real) for e in range(4)]) / real.sum()
            mean = jnp.sum(jnp.where(real[..., None], jax.nn.softmax(logits), 0.0), axis=(0, 1)) / real.sum()
            total += 4 * jnp.sum(load * mean) / 2
        return -jnp.sum(_direct_likelihoods(params, batch)) / batch["mask"].sum() + 0.001 * total

    _against("router.balanced", direct, batch)
    (measured, _), *_ = _plain("router.balanced")[0]
    assert 0.001 * 1.5 < measured["loss/balance"] < 0.001 * 4  # two of four experts: 2 when even, 4 at worst


def test_dft_is_minus_the_mean_probability_in_gradient():
    batch = _batches("sft.dft")[0]

    def direct(params):
        return -jnp.sum(jnp.where(batch["mask"], jnp.exp(_direct_likelihoods(params, batch)), 0.0)) / batch["mask"].sum()

    _, grads = _whole(direct)
    (_, found), *_ = _plain("sft.dft")[0]
    jax.tree_util.tree_map_with_path(_same_leaf, found, jax.device_get(grads))


# ------------------------------------------------------------------------------------------------------- By hand

# Two learned tokens of one document, the second a stop token at the row's end; then a padding row.
TINY = {
    "tokens": np.array([[1, 0, 1], [0, 0, 0]], np.int32),
    "segments": np.array([[1, 1, 1], [0, 0, 0]], np.int32),
    "positions": np.array([[0, 1, 2], [0, 0, 0]], np.int32),
    "mask": np.array([[0, 1, 1], [0, 0, 0]], bool),
    "old_logps": np.array([[0, -1, -1], [0, 0, 0]], np.float32),
    "advantages": np.array([[0, 2, 2], [0, 0, 0]], np.float32),
}


def _on_logits(name, logits):
    """(loss, d loss / d logits) where the hidden states are the logits themselves."""
    head = jnp.eye(logits.shape[-1])
    objective, key = OBJECTIVES[name], jax.random.PRNGKey(0)
    forward = lambda params, batch: Output(params, Head(head))  # noqa: E731
    loss, grads, measured = gradients(forward, objective, jnp.asarray(logits, jnp.float32), None, TINY, key)
    return float(loss), np.asarray(grads), metrics.values(measured)


def test_a_uniform_model_has_log_v_nats():
    loss, _, measured = _on_logits("sft.nll", np.zeros((2, 3, 32)))
    assert loss == np.log(np.float32(32)) == np.float32(measured["entropy"])


def test_equal_logits_of_two_give_dft_half_of_sfts_gradient():
    # Two tokens share the denominator: per token -1/2 for SFT's target, and its probability 1/2 of that for DFT.
    _, sft, _ = _on_logits("sft.nll", np.zeros((2, 3, 2)))
    loss, dft, measured = _on_logits("sft.dft", np.zeros((2, 3, 2)))
    assert (2 * sft[0]).tolist() == [[-0.5, 0.5], [0.5, -0.5], [0, 0]] and not sft[1].any()
    assert (2 * dft[0]).tolist() == [[-0.25, 0.25], [0.25, -0.25], [0, 0]] and not dft[1].any()
    assert loss == pytest.approx(0.5 * np.log(2), rel=1e-6) and measured["nll"] == pytest.approx(np.log(2), rel=1e-6)


def test_reinforce_by_hand():
    loss, grads, measured = _on_logits("policy_gradient.reinforce", np.zeros((2, 3, 2)))
    assert loss == pytest.approx(2 * 2 * np.log(2), rel=1e-6)  # advantage 2, two tokens of one completion
    assert grads[0].tolist() == [[-1, 1], [1, -1], [0, 0]]
    assert measured["sampling/sampling_logp_difference/max"] == pytest.approx(1 - np.log(2), rel=1e-6)
