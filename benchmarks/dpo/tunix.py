"""Preference optimisation by Tunix's DPOTrainer, whose reference is a second model, asked at every step: it has no other way.

Its hook for a step comes while the next one is under way, and the first when the second has been dispatched.
"""


def run(job: dict, clock) -> None:
    """Trains on the job's pairs, in their order; prompt and answers are as long as their arrays, so nothing is padding."""
    import numpy as np
    from sft import tunix
    from tunix.sft.dpo import dpo_trainer

    columns = dict(np.load(job["rows"]))
    masks = {f"{name}_mask": np.ones(x.shape[1:], np.int32) for name, x in columns.items()}

    def at(step: int):
        return dpo_trainer.TrainingInput(**{f"{name}_ids": x[step] for name, x in columns.items()}, **masks)

    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=job["steps"], beta=job["beta"])
    with tunix.mesh() as on:
        policy, reference = (tunix.network(job["model"], on) for _ in range(2))
        trainer = dpo_trainer.DPOTrainer(policy, reference, tunix.optimizer(job), config)
        trainer.with_training_hooks(tunix.hook(clock))
        trainer.train([at(step) for step in range(job["steps"])])
