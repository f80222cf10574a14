"""Every merge under one contract, by discovery, and each against a computation of its own in numpy's float64.

The references sort where the library partitions and loop where it sums, after mergekit's definitions. Values are multiples of a
quarter, so many magnitudes are equal and signs cancel.
"""

import itertools
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxpost.config.naming import digest_of
from jaxpost.config.resolve import fits, known, resolve
from jaxpost.errors import UserError
from jaxpost.merging import arithmetic, coefficients, sparse, spherical, statistics
from jaxpost.merging.tensorwise import _pieces as tensorwise_pieces
from jaxpost.merging.tensorwise import declaration, merged, stream, tensorwise
from jaxpost.stages.merge import entry

MERGES = known("merging")
SHAPES = {
    "model.embed_tokens.weight": (7, 4),
    "model.layers.0.self_attn.q_proj.weight": (6, 4),
    "model.layers.1.self_attn.q_proj.weight": (6, 4),
    "model.layers.2.self_attn.q_proj.weight": (6, 4),
    "model.layers.2.mlp.down_proj.weight": (4, 9),
    "model.norm.weight": (4,),
}
HALVES = dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight"), np.dtype(ml_dtypes.bfloat16))


def model(seed: int, step: float = 0.25) -> dict:
    rng = np.random.default_rng(seed)
    values = {name: np.round(rng.normal(size=shape) / step) * step for name, shape in SHAPES.items()}
    return {name: x.astype(HALVES.get(name, np.float32)) for name, x in values.items()}


ONE, TWO, THREE, FOUR = map(model, range(4))
UNIFORM = [{name: np.ones(shape, np.float32) for name, shape in SHAPES.items()} for _ in range(3)]
# The settings at which a merge of three models gives the first, and what it needs; slerp takes two.
NOTHING = {
    "arithmetic.linear": {"weight": (1.0, 0.0, 0.0)},
    "arithmetic.task_arithmetic": {"strength": 0.0},
    "sparse.breadcrumbs": {"density": 0.0},
    "sparse.breadcrumbs_ties": {"strength": 0.0},
    "sparse.dare_linear": {"density": 0.0},
    "sparse.dare_ties": {"strength": 0.0},
    "sparse.ties": {"density": 0.0},
    "spherical.slerp": {"t": 0.0},
    "spherical.model_stock": {},
    "statistics.fisher": {"weight": (1.0, 0.0, 0.0)},
    "statistics.regmean": {"weight": (1.0, 0.0, 0.0)},
}
NEEDS = {
    "spherical.slerp": {"t": 0.3},
    "statistics.fisher": {"information": UNIFORM},
    "statistics.regmean": {"moments": [{}, {}, {}]},
}


def models_of(name: str) -> list[dict]:
    return [ONE, TWO] if name == "spherical.slerp" else [ONE, TWO, THREE]


def bound(name: str, **settings):
    return resolve({"name": name, **NEEDS.get(name, {}), **settings}, "merging")


def around(base: dict, seed: int) -> list[dict]:
    """Two models whose changes are opposite, so that their mean is the base."""
    change = model(seed)
    return [{k: (x + sign * change[k]).astype(x.dtype) for k, x in base.items()} for sign in (1, -1)]


def test_every_method_is_known_and_has_its_settings_here():
    assert set(MERGES) == set(NOTHING)


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_keeps_names_shapes_and_formats_and_without_strength_gives_the_first_model(name):
    models = models_of(name)
    result = bound(name)(*models)
    assert {k: (x.shape, x.dtype) for k, x in result.items()} == {k: (x.shape, x.dtype) for k, x in ONE.items()}
    assert any(not np.array_equal(result[k], ONE[k]) for k in ONE)
    same = [ONE, *around(ONE, 9)] if name == "spherical.model_stock" else models
    for key, x in bound(name, **NOTHING[name])(*same).items():
        np.testing.assert_array_equal(x, ONE[key])


