"""Study: do DPO and GRPO gain more than SFT does when it simply goes on for the time that both took?

    python -m jaxpost.train --config=configs/papers/equal_time.py --workdir=runs/equal_time --config.seed=0

The first four stages are the quickstart's. The fifth, `control`, starts from SFT's weights and goes on with SFT's own
demonstrations. It ends when it has trained for as long as `drawn`, `dpo` and `grpo` together; evaluation
does not count. Its learning rate is constant, since its number of steps is not known beforehand. Claim: in each of three seeds
`grpo` ends above the best evaluation of `control`.
"""

from jaxpost import recipe


def get_config(arg: str = ""):
    config = recipe.opened("configs/quickstart.py")
    return recipe.opened(
        config,
        stages=(*config.stages, "control"),
        result="grpo",
        control={
            **config.sft.to_dict(),
            "model": "@sft",
            "time_of": "drawn,dpo,grpo",
            "steps": 100000,
            "eval_every": 200,
            "optimizer": {"lr": 2e-4, "schedule": "constant", "warmup": 10, "b2": 0.98},
        },
    )
