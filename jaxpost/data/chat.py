"""From an example to tokens and a mask of learned tokens, with chat templates.

A Jinja template renders a conversation to one string, always through the tokenizer's own `apply_chat_template`. Stock templates
do not mark the assistant's text, so the spans are found by rendering prefixes. The conversation before an assistant turn, with
the generation prompt, ends where the turn begins, exactly as the model sees it when it generates. The conversation including
the turn ends where the turn ends. Both must be prefixes of the whole. Where they are not, the template rewrites earlier turns
(as those that strip old reasoning do). It is refused, since guessing would train on the wrong tokens. Templates that only end
the last turn differently (Phi-3, OLMo) are accepted: there a turn ends with the special tokens that follow it in both texts, or
with the one that ends the user's turn. What is learned must be in the text (rendered.py).

The whole string is tokenised once, and character offsets map the spans to tokens: tokenising the parts separately would give
other tokens at the seams. A token across the beginning of a span is learned, since part of it is the assistant's. So is the
token that ends the turn, or a model would never learn to stop; white space after it is the template's. For the same reason a
template is refused if it ends the assistant's turn without its own special token.

A template writes the beginning-of-sequence token itself, so none is added. Prompts with completions and plain texts have no
template: they get that token if the tokenizer adds one by default, and the end-of-sequence token by id.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpost.data import parts, rendered
from jaxpost.data.formats import Completion, Conversation, Example, Text
from jaxpost.data.messages import check, filled, turns
from jaxpost.data.templates import adapted, render
from jaxpost.errors import UserError, printable
from jaxpost.tokenizer import encoding, is_enclosing, opening

TRAIN_ON = ("assistant", "last", "completion", "all")
_PROBE = "probe"
_KEEP = "use another template (config.template), or take that out of the row"


def encode(example: Example, tokenizer: Any, template: str | None = None, train_on: str = "assistant") -> dict[str, np.ndarray]:
    """{"tokens": [n] int32, "mask": [n] bool} of an example; the first token is never in the mask.

    template: as in `templates.jinja`: a name, a Jinja string, or None for the tokenizer's own. train_on: what is learned of a
    conversation: "assistant" every assistant turn, "last" the last one, "completion" those of the row's completion (the last if
    the row has no prompt apart), each without turns of weight 0; "all" everything. Of a prompt with a completion the completion
    is learned, or with "all" everything; of a plain text everything; of parts those that say so. Raises UserError with the
    example's place.
    """
    if train_on not in TRAIN_ON:
        raise UserError(f"train_on={train_on!r} is not known; choose one of {', '.join(TRAIN_ON)}")
    if isinstance(example, Conversation):
        tokens, mask = _conversation(example, tokenizer, template, train_on)
    elif isinstance(example, Completion):
        tokens, mask = _document(example.prompt, example.completion, tokenizer, example.place)
    elif isinstance(example, parts.Parts):
        tokens, mask = parts.encode(example, tokenizer)
    else:
        tokens, mask = _document("", example.text, tokenizer, example.place)
    if train_on == "all":
        mask = np.ones_like(mask)
    mask[:1] = False
    return {"tokens": tokens, "mask": mask}


def encode_prompt(messages: str | Sequence[dict[str, str]], tokenizer: Any, template: str | None = None) -> np.ndarray:
    """[n] int32: the prompt for generation, with the opening of the assistant's turn. messages: a list, or one user message."""
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    text = render(messages, tokenizer, template, True, "the prompt")
    rendered.check_prompt(messages, None, text, range(1, len(messages) + 1), "the prompt")
    return _tokenise(text, tokenizer, "the prompt")[0]