@pytest.mark.parametrize("name", MERGES)
def test_a_tensor_does_not_depend_on_the_others(name):
    """Neither on which there are nor on their order: noise is drawn by the seed and the name."""
    merge, models, backwards = bound(name), models_of(name), list(SHAPES)[::-1]
    whole = merge(*models)
    streamed = dict(stream(merge, models, backwards, layers=3))
    assert list(streamed) == backwards
    for key, x in whole.items():
        np.testing.assert_array_equal(streamed[key].astype(x.dtype), x)
        np.testing.assert_array_equal(merged(merge, key, models, 3), streamed[key])


@pytest.mark.parametrize(
    "name", [n for n in MERGES if declaration(resolve(n, "merging") if n not in NEEDS else bound(n)).elementwise]
)
def test_an_elementwise_merge_may_be_given_pieces(name, monkeypatch):
    whole = bound(name)(*models_of(name))
    monkeypatch.setattr("jaxpost.merging.tensorwise.BLOCK", 8)
    for key, x in bound(name)(*models_of(name)).items():
        np.testing.assert_array_equal(x, whole[key])


# ------------------------------------------------------------------------------------------------------ The methods' numbers


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def descending(delta: np.ndarray) -> np.ndarray:
    """The places of a tensor's elements by magnitude, the largest first and equal ones as they stand."""
    return np.argsort(-np.abs(delta).reshape(-1), kind="stable")


def masked(delta: np.ndarray, places: np.ndarray) -> np.ndarray:
    out = np.zeros(delta.size)
    out[places] = delta.reshape(-1)[places]
    return out.reshape(delta.shape)


def rescaled(kept: np.ndarray, delta: np.ndarray, density: float, how: str) -> np.ndarray:
    if how == "density":
        return kept / density
    if how == "l1" and np.abs(kept).sum() >= 1e-7:
        return kept * np.abs(delta).sum() / np.abs(kept).sum()
    return kept


def combined(base, deltas, weight, *, elect=None, normalize, strength=1.0):
    """base + lambda * the weighted sum of deltas, element by element."""
    out = np.zeros(base.shape)
    for place in np.ndindex(base.shape):
        terms = [w * d[place] for w, d in zip(weight, deltas, strict=True)]
        divisor = sum(weight)
        if elect:
            votes = sum(terms) if elect == "sum" else sum(np.sign(x) for x in terms)
            sign = 1 if votes >= 0 else -1
            agree = [np.sign(x) == sign for x in terms]
            terms = [x for x, a in zip(terms, agree, strict=True) if a]
            divisor = sum(w for w, a in zip(weight, agree, strict=True) if a) or 1.0
        out[place] = base[place] + strength * sum(terms) / (divisor if normalize else 1.0)
    return out


def assert_merged(result: dict, expected: dict) -> None:
    for key, x in expected.items():
        dtype = ONE[key].dtype
        if dtype == np.float32:
            np.testing.assert_allclose(result[key], x, rtol=1e-6, atol=1e-6)
        else:  # the sum is rounded once
            np.testing.assert_array_equal(result[key], x.astype(np.float32).astype(dtype))


def test_linear_and_task_arithmetic():
    for settings, expected in (
        ({}, lambda a, b, c: (a + b + c) / 3),
        ({"weight": (2, 1, 1)}, lambda a, b, c: (2 * a + b + c) / 4),
        ({"weight": (2, -1, 0.5), "normalize": False}, lambda a, b, c: 2 * a - b + 0.5 * c),
    ):
        got = arithmetic.linear(ONE, TWO, THREE, **settings)
        assert_merged(got, {k: expected(*(wide(m[k]) for m in (ONE, TWO, THREE))) for k in SHAPES})
    for settings, expected in (
        ({}, lambda a, b, c: b + c - a),
        ({"strength": 0.5, "weight": (1.0, -2.0)}, lambda a, b, c: a + 0.5 * ((b - a) - 2 * (c - a))),
        ({"normalize": True, "weight": (1.0, 3.0)}, lambda a, b, c: a + ((b - a) + 3 * (c - a)) / 4),
    ):
        got = arithmetic.task_arithmetic(ONE, TWO, THREE, **settings)
        assert_merged(got, {k: expected(*(wide(m[k]) for m in (ONE, TWO, THREE))) for k in SHAPES})


