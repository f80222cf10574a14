"""The optimizer: groups of leaves with a rate of their own, and functions of one's own on gradients and updates.

The numbers are those of AdamW written out in numpy; that nothing changes where neither is asked for is read from the traced
computation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

import jaxpost
from jaxpost import optim, recipe
from jaxpost.errors import UserError

PLAIN = recipe.make(optimizer={"lr": 1e-2, "warmup": 0, "schedule": "constant", "weight_decay": 0.1, "clip": 0.5}).optimizer


def settings(**changes) -> dict:
    return {**recipe.plain(PLAIN), **changes}


def tree(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    leaves = {"embed": {"weight": (5, 3)}, "layers": {"mlp": {"up": {"kernel": (2, 3, 4), "bias": (2, 4)}}}}
    return jax.tree.map(
        lambda s: (scale * rng.normal(size=s)).astype(np.float32), leaves, is_leaf=lambda x: isinstance(x, tuple)
    )


def stepped(chosen: dict, count: int = 3, scale: float = 1.0) -> tuple[list, object]:
    """(the parameters after each step, the optimizer's last state)."""
    tx, params, after = optim.make(chosen, 10), tree(0), []
    state = tx.init(params)
    for step in range(count):
        updates, state = tx.update(tree(step + 1, scale), state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after, state


def adamw(path: str, leaf, steps: list, lr: float, decay: float) -> list:
    """AdamW of one leaf in float64, of gradients that are clipped together to a norm of 0.5; the parameter after each step."""
    m, v, after, p = 0.0, 0.0, [], np.asarray(leaf(tree(0)), np.float64)
    for n, grads in enumerate(steps, start=1):
        norm = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(grads)))
        g = np.asarray(leaf(grads), np.float64) * min(1.0, 0.5 / norm)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - lr * (m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8) + decay * p)
        after.append(p)
    return after


LEAVES = {
    "embed/weight": lambda t: t["embed"]["weight"],
    "layers/mlp/up/kernel": lambda t: t["layers"]["mlp"]["up"]["kernel"],
    "layers/mlp/up/bias": lambda t: t["layers"]["mlp"]["up"]["bias"],
}


def test_each_group_has_its_rate_and_its_decay():
    groups = [{"paths": "^embed/", "lr": 1e-3}, {"paths": "up/(kernel|bias)$", "weight_decay": 0.7}]
    own = {
        "embed/weight": (1e-3, 0.1),
        "layers/mlp/up/kernel": (1e-2, 0.7),
        "layers/mlp/up/bias": (1e-2, 0.0),
    }  # no bias decays
    for chosen, rates in ((groups, own), ("", {k: (1e-2, decay and 0.1) for k, (_, decay) in own.items()})):
        after, _ = stepped(settings(groups=chosen))
        for path, leaf in LEAVES.items():
            wanted = adamw(path, leaf, [tree(n) for n in (1, 2, 3)], *rates[path])
            for params, own_params in zip(after, wanted, strict=True):
                np.testing.assert_allclose(leaf(params), own_params, atol=1e-6)


def test_groups_with_nothing_of_their_own_change_no_bit():
    same = settings(groups='[{"paths": "^embed/", "lr": 0.01}, {"paths": "bias", "lr": 0.01, "weight_decay": 0.1}]')
    for one, other in zip(jax.tree.leaves(stepped(same)[0]), jax.tree.leaves(stepped(settings())[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_where_nothing_is_asked_for_the_computation_is_adamw_alone():
    def traced(tx):
        return str(jax.make_jaxpr(lambda g, p: tx.update(g, tx.init(p), p))(tree(1), tree(0)))

    decays = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in str(path), params)  # noqa: E731
    rate = optax.constant_schedule(1e-2)
    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=0.1, mask=decays))
    assert traced(optim.make(settings(), 10)) == traced(plain)
    assert traced(optim.make(settings(clip=0.0), 10)) != traced(plain)


def test_groups_that_do_not_add_up_are_refused():
    for groups, message in (
        (
            [{"paths": "^head/", "lr": 1e-5}],
            "'\\^head/' matches none of the leaves that train; there are, for example, embed/weight",
        ),
        ([{"paths": "up", "lr": 1e-5}, {"paths": "kernel", "lr": 1e-3}], "'up' and 'kernel' both match layers/mlp/up/kernel"),
        ([{"paths": "up"}], "a group is a dict of `paths`"),
        (["up"], "a group is a dict of `paths`"),
        ([{"paths": "up", "rl": 1}], "a group has no 'rl'. Known: lr, weight_decay"),
        ([{"paths": "up", "lr": -1.0}], "lr is -1.0"),
        ([{"paths": "up", "lr": "1e-5"}], "lr is '1e-5'"),
        ([{"paths": "[", "lr": 1e-5}], "no regular expression"),
    ):
        with pytest.raises(UserError, match=message):
            optim.check(settings(groups=groups), tree(0))
    optim.check(settings(groups=[{"paths": "embed", "lr": 1e-5}, {"paths": "kernel", "lr": 1e-3}]), tree(0))
    frozen = {**tree(0), "embed": {"weight": None}}
    with pytest.raises(UserError, match="matches none of the leaves that train"):
        optim.check(settings(groups=[{"paths": "embed", "lr": 1e-5}]), frozen)


# ----------------------------------------------------------------------------------------------------- Functions of one's own


