"""Text to ids and back: tokenizers from a model's folder, and a small one made in code.

Tokenizers are `transformers` objects: a checkpoint comes with a chat template and a tokenizer.json, and an exported model needs
both. Nothing else of `transformers` is used at run time, no code from a checkpoint is ever run, and no call here uses the
network. The import takes about a second, so it waits until a tokenizer is needed.

`load` reads a folder's tokenizer, or gives None where the folder has none: a model can be trained on ids alone.
`characters` makes a tokenizer with one token a character and four special tokens, enough for arithmetic, and `learned` one of
words for the tasks that are written in them:

    <|user|>12+34<|assistant|>46<|end|>

Each turn opens with its role. Only an assistant's turn is closed, since only the assistant has to learn where to stop. There is
no beginning-of-text token that a template and an encoder could both add.

`encode` turns rendered text into ids and adds nothing; its error names a character that the tokenizer lacks. `check_ids` checks
ids against a model's vocabulary.
"""

import copy
import functools
import inspect
import json
import os
import string
import tempfile

import numpy as np
from etils import epath
from tokenizers import processors

from jaxpost.errors import UserError, first_line
from jaxpost.storage.host import check_regular

PAD, USER, ASSISTANT, END = SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")

# Files of a tokenizer: a folder with any of them must load, else there is an error.
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
# Files that only accompany one of those.
_COMPANIONS = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "config.json")
_TEMPLATES = "additional_chat_templates"  # a folder with one NAME.jinja for each further template
_PIECES = "tokenizer.model"  # SentencePiece's file, for servers that do not read tokenizer.json
# The classes of transformers 4 in which the flags add_bos_token and add_eos_token of tokenizer_config.json override
# tokenizer.json, and the default of each flag where only the other is given.
_FLAGGED = {"Llama": (True, False), "CodeLlama": (True, False), "Gemma": (True, False), "GPTNeoX": (False, False)}
# Classes that have default special tokens.
_DEFAULTS = (*_FLAGGED, "GPT2", "Qwen2")
_SPECIALS = {"bos_token", "eos_token", "unk_token", "pad_token"}
# Fields that only transformers 5 writes to tokenizer_config.json; an auto_map names code, which is not written.
_UNPORTABLE = ("backend", "is_local", "local_files_only", "auto_map", "model_specific_special_tokens")

_SPACE = "▁"  # stands for a space within tokens, as in SentencePiece
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '" + ASSISTANT + "' + message['content'] + '" + END + "' }}"
    "{% else %}{{ raise_exception('this template knows the roles user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def _transformers():
    # Without this the import recommends PyTorch on every start.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def load(folder):
    """The tokenizer in a model's folder (local or gs://) as a `PreTrainedTokenizerFast`, or None if the folder has none.

    Raises UserError when the folder does not exist, or when its tokenizer files cannot be read.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds tokenizer.json")
    if not any((folder / name).exists() for name in _FILES):
        return None
    files = [*map(folder.joinpath, _FILES + _COMPANIONS), *(folder / _TEMPLATES).glob("*.jinja")]
    for path in files:
        check_regular(path)
    if "://" not in str(folder):
        return _read(folder, shown=folder)
    # `transformers` opens local files only.
    with tempfile.TemporaryDirectory() as local:
        for path in files:
            if path.exists():
                _copy(path, epath.Path(local) / path.relative_to(folder))
        return _read(epath.Path(local), shown=folder)


def _read(folder, *, shown):
    transformers = _transformers()
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = _described(folder, transformers)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the Rust half raises bare Exception
        raise UserError(
            f"{shown}: the tokenizer cannot be read ({type(error).__name__}: {first_line(error)}); "
            "save it again as tokenizer.json, or remove its files to work on token ids alone"
        ) from error
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        raise UserError(f"{shown}: {type(tokenizer).__name__} is not a fast tokenizer; convert it to tokenizer.json")
    if (folder / _PIECES).exists():
        tokenizer.pieces = (folder / _PIECES).read_bytes()
    return tokenizer


def _described(folder, transformers):
    """The tokenizer of tokenizer.json. The class that the folder names is not used, since the classes of transformers 5 build
    another tokenizer from the vocabulary; only its default special tokens and the flags of _FLAGGED are.
    """
    from tokenizers import Tokenizer

    fields, elsewhere = (
        json.loads(path.read_text()) if (path := folder / f"{name}.json").exists() else {}
        for name in ("tokenizer_config", "special_tokens_map")
    )
    named = str(fields.get("tokenizer_class")).removesuffix("Fast").removesuffix("Tokenizer")
    special = {}
    if named in _DEFAULTS:
        options = inspect.signature(getattr(transformers, f"{named}Tokenizer").__init__).parameters
        special = {k: options[k].default for k in options.keys() & _SPECIALS - fields.keys() - elsewhere.keys()}
    if special:  # transformers would add a token that the vocabulary lacks
        words = Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = {k: token for k, token in special.items() if token and words.token_to_id(token) is not None}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **special)
    flags = [fields.get(f"add_{end}_token") for end in ("bos", "eos")]
    if named in _FLAGGED and any(flag is not None for flag in flags):
        flags = [default if flag is None else bool(flag) for flag, default in zip(flags, _FLAGGED[named], strict=True)]
        ends = [tokenizer.bos_token_id] * flags[0] + [tokenizer.eos_token_id] * flags[1]
        if None not in ends and tokenizer("")["input_ids"] != ends:
            tokenizer.add_bos_token, tokenizer.add_eos_token = flags
    return tokenizer


def characters(alphabet):
    """A tokenizer with one token a character of `alphabet` (distinct characters), after the four special tokens.

    Ids: 0 pad, 1 user, 2 assistant, 3 end (the stop token), then the alphabet in its order. There is no unknown token: encoding
    a character outside the alphabet is an error. Raises UserError on an empty or repeating alphabet.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise UserError(f"alphabet {alphabet!r}: needs at least one character, and each only once")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return _with_turns(core)