GTA = {
    "plain": {"weight": (1.0, 1.0, 1.0)},
    "weights": {"weight": (1.0, 0.5, -0.25), "strength": 0.7},
    "normalized": {"weight": (1.0, 0.5, 2.0), "normalize": True},
    "not": {"weight": (1.0, 0.5, 2.0), "normalize": False},
    "counted": {"weight": (1.0, 0.5, 2.0), "consensus": "count"},
    "l1": {"rescale": "l1", "density": (0.3, 0.6, 1.0)},
    "one each": {"density": (0.0, 0.5, 0.9)},
}


@pytest.mark.parametrize("case", GTA)
def test_ties(case):
    settings = {"weight": (1.0,) * 3, "density": (0.5,) * 3, "normalize": True, "rescale": "", "consensus": "sum", **GTA[case]}
    expected = {}
    for key in SHAPES:
        base, *tuned = (wide(m[key]) for m in (ONE, TWO, THREE, FOUR))
        deltas = []
        for x, density in zip(tuned, settings["density"], strict=True):
            kept = masked(x - base, descending(x - base)[: int(density * base.size)])
            deltas.append(rescaled(kept, x - base, density, settings["rescale"]))
        about = {"elect": settings["consensus"], "normalize": settings["normalize"], "strength": settings.get("strength", 1.0)}
        expected[key] = combined(base, deltas, settings["weight"], **about)
    assert_merged(sparse.ties(ONE, TWO, THREE, FOUR, **settings), expected)


@pytest.mark.parametrize("kind", ["normal", "steps", "zeros", "rows", "infinite"])
def test_the_largest_elements_are_those_that_sorting_gives(kind, monkeypatch):
    """Whatever a sample says: where values are few, where the sampled rows are no sample, where nothing is finite."""
    monkeypatch.setattr("jaxpost.merging.tensorwise.BLOCK", 64 * 8)
    x = np.random.default_rng(0).normal(size=(80, 64)).astype(np.float32)
    x = {"steps": np.round(x), "zeros": x * (x > 1), "infinite": np.where(x > 1, np.inf, x)}.get(kind, x)
    if kind == "rows":
        x[::8] *= 1e-3
    order = descending(x)
    for count in (0, 1, 700, 2500, 5119, 5120):
        cut = sparse._largest(tensorwise_pieces([np.zeros_like(x), x]), 1, count)
        for start in (0, 37):
            mask = cut.mask(x.reshape(-1)[start:], start)
            np.testing.assert_array_equal(mask, np.isin(np.arange(start, x.size), order[:count]))


