"""From an example to tokens and a mask: chat templates, and the question which tokens are learned.

A conversation is rendered to one string by a Jinja template, always through the tokenizer's own `apply_chat_template`.
Stock templates do not mark what the assistant said, so the spans are found by rendering: the conversation up to an assistant
turn, with the generation prompt, ends where the turn begins (that is exactly what the model sees when it is asked to speak);
the conversation up to and including the turn ends where it ends. Both must be prefixes of the whole. Where they are not, the
template rewrites earlier turns (as those that strip old reasoning do); guessing would train on the wrong tokens, so it is
refused.

The whole string is tokenised once and the spans are carried to tokens by character offsets. Tokenising the parts apart and
joining them gives other tokens at the seams. A token that straddles the beginning of a span is learned: part of it is the
assistant's. The token that ends the turn is the assistant's too, or a model would never learn to stop; white space after it is
the template's. A template that ends the assistant's turn without any special token is refused for the same reason.

A template writes the beginning-of-sequence token itself, so none is added to it. Prompts with completions and plain texts have
no template: they get that token where the tokenizer adds one on its own, and the end-of-sequence token by id.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpost.data.formats import Completion, Conversation, Example
from jaxpost.data.templates import adapted, render
from jaxpost.errors import UserError, printable
from jaxpost.tokenizer import encoding, opening

TRAIN_ON = ("assistant", "last", "completion", "all")
_PROBE = "probe"


def encode(example: Example, tokenizer: Any, template: str | None = None, train_on: str = "assistant") -> dict[str, np.ndarray]:
    """{"tokens": [n] int32, "mask": [n] bool} of an example; the first token is never in the mask.

    `template` is what `templates.jinja` takes: a name, a Jinja string, or None for the tokenizer's own. `train_on` picks what
    is learned of a conversation: "assistant" every assistant turn, "last" the last of them, "completion" those of the row's
    completion (the last where the row makes no difference), in all three save turns of weight 0; "all" everything. Of a prompt
    with a completion it is the completion, or with "all" everything; of a plain text everything.
    Raises UserError with the example's place.
    """
    if train_on not in TRAIN_ON:
        raise UserError(f"train_on={train_on!r} is not known; choose one of {', '.join(TRAIN_ON)}")
    if isinstance(example, Conversation):
        tokens, mask = _conversation(example, tokenizer, template, train_on)
    elif isinstance(example, Completion):
        tokens, mask = _document(example.prompt, example.completion, tokenizer, example.place)
    else:
        tokens, mask = _document("", example.text, tokenizer, example.place)
    if train_on == "all":
        mask = np.ones_like(mask)
    mask[:1] = False
    return {"tokens": tokens, "mask": mask}


def encode_prompt(messages: str | Sequence[dict[str, str]], tokenizer: Any, template: str | None = None) -> np.ndarray:
    """[n] int32: the messages, or one of the user, as generation sees them, the opening of the assistant's turn included."""
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return _tokenise(render(messages, tokenizer, template, True, "the prompt"), tokenizer, "the prompt")[0]