def scaled(updates, params, step, *, by: float = 0.5):
    return jax.tree.map(lambda x: x * by, updates)


def only_later(updates, params, step, *, first: int = 1):
    return jax.tree.map(lambda x: jnp.where(step < first, 0.0, x), updates)


def towards_zero(updates, params, step):
    return jax.tree.map(lambda x, p: x - 0.1 * p, updates, params)


def momentum(*, decay: float = 0.5):
    return optax.trace(decay)


def one_short(updates, params, step):
    return {"embed": updates["embed"]}


def narrower(updates, params, step):
    return jax.tree.map(lambda x: x[:1], updates)


def of_two(updates, params):
    return updates


def test_gradients_are_changed_before_they_are_clipped_and_updates_before_they_are_added():
    plain, _ = stepped(settings())
    small, _ = stepped(settings(clip=0.0), scale=0.25)  # below the norm at which they would be clipped
    for one, other in zip(
        jax.tree.leaves(stepped(settings(gradients=[{"name": f"{__name__}.scaled", "by": 0.25}], clip=0.0))[0]),
        jax.tree.leaves(small),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    half, _ = stepped(settings(updates=f"{__name__}.scaled"), count=1)
    jax.tree.map(lambda x, y, p: np.testing.assert_allclose(x - p, (y - p) / 2, atol=5e-7), half[0], plain[0], tree(0))
    decayed, _ = stepped(settings(updates=f"{__name__}.towards_zero,{__name__}.scaled"), count=1)
    jax.tree.map(
        lambda x, y, p: np.testing.assert_allclose(x - p, (y - p - 0.1 * p) / 2, atol=1e-6), decayed[0], plain[0], tree(0)
    )
    late, _ = stepped(settings(updates=[{"name": f"{__name__}.only_later", "first": 2}]))
    jax.tree.map(np.testing.assert_array_equal, late[1], tree(0))
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(late[2]), jax.tree.leaves(tree(0)), strict=True))


def test_an_optax_transformation_keeps_its_state():
    after, state = stepped(settings(gradients=f"{__name__}.momentum", clip=0.0))
    wanted = tree(3)["embed"]["weight"] + 0.5 * (tree(2)["embed"]["weight"] + 0.5 * tree(1)["embed"]["weight"])
    (kept,) = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if "trace" in str(path) and "embed" in str(path)]
    np.testing.assert_allclose(kept, wanted, atol=1e-6)


def test_functions_that_cannot_be_are_refused():
    for name, message in (
        ("one_short", "one_short gave another tree, or other shapes"),
        ("narrower", "narrower gave another tree, or other shapes"),
        ("of_two", "of_two is neither a function of \\(updates, params, step\\) nor one that gives optax's own"),
        ("tree", "tree is neither"),
        ("nothing", "no 'nothing'"),
    ):
        with pytest.raises(UserError, match=message):
            optim.check(settings(updates=f"{__name__}.{name}"), tree(0))
    with pytest.raises(UserError, match="takes no option 'bye'. Did you mean 'by'"):
        optim.check(settings(gradients=[{"name": f"{__name__}.scaled", "bye": 1}]), tree(0))


def test_a_recipe_names_functions_of_its_own():
    config = recipe.make(optimizer={"updates": [scaled, {"name": scaled, "by": 0.1}], "gradients": momentum})
    names = [entry["name"] for entry in recipe.plain(config.optimizer.updates)]
    assert names == [f"{__name__}.scaled"] * 2 and config.optimizer.gradients["name"] == f"{__name__}.momentum"
    tx = optim.make(recipe.plain(config.optimizer), 10)
    assert len(tx.init(tree(0))) == 5  # momentum, the clip, AdamW, and two


FILE = """
import jax
import jax.numpy as jnp
import optax


def momentum(*, decay=0.5):
    return optax.trace(decay)


def only_later(updates, params, step, *, first):
    return jax.tree.map(lambda x: jnp.where(step < first, 0.0, x), updates)
"""


@pytest.mark.slow
def test_a_run_goes_on_with_its_groups_and_what_its_functions_keep(tmp_path):
    """Four steps and then four more are the eight of a run that went on, bit for bit."""
    (tmp_path / "own.py").write_text(FILE)
    optimizer = {"lr": 1e-2, "warmup": 0, "schedule": "constant", "groups": [{"paths": "^embed/", "lr": 0.0}]}
    own = {"gradients": f"{tmp_path}/own.py:momentum", "updates": [{"name": f"{tmp_path}/own.py:only_later", "first": 6}]}
    chosen = runs.settings(tmp_path, optimizer=optimizer | own)
    weights = {}
    for name, lengths in (("whole", (8,)), ("parts", (4, 8))):
        for steps in lengths:
            jaxpost.train(recipe.make(**chosen, steps=steps), tmp_path / name)
            weights[name, steps] = jax.device_get(jaxpost.load(str(tmp_path / name)).params)
    jax.tree.map(np.testing.assert_array_equal, weights["whole", 8], weights["parts", 8])
    begun, after = weights["parts", 4], weights["parts", 8]
    np.testing.assert_array_equal(begun["embed"]["weight"], after["embed"]["weight"])  # its group has a rate of 0
    assert all((x != y).any() for x, y in zip(*(jax.tree.leaves(w["layers"]) for w in (begun, after)), strict=True))