def test_equal_magnitudes_keep_the_first_and_a_vote_of_nothing_is_plus():
    base = {"w": np.zeros(4, np.float32)}
    one, two = ({"w": np.array(x, np.float32)} for x in ([1, -1, 1, -1], [-1, 1, -2, 0]))
    np.testing.assert_array_equal(sparse.ties(base, one, density=0.5)["w"], [1, -1, 0, 0])
    np.testing.assert_array_equal(sparse.ties(base, one, density=0.25)["w"], [1, 0, 0, 0])
    # Votes 0, 0, -1, -1: the plus of the first two is elected, and who said minus is left out of sum and divisor.
    np.testing.assert_array_equal(sparse.ties(base, one, two, density=1.0)["w"], [1, 1, -2, -1])
    np.testing.assert_array_equal(sparse.ties(base, one, two, density=1.0, consensus="count")["w"], [1, 1, 1, -1])


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize(
    "case", [{}, {"density": 0.9, "gamma": 0.3}, {"gamma": 0.3}, {"gamma": (0.0, 0.2), "weight": (1.0, -0.5)}]
)
def test_breadcrumbs(case, elect):
    settings = {"density": 0.5, "gamma": 0.1, "weight": (1.0, 1.0), **case}
    expected = {}
    for key in SHAPES:
        base, *tuned = (wide(m[key]) for m in (ONE, TWO, THREE))
        deltas = []
        for number, x in enumerate(tuned):
            density, gamma = (v[number] if isinstance(v, tuple) else v for v in (settings["density"], settings["gamma"]))
            size, keep, top = x.size, int(density * x.size), int(gamma * x.size)
            bottom = size - keep - top
            top, bottom = (top, bottom) if bottom >= 0 else (top + bottom, 0)
            deltas.append(masked(x - base, descending(x - base)[top : size - bottom]))
        expected[key] = combined(base, deltas, settings["weight"], elect="sum" if elect else None, normalize=False)
    merge = sparse.breadcrumbs_ties if elect else sparse.breadcrumbs
    assert_merged(merge(ONE, TWO, THREE, **settings), expected)


def test_dare_drops_at_random_and_keeps_the_mean():
    base, tuned = ({"layers.0.w": np.full((100, 50), x, np.float32)} for x in (1.0, 1.5))
    kept = sparse.dare_linear(base, tuned, density=0.25)["layers.0.w"] - 1
    assert set(np.unique(kept)) == {0.0, 2.0} and abs((kept > 0).mean() - 0.25) < 0.02
    again = sparse.dare_linear(base, tuned, density=0.25)["layers.0.w"] - 1
    np.testing.assert_array_equal(kept, again)
    for other in (
        sparse.dare_linear(base, tuned, density=0.25, seed=1)["layers.0.w"] - 1,
        sparse.dare_linear({"layers.1.w": base["layers.0.w"]}, {"layers.1.w": tuned["layers.0.w"]}, density=0.25)["layers.1.w"]
        - 1,
    ):
        assert abs(np.mean((other > 0) & (kept > 0)) - 0.25**2) < 0.02  # drawn apart
    one, two = ({"w": x["model.layers.0.self_attn.q_proj.weight"]} for x in (ONE, TWO))
    mean = np.mean([sparse.dare_linear(one, two, density=0.5, seed=seed)["w"] for seed in range(2000)], axis=0)
    delta = np.abs(two["w"] - one["w"])
    assert (np.abs(mean - two["w"]) <= 4.5 * delta / math.sqrt(2000) + 1e-6).all()  # the standard deviation is delta


