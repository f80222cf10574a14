"""configs/papers/spt.py: the memory's weights against numpy, whom a gradient reaches, and what a prompt depends on."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.config import resolve
from jaxpost.models import families
from jaxpost.models.transformer import Transformer

PAPER = str(Path(__file__).parent.parent / "configs" / "papers" / "spt.py")
spt = resolve.find(f"{PAPER}:get_config", "configs").__globals__

FIELDS = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
BASE = Transformer(families.architecture({**FIELDS, "num_attention_heads": 2, "max_position_embeddings": 64}))
PLACE, LINE, LENGTH = 30, 31, 2


def model(size=4, top=2):
    return spt["Prompted"](BASE, (size, LENGTH, top), (PLACE, LINE))


def weights(size=4):
    return model(size).init(jax.random.PRNGKey(0))


def document(told, asked):
    """Turn, the places, the instruction, a line end, the input."""
    return [1, *[PLACE] * LENGTH, *told, LINE, *asked]


def batch(*documents):
    """The documents one after another in a row."""
    numbers = [[i] * len(each) for i, each in enumerate(documents, start=1)]
    places = [list(range(len(each))) for each in documents]
    tokens, segments, positions = (np.array([sum(each, [])], np.int32) for each in (documents, numbers, places))
    return {"tokens": tokens, "segments": segments, "positions": positions}


def by_hand(memory, table, told, top):
    """The prompt [m,D] of an instruction."""
    query = table[told].mean(0)
    query = (query - query.mean()) / query.std()
    products = memory["keys"] @ query / np.sqrt(len(query))
    chosen = np.argsort(products)[-top:]
    share = np.exp(products[chosen] - products[chosen].max())
    return np.einsum("k,kmd->md", share / share.sum(), memory["prompts"][chosen]), chosen


def test_documents_see_the_prompts_of_their_instructions():
    params = weights()
    memory, table = jax.tree.map(np.asarray, params["memory"]), np.asarray(params["embed"]["weight"])
    first, second = document([5, 6, 7], [8, 9]), document([10, 11], [12, 13, 14])
    row = batch(first, second)
    embeds = np.zeros((1, row["tokens"].shape[1], 16), np.float32)
    embeds[0, 1:3] = by_hand(memory, table, [5, 6, 7], 2)[0]
    embeds[0, len(first) + 1 : len(first) + 3] = by_hand(memory, table, [10, 11], 2)[0]
    expected = BASE.forward(params, {**row, "embeds": jnp.asarray(embeds), "embedded": row["tokens"] == PLACE}).hidden
    np.testing.assert_allclose(model().forward(params, row).hidden, expected, atol=1e-5)


def test_only_the_prompts_that_are_chosen_learn():
    params = weights()
    table = np.asarray(params["embed"]["weight"])

    def loss(memory):
        return jnp.sum(jnp.sin(model().forward({**params, "memory": memory}, batch(document([5, 6], [8]))).hidden))

    slopes = jax.grad(loss)(params["memory"])
    _, chosen = by_hand(jax.tree.map(np.asarray, params["memory"]), table, [5, 6], 2)
    for slope in slopes.values():
        moved = np.abs(np.asarray(slope)).reshape(4, -1).sum(1) > 0
        assert set(np.flatnonzero(moved)) == set(chosen)


def test_the_input_does_not_choose_and_one_prompt_is_prompt_tuning():
    params = weights(size=1)
    row = batch(document([5, 6], [8, 9]))
    embeds = np.zeros((1, row["tokens"].shape[1], 16), np.float32)
    embeds[0, 1:3] = params["memory"]["prompts"][0]
    expected = BASE.forward(params, {**row, "embeds": jnp.asarray(embeds), "embedded": row["tokens"] == PLACE}).hidden
    np.testing.assert_allclose(model(1, 1).forward(params, row).hidden, expected, atol=1e-6)
    several = weights()
    before = [model().forward(several, batch(document([5, 6], asked))).hidden[0, :5] for asked in ([8, 9], [20, 21])]
    np.testing.assert_allclose(*before, atol=1e-6)


def test_a_cache_that_is_filled_gives_what_a_row_gives():
    params, row = weights(), batch(document([5, 6], [8, 9]))
    size = row["tokens"].shape[1]
    expected = model().forward(params, row).hidden[:, -1]
    own = model()
    filled = {"tokens": row["tokens"][:, :-1], "positions": row["positions"][:, :-1], "lengths": np.array([size - 1])}
    cache = own.forward(own.prepared(params), filled, own.make_cache(1, size)).cache
    last = {"tokens": row["tokens"][:, -1:], "positions": row["positions"][:, -1:]}
    np.testing.assert_allclose(own.forward(own.prepared(params), last, cache).hidden[:, -1], expected, atol=1e-5)
