"""Texts for masked language models: a document each, of which every token but the special ones may be asked for.

A text gets the special tokens that its tokenizer puts around texts, as [CLS] and [SEP]; conversations and completions are as in
demonstrations, and what is learned of them may be asked for. The column `mask_token` is the id that stands in place of a token
that is hidden.
"""

from collections.abc import Mapping

import numpy as np

from jaxpost.data import formats
from jaxpost.data.examples import Example, Row, Settings
from jaxpost.data.readers import Record
from jaxpost.data.row_types import demonstrations
from jaxpost.errors import UserError
from jaxpost.tokenizer import encode as encode_text

fills_window, check, fit = True, demonstrations.check, demonstrations.fit
_NO_PROMPT = np.zeros(0, np.int32)


def columns(reads: frozenset[str]) -> Mapping[str, str]:
    """The id of the mask token, at every token."""
    return {"mask_token": "int32"}


def encode(record: Record, settings: Settings) -> Example:
    """The document that a record holds. Raises UserError where nothing of it may be asked for, and for a tokenizer without a
    mask token.
    """
    tokenizer = settings.tokenizer
    if tokenizer.mask_token_id is None:
        raise UserError(
            "config.tokenizer: it has no mask token, which stands in place of a hidden token; add one, by python -m "
            "jaxpost.export --checkpoint=FOLDER --out=FOLDER2 --add='<mask>' --special, and name it as mask_token in "
            "FOLDER2/tokenizer_config.json."
        )
    document = formats.demonstration(record, settings.columns)
    if isinstance(document, formats.Text):
        encode_text(tokenizer, document.text)  # which names a character that the tokenizer lacks
        tokens = np.array(tokenizer(document.text, verbose=False)["input_ids"], np.int32)
        mask = np.ones(len(tokens), bool)
    else:
        ((tokens,), (mask,)) = demonstrations.encode(record, settings)[1:3]
    mask = mask & ~np.isin(tokens, tokenizer.all_special_ids)
    mask[:1] = False
    if not mask.any():
        raise UserError(f"{record.place}: no token of it can be hidden, beside special ones and the first; remove the row")
    return Example(_NO_PROMPT, (tokens,), (mask,))


def lay_out(example: Example, settings: Settings) -> Row:
    """{tokens, mask, mask_token}: [n]."""
    row = demonstrations.lay_out(example, settings)
    return row | {"mask_token": np.full(len(row["tokens"]), settings.tokenizer.mask_token_id, np.int32)}