def learned(texts, size):
    """A tokenizer of at most `size` tokens, learned from texts by byte-pair encoding, after the four special tokens.

    A word is the same token at the beginning of a text and within it, as in SentencePiece. Digits, punctuation and line ends
    are tokens of their own. What the texts lack is spelled in bytes, so every text comes back from its tokens as it was, but
    for the sign ▁, which stands for a space. The tokens are a function of the texts. Raises UserError where `size` is less than
    what bytes and printable characters take.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = [_SPACE, "\n", *string.ascii_letters, *string.digits, *string.punctuation]
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    if size < (least := len(SPECIAL) + len(alphabet) + len(octets)):
        raise UserError(f"size={size}: bytes, printable characters and special tokens take {least} tokens; give that or more")
    core = Tokenizer(models.BPE(byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    parts = [pre_tokenizers.Split(Regex(rf"\n|{_SPACE}?[0-9]"), "isolated"), pre_tokenizers.Punctuation("isolated")]
    core.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.Split(_SPACE, "merged_with_next")])
    begins = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(begins)
    options = {"special_tokens": list(SPECIAL), "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size - len(octets), limit_alphabet=len(alphabet), **options))
    described = json.loads(core.to_str())  # the trainer would make special tokens of the bytes
    vocabulary = described["model"]["vocab"]
    vocabulary.update({octet: len(vocabulary) + number for number, octet in enumerate(octets)})
    return _with_turns(Tokenizer.from_str(json.dumps(described)))


def _with_turns(core):
    """The tokenizer of `transformers` with the four special tokens and the chat template."""
    tokenizer = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def encode(tokenizer, text):
    """The ids of `text`, a list of ints. Nothing is added: a rendered chat template already has its special tokens.

    Raises UserError naming the first character that the tokenizer has no token for.
    """
    return encoding(tokenizer, text)["input_ids"]


def encoding(tokenizer, text, **options):
    """tokenizer(text, **options) with nothing added; raises as `encode` does."""
    try:
        return tokenizer(text, add_special_tokens=False, **options)
    except Exception as error:  # the Rust half raises bare Exception, and does not say where
        plain = functools.reduce(lambda rest, token: rest.replace(token, ""), tokenizer.get_added_vocab(), text)
        missing = next((c for c in plain if not encodes(tokenizer, c)), None)
        if missing is None:
            raise
        raise UserError(
            f"{text!r}: the tokenizer has no token for {missing!r}; use text that it knows, or another tokenizer"
        ) from error


def encodes(tokenizer, text):
    """Whether the tokenizer has tokens for a text."""
    try:
        tokenizer(text, add_special_tokens=False)
    except Exception:  # as above
        return False
    return True


def check_ids(ids, vocab, tokenizer, place):
    """Raises UserError, with place, for an id outside of a model's vocabulary, 0 to vocab - 1.

    ids: an array or a number. tokenizer: to name the token; None where there is none. It may have tokens that the model lacks.
    """
    lowest, highest = int(np.min(ids, initial=0)), int(np.max(ids, initial=0))
    if lowest < 0 or highest >= vocab:
        wrong = min(lowest, 0) or highest
        token = tokenizer.convert_ids_to_tokens(wrong) if tokenizer is not None and 0 < wrong < len(tokenizer) else None
        spelled = f"id {wrong}" if token is None else f"the token {token!r} (id {wrong})"
        raise UserError(f"{place}: has {spelled}, and the model has a vocabulary of {vocab}; take it out.")


def opening(tokenizer):
    """[the beginning-of-text token] where the tokenizer adds one to a text, else []."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] and _begins_with(tokenizer, first[0]) else []


