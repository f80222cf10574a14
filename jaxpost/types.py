"""The shared data types: a batch, a model's output, an objective's terms and the train state.

Axis letters, the same in every einsum, annotation and sharding rule:
B batch, S sequence (query), T key/cache length, L layers, D model width, F feed-forward width, N query heads,
K key/value heads, H head width, V vocabulary, G group (completions a prompt), E experts.

A batch is a dict of arrays. A column describes the token at its own place, never the next one:

    tokens     [B,S] int32    the token ids
    segments   [B,S] int32    which document of the row a token belongs to, counted from 1; 0 is padding
    positions  [B,S] int32    the token's place in its document
    mask       [B,S] bool     the tokens to learn: targets, the stop token included; never a document's first token
    old_logps  [B,S] float32  (rollouts) log-probability under the policy that sampled the token
    advantages [B,S] float32  (rollouts) how much better than expected the completion, or the token, was
    temperature []   float32  (rollouts) the sampling temperature
    fresh      []    bool     (rollouts) whether the weights are still those that sampled
    step       []    int32    the steps that the stage has taken
    progress   []    float32  the same as a share of its steps, below 1
    sampled    [B,S] bool     (where tokens are given) the policy's own tokens, masked ones included
    demonstrations [B,S] bool (where tokens are given) tokens that the policy did not sample and that are to be imitated
    embeds     [B,S,D] float32  (optional) vectors that enter the first layer in place of the tokens' where `embedded` is set
    embedded   [B,S] bool     (with embeds) the places of such vectors
    bidirectional [B,S] bool  (optional) tokens of a document that see each other, before and behind; the others see what is
                              before them
    token_types [B,S] int32   (optional) the kinds of tokens of models that embed them, as BERT's first and second sentence

The step adds `rows` [B] int32, each row's number in the global batch: an objective that draws noise folds it into its key, so
that the noise does not depend on how the batch is split. A column without a batch axis is a scalar, the same for every row.
Padding rows are all zeros.
"""

from typing import Any, NamedTuple

import flax.struct
import jax

Batch = dict[str, jax.Array]
Params = Any  # a pytree of arrays


class Term(NamedTuple):
    """One summand of a loss: `coefficient * sum / weight`, with the weight taken over the whole global batch.

    `sum` and `weight` are scalars that add over rows, microbatches and devices. The weight must come from masks alone,
    never from parameters: the step evaluates it before the first microbatch.
    """

    sum: jax.Array
    weight: jax.Array
    coefficient: float | jax.Array = 1.0


class Head(flax.struct.PyTreeNode):
    """An unembedding as data: logits = cap * tanh(hidden @ weight.T / cap), or hidden @ weight.T if cap is None.

    weight: [V,D].
    """

    weight: jax.Array
    soft_cap: float | None = flax.struct.field(pytree_node=False, default=None)


class Output(flax.struct.PyTreeNode):
    """A forward's result: final hidden states [B,S,D], the head that turns them into logits, the key/value cache.

    router (mixtures of experts, without a cache): {"probs", "picks"}, each [B,L,E] float32: for each row and layer, the
    router's probabilities and its choices of each expert, summed over the row's real tokens. taps: {site: activation} of the
    sites that were asked for (models/sites.py). whole: whether a token sees those behind it, so that none is left to predict.
    """

    hidden: jax.Array
    head: Head
    cache: Any = None
    router: Any = None
    taps: Any = None
    whole: bool = flax.struct.field(pytree_node=False, default=False)


class TrainState(flax.struct.PyTreeNode):
    """Everything a step reads and replaces.

    `train` and `frozen` have the model's tree structure, with None where the other one has the leaf. `ema` is a running mean of
    `train`, or None. `skipped` counts the updates skipped because they were not finite, `streak` the latest ones in a row.
    """

    step: jax.Array
    train: Params
    frozen: Params
    opt_state: Any
    ema: Params
    key: jax.Array
    skipped: jax.Array
    streak: jax.Array
