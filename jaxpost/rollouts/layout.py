"""From completions to the rows of a batch, and back.

A row is a prompt and one completion, or `together` of them, one document after the other; or, with a shared prefix, the prompt
once and its completions behind it as branches, so that no token of a prompt is computed twice:

    prompt a b c, completions x y and z         tokens     a b   c x y   c z
                                                segments   1 1   1 1 1   2 2
                                                branches   0 0   1 1 1   2 2
                                                positions  0 1   2 3 4   2 3
                                                mask             - y y   - y

Each branch begins with the prompt's last token, since that is what predicts its first. The completions of a row are its
documents, numbered from 1 in their order. Numbers about completions are [B,N] on the host, N the most new tokens; on the device
they are columns [R,S] like any other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """Where completions lie in rows: [B,N] row and place of each of their tokens, and which of them are tokens (`real`); and
    the columns [R,S] that do not depend on what was drawn, `tokens` but for the completions'.
    """

    row: np.ndarray
    place: np.ndarray
    real: np.ndarray
    columns: dict[str, np.ndarray]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """[B,N,...] (or [B,1]) values as a column [R,S,...], zero where no completion is."""
        values = np.broadcast_to(values, (*self.real.shape, *values.shape[2:]))
        column = np.zeros((*self.columns["tokens"].shape, *values.shape[2:]), values.dtype)
        column[self.row[self.real], self.place[self.real]] = values[self.real]
        return column

    def collect(self, column: np.ndarray) -> np.ndarray:
        """A column [R,S,...] as the completions' values [B,N,...], zero after their ends."""
        values = np.zeros((*self.real.shape, *column.shape[2:]), column.dtype)
        values[self.real] = column[self.row[self.real], self.place[self.real]]
        return values


def length(prompt_window: int, new: int, together: int, shared: bool) -> int:
    """The tokens of a row, S."""
    return prompt_window - 1 + together * (1 + new) if shared else together * (prompt_window + new)


def laid_out(
    prompts: Sequence[np.ndarray], lengths: np.ndarray, together: int, prompt_window: int, new: int, shared: bool
) -> Layout:
    """The layout of completions of `lengths` [B], of which each prompt has as many as the next; `together` of one prompt are in
    a row. The columns are tokens, segments, positions, mask, and branches where the prefix is shared.
    """
    size, group = length(prompt_window, new, together, shared), len(lengths) // len(prompts)
    names = ("tokens", "segments", "positions", *["branches"] * shared)
    columns = {name: np.zeros((len(lengths) // together, size), np.int32) for name in names}
    begins, end = np.zeros(len(lengths), int), 0
    for b, count in enumerate(lengths):
        ids, (row, place) = prompts[b // group], divmod(b, together)
        end = 0 if place == 0 else end
        kept = len(ids) - 1 if shared else 0
        # What comes once, and what comes with each completion, whose own tokens whoever drew them will fill in.
        parts = [(ids[:kept], 0, 0)] * (place == 0) + [(np.append(ids[kept:], np.zeros(count, np.int32)), kept, place + 1)]
        for tokens, position, branch in parts:
            here = (row, slice(end, end + len(tokens)))
            columns["tokens"][here], columns["segments"][here] = tokens, place + 1
            columns["positions"][here] = np.arange(position, position + len(tokens))
            if shared:
                columns["branches"][here] = branch
            end += len(tokens)
        begins[b] = end - count
    place = begins[:, None] + np.arange(new)
    real = np.arange(new) < np.asarray(lengths)[:, None]
    row = np.broadcast_to(np.arange(len(lengths))[:, None] // together, place.shape)
    where = Layout(row, place, real, columns)
    columns["mask"] = where.spread(real)
    return where