@functools.lru_cache(maxsize=8)
def some_text(tokenizer):
    """A text that the tokenizer has tokens for, "" where it has none."""
    special = set(tokenizer.all_special_ids)
    texts = (tokenizer.decode([number]) for number in range(len(tokenizer)) if number not in special)
    return next((text for text in texts if text.strip() and encodes(tokenizer, text)), "")


def _begins_with(tokenizer, token):
    """Whether a non-empty text begins with the token; where one token marks beginning and end, it may be added at the end."""
    return tokenizer(some_text(tokenizer))["input_ids"][:1] == [token]


def is_enclosing(tokenizer):
    """Whether the tokenizer has no end-of-sequence token, but ends a text with its separator, as BERT's does."""
    last = tokenizer.sep_token_id
    return tokenizer.eos_token_id is None and last is not None and tokenizer("")["input_ids"][-1:] == [last]


def ending(tokenizer, longest):
    """A copy of the tokenizer that ends a text as `chat.encode_text` does, that cuts it to `longest` tokens, and that can pad.

    Raises UserError where it has neither an end-of-sequence token nor one of its own behind texts.
    """
    ender = copy.deepcopy(tokenizer)
    if not is_enclosing(tokenizer):
        ender.backend_tokenizer.post_processor = _ending_in_eos(tokenizer)
    ender.model_max_length = longest
    if ender.pad_token is None:
        ender.pad_token = tokenizer.eos_token or tokenizer.sep_token
    return ender


def _ending_in_eos(tokenizer):
    """What puts the end-of-sequence token behind a text, and the beginning-of-text token before it if there is one."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token, in which a text that is embedded ends; give it one.")
    ids = [*opening(tokenizer), tokenizer.eos_token_id]
    *first, last = tokenizer.convert_ids_to_tokens(ids)
    texts = {"single": [*first, "$A", last], "pair": [*first, "$A", last, "$B", last]}
    marks = list(zip([*first, last], ids, strict=True))
    return processors.TemplateProcessing(**texts, special_tokens=list(dict.fromkeys(marks)))


def carrying(tokenizer, template):
    """A copy of the tokenizer with this chat template, for rows with tools and without; templates of other names stay."""
    carrier = copy.deepcopy(tokenizer)
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    further = {name: jinja for name, jinja in templates.items() if name not in ("default", "tool_use")}
    carrier.chat_template = {"default": template, **further} if further else template
    return carrier


def save(tokenizer, folder):
    """Writes tokenizer.json, tokenizer_config.json and the chat templates to `folder` (local or gs://), for `load` and for
    transformers 4.57 and 5 to read; tokenizer.model too, where the loaded folder had one.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # By way of a local folder, so that gs:// and the disk take the same path.
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save_pretrained(local)
        local = epath.Path(local)
        config = local / "tokenizer_config.json"
        fields = _portable(tokenizer, json.loads(config.read_text()))
        config.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        if pieces := getattr(tokenizer, "pieces", None):
            (local / _PIECES).write_bytes(pieces)
        for path in [*local.iterdir(), *(local / _TEMPLATES).glob("*")]:
            if not path.is_dir():
                _copy(path, folder / path.relative_to(local))


def _copy(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    path.copy(target, overwrite=True)


def _portable(tokenizer, fields):
    """The fields of tokenizer_config.json in a form that transformers 4.57 and 5 both read: a class that both have and that
    uses tokenizer.json unchanged, and special tokens in 4.57's spelling.
    """
    fields = {k: v for k, v in fields.items() if k not in _UNPORTABLE}
    extra = fields.pop("extra_special_tokens", None) or []
    if isinstance(extra, dict):
        fields |= extra
    elif extra:
        fields["additional_special_tokens"] = extra
    # 4.57 sets this in the pre-tokenizer, to false where the field is absent.
    before = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in before:
        fields["add_prefix_space"] = before["add_prefix_space"]
    return fields | {"tokenizer_class": "PreTrainedTokenizerFast"}
