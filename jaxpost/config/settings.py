"""Every setting of a run on one page, with its default and its allowed values.

Where a key holds a dict with a `name`, the name is a function's and the other keys are its keyword arguments. Methods describe
their keywords themselves.
"""

import math
from collections.abc import Mapping

from jaxpost.errors import UserError

DEFAULTS = {
    "seed": 0,  # of fresh weights, of the data's order and of all sampling; evaluation has noise of its own, always the same
    "stages": (),  # names, in order; () is one stage called "train" with the settings as they stand
    "result": "",  # the stage whose weights generate and export take from the workdir; "" is the last
    "do": "train",  # what a stage does: train, generate, annotate, select, merge or evaluate (stages/)
    "with": "",  # the function that annotate, select and merge apply, by name or as a dict with one
    # merge: the models, the base first where the method has one: each a folder, a workdir, a name on the hub, "@NAME" of an
    # earlier stage or "recipe:PATH".
    "of": (),
    "rows": "demonstrations",  # generate: the row type of the rows that a prompt's completions give (stages/generate.py)
    # generate with a `prompt`: a function of synthesis/prompts.py, by name or as a dict with one, makes messages of each record
    # of `data`, or else of the task; `parser` makes rows of a completion ("" is the answer as it stands), `filters` say which
    # rows are kept: names with commas, or a list of names and dicts (stages/synthesis.py).
    "prompt": "",
    "parser": "",
    "filters": "",
    # The records are asked round and round until one of these is reached; without any, each record is asked once.
    "budget": {"rows": 0, "completions": 0, "tokens": 0},
    "round": 32,  # prompts of a round: a prompt that reads the rows kept so far sees those of earlier rounds
    # Completions of an OpenAI-compatible server in place of the model's: dict(url="http://HOST/v1", model="NAME"), and further
    # keywords of synthesis/endpoint.py.
    "endpoint": "",
    # Where artefacts go, shared with other runs: what another run has made there is taken. "" is the workdir.
    "artefacts": "",
    # The model: a folder with config.json and safetensors, a workdir, a name on the hub, the fields of a config.json to start
    # from scratch, "@NAME" of an earlier stage, or "recipe:PATH[:ARG]", a recipe that is run on first use and kept; {seed} in
    # it is this recipe's seed. Under `of`, a model that is made of others takes recipes too.
    "model": "",
    "tokenizer": "",  # a folder, or a function's name (tasks.arithmetic.tokenizer); "" is the model folder's own
    # Of the computation: float32 or bfloat16; parameters and optimizer are float32. Products of float32 are as exact as jax's
    # default is on the device (bfloat16 passes on a TPU, unless JAX_DEFAULT_MATMUL_PRECISION=highest). With bfloat16 the
    # gradients of layers' matrices and of the head are rounded to it before they are added across devices.
    "dtype": "float32",
    # What a layer keeps for the backward pass: none (all of it), dots (what weights multiplied), attention (splash's output and
    # the layer's input; without splash the same as full), full (its input alone).
    "remat": "none",
    # Over whole rows: xla, splash (TPU), cudnn (GPU), auto (the platform's fast one). Where a kernel cannot, xla takes its
    # place: splash with a window that is no multiple of 128 or a shared prefix, cudnn with float32, both with a learned prompt
    # before documents (models/attention.py).
    "attention": "auto",
    # What a token sees of its document: causal (itself and what is before it), whole (all of it, as an encoder does), prefix (a
    # prompt whole, and behind it what is before). "" is the model's own. The weights keep it (is_causal in config.json).
    "attend": "",
    # An adapter of the model, whose own weights are then frozen: dict(name="lora", rank=8, alpha=16.0), of adapters/; or a
    # tuple of several. A stage that starts from a model with an adapter trains that one on.
    "adapter": {},
    # Pattern over parameter paths; the others are frozen: they cost no optimizer memory, and no room in checkpoints where a
    # folder holds them. With an adapter ".*" means the weights that it adds.
    "trainable": ".*",
    "objective": {"name": "sft.nll"},
    # Where batches come from: "data" (files, or the task's demonstrations), "rollouts" (completions of the current weights), or
    # both in each batch, by shares of its rows: {"rollouts": 0.75, "data": 0.25} (sources.py).
    "source": "data",
    # Files, folders, patterns, tfds:NAME/SPLIT, hf:NAME (data/readers.py) or "@NAME" of an earlier stage, with commas between
    # several, and =WEIGHT after each for a mixture (data/mixture.py); "" is the task's demonstrations.
    "data": "",
    "eval_data": "",  # the same, held out for evaluation; "" takes `held_out` from data
    "columns": "",  # the data's own names for the keys of a row type: "prompt=problem,completion=solution", or a dict
    "row_columns": "",  # keys of the rows, with commas, whose numbers become columns; those that the objective reads always do
    # The order of the rows, of data/transforms/order.py: dict(name="by", column="difficulty"); "" is shuffled.
    "order": "",
    "bad_rows": "stop",  # for a row or problem that cannot be used: stop the run, or skip it (with a count)
    "held_out": 0.0,  # how much of data to hold out: a share below 1, or a number of examples
    "split_seed": 0,  # decides which these are, and a task's demonstrations: the same for each `seed`, so that seeds compare
    "template": "",  # chat template: plain, chatml, llama3, gemma, or Jinja; "" is the tokenizer's own
    "template_options": "",  # values for variables that it reads: "enable_thinking=false", or a dict
    "train_on": "assistant",  # assistant, last, completion, all
    "window": 512,  # tokens a row
    "packing": True,  # several documents a row, by a plan
    "shared_prefix": False,  # pairs: the prompt once, with both answers as branches behind it
    # Columns that models make: folders, or "@NAME" of an earlier stage, with commas between several; or annotators with the
    # weights that they take (start, current, or a model): {"harder": {"name": "perplexity", "weights": "FOLDER"}}
    # (stages/annotations.py).
    "annotations": "",
    "too_long": "error",  # an example longer than the window: error, truncate, split (into pieces), drop; a prompt is never cut
    # dict(name="arithmetic", ...): problems, demonstrations and a reward from one module. Of its keys `examples` is how many
    # demonstrations there are, or prompts that `generate` asks, `problems` how many problems are drawn, round and round
    # (0: all).
    "task": {},
    # What judges completions in place of the task's own reward: a function (record, completion) -> float or None, by name or as
    # a dict with one; or several, {"format": {"name": "format.tags", "weight": 0.2}, "right": "task"}, "task" being the task's
    # own and "task.NAME" another of its functions. A weight of 0 makes a figure of it.
    "reward": "",
    "rollouts": {
        "group": 8,  # completions of a prompt
        "prompt_window": 64,  # tokens of a prompt at most
        "new": 64,  # and of a completion
        "temperature": 1.0,
        "top_k": 0,  # 0, 1 and 0 restrict nothing (sampling/processors.py); what they restrict needs a correction
        "top_p": 1.0,
        "min_p": 0.0,
        "processors": "",  # of sampling/processors.py: names with commas, or a list of names and dicts with keywords
        "stop": (),  # what ends a completion besides: texts, and in place of the tokenizer's own ids others, as (1, "END")
        "slots": 0,  # completions under way at a time; 0 is all of them
        "segment": 32,  # tokens between two looks of the host
        "minibatches": 1,  # training batches that a batch of rollouts makes
        "epochs": 1,  # how often each is learned from
        "lag": 0,  # by how many batches of rollouts learning is behind, so that rewards may take their time
        "advantages": "",  # of rollouts/advantages.py, by name or as a dict with one; "" is the objective's own
        "steps": "",  # functions of rollouts/steps.py or one's own, ("annotate", "mine.py:f"); "" is what the keys below ask
        "given": "",  # the first tokens of completions: a function of rollouts/given.py, by name or as a dict with one
        "resample": 0,  # how often at most to sample more prompts, in place of groups whose rewards (but for length) are equal
        "drop_level": False,  # do not learn from groups whose rewards are all equal, nor count them
        "overlong": 0,  # the last tokens of `new` over which a punishment for length grows to -1
        "truncated": 0.0,  # added to the reward of a completion that nothing but the limit ended, as with -0.5
        "mask_truncated": False,  # do not learn from such completions; the objective says whether they are counted
        "correction": "",  # for a sampler whose probabilities are not the trainer's: truncate (tokens), mask (completions)
        "correction_cap": 2.0,
        # Processes that rewards run in; one that hangs is killed. 0 is this process, where a loop in C cannot be stopped.
        "reward_workers": 4,
        "reward_memory": 8.0,  # GiB that each may allocate, on Linux; a reward that asks for more fails. 0 is no limit
        "reward_seconds": 10.0,  # after which a reward has failed, as when it raises or returns no number
        "failed": 0.0,  # the value of a failed reward
        "failures": 0.1,  # the share of failed rewards in a batch above which the run stops
    },
    # The length of the run: steps, or passes over the data where steps is 0.
    "batch_size": 8,  # rows, over all devices and microbatches
    "microbatches": 1,
    "steps": 0,
    "epochs": 1,
    # End when the training time of the named stages (with commas) is used up; steps is then only the schedule's length.
    "time_of": "",
    "tokens_of": "",  # the same for the tokens that they trained on (num_tokens); with both, the first to be used up counts
    # End when the stage has spent so many tokens: learned from, generated, and scored by other models. 0 is no such end.
    "tokens": 0,
    "optimizer": {
        "lr": 2e-5,
        "schedule": "cosine",  # cosine, linear, constant, wsd
        "warmup": 0.03,  # steps, or a share of them if below 1
        "end": 0.1,  # the last learning rate, as a share of lr
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decay": "(kernel(/[ab])?|weight)$",  # pattern of the paths that decay
        "clip": 1.0,  # of the gradient's global norm; 0 is off
        # Leaves with a rate or a decay of their own: [{"paths": "^embed/", "lr": 1e-5, "weight_decay": 0.0}, ...], by patterns
        # of which at most one matches a leaf. The schedule is the same for all.
        "groups": "",
        # Functions of one's own, FILE.py:function or a list of names and dicts with keywords, that change gradients before they
        # are clipped, and updates before they are added (optim.py).
        "gradients": "",
        "updates": "",
    },
    "ema": 0.0,  # decay of a running mean of the weights; 0 keeps none
    "max_skipped": 10,  # non-finite updates in a row, all skipped, after which the run stops
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    "topology": "",  # the machine that the recipe is for, e.g. v5e:2x4: what jaxpost.fit compiles for
    # When to write, evaluate and save (in steps; 0 is only at the end), and what to keep.
    "log_every": 10,
    "term_norms": False,  # log the norm of each term's gradient as well (grad_norm/TERM), at a backward pass a term
    "eval_every": 0,
    "save_every": 0,
    "keep": 2,
    # Every so many steps of rollouts, all completions with their rewards and advantages go to completions/STAGE/STEP.parquet,
    # and some are shown on a terminal.
    "completions": 0,
    "profile": 0,  # steps of each stage to trace, once it is under way (reporting/profile.py)
    "best": "eval/loss",  # the metric whose best checkpoint is kept too
    "highest": False,  # whether higher is better
    "eval_rows": 64,  # completions at a time, of evaluation and of generate
    "eval_per_cell": 50,  # test problems of each of the task's cells
    # Evals that run with the stage's own held-out loss and test problems: {NAME: a function of evals/ by name, or a dict with
    # its keywords}, as {"gsm8k": {"name": "accuracy", "task": {"name": "gsm8k", "data": "F.jsonl"}}}. Figures are
    # eval/NAME/FIGURE. An eval that takes a `template` gets the stage's; its other keywords are its own.
    "evals": {},
}

