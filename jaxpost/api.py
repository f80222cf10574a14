"""A model in Python: what `jaxpost.load` gives.

    model = jaxpost.load("FOLDER")                       a Hugging Face folder, a workdir, or one checkpoint in a workdir
    model.generate("Once upon a time", new=40)           [text]
    model.logits(tokens)                                 [B,S,V]
    model.scores(tokens)["logps"]                        [B,S], without the [B,S,V]
    model.tap("layers.3.head_out", ["Once upon a time"]) [B,S,N,H], an activation (models/sites.py)
    model.patched({"layers.3.mlp_out": 0.0})             a model without that layer's feed-forward
    model.embed(["a text", "another"])                   [2,D]
    jax.grad(lambda p: loss(model.forward(p, batch)))(model.params)

`params` is a plain tree of arrays in its place on the mesh, and `forward` a plain function of it, the same that objectives get.
The other methods fill in a batch's columns and compile once for each shape.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import sharding
from jaxpost.config import resolve, type_hints
from jaxpost.data import chat, templates
from jaxpost.errors import UserError
from jaxpost.models import loading, prefix, protocol, routes, vocabulary
from jaxpost.models.composed import Patched
from jaxpost.models.heads import logits
from jaxpost.models.sites import checked
from jaxpost.objectives import documents
from jaxpost.objectives.logprobs import token_scores
from jaxpost.sampling.text import completed, continuation, encoded
from jaxpost.storage import compile_cache
from jaxpost.tokenizer import check_ids
from jaxpost.types import Batch, Output, Params

WIDTH = 64  # texts that are embedded are padded to a multiple of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its weights, its tokenizer (None where its folder has none), config.json's fields, and the mesh it is on."""

    transformer: protocol.Model
    # Left out of the repr, which a notebook prints: it would take pages.
    params: Params = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)
    config: dict = dataclasses.field(repr=False)
    mesh: Any
    ends: tuple[int, ...] = ()  # the ids that end a completion besides the tokenizer's and the template's
    suppressed: tuple[int, ...] = ()  # the ids that no completion has

    def forward(self, params: Params, batch: Batch) -> Output:
        """Final hidden states [B,S,D], and the head that makes logits of them; batch: tokens, segments, positions [B,S]."""
        return self.transformer.forward(params, batch)

    @property
    def max_positions(self) -> int:
        """The most tokens that a document may have."""
        return prefix.max_positions(self.transformer, self.params)

    def logits(self, tokens, lengths=None, *, patch: Mapping | None = None, columns: Mapping | None = None) -> jax.Array:
        """Logits [B,S,V] float32 of ids [B,S]; each place's predict the next token.

        lengths [B]: the number of real tokens in each row, where rows are padded on the right; padding does not affect them,
        and its logits mean nothing. patch: {site: value, or function} (models/sites.py). columns: {name: a number of each row},
        by which rows choose among the model's adapters. This is a very large array; `scores` does without it.
        """
        batch, rows = self._batch(tokens, lengths, numbers=columns)
        with sharding.use(self.mesh):
            return _logits(self.transformer, self.params, batch, *_sorted(patch))[:rows]

    def tap(self, sites: str | Sequence[str], prompts, lengths=None, *, patch: Mapping | None = None):
        """The activations at `sites`, such as "layers.3.head_out" or "layers.*.resid_post" (models/sites.py): an array for one
        name, else {name: array}.

        prompts: ids [B,S] with `lengths` as in `logits`; or prompts as `complete` takes them, which `encoded` turns into ids.
        Past a row's length activations mean nothing. patch: changes of other activations.
        Raises UserError for a site that the model does not have.
        """
        if not (isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 2):
            prompts, lengths = self.encoded(prompts)
        names = (sites,) if isinstance(sites, str) else tuple(sites) if isinstance(sites, (list, tuple)) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"tap: {sites!r} names no site; give a name such as 'layers.3.head_out', or a list of names.")
        batch, rows = self._batch(prompts, lengths)
        with sharding.use(self.mesh):
            taps = _tapped(self.transformer, self.params, batch, names, *_sorted(patch))
        taps = {name: x[:, :rows] if ".*." in name else x[:rows] for name, x in taps.items()}
        return taps[sites] if isinstance(sites, str) else taps

    def only(self, number: int) -> "Model":
        """The model with one of several adapters, among which rows choose, for all rows. Raises UserError for no such one."""
        return dataclasses.replace(self, params=routes.only(self.params, number))

    def patched(self, patch: Mapping) -> "Model":
        """The model with {site: value, or function (value, batch) -> value} in every forward pass, generation included
        (models/sites.py). A value is broadcast; in generation a site has the tokens of a prompt, or one token.
        """
        return dataclasses.replace(self, transformer=Patched(self.transformer, checked(patch)))

    def encoded(self, prompts: str | Sequence, *, chat: bool = False, template: str | None = None) -> tuple:
        """(ids [B,S] with zeros after, lengths [B]) of prompts as `complete` takes them."""
        self.need_tokenizer()
        ids = [encoded(self.tokenizer, prompt, chat, template) for prompt in _several(prompts)]
        lengths = np.array([len(x) for x in ids])
        tokens = np.zeros((len(ids), max(lengths, default=0)), np.int32)
        for row, x in zip(tokens, ids, strict=True):
            row[: len(x)] = x
        return tokens, lengths

    def scores(self, tokens, lengths=None, *, columns: Mapping | None = None) -> dict[str, jax.Array]:
        """Scores of each token of ids [B,S] given those before it: its log-probability `logps`, the distribution's `entropy`,
        and `correct` (1 or 0), whether it is the likeliest, each [B,S] float32; zero at a row's first token and past its
        length. columns: as in `logits`.
        """
        batch, rows = self._batch(tokens, lengths, beyond=1, numbers=columns)  # the last token is only scored
        with sharding.use(self.mesh):
            return {k: v[:rows] for k, v in _scores(self.transformer, self.params, batch).items()}

    def generate(self, prompts: str | Sequence, **options) -> list[str]:
        """`n` completions of each prompt, those of one prompt side by side; see `complete` for the arguments."""
        return [continuation(self.tokenizer, *pair) for pair in self._completed(prompts, **options)]

    def complete(self, prompts: str | Sequence, **options) -> list[np.ndarray]:
        """`generate` without decoding: the completions' ids, without the token that stopped them.

        prompts: a string, or a list of them; or a conversation (a list of {"role", "content"}, whose next turn is the
        assistant's), or a list of those; or arrays of token ids, used as they are. Options: chat=False: a string is a user's
        message, not text to continue. template=None: for chat, a name or Jinja. new=None: the most tokens of a completion; 200,
        or what the model has room for. temperature=0.0: 0 takes the likeliest token. n=1: completions a prompt. seed=0: which
        random numbers. processors=(): what may be said, named as in `rollouts.processors`, or functions. beams=None: the width
        of a beam search, which gives the n best; length_penalty=1.0: of its scores (sampling/beam.py). columns=None: {name: a
        number of each prompt}, by which prompts choose among adapters. Raises UserError for no or empty prompts, where prompt
        and `new` exceed the model's positions, or without a tokenizer.
        """
        return [ids for _, ids in self._completed(prompts, **options)]

    def _completed(self, prompts, **options) -> list[tuple[np.ndarray, np.ndarray]]:
        self.need_tokenizer()
        prompts = _several(prompts)
        bound = _bound(completed, {"mesh": self.mesh, "ends": self.ends, "suppressed": self.suppressed, **options}, "generate")
        return bound(self.transformer, self.params, self.tokenizer, prompts)

    def embed(
        self,
        texts: str | Sequence,
        *,
        pooling: str | None = None,
        normalise: bool = True,
        instruction: str = "",
        template: str | None = None,
        too_long: str = "error",
        rows: int = 32,
    ) -> np.ndarray:
        """Embeddings [N,D] float32 of texts: strings, or conversations (lists of messages).

        pooling: "last", "mean" or "latent", as the model was trained (`objectives.documents.pooled`); None is latent for a
        model that has learned that, else last. normalise: whether each has length 1. instruction: stands in front of each
        string, or is the system turn. template: for messages, a name or Jinja. too_long: "error", or "truncate" what exceeds
        the model's positions; the last token stays. rows: texts at a time, which changes nothing. Raises UserError for an empty
        text, one that is too long, and without a tokenizer.
        """
        self.need_tokenizer()
        options = {"pooling": pooling, "normalise": normalise, "instruction": instruction, "template": template}
        type_hints.check(Model.embed, {**options, "too_long": too_long, "rows": rows}, "embed")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, (str, list)) for text in texts):
            raise UserError(f"embed: {str(texts)[:80]!r}; give a text, a list of texts, or a list of conversations.")
        pooling = ("latent" if "latent" in self.params else "last") if pooling is None else pooling
        if pooling not in documents.POOLINGS or too_long not in ("error", "truncate") or rows < 1:
            raise UserError(
                f"embed: pooling={pooling!r} is {' or '.join(documents.POOLINGS)}, too_long={too_long!r} error or truncate, "
                f"rows={rows} at least 1."
            )
        jinja, most = templates.jinja(self.tokenizer, template), self.max_positions
        options = {"template": jinja, "instruction": instruction}
        ids = [chat.encode_text(x, self.tokenizer, place=f"text {i + 1}", **options) for i, x in enumerate(texts)]
        for i, one in enumerate(ids):
            if len(one) > most and too_long == "error":
                raise UserError(f"text {i + 1}: it has {len(one)} tokens and the model takes {most}; say too_long='truncate'.")
        ids = [one if len(one) <= most else np.append(one[: most - 1], one[-1:]) for one in ids]
        # A text's width depends on itself alone, and so does its embedding.
        widths = np.array([min(most, len(one) + -len(one) % WIDTH) for one in ids], int)
        vectors = np.zeros((len(ids), self.transformer.width), np.float32)
        for width in np.unique(widths):
            same = np.flatnonzero(widths == width)
            for members in (same[first : first + rows] for first in range(0, len(same), rows)):
                vectors[members] = self._pooled([ids[i] for i in members], width, rows, pooling, normalise)
        return vectors

    def _pooled(self, ids: list[np.ndarray], width: int, rows: int, pooling: str, normalise: bool) -> np.ndarray:
        """The embeddings of at most `rows` texts of at most `width` tokens."""
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row, one in enumerate(ids):
            tokens[row, : len(one)], lengths[row] = one, len(one)
        batch, _ = self._batch(tokens, lengths)
        with sharding.use(self.mesh):
            return sharding.everywhere(_embeddings(self.transformer, self.params, batch, pooling, normalise))[: len(ids)]

    def with_tokens(self, add: Sequence[str], **options) -> "Model":
        """This model with further tokens; see `models.vocabulary.grown` for by="mean", multiple=1 and special=False."""
        self.need_tokenizer()
        bound = _bound(vocabulary.grown, {"add": add, **options}, "with_tokens")
        model, params, words, config = bound(self.transformer, self.params, self.tokenizer, self.config, self.mesh)
        suppressed = vocabulary.suppressed(self.suppressed, self.transformer.vocab, model.vocab, words)
        return Model(model, params, words, config, self.mesh, self.ends, suppressed)

    def need_tokenizer(self) -> None:
        """Raises UserError for a model without a tokenizer."""
        if self.tokenizer is None:
            raise UserError(
                "the model's folder has no tokenizer (tokenizer.json), so there is no way from text to tokens; give it one."
            )

    def _batch(self, tokens, lengths, beyond: int = 0, numbers: Mapping | None = None) -> tuple[dict, int]:
        """(columns on the mesh, number of given rows): one document a row, with rows of padding where the mesh needs more."""
        tokens = _array(tokens, "tokens are ids [B,S], all rows of one length")
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"tokens are ids [B,S], all rows of one length; these are {tokens.dtype} of shape {tokens.shape}.")
        check_ids(tokens, self.transformer.vocab, self.tokenizer, "tokens")
        rows, length = tokens.shape
        most = self.max_positions + beyond
        if not 0 < length <= most or not rows:
            raise UserError(f"tokens of shape {tokens.shape}: give rows of 1 to {most} tokens, and one at least.")
        lengths = np.full(rows, length) if lengths is None else _array(lengths, "lengths are numbers, one a row")
        if lengths.shape != (rows,) or lengths.dtype.kind not in "iu" or not ((lengths >= 0) & (lengths <= length)).all():
            raise UserError(f"lengths are {rows} numbers of 0 to {length}, one a row; these are {lengths.tolist()}.")
        real = np.arange(length) < lengths[:, None]
        columns = {"tokens": np.where(real, tokens, 0), "segments": real, "positions": np.where(real, np.arange(length), 0)}
        chosen = routes.of_prompts(numbers or {}, routes.columns(self.params), rows)
        columns |= {name: np.where(real, x[:, None], 0) for name, x in chosen.items()}
        extra = -rows % (self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        padded = {k: np.pad(x.astype(np.int32), ((0, extra), (0, 0))) for k, x in columns.items()}
        first, last = sharding.local_rows(self.mesh, rows + extra)
        return sharding.distribute({k: x[first:last] for k, x in padded.items()}, self.mesh, rows + extra), rows


def _bound(function: Callable, options: Mapping[str, Any], place: str) -> Callable:
    """The function with options that a caller gave. Raises UserError for one that it does not have, or of another type."""
    try:
        return resolve.bind(function, options, place)
    except UserError as error:
        raise UserError(str(error).removeprefix("config: ")) from error


def _array(value: Any, kind: str) -> np.ndarray:
    """The array of a value. Raises UserError, saying what kind it is, for one of no even shape."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise UserError(f"{kind}; these are {str(value)[:80]}.") from error


def _several(prompts) -> list:
    """Prompts as a list: a string, a conversation or ids are one. Raises UserError for what is no prompt and no list."""
    if not isinstance(prompts, (str, list, tuple, np.ndarray)):
        raise UserError(f"prompts: {str(prompts)[:80]!r}; give a text, a conversation, an array of ids, or a list of these.")
    one = isinstance(prompts, (str, np.ndarray)) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    return [prompts] if one else list(prompts)


def _sorted(patch: Mapping | None) -> tuple[dict, tuple]:
    """(a patch's values, its functions): the former may change without a compilation."""
    patch = checked({} if patch is None else patch)
    functions = tuple((name, change) for name, change in patch.items() if callable(change))
    return {name: jnp.asarray(change) for name, change in patch.items() if not callable(change)}, functions


@functools.partial(jax.jit, static_argnames=("model", "functions"))
def _logits(model: protocol.Model, params: Params, batch: Batch, values: dict, functions: tuple) -> jax.Array:
    out = model.forward(params, batch, patch={**values, **dict(functions)})
    return sharding.shard(logits(out.hidden, out.head), "BSV")


@functools.partial(jax.jit, static_argnames=("model", "sites", "functions"))
def _tapped(model: protocol.Model, params: Params, batch: Batch, sites: tuple, values: dict, functions: tuple) -> dict:
    return model.forward(params, batch, tap=sites, patch={**values, **dict(functions)}).taps


@functools.partial(jax.jit, static_argnums=0)
def _scores(model: protocol.Model, params: Params, batch: Batch) -> dict[str, jax.Array]:
    mask = (batch["segments"] > 0) & (jnp.arange(batch["tokens"].shape[1]) > 0)
    return token_scores(model.forward(params, {**batch, "mask": mask}), batch, mask)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _embeddings(model: protocol.Model, params: Params, batch: Batch, pooling: str, normalise: bool) -> jax.Array:
    """[B,D]: of rows of one document each, whose tokens all count but the first, as in training."""
    batch = {**batch, "mask": (batch["segments"] > 0) & (batch["positions"] > 0)}
    hidden = model.forward(params, batch).hidden
    vectors = documents.pooled(hidden, batch, pooling=pooling, latent=params.get("latent"), count=2)[:, 1]
    return documents.unit(vectors) if normalise else vectors


def load(
    where: str | Mapping,
    *,
    mesh=None,
    dtype: str = "float32",
    adapter: Mapping | Sequence | str | None = None,
    trust: Sequence[str] = (),
) -> Model:
    """The model of a Hugging Face folder, a workdir, or one checkpoint in a workdir; config.json's fields give a fresh one.

    mesh: of `jaxpost.sharding.make_mesh`; None is all devices along `data`. dtype: of the computation, float32 or bfloat16; the
    weights are float32. adapter: a recipe's entry, such as {"name": "peft", "folder": "FOLDER"} or {"name": "lora", "rank":
    16}, or a list of entries; a workdir's own adapter is always loaded. trust: functions of yours, FILE.py:function, that the
    model's files may name. Raises UserError if `where` is none of these, or broken, or not supported.
    """
    compile_cache.keep()
    resolve.trust(trust)
    mesh = sharding.make_mesh() if mesh is None else mesh
    spec, params = loading.open_model(where if isinstance(where, Mapping) else str(where), mesh, dtype, adapter)
    return Model(spec.transformer, params, spec.tokenizer, spec.config, mesh, spec.ends, spec.suppressed)