def stop_ids(tokenizer: Any, template: str | None = None) -> tuple[int, ...]:
    """The ids that end an assistant's turn: eos, and the special token the template puts after its content; may be empty."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    probe = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    tail = render(probe, tokenizer, template, False, "the template").rpartition(_PROBE)[2].lstrip()
    ends = [token for token in _specials(tokenizer) if tail.startswith(token)]
    if ends:
        found.append(_specials(tokenizer)[max(ends, key=len)])
    return tuple(dict.fromkeys(found))


def show(tokens: np.ndarray, mask: np.ndarray, tokenizer: Any, colour: bool = True) -> str:
    """The example (tokens, mask: [n]) as text, special tokens too; what is learned is green, or in ⟦ ⟧ without colour."""
    left, right = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")

    def decode(stop: int) -> str:
        ids = np.asarray(tokens[:stop]).tolist()
        return printable(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # Runs are cut out of the whole text: a run decoded alone would lose its leading space in some tokenizers.
    whole = decode(len(tokens))
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
    cuts = [len(os.path.commonprefix([decode(edge), whole])) for edge in edges]
    parts = []
    for edge, start, stop in zip(edges, cuts, cuts[1:], strict=False):
        text = whole[start:stop]
        parts.append(f"{left}{text}{right}" if text and mask[edge] else text)
    return "".join(parts)


def answer(example: Conversation, tokenizer: Any, template: str | None = None) -> tuple:
    """(tokens, starts and ends [n], (begin, end), text): a conversation's text, where each of its tokens starts and ends in it,
    and where its last assistant turn does, in characters.
    """
    example = adapted(example, tokenizer, template)
    whole = render(example.messages, tokenizer, template, False, example.place, example.tools)
    turn = max(number for number, message in enumerate(example.messages) if message["role"] == "assistant")
    return *_tokenise(whole, tokenizer, example.place), _span(example, turn, whole, tokenizer, template, "last"), whole


def _conversation(example: Conversation, tokenizer: Any, template: str | None, train_on: str) -> tuple[np.ndarray, np.ndarray]:
    """tokens, mask [n]: of the whole, the tokens that belong to the assistant's turns chosen by train_on."""
    example = adapted(example, tokenizer, template)
    whole = render(example.messages, tokenizer, template, False, example.place, example.tools)
    tokens, starts, ends = _tokenise(whole, tokenizer, example.place)
    mask = np.zeros(len(tokens), np.bool_)
    if train_on == "all":
        return tokens, mask
    specials = list(_specials(tokenizer).values())
    is_special = np.isin(tokens, specials)
    turns = [number for number, message in enumerate(example.messages) if message["role"] == "assistant"]
    for turn in _chosen(turns, example.prompt, train_on):
        if turn in example.untrained:
            continue
        begin, end = _span(example, turn, whole, tokenizer, template, train_on)
        # A special token may swallow the white space after it, into the span of the next turn, but it is the header's.
        inside = (ends > begin) & (starts < end) & ~(is_special & (starts < begin))
        if not inside.any() or not is_special[np.flatnonzero(inside)[-1]]:
            raise UserError(
                f"{example.place}: the chat template ends the assistant's turn in {whole[begin:end][-12:]!r}, which is no"
                " special token, so a model would never learn to stop; end the turn with {{ eos_token }}"
                + ("" if tokenizer.eos_token else " and give the tokenizer an eos_token")
            )
        mask |= inside
    return tokens, mask


def _chosen(turns: list[int], prompt: int | None, train_on: str) -> list[int]:
    if train_on == "completion" and prompt is not None:
        return [turn for turn in turns if turn >= prompt]
    return turns if train_on == "assistant" else turns[-1:]


def _span(example: Conversation, turn: int, whole: str, tokenizer: Any, template: str | None, train_on: str) -> tuple[int, int]:
    """Where an assistant turn begins and ends in the rendered whole, in characters."""
    before = render(example.messages[:turn], tokenizer, template, True, example.place, example.tools)
    last = turn + 1 == len(example.messages)
    part = example.messages[: turn + 1]
    through = whole if last else render(part, tokenizer, template, False, example.place, example.tools)
    if whole.startswith(before) and whole.startswith(through):
        return len(before), len(through.rstrip())
    where = f"{example.place}, message {turn + 1}"
    bare = render(example.messages[:turn], tokenizer, template, False, example.place, example.tools)
    if whole.startswith(bare) and not whole.startswith(before):
        raise UserError(
            f"{where}: for generation the chat template opens the assistant's turn with {before[len(bare) :]!r}, and this turn"
            " does not begin so; begin its content like that, or use another template"
        )
    remedy = "end the conversation with the assistant, or use another template"
    if train_on != "last":
        remedy = 'say train_on="last"'
    raise UserError(
        f"{where}: the chat template rewrites earlier turns (a rendered part is not the beginning of the rendered whole), so"
        f" the assistant's words cannot be told apart; {remedy}"
    )


def _document(prompt: str, completion: str, tokenizer: Any, place: str) -> tuple[np.ndarray, np.ndarray]:
    """tokens, mask [n]: [bos] + the strings tokenised as one + eos; in the mask the completion and eos."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{place}: the tokenizer has no eos_token, so a model would never learn to stop; give it one")
    tokens, _, ends = _tokenise(prompt + completion, tokenizer, place)
    mask = ends > len(prompt)
    first = opening(tokenizer)
    # A text that spells the special tokens out itself has them already.
    if first and tokens[:1].tolist() != first:
        tokens, mask = np.insert(tokens, 0, first), np.insert(mask, 0, False)
    if tokens[-1:].tolist() != [tokenizer.eos_token_id]:
        tokens, mask = np.append(tokens, np.int32(tokenizer.eos_token_id)), np.append(mask, True)
    return tokens, mask


def _tokenise(text: str, tokenizer: Any, place: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens [n] int32, and where each starts and ends in the text, in characters. No special token is added."""
    if not tokenizer.is_fast:
        raise UserError("the tokenizer gives no character offsets, which masks need; use one with a tokenizer.json")
    try:
        encoded = encoding(tokenizer, text, return_offsets_mapping=True, verbose=False)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int32), offsets[:, 0], offsets[:, 1]


def _specials(tokenizer: Any) -> dict[str, int]:
    """Special and added tokens by their text: whatever a text cannot spell by accident of its characters."""
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | tokenizer.get_added_vocab()
