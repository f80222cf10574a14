"""Completions of prompts on the command line.

    python -m jaxpost.generate --model=FOLDER --prompt="Once upon a time"

The model is anything that `jaxpost.load` opens: a Hugging Face folder, a workdir of jaxpost.train, or one checkpoint in a
workdir. A prompt is continued as it is; with `--chat` it is a user's message, and the completion the assistant's turn.
`jaxpost/sampling/text.py` describes how a prompt is processed.
"""

import json

from absl import flags

from jaxpost import api
from jaxpost.config import cli
from jaxpost.config.resolve import entry_of
from jaxpost.models import computing


def main(_) -> None:
    """The command line; see the module's docstring."""
    options = flags.FLAGS
    where, prompts = cli.required("model", "prompt")
    model = api.load(entry_of(where, "--model"), dtype=options.dtype)
    names = ("new", "temperature", "chat", "seed", "n", "processors", "beams", "length_penalty")
    texts = model.generate(prompts, **{k: options[k].value for k in names})
    for i, completion in enumerate(texts):
        prompt = prompts[i // options.n]
        if options.json:
            print(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False))
            continue
        if len(texts) > 1:
            print(f"--- {prompt}")
        print(completion)


ABOUT = """Completes prompts with a model.

The model is a Hugging Face folder, a workdir of jaxpost.train, or one checkpoint in it:

    python -m jaxpost.generate --model=FOLDER --prompt="Once upon a time"
    python -m jaxpost.generate --model=/tmp/quickstart --chat --prompt="12+34" --prompt="7x8"
    python -m jaxpost.generate --model=/tmp/quickstart/checkpoints/sft --chat --prompt="12+34" --temperature=1 --n=4 --json
    python -m jaxpost.generate --model=FOLDER --prompt="Title:" --beams=4 \\
        --processors='{"name": "constrained.trie", "texts": "titles.txt"}'
"""

if __name__ == "__main__":
    flags.DEFINE_string(
        "model",
        None,
        "Folder of the model: Hugging Face's, a workdir of jaxpost.train, or a checkpoint in one; or JSON of a recipe's model.",
    )
    flags.DEFINE_multi_string("prompt", [], "Text to complete; for several, give it several times")
    flags.DEFINE_integer("new", None, "The most tokens to add (default: 200, or what the model has room for).", lower_bound=1)
    flags.DEFINE_float(
        "temperature", 0.0, "0 takes the likeliest token each time, 1 samples as the model says.", lower_bound=0.0
    )
    flags.DEFINE_bool(
        "chat", False, "The prompt is a user's message: apply the chat template, and print the assistant's answer."
    )
    flags.DEFINE_integer("seed", 0, "Which random numbers to sample with.", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_integer("n", 1, "How many completions of each prompt.", lower_bound=1)
    flags.DEFINE_string("processors", "", "What may be said: names of processors with commas, or JSON with their keywords.")
    flags.DEFINE_integer(
        "beams", None, "The width of a beam search, which gives the n best (default: completions are drawn).", lower_bound=1
    )
    flags.DEFINE_float("length_penalty", 1.0, "Of a beam search: the power of the length that divides a completion's sum.")
    flags.DEFINE_enum("dtype", "float32", sorted(computing.DTYPES), "The computation's number format.")
    flags.DEFINE_bool("json", False, "Print one JSON object a completion, with the keys prompt and completion.")
    cli.run(main, ABOUT, model=True)
