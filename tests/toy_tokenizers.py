"""Two tokenizers small enough that every expected value can be read: what the tests of the data share.

One has a token for each character; the other is a byte-level BPE with merges across the seams that masks must find, and with
the tokens of ChatML. Both are made in code, so no test needs a download.
"""

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jaxpost.data import chat


def characters(adds_bos=True, **specials):
    """A token a character, in front of them <s> and </s>; adds <s> on its own, as Llama's tokenizer does."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | specials
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def byte_pairs(template=None):
    """A byte-level BPE that merges "b c" and "Ġ c", with ChatML's tokens and pad == eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "bc", "Ġc"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("Ġ", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    specials = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": template}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def learned(example, tokenizer):
    """The example as text with ⟦ ⟧ around what is learned: the mask made legible, token by token."""
    return chat.show(example["tokens"], example["mask"], tokenizer, colour=False)


def conversation(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
