"""Tokenizers of folders: ids are those of the folder's own tokenizer.json, and what is written opens in both transformers.

The folders are made here, small, and in the shapes that released models have. That 4.57 and 5 open what is written was seen
by hand (LOG.md); the tests hold the files to what was opened.
"""

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxpost import tokenizer
from jaxpost.errors import UserError
from jaxpost.models import hf

TEXTS = ["", "12 bc abc", "a  b c<s>bc</s> 12", "<|im_start|>bc<|im_end|> bc  <|x|> c", "e\u0301 \n\n1234"]
PREFIXED = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])


def byte_level(**options):
    """A byte-level BPE that merges digits and "bc", with two special tokens and one that is not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, "bc", "Ġbc", "12", "34", "<|end|>"])}
    made = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("Ġ", "bc"), ("1", "2"), ("3", "4")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": True, **options})
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<|x|>", lstrip=True)])
    return made


def metaspace(post=None):
    """What sentencepiece's models become: a prepended space, no pre-tokenizer, perhaps a template that begins with <s>."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abc12<>s/|_", "bc", "▁bc", "12"]
    made = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("b", "c"), ("▁", "bc"), ("1", "2")], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if post is not None:
        made.post_processor = post
    return made


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write(folder, made, name=None, model="llama", **fields):
    """A folder with tokenizer.json, tokenizer_config.json of these fields and config.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    fields = {**({"tokenizer_class": name} if name else {}), **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps({"model_type": model}))
    return folder


def ids(found):
    """What the texts become, with what the tokenizer adds and without."""
    return [found(text, add_special_tokens=add)["input_ids"] for text in TEXTS for add in (True, False)]


def own_ids(folder):
    """The same by tokenizer.json alone."""
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [found.encode(text, add_special_tokens=add).ids for text in TEXTS for add in (True, False)]


CLASSES = ("Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GPTNeoXTokenizer",
           "PreTrainedTokenizerFast", "TokenizersBackend", None)  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("shape", ["bytes", "bytes_after", "metaspace", "metaspace_prefixed"])
def test_ids_are_those_of_tokenizer_json_whatever_class_the_folder_names(tmp_path, name, shape):
    made = (
        byte_level(add_prefix_space=shape == "bytes_after")
        if "bytes" in shape
        else metaspace(PREFIXED if shape[-1] == "d" else None)
    )
    if shape == "bytes_after":
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), PREFIXED])
    write(tmp_path, made, name, "qwen2" if "bytes" in shape else "gemma", **NAMED)
    found = tokenizer.load(tmp_path)
    assert ids(found) == own_ids(tmp_path)
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")
    assert tokenizer.opening(found) == ([1] if shape in ("bytes_after", "metaspace_prefixed") else [])


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizerFast", "GPTNeoXTokenizer"])
@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_flags_of_old_folders_keep_their_effect(tmp_path, name, flags, before, after):
    """Transformers 4 builds the template of these classes from the flags; tokenizer.json's own begins with <s>."""
    write(tmp_path, metaspace(PREFIXED), name, **NAMED, **flags)
    found = tokenizer.load(tmp_path)
    bare = found("12 bc", add_special_tokens=False)["input_ids"]
    assert found("12 bc")["input_ids"] == before + bare + after
    assert tokenizer.opening(found) == before


def test_an_added_end_is_not_the_beginning(tmp_path):
    write(tmp_path, metaspace(), "LlamaTokenizer", bos_token="</s>", eos_token="</s>", add_bos_token=False, add_eos_token=True)
    found = tokenizer.load(tmp_path)
    assert found("")["input_ids"] == [2] and tokenizer.opening(found) == []


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_flags_mean_nothing_to_other_classes(tmp_path, name):
    write(tmp_path, metaspace(PREFIXED), name, **NAMED, add_bos_token=False, add_eos_token=True)
    assert ids(tokenizer.load(tmp_path)) == own_ids(tmp_path)


def test_special_tokens_that_a_folder_leaves_to_its_class_are_known(tmp_path):
    """They are the class's defaults, where the vocabulary has them: none is added to it."""
    found = tokenizer.load(write(tmp_path / "llama", metaspace(), "LlamaTokenizer"))
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")
    found = tokenizer.load(write(tmp_path / "qwen", byte_level(), "Qwen2Tokenizer", eos_token="<|im_end|>"))
    assert found.pad_token is None and len(found) == byte_level().get_vocab_size()