@pytest.mark.parametrize("rescale", ["", "density", "l1"])
@pytest.mark.parametrize("elect", [False, True])
def test_dare_is_a_sum_of_what_was_drawn(elect, rescale):
    """The elements that are drawn show where one model alone changes the base, whatever its place among the models."""
    merge = sparse.dare_ties if elect else sparse.dare_linear
    far = [{k: (wide(ONE[k]) + 1).astype(np.float32) for k in SHAPES}] * 2
    base = {k: x.astype(np.float32) for k, x in ONE.items()}
    drawn = [sparse.dare_linear(base, *far, density=0.5, weight=w, rescale="") for w in ((1, 0), (0, 1))]
    drawn = [{k: np.round(x[k] - base[k]) for k in SHAPES} for x in drawn]
    assert set(np.unique(np.concatenate([x.ravel() for x in drawn[0].values()]))) == {0.0, 1.0}
    assert any((drawn[0][k] != drawn[1][k]).any() for k in SHAPES), "each model has draws of its own"
    expected = {}
    for key in SHAPES:
        base_, *tuned = (wide(m[key]) for m in (ONE, TWO, THREE))
        deltas = [rescaled((x - base_) * mask[key], x - base_, 0.5, rescale) for x, mask in zip(tuned, drawn, strict=True)]
        expected[key] = combined(base_, deltas, (1.0, 0.5), elect="sum" if elect else None, normalize=True, strength=0.8)
    got = merge(ONE, TWO, THREE, density=0.5, weight=(1.0, 0.5), rescale=rescale, normalize=True, strength=0.8)
    assert_merged(got, expected)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_slerp(t):
    expected = {}
    for key in SHAPES:
        a, b = wide(ONE[key]), wide(TWO[key])
        angle = math.acos(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
        expected[key] = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    assert_merged(spherical.slerp(ONE, TWO, t=t), expected)


def test_slerp_of_colinear_and_of_zero_tensors():
    one, two = ({"w": np.array(x, np.float32)} for x in ([1.0, 2.0, 3.0], [2.0, 4.0, 6.001]))
    np.testing.assert_allclose(spherical.slerp(one, two, t=0.25)["w"], 0.75 * one["w"] + 0.25 * two["w"], rtol=1e-6)
    opposite = {"w": -2 * one["w"]}  # no arc is between them
    np.testing.assert_allclose(spherical.slerp(one, opposite, t=0.5)["w"], -0.5 * one["w"], rtol=1e-6)
    rotated = {"w": np.array([-2.0, 1.0, 0.0], np.float32)}  # of the length of its partner, and so are all between
    between = spherical.slerp({"w": np.array([1.0, 2.0, 0.0], np.float32)}, rotated, t=0.3)["w"]
    np.testing.assert_allclose(np.linalg.norm(between), math.sqrt(5), rtol=1e-6)
    nothing = {"w": np.zeros(3, np.float32)}
    np.testing.assert_allclose(spherical.slerp(nothing, two, t=0.5)["w"], math.sin(math.pi / 4) * two["w"], rtol=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("tuned", [[TWO, THREE], [TWO, THREE, FOUR]], ids=len)
def test_model_stock(filter_wise, tuned):
    expected = {}
    for key, shape in SHAPES.items():
        base, rows = wide(ONE[key]), shape[0] if filter_wise and len(shape) > 1 else 1
        deltas = [(wide(m[key]) - base).reshape(rows, -1) for m in tuned]
        out = np.zeros((rows, base.size // rows))
        for row in range(rows):
            cosines = []
            for a, b in itertools.combinations([d[row] for d in deltas], 2):
                cosines.append(a @ b / max(math.sqrt(a @ a) * math.sqrt(b @ b), 1e-6))
            cosine, n = sum(cosines) / len(cosines), len(tuned)
            t = n * cosine / (1 + (n - 1) * cosine)
            out[row] = t * sum(d[row] for d in deltas) / n
        expected[key] = base + out.reshape(shape)
    assert_merged(spherical.model_stock(ONE, *tuned, filter_wise=filter_wise), expected)


def test_fisher():
    rng = np.random.default_rng(5)
    information = [{k: rng.gamma(0.3, size=shape).astype(np.float32) for k, shape in SHAPES.items()} for _ in range(3)]
    expected = {}
    for key in SHAPES:
        shares = [w * np.maximum(wide(f[key]), 0.01) for w, f in zip((1.0, 2.0, 0.5), information, strict=True)]
        expected[key] = sum(f * wide(m[key]) for f, m in zip(shares, (ONE, TWO, THREE), strict=True)) / sum(shares)
    got = statistics.fisher(ONE, TWO, THREE, information=information, weight=(1.0, 2.0, 0.5), floor=0.01)
    assert_merged(got, expected)
    assert_merged(
        statistics.fisher(ONE, TWO, THREE, information=UNIFORM),
        {k: wide(x) for k, x in arithmetic.linear(ONE, TWO, THREE).items()},
    )


def test_regmean_reproduces_both_models_on_their_own_inputs():
    rng = np.random.default_rng(6)
    one, two = ({"w": rng.normal(size=(5, 6)).astype(np.float32)} for _ in range(2))
    inputs = [np.concatenate([rng.normal(size=(20, 3)), np.zeros((20, 3))], axis=1)]
    inputs.append(inputs[0][:, ::-1])
    moments = [{"w": (x.T @ x).astype(np.float32)} for x in inputs]
    got = statistics.regmean(one, two, moments=moments, diagonal=0.0)["w"]
    for x, each in zip(inputs, (one, two), strict=True):  # no direction is in both
        np.testing.assert_allclose(x @ got.T, x @ wide(each["w"]).T, rtol=1e-4, atol=1e-5)
    # Least squares, solved another way: the rows of both problems below each other, their diagonals shrunk to the same.
    x = [rng.normal(size=(30, 6)) for _ in range(2)]
    moments = [{"w": (y.T @ y).astype(np.float32)} for y in x]
    stacked, targets = np.concatenate(x), np.concatenate([y @ wide(m["w"]).T for y, m in zip(x, (one, two), strict=True)])
    expected = np.linalg.lstsq(stacked, targets, rcond=None)[0].T
    np.testing.assert_allclose(statistics.regmean(one, two, moments=moments, diagonal=0.0)["w"], expected, rtol=1e-4, atol=1e-5)
    grams = [0.7 * wide(m["w"]) + 0.3 * np.diag(np.diag(wide(m["w"]))) for m in moments]
    expected = np.linalg.inv(grams[0] + 2 * grams[1]) @ (grams[0] @ wide(one["w"]).T + 2 * grams[1] @ wide(two["w"]).T)
    got = statistics.regmean(one, two, moments=moments, diagonal=0.3, weight=(1.0, 2.0))["w"]
    np.testing.assert_allclose(got, expected.T, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="no inverse; take more data"):
        statistics.regmean(one, two, moments=[{"w": np.zeros((6, 6), np.float32)}] * 2)


# ---------------------------------------------------------------------------------------------------------- Coefficients


def test_a_setting_goes_by_name_by_depth_and_by_model():
    at = coefficients.at
    first, middle, last, head = "model.layers.0.mlp.x", "model.layers.1.self_attn.x", "model.layers.2.mlp.x", "lm_head.weight"
    depths = [coefficients.depth_of(name, 3) for name in (first, middle, last, head)]
    assert depths == [0.0, 0.5, 1.0, 0.0] and coefficients.depth_of(first, 1) == 1.0
    assert [at([1.0, 2.0, 4.0], "", depth, "w") for depth in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 4.0]
    assert at([0.3], "", 0.7, "w") == 0.3
    by_name = {"mlp": [0.0, 1.0], r"layers\.1\.": 5.0, "": 7.0}
    assert [at(by_name, name, depth, "w") for name, depth in zip((first, middle, last, head), depths, strict=True)] == [
        0,
        5,
        1,
        7,
    ]
    assert at(tuple(by_name.items()), middle, 0.5, "w") == 5.0  # as a recipe stores it
    assert coefficients.each_at(0.5, 2, first, 0.0, "w") == [0.5, 0.5]
    assert coefficients.each_at([0.1, by_name], 2, last, 1.0, "w") == [0.1, 1.0]
    assert coefficients.each_at([[0.0, 1.0], 0.5], 2, middle, 0.5, "w") == [0.5, 0.5]
    for setting, message in (
        ({"mlp": 1.0}, 'w: none of its patterns is in model.layers.1.self_attn.x; add ""'),
        ({"(": 1.0}, "w: '\\(' is no regular expression"),
        (["a", 1.0], "a list over the layers has numbers only"),
        ([], "a list over the layers has numbers only"),
    ):
        with pytest.raises(UserError, match=message):
            at(setting, middle, 0.5, "w")
    with pytest.raises(UserError, match="has 3 entries; give 2, one a model"):
        coefficients.each_at([1.0, 2.0, 3.0], 2, first, 0.0, "w")


def test_a_pattern_that_is_in_no_tensors_name_is_refused_with_the_nearest():
    for settings, message in (
        (
            {"density": {"self_atn": 0.5, "": 0.2}},
            "ties: density: 'self_atn' is in no tensor's name. Did you mean 'self_attn'?",
        ),
        ({"weight": [{"": {r"\.mpl\.": 1.0, "": 2.0}}, 1.0]}, r"weight: '\\\\.mpl\\\\.' is in .* Did you mean 'mlp'?"),
        ({"strength": {"router": 0.5, "": 1.0}}, "strength: 'router' is in no .* Known: down_proj, embed_tokens, layers, mlp"),
    ):
        with pytest.raises(UserError, match=message):
            sparse.ties(ONE, TWO, THREE, **settings)


def test_every_keyword_of_every_merge_takes_all_of_these():
    settings = {
        "weight": [{"mlp": 0.5, "": [1.0, 2.0, 4.0]}, 1.0],
        "density": {"embed": 1.0, "": [0.2, 0.8]},
        "normalize": {"norm": True, "": False},
    }
    got = sparse.ties(ONE, TWO, THREE, **settings)
    for key, weight, density in (
        ("model.embed_tokens.weight", 1.0, 1.0),
        ("model.layers.0.self_attn.q_proj.weight", 1.0, 0.2),
        ("model.layers.1.self_attn.q_proj.weight", 2.0, 0.5),
        ("model.layers.2.self_attn.q_proj.weight", 4.0, 0.8),
        ("model.layers.2.mlp.down_proj.weight", 0.5, 0.8),
        ("model.norm.weight", 1.0, 0.2),
    ):
        alone = [{key: m[key]} for m in (ONE, TWO, THREE)]
        plain = sparse.ties(*alone, weight=(weight, 1.0), density=density, normalize=key == "model.norm.weight")
        np.testing.assert_array_equal(got[key], plain[key])
    t = spherical.slerp(ONE, TWO, t=[0.0, 0.0, 1.0])
    np.testing.assert_array_equal(t["model.layers.0.self_attn.q_proj.weight"], ONE["model.layers.0.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(t["model.layers.2.self_attn.q_proj.weight"], TWO["model.layers.2.self_attn.q_proj.weight"])


# -------------------------------------------------------------------------------------------------------------- Refusals


def test_models_that_differ_are_refused_by_tensor():
    wide_norm = {**TWO, "model.norm.weight": jnp.ones(5)}
    with pytest.raises(UserError, match=r"model.norm.weight is \(4,\) in model 1 and \(5,\) in model 3"):
        arithmetic.linear(ONE, TWO, wide_norm)
    with pytest.raises(UserError, match="only model 2 has lm_head.weight"):
        arithmetic.task_arithmetic(ONE, {**TWO, "lm_head.weight": jnp.ones(2)})
    with pytest.raises(UserError, match="only model 1 has model.norm.weight"):
        arithmetic.linear(ONE, {k: x for k, x in TWO.items() if k != "model.norm.weight"})
    with pytest.raises(UserError, match="model.norm.weight is quantised"):
        arithmetic.linear(ONE, {**TWO, "model.norm.weight": jnp.ones(4, jnp.int8)})
    with pytest.raises(UserError, match="layers is no array; jaxpost.models.tensors.of_tree makes"):
        arithmetic.linear({"layers": {}}, {"layers": {}})
    infinite = {**TWO, "model.norm.weight": np.full(4, np.inf, np.float32)}
    with pytest.raises(UserError, match="merge: model.norm.weight has NaN or infinity in it"):
        arithmetic.linear(ONE, infinite)


@pytest.mark.parametrize(
    ("merge", "settings", "message"),
    [
        (arithmetic.linear, {"weight": (1.0, -1.0)}, "linear: weight=.* they sum to 0"),
        (arithmetic.linear, {"weight": (1.0,)}, "linear: weight: .* has 1 entries; give 2, one a model"),
        (sparse.ties, {"weight": (1.0, 1.0)}, "ties: weight: .* has 2 entries; give 1, one a model"),
        (sparse.ties, {"density": 1.5}, "ties: density=1.5: give a share from 0 to 1"),
        (sparse.ties, {"density": {"norm": 2.0, "": 0.1}}, "ties: density=2.0: give a share"),
        (sparse.ties, {"consensus": "most"}, "ties: consensus='most': give one of 'sum', 'count'"),
        (sparse.dare_linear, {"rescale": "l2"}, "dare_linear: rescale='l2': give one of"),
        (sparse.breadcrumbs, {"gamma": -0.1}, "breadcrumbs: gamma=-0.1: give a share"),
        (spherical.model_stock, {}, "model_stock: it takes 3 or more models, the base first; 2 given"),
        (statistics.fisher, {"information": [{}, {}]}, "fisher: information has nothing of a tensor"),
        (statistics.fisher, {"information": [UNIFORM[0], {}]}, "information number 2 has nothing of model.norm.weight"),
        (statistics.fisher, {"information": UNIFORM}, "fisher: information is a list of 2, one folder"),
        (statistics.fisher, {"information": ["/nowhere", "/nowhere"]}, "/nowhere: no folder with a safetensors file"),
    ],
)
def test_settings_that_do_not_suit_are_refused(merge, settings, message):
    with pytest.raises(UserError, match=message):
        merge(ONE, TWO, **settings)


def test_the_number_of_models_is_that_of_the_functions_arguments():
    with pytest.raises(UserError, match="slerp: it takes 2 models, the base first; 3 given"):
        spherical.slerp(ONE, TWO, THREE, t=0.5)
    with pytest.raises(UserError, match="ties: it takes 2 or more models, the base first; 1 given"):
        sparse.ties(ONE)


def test_a_merge_takes_further_models_and_keyword_settings():
    assert fits(lambda params, *others, strength=1.0: params, "merging") and fits(lambda params: params, "merging")
    assert not fits(lambda params, other, *more: params, "merging") and not fits(lambda: None, "merging")


def test_a_merge_of_a_notebook_is_recorded_by_what_it_does():
    def version(share):
        @tensorwise()
        def mine(tensor, other):
            return tensor + share * other

        return digest_of(mine)

    assert version(0.5) == version(0.5) != version(0.25)


def test_a_method_may_be_named_without_its_file():
    assert entry("ties") == {"name": "sparse.ties"} and entry("sparse.ties") == {"name": "sparse.ties"}
    assert entry({"name": "slerp", "t": 0.5}) == {"name": "spherical.slerp", "t": 0.5}
    assert entry("mine.py:halves") == {"name": "mine.py:halves"} and entry("tie") == {"name": "tie"}
    assert entry(sparse.ties)["name"] == "sparse.ties"


def test_a_function_of_ones_own_gets_one_tensor_at_a_time_and_must_keep_its_shape():
    @tensorwise(each=("share",))
    def mine(tensor, other, *, share=0.5):
        assert tensor.dtype == np.float32
        return tensor + share[1] * (other - tensor)

    assert_merged(mine(ONE, TWO, share=[0, 0.25]), {k: wide(ONE[k]) + 0.25 * (wide(TWO[k]) - wide(ONE[k])) for k in SHAPES})

    @tensorwise()
    def flat(tensor, *others):
        return tensor.ravel()

    with pytest.raises(UserError, match=r"flat: model.layers.0.self_attn.q_proj.weight of shape \(6, 4\) comes out as \(24,\)"):
        flat(ONE)

    @tensorwise()
    def failing(tensor, *others):
        return tensor[7]

    with pytest.raises(UserError, match="failing: model.norm.weight failed with IndexError"):
        failing(ONE)


def test_layers_of_encoders_have_a_depth_too():
    names = ("model.layers.3.mlp.up_proj.weight", "bert.encoder.layer.3.output.dense.weight", "lm_head.weight")
    assert [coefficients.layer_of(name) for name in names] == [3, 3, None]
