"""Studies: a paper's claim beside its own measurement, under rules that are fixed before the run.

A paper's file says what it claims as data:

    from jaxpost.studies import Claim, Study

    STUDY = Study(
        arms=("hpt", "grpo", "sft"),
        metric="eval/accuracy",
        claims=(Claim("hpt", over=("grpo", "sft"), margin=0.03),),
        equal="tokens",
        tune={"train.optimizer.lr": (1e-4, 3e-4, 1e-3)},
    )

and `jaxpost.study` runs it. claims.py has verdicts, runs.py the runs, results.py what is committed, page.py the report.
"""

from jaxpost.studies.claims import Claim, Study

__all__ = ["Claim", "Study"]