# Settings that may differ between a workdir and the command that continues it: they do not change what is learned.
FREE = (
    "attention",
    "result",
    "topology",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "eval_rows",
    "eval_per_cell",
    "evals",
    "mesh",
    "max_skipped",
    "remat",
    "profile",
    "completions",
    "rollouts.reward_workers",
    "rollouts.reward_memory",
    *(f"endpoint.{key}" for key in ("url", "key", "concurrency", "seconds", "retries", "patience")),
)

# Counts, which must be at least 1; other numbers must not be negative.
COUNTS = (
    *("window", "batch_size", "microbatches", "epochs", "keep", "max_skipped", "eval_rows", "eval_per_cell", "round"),
    *("prompt_window", "new", "group", "segment", "minibatches"),
)

# Dicts of names: a change replaces all.
WHOLE = ("columns", "template_options", "annotations", "source", "evals", "with", "endpoint")
_KINDS = {bool: (bool,), int: (int,), float: (float, int), str: (str,), tuple: (tuple, list), dict: (Mapping,)}


def check(key: str, default, value, place: str) -> None:
    """Raises UserError for a value that is not of its default's type, and for a number out of range."""
    whole = ("model", "objective", "reward", "adapter", "advantages", "given", "task", "order", "prompt", "parser", *WHOLE)
    kinds = (str, Mapping) if key in whole else _KINDS[type(default)]
    if key == "adapter":
        kinds = (str, Mapping, tuple, list)
    lists = ("data", "eval_data", "processors", "steps", "filters", "groups", "gradients", "updates")
    if key in lists and default == "":
        kinds = (str, tuple, list) if key == "steps" else (str, Mapping, tuple, list)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("dict" if k is Mapping else k.__name__ for k in kinds)
        raise UserError(f"{place}.{key}: {value!r} is no {expected}.")
    if key == "source" and value == "samples":
        raise UserError(
            f"{place}.source: 'samples' is now a stage of its own: drawn={{'do': 'generate', 'rows': 'pairs', ...}} before "
            "this one, in config.stages too, and data='@drawn' here."
        )
    signed = key in ("data", "fsdp", "tensor", "truncated", "failed")  # a mesh axis of -1 takes what the others leave
    least = int(key in COUNTS)
    if isinstance(value, (int, float)) and not signed and not value >= least:
        raise UserError(f"{place}.{key}: {value!r}; it must be at least {least}.")
    if isinstance(value, float) and math.isinf(value):
        raise UserError(f"{place}.{key}: {value!r}; it must be finite.")
    if key in ("seed", "split_seed") and value >= 2**32:  # jax would take it modulo 2**32
        raise UserError(f"{place}.{key}: {value!r}; it must be below 2**32.")
    if key == "warmup" and value > 1 and value != int(value):
        raise UserError(f"{place}.{key}: {value!r}; give a whole number of steps, or a share of them below 1.")
    if key in ("ema", "b1", "b2") and value >= 1:
        raise UserError(f"{place}.{key}: {value!r}; a decay is below 1.")
    if key == "temperature" and value == 0:
        raise UserError(f"{place}.{key}: a greedy policy has no gradient; give a temperature above 0.")
