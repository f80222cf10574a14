"""The same as TRL does it when it is told nothing: a frozen copy of the model says anew what it says at every step."""


def run(job: dict, clock) -> None:
    """Trains on the job's pairs, in their order."""
    from dpo import trl

    trl.run(job, clock, precompute=False)