def encode_text(
    text: str | list | dict, tokenizer: Any, template: str | None = None, *, instruction: str = "", place: str = "the text"
) -> np.ndarray:
    """[n] int32: all of a text to be embedded. Of a string [bos] + it + eos, so that all end in the same token, or what a
    tokenizer without eos puts around it, as BERT's [CLS] and [SEP]; of messages the conversation, with the opening of the
    assistant's turn if it does not end with one.

    instruction: stands in front of a string as it is, or is the system turn of messages. Raises UserError with the place.
    """
    if isinstance(text, str) and is_enclosing(tokenizer):
        _tokenise(whole := instruction + filled(text, "text", place), tokenizer, place)  # which names what it lacks
        return np.array(tokenizer(whole, verbose=False)["input_ids"], np.int32)
    if isinstance(text, str):
        return encode(Text(instruction + filled(text, "text", place), place), tokenizer)["tokens"]
    messages = turns(text, "text", place)
    if instruction and messages[:1] and messages[0]["role"] == "system":
        raise UserError(f"{place}: there is an instruction and a system turn; leave one of them out")
    messages = [{"role": "system", "content": instruction}] * bool(instruction) + messages
    if messages and messages[-1]["role"] == "assistant":
        return encode(Conversation(check(messages, place), place), tokenizer, template, "all")["tokens"]
    try:
        return encode_prompt(messages, tokenizer, template)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def stop_ids(tokenizer: Any, template: str | None = None, ends: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids that end an assistant's turn, maybe none: eos, the model's `ends`, and the template's special token there."""
    ids = [*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *ends]
    probe = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    tail = render(probe, tokenizer, template, False, "the template").rpartition(_PROBE)[2].lstrip()
    ends = [token for token in specials(tokenizer) if tail.startswith(token)]
    if ends:
        ids.append(specials(tokenizer)[max(ends, key=len)])
    return tuple(dict.fromkeys(ids))


def show(tokens: np.ndarray, mask: np.ndarray, tokenizer: Any, colour: bool = True) -> str:
    """The example (tokens, mask: [n]) as text with special tokens; learned text is green, or in ⟦ ⟧ without colour."""
    left, right = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")

    def decode(stop: int) -> str:
        ids = np.asarray(tokens[:stop]).tolist()
        return printable(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # Runs are slices of the whole text: decoded alone, a run loses its leading space in some tokenizers.
    whole = decode(len(tokens))
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
    cuts = [len(os.path.commonprefix([decode(edge), whole])) for edge in edges]
    parts = []
    for edge, start, stop in zip(edges, cuts, cuts[1:], strict=False):
        text = whole[start:stop]
        parts.append(f"{left}{text}{right}" if text and mask[edge] else text)
    return "".join(parts)


def answer(example: Conversation, tokenizer: Any, template: str | None = None) -> tuple:
    """(tokens, starts, ends [n], (begin, end), text) of a conversation: its tokens, their spans in the text, and the span of
    its last assistant turn, in characters.
    """
    example, whole = _rendered(example, tokenizer, template)
    turn = max(number for number, message in enumerate(example.messages) if message["role"] == "assistant")
    return *_tokenise(whole, tokenizer, example.place), _span(example, turn, whole, tokenizer, template), whole


def _rendered(example: Conversation, tokenizer: Any, template: str | None) -> tuple[Conversation, str]:
    """(the conversation adapted to the template, its text). Raises UserError if the text lacks part of the prompts."""
    example = adapted(example, tokenizer, template)
    whole = render(example.messages, tokenizer, template, False, example.place, example.tools)
    rendered.check_prompt(example.messages, example.tools, whole, example.numbered, example.place)
    return example, whole


def _conversation(example: Conversation, tokenizer: Any, template: str | None, train_on: str) -> tuple[np.ndarray, np.ndarray]:
    """tokens, mask [n] of the conversation; the mask has the tokens of the assistant's turns chosen by train_on."""
    example, whole = _rendered(example, tokenizer, template)
    tokens, starts, ends = _tokenise(whole, tokenizer, example.place)
    mask = np.zeros(len(tokens), np.bool_)
    turns = [number for number, message in enumerate(example.messages) if message["role"] == "assistant"]
    if train_on == "all":
        if lost := rendered.first_left_out([example.messages[turn] for turn in turns], whole):
            remedy = 'say train_on="last"' if turns[lost[0]] < turns[-1] else _KEEP
            raise UserError(_left_out(example, turns[lost[0]], lost[1], remedy))
        return tokens, mask
    is_special = np.isin(tokens, list(specials(tokenizer).values()))
    for turn in _chosen(turns, example.prompt, train_on):
        if turn in example.untrained:
            continue
        begin, end = _span(example, turn, whole, tokenizer, template)
        if rendered.left_out(example.messages[turn], whole[begin:end]):
            # The generation prompt may contain the turn's own beginning, such as <think>.
            bare = render(example.messages[:turn], tokenizer, template, False, example.place, example.tools)
            _check_rendered(example, turn, whole[len(bare) if whole.startswith(bare) else begin : end])
        # A header's special token may include white space after it, in the span of the next turn, but is not the turn's.
        inside = (ends > begin) & (starts < end) & ~(is_special & (starts < begin))
        final = int(np.flatnonzero(inside)[-1]) if inside.any() else 0
        content_end = begin + rendered.content_end(example.messages[turn]["content"], whole[begin:end])
        if not inside.any() or not is_special[final] or starts[final] < content_end:
            fault = "is the turn's own text" if inside.any() and is_special[final] else "is no special token"
            raise UserError(
                f"{example.place}: the chat template ends the assistant's turn in {whole[begin:end][-12:]!r}, which {fault},"
                " so a model would never learn to stop; end the turn with {{ eos_token }}"
                + ("" if tokenizer.eos_token else " and give the tokenizer an eos_token")
            )
        mask |= inside
    return tokens, mask


def _check_rendered(example: Conversation, turn: int, text: str) -> None:
    """Raises UserError if the text lacks a part of an assistant's turn."""
    if part := rendered.left_out(example.messages[turn], text):
        raise UserError(_left_out(example, turn, part, _KEEP))


def _left_out(example: Conversation, turn: int, part: str, remedy: str) -> str:
    return f"{_at(example, turn)}: the chat template leaves out {part} of the assistant's turn; {remedy}"


def _at(example: Conversation, turn: int) -> str:
    return f"{example.place}, message {example.numbered[turn]}"


def _chosen(turns: list[int], prompt: int | None, train_on: str) -> list[int]:
    if train_on == "completion" and prompt is not None:
        return [turn for turn in turns if turn >= prompt]
    return turns if train_on == "assistant" else turns[-1:]


def _span(example: Conversation, turn: int, whole: str, tokenizer: Any, template: str | None) -> tuple[int, int]:
    """(begin, end) of an assistant turn in the rendered whole, in characters."""

    def rendering(messages: list, generate: bool = False) -> str:
        return render(messages, tokenizer, template, generate, example.place, example.tools)

    before = rendering(example.messages[:turn], True)
    last = turn + 1 == len(example.messages)
    through = whole if last else rendering(example.messages[: turn + 1])
    if whole.startswith(before) and whole.startswith(through):
        return len(before), len(through.rstrip())
    bare = rendering(example.messages[:turn])
    if whole.startswith(before) and through.startswith(before):
        stop = _end_of_earlier(whole, through, before, bare, tuple(specials(tokenizer)))
        if stop is not None:
            return len(before), stop
    if not before.startswith(bare):
        # Some templates end a text with the end-of-text token unless more follows.
        bare = os.path.commonprefix([bare, before])
    _check_rendered(example, turn, through[len(bare) :] if through.startswith(bare) else through)
    if whole.startswith(bare) and not whole.startswith(before):
        lead = before[len(os.path.commonprefix([before, whole])) :]
        # A template may strip a complete thought.
        thought = lead + ("-</think>" if "<think>" in lead else "")
        led = example.messages[turn] | {"content": thought + example.messages[turn]["content"]}
        remedy = "use another template"
        if rendering([*example.messages[:turn], led]).startswith(before):
            remedy = f"begin its content with {lead!r}, or {remedy}"
        raise UserError(
            f"{_at(example, turn)}: for generation the chat template opens the assistant's turn with {before[len(bare) :]!r},"
            f" and this turn does not begin so; {remedy}"
        )
    place = len(os.path.commonprefix([through, whole]))
    alone, here = (text[max(place - 10, 0) : place + 20] for text in (through, whole))
    remedy = "end the conversation with the assistant, or use another template"
    if any(message["role"] == "assistant" for message in example.messages[turn + 1 :]):
        remedy = 'say train_on="last", make a row of each answer, or use another template'
    raise UserError(
        f"{_at(example, turn)}: the chat template rewrites earlier turns: where this turn is the last it writes {alone!r}, and"
        f" where the conversation goes on {here!r}, so what is learned would not be what is generated; {remedy}"
    )


def _end_of_earlier(whole: str, through: str, before: str, bare: str, specials: tuple[str, ...]) -> int | None:
    """The end of a turn in the whole if the template ends the last turn differently from earlier ones (Phi-3, OLMo).

    None if more than the end differs, or if earlier turns have no end. through: the text up to and including the turn. before,
    bare: the text before it, with and without the generation prompt.
    """
    body, bare_body = _body(through, len(before), specials), _body(bare, 0, specials)
    if whole[:body] != through[:body]:
        return None
    here, alone = _marks(whole, body, specials), _marks(through, body, specials)
    common = 0
    while common < min(len(here), len(alone)) and here[common][0] == alone[common][0]:
        common += 1
    # The mark that ends the user's turn also ends the assistant's, if it is there.
    users = _marks(before, bare_body, specials)
    if users and bare.startswith(before[: users[0][1]]) and [mark for mark, _ in here[common : common + 1]] == [users[0][0]]:
        common += 1
    return here[common - 1][1] if common else None


def _body(text: str, start: int, specials: tuple[str, ...]) -> int:
    """The beginning, not before start, of the special tokens that end a text, ignoring white space."""
    end = len(text.rstrip())
    while mark := next((mark for mark in specials if text.endswith(mark, start, end)), None):
        end = len(text[: end - len(mark)].rstrip())
    return end


def _marks(text: str, start: int, specials: tuple[str, ...]) -> list[tuple[str, int]]:
    """The consecutive special tokens from a place on, ignoring white space, each with its end."""
    marks = []
    while True:
        start += len(text[start:]) - len(text[start:].lstrip())
        mark = max((mark for mark in specials if text.startswith(mark, start)), key=len, default=None)
        if mark is None:
            return marks
        start += len(mark)
        marks.append((mark, start))


def _document(prompt: str, completion: str, tokenizer: Any, place: str) -> tuple[np.ndarray, np.ndarray]:
    """tokens, mask [n]: [bos] + prompt and completion tokenised as one + eos; the mask has the completion and eos."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{place}: the tokenizer has no eos_token, so a model would never learn to stop; give it one")
    tokens, _, ends = _tokenise(prompt + completion, tokenizer, place)
    mask = ends > len(prompt)
    first = opening(tokenizer)
    # A text may spell out the special tokens itself.
    if first and tokens[:1].tolist() != first:
        tokens, mask = np.insert(tokens, 0, first), np.insert(mask, 0, False)
    if tokens[-1:].tolist() != [tokenizer.eos_token_id]:
        tokens, mask = np.append(tokens, np.int32(tokenizer.eos_token_id)), np.append(mask, True)
    return tokens, mask


def _tokenise(text: str, tokenizer: Any, place: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens [n] int32, and their starts and ends [n] in the text, in characters. No special token is added."""
    if not tokenizer.is_fast:
        raise UserError("the tokenizer gives no character offsets, which masks need; use one with a tokenizer.json")
    try:
        encoded = encoding(tokenizer, text, return_offsets_mapping=True, verbose=False)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int32), offsets[:, 0], offsets[:, 1]


def specials(tokenizer: Any) -> dict[str, int]:
    """{text: id} of special and added tokens."""
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | tokenizer.get_added_vocab()
