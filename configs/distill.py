r"""Distillation: a Hugging Face checkpoint learns what a teacher with the same tokenizer finds likely, token by token.

    python -m jaxpost.annotate --config=configs/distill.py --what=topk --out=/tmp/teacher --config.model=TEACHER \
        --config.data=FILE.jsonl
    python -m jaxpost.train --config=configs/distill.py --workdir=/tmp/distill --config.model=FOLDER \
        --config.data=FILE.jsonl --config.annotations=/tmp/teacher

The first command writes the teacher's likeliest tokens at every place that is learned, once; then the teacher is no longer
needed. Both must read the same data with the same settings, `held_out` and `window` among them.

`:forward_kl`, `:reverse_kl` or `:jensen_shannon` after the second command's file name learns the whole distribution instead. It
takes --config.objective.teacher=TEACHER in place of --config.annotations, and needs no first command: the teacher's hidden
states are written under the workdir before the first step, and its head is read.
"""

from jaxpost import recipe


def get_config(arg: str = "top_k"):
    return recipe.make(
        objective={"name": f"distill.{arg}"},
        held_out=0.02,
        too_long="truncate",
        window=512,
        batch_size=8,
        epochs=1,
        optimizer={"lr": 2e-5, "schedule": "cosine", "warmup": 0.03},
        log_every=10,
        eval_every=100,
        save_every=100,
    )
