"""SPT: Semi-Parametric Prompt Tuning for Multitask Prompted Learning.

    e(h) = sum_j softmax_{j in top-k}(<q(h), k_j> / sqrt(D)) P_j,    q(h): the mean embedding of the instruction h, normalised

Claim: prompts that instructions choose from a memory have a frozen model solve more problems, in trained wordings and in new
ones, than one prompt of the same length, and than one of as many numbers. Both are its nearest relative, prompt tuning.

A reconstruction: the paper's equation was not at hand, and sizes are ours. Words are spelled backwards, which the base has not
read, as jargon: what tells the four tasks apart has to be learned. All arms learn from the same documents. Left out: tuning all
weights, pretraining, and keys that begin as clusters.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp

from jaxpost import recipe
from jaxpost.models import loading
from jaxpost.models.protocol import Sampled
from jaxpost.studies import Claim, Study
from jaxpost.tasks import instructions

FIGURE = "eval/accuracy_greedy"
STUDY = Study(
    arms=("spt", "prompt", "long"),
    metric=FIGURE,
    claims=tuple(Claim("spt", over=("prompt", "long"), metric=f"{FIGURE}/{cell}", margin=0.03) for cell in ("trained", "new")),
    family="adapter",
    equal="steps",
    tune={"optimizer.lr": (0.03, 0.1, 0.3)},
)
TASKS = ("count", "parity", "compare", "odd")
PLACE = "~"  # stands where a virtual token goes; no text of the task has it
MEMORY = {"spt": {"size": 8, "length": 4, "top": 2}, "prompt": {"length": 4}, "long": {"length": 40}}  # long: with spt's keys


def make(*, places: int = 4):
    """The task `instructions` with words backwards, behind `places` virtual tokens, tested in trained and new wordings."""
    trained, unseen = (instructions.make(tasks=TASKS, length=(3, 5), definitions=which) for which in ((0, 2, 3), (1,)))

    def prompted(record: dict) -> dict:
        record = record | {"definition": " ".join(word[::-1] for word in record["definition"].split())}
        return record | {"prompt": f"{PLACE * places} {instructions.prompt(record)}"}

    def conversation(index, *, seed=0):
        columns = prompted(trained.record(index, seed=seed))
        turns = {"user": columns.pop("prompt"), "assistant": columns["answer"]}
        return {"messages": [{"role": role, "content": content} for role, content in turns.items()], **columns}

    def test_records(per_cell, *, seed=0):
        cells = {name: task.test_records(per_cell, seed=seed) for name, task in (("trained", trained), ("new", unseen))}
        return [prompted(each) | {"cell": name} for name, records in cells.items() for each in records]

    task = {**vars(trained), "record": lambda *a, **k: prompted(trained.record(*a, **k))}
    return types.SimpleNamespace(**task | {"conversation": conversation, "test_records": test_records})


def shares(query: jax.Array, keys: jax.Array, top: int) -> jax.Array:
    """What each prompt of the memory has in a document's, [...,M]: a softmax over the `top` keys [M,D] nearest to [...,D]."""
    products = query @ keys.T / jnp.sqrt(keys.shape[1])
    return jax.nn.softmax(products, axis=-1, where=products >= jax.lax.top_k(products, top)[0][..., -1:])


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A model whose documents begin with a prompt that their instructions choose: what stands between the virtual tokens and
    the next line end. memory: (M, m, k); ids: of a virtual token and of a line end; parts, tokenizer: the model's folder.
    """

    model: Sampled
    memory: tuple[int, int, int]
    ids: tuple[int, int]
    parts: tuple[str, ...] = ()
    tokenizer: str = ""

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "arch":
            raise AttributeError(name)
        return getattr(self.model, name)

    def with_memory(self, params, key):
        prompts = jax.random.choice(key, params["embed"]["weight"], self.memory[:2])  # of random tokens
        return {**params, "memory": {"keys": jax.random.normal(key, (self.memory[0], self.width)), "prompts": prompts}}

    def init(self, key):
        return self.with_memory(self.model.init(key), key)

    def weights(self, mesh, seed):
        return self.with_memory(loading.weights(loading.describe(self.tokenizer), mesh, seed), jax.random.PRNGKey(seed))

    def prepared(self, params):
        return {**self.model.prepared({k: x for k, x in params.items() if k != "memory"}), "memory": params["memory"]}

    def forward(self, params, batch, cache=None, *, tap=(), patch=None):
        tokens, table, (_, length, top) = batch["tokens"], params["embed"]["weight"], self.memory
        segments = batch.get("segments", jnp.ones_like(tokens))
        same, (place, line) = segments[:, :, None] == segments[:, None, :], (tokens == one for one in self.ids)
        places, lines = (jnp.sum(jnp.tril(same) & x[:, None, :], axis=-1) for x in (place, line))  # so far in the document
        asked = same & ((places > 0) & (lines == 0) & ~place)[:, None, :]
        query = jax.nn.standardize(asked @ table[tokens] / jnp.maximum(asked.sum(-1, keepdims=True), 1), epsilon=1e-12)
        share, number = shares(query, params["memory"]["keys"], top), jax.nn.one_hot(places - 1, length)
        prompts = jnp.einsum("bsm,bsp,mpd->bsd", share, number, params["memory"]["prompts"])
        return self.model.forward(params, batch | {"embeds": prompts, "embedded": place}, cache, tap=tap, patch=patch)


def prompted(*, of: str, size: int = 1, length: int = 4, top: int = 1) -> Prompted:
    """The model `of` with a memory of `size` prompts of `length` virtual tokens, `top` of which make a document's prompt."""
    ids = tuple(map((spec := loading.describe(of)).tokenizer.convert_tokens_to_ids, (PLACE, "\n")))
    return Prompted(spec.transformer, (size, length, top), ids, (of,), of)


def get_config(arg="spt"):
    places = (memory := recipe.chosen(MEMORY, arg))["length"]
    model = {"name": f"{__file__}:prompted", "of": "recipe:configs/tiny.py", **memory}
    data = {"task": {"name": __file__, "places": places, "examples": 8000}, "packing": False, "window": 64 + places}
    data |= {"rollouts": {"prompt_window": 60 + places, "new": 8}, "eval_per_cell": 40, "eval_rows": 320}
    data |= {"batch_size": 16, "steps": 100, "optimizer": {"lr": 0.1, "warmup": 10}}
    return recipe.make(model=model, trainable="^memory/", **data)
