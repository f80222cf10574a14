"""Rollouts as a batch source: RL is SFT on data made a second ago.

Called with the train state, the source completes the next prompts with the current weights, scores the completions on the host,
and returns a batch whose columns (mask, advantages, old_logps, ...) an objective trains on. Its whole state is `position`, the
number of batches made: prompts and noise are functions of it, and completions follow from the weights.
"""

from collections.abc import Callable

import jax
import numpy as np

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.rollouts.advantages import leave_one_out
from jaxpost.sampling.decode import answers, complete
from jaxpost.step import combine


def columns(batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a whole batch as shapes; length: of a prompt's window and its completion together."""
    token = {"tokens": "int32", "segments": "int32", "positions": "int32", "mask": "bool"}
    token |= {"old_logps": "float32", "advantages": "float32"}
    row = {"rewards": "float32", "group_std": "float32", "truncated": "bool"}
    found = {k: jax.ShapeDtypeStruct((batch_size, length), np.dtype(dtype)) for k, dtype in token.items()}
    found |= {k: jax.ShapeDtypeStruct((batch_size,), np.dtype(dtype)) for k, dtype in row.items()}
    return {**found, "temperature": jax.ShapeDtypeStruct((), np.float32)}


class Rollouts:
    """Batches of `batch_size` rows: batch_size / group prompts, `group` completions of each.

    prompts(i) -> (record, token ids) of the i-th prompt of an endless sequence; reward(record, completion text) -> float;
    options: what `complete` takes. `samples` holds the latest batch's first groups, for the log.
    """

    def __init__(self, model, tokenizer, prompts: Callable, reward: Callable, mesh, *, batch_size, group, seed, options):
        if group < 2 or batch_size % group:
            raise UserError(f"config.rollouts.group: {group} must be at least 2 and divide config.batch_size {batch_size}.")
        self.rows = sharding.local_rows(mesh, batch_size)
        if not sharding.in_one_piece(mesh, batch_size):
            raise UserError(
                "config.mesh: with these sizes a host's rows are not neighbours in the batch, and it cannot complete prompts "
                "for them; split the batch along one axis of the torus, or run a host on its own."
            )
        if self.rows[0] % group or self.rows[1] % group:
            raise UserError(
                f"config.rollouts.group: {group} does not divide each process's rows {self.rows}; change batch_size."
            )
        self.model, self.tokenizer, self.prompts, self.reward, self.mesh = model, tokenizer, prompts, reward, mesh
        self.batch_size, self.group, self.options, self.seed = batch_size, group, options, seed
        self.position = 0
        self.samples: list[dict] = []

    def __call__(self, state) -> dict[str, np.ndarray]:
        """The next batch's local rows, completed by the state's weights."""
        first = self.position * (self.batch_size // self.group)
        drawn = [self.prompts(first + row // self.group) for row in range(*self.rows)]
        found = complete(
            self.model,
            combine(state.train, state.frozen),
            [ids for _, ids in drawn],
            mesh=self.mesh,
            seed=self.seed,
            step=self.position,
            rows=(self.rows[0], self.batch_size),
            **self.options,
        )
        self.position += 1
        return self._batch(drawn, found)

    def _batch(self, drawn, found) -> dict[str, np.ndarray]:
        starts = np.array([len(ids) for _, ids in drawn])
        ends = starts + found.lengths
        texts = answers(found, [ids for _, ids in drawn], self.tokenizer)
        rewards = np.array([self.reward(record, text) for (record, _), text in zip(drawn, texts, strict=True)], np.float32)
        groups = rewards.reshape(-1, self.group)
        advantages = leave_one_out(groups).reshape(-1)
        place = np.arange(found.tokens.shape[1])[None]
        inside, mask = place < ends[:, None], (place >= starts[:, None]) & (place < ends[:, None])
        self.samples = [
            {
                "prompt": self.tokenizer.decode(drawn[i][1]),
                "completion": texts[i],
                "reward": float(rewards[i]),
                "advantage": float(advantages[i]),
            }
            for i in range(min(len(drawn), 2 * self.group))
        ]
        return {
            "tokens": np.where(inside, found.tokens, 0).astype(np.int32),
            "segments": inside.astype(np.int32),
            "positions": np.where(inside, place, 0).astype(np.int32),
            "mask": mask,
            "old_logps": found.logps.astype(np.float32),
            "advantages": np.where(mask, advantages[:, None], 0.0).astype(np.float32),
            "rewards": rewards,
            "group_std": np.repeat(groups.std(axis=1, ddof=1), self.group).astype(np.float32),
            "truncated": ~found.stopped,
            "temperature": np.float32(self.options["temperature"]),
        }