# ---------------------------------------------------------------------------------------------------------- What is written


def test_what_is_written_is_what_both_versions_of_transformers_read(tmp_path):
    made = byte_level(add_prefix_space=True)
    further = {
        "additional_special_tokens": ["<|im_start|>"],
        "image_token": "<|x|>",
        "auto_map": {"AutoTokenizer": ["a.B", None]},
    }
    folder = write(tmp_path / "in", made, "Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|end|>", **further)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    found, out = tokenizer.load(folder), tmp_path / "out"
    tokenizer.save(found, out)
    fields = json.loads((out / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<|im_start|>"] and fields["image_token"] == "<|x|>"
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens", "auto_map"} & fields.keys()
    assert fields["add_prefix_space"] is True  # 4.57 would write false into the pre-tokenizer
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    again = tokenizer.load(out)
    assert ids(again) == ids(found) == own_ids(out)
    assert again.chat_template == {"default": "{{ messages }}\n", "rag": "{{ documents }}"}
    assert tokenizer.carrying(again, "own").chat_template == {"default": "own", "rag": "{{ documents }}"}
    assert again.special_tokens_map == found.special_tokens_map
    # A second copy, of the copy alone, is the same again.
    shutil.rmtree(folder)
    tokenizer.save(again, tmp_path / "third")
    assert (tmp_path / "third" / "tokenizer_config.json").read_text() == (out / "tokenizer_config.json").read_text()
    assert (tmp_path / "third" / "tokenizer.model").exists()


def test_flags_are_in_the_template_that_is_written(tmp_path):
    """Neither version reads add_eos_token for the class that is written, so tokenizer.json itself adds the token."""
    folder = write(tmp_path / "in", metaspace(PREFIXED), "LlamaTokenizer", **NAMED, add_eos_token=True)
    found = tokenizer.load(folder)
    tokenizer.save(found, tmp_path / "out")
    assert own_ids(tmp_path / "out") == ids(found) and ids(found)[0] == [1, 2]


def test_a_written_config_has_the_rotary_constants_where_both_versions_read_them():
    newer = {"model_type": "qwen3_moe", "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert hf.portable(newer) == {"model_type": "qwen3_moe", "num_experts": 4, "rope_theta": 1e6}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    older = {"model_type": "qwen2", "rope_theta": 9.0, "rope_scaling": yarn}
    assert hf.portable({"model_type": "qwen2", "rope_parameters": {**yarn, "rope_theta": 9.0}}) == older == hf.portable(older)
    layers = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    apart = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert hf.portable({"model_type": "gemma3_text", "rope_parameters": layers}) == {"model_type": "gemma3_text"} | apart
    long = {"short_factor": [1.0], "long_factor": [2.0]}
    newer = {"model_type": "phi3", "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 32.0, **long}}
    assert hf.portable(newer)["rope_scaling"] == {"type": "longrope", **long}  # 4.57 takes no other field
    olmo = {"model_type": "olmo2", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert hf.portable(olmo)["rope_scaling"] == {"type": "linear", "factor": 2.0}


TOWNS = ["Anna lives in the town of Brek. She is a baker.", "The baker of Brek has 12 ovens.\nAnna bakes."]


def test_a_learned_tokenizer_has_whole_words_and_gives_every_text_back(tmp_path):
    learned = tokenizer.learned(TOWNS * 20, 460)
    assert learned.tokenize("Anna") == learned.tokenize("in Brek, Anna")[-1:] == ["▁Anna"]
    assert learned.tokenize("in\nAnna 12.")[1] == "\n"
    assert learned.tokenize("12.")[-2:] == ["2", "."]
    tokenizer.save(learned, tmp_path)
    for text in (*TOWNS, "", " ", "  two  spaces ", "a\n\nb", "é ü 日 \U0001f600", "<answer>no</answer>", "\t"):
        ids = tokenizer.encode(learned, text)
        assert learned.decode(ids) == text
        assert tokenizer.encode(tokenizer.load(tmp_path), text) == ids
    assert len(learned) <= 460 and max(learned.get_vocab().values()) == len(learned) - 1


def test_a_learned_tokenizer_is_a_function_of_its_texts():
    first, second, other = (tokenizer.learned(texts, 460).get_vocab() for texts in (TOWNS, list(TOWNS), TOWNS[:1]))
    assert first == second != other
    with pytest.raises(UserError, match="size=300: .* take 356 tokens"):
        tokenizer.learned(TOWNS, 300)
