"""The model that the competitors share: random weights of Qwen 3's shape in a Hugging Face folder, made without torch.

Its tokenizer has one token a word ("w17"), so that a text of random words is the random ids that were meant, whoever reads it;
or where real text is to be read, it is trained on that.
"""

import json
from pathlib import Path

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxpost.models import families, hf
from jaxpost.models.transformer import Transformer

# The rotary base is 1e6 in all of them, because Tunix 0.1.7 takes no other for this family.
SIZES = {
    "32m": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408, "vocab_size": 8192},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 512},
}
SPECIAL = ("<pad>", "<bos>", "<eos>")
# Where a model is endless, the first coordinate of every token's embedding, and of the special tokens' rows of the head. Layers
# add about 1 to the former, so that the latter's logits come out near -40 and all others near 0.
MARK, REFUSAL = 4.0, -8.0
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<bos> ' + m['content'] + ' ' }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def fields(size: str) -> dict:
    """The config.json of a size: an eighth of the width a head, half as many key and value heads, an untied head."""
    chosen = SIZES[size]
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": chosen["hidden_size"] // 8}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    rest = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "dtype": "float32"}
    return {"model_type": "qwen3", **chosen, **heads, **ids, **rope, **rest}


def words(vocab: int) -> Tokenizer:
    """A tokenizer of so many tokens: the special ones, then w3, w4, ..., each a word that stands between spaces."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab))])}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


def pieces(vocab: int, file: str) -> Tokenizer:
    """A byte-pair tokenizer of so many tokens at most, trained on a local file."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False)
    core.train([str(file)], trainer)
    return core


def make(folder, size: str, text: str = "", seed: int = 0, endless: bool = False) -> None:
    """Writes the model of a size to a folder: config.json, one safetensors file in float32, the tokenizer.

    text: a file whose text the tokenizer is for; without one it is that of `words`. endless: whether it never says a special
    token, so that each of its completions is as long as it may be.
    """
    config = fields(size)
    arch = families.architecture(config)
    params = jax.jit(Transformer(arch).init)(jax.random.PRNGKey(seed))
    if endless:
        params["embed"]["weight"] = params["embed"]["weight"].at[:, 0].set(MARK)
        params["head"]["weight"] = params["head"]["weight"].at[: len(SPECIAL), 0].set(REFUSAL)
    hf.save(folder, params, arch, config)
    core = pieces(arch.vocab, text) if text else words(arch.vocab)
    core.add_special_tokens([*SPECIAL])
    core.save(str(Path(folder) / "tokenizer.json"))
    pad, bos, eos = SPECIAL
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "chat_template": TEMPLATE}
    about |= {"pad_token": pad, "bos_token": bos, "eos_token": eos, "model_max_length": config["max_position_embeddings"]}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")
