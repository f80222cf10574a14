"""One competitor's turn, in its own interpreter: `python -P benchmarks/competitor.py FOLDER/COMPETITOR.py JOB.json`.

The file named has one function, `run(job, clock)`: it does the job as its framework would have a user do it, and calls
`clock.tick(loss, norm)` whenever a step is over and its loss is known, with the gradient's norm where there is one to be had.
What it returns, if anything, joins the figures. It may import what another workload's file has (`from sft import tunix`). This
file and the job know nothing of any framework, and need the standard library alone.
"""

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path


class Clock:
    """When each step was over, by the wall's clock, which all processes share; its loss and its gradient's norm."""

    def __init__(self):
        self.ends, self.losses, self.norms = [], [], []

    def tick(self, loss=None, norm=None) -> None:
        """A step is over. loss, norm (before clipping): anything that `float` takes, or None where there is none to compare."""
        for given, kept in ((loss, self.losses), (norm, self.norms)):
            if given is not None:
                kept.append(float(given))
        self.ends.append(time.time())


def load(path: Path):
    """A module from its file, under a name that hides no installed package: sft/trl.py must not be `trl`."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak_bytes() -> int:
    """The most memory that this program held at a time. The rusage counts what the parent held before exec as well."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(competitor: str, job_file: str) -> None:
    """Runs the job, and writes its figures to job["result"]."""
    # At the end of the path, where no workload's name hides an installed package.
    sys.path.append(str(Path(__file__).parent))
    job, clock = json.loads(Path(job_file).read_text()), Clock()
    more = load(Path(competitor)).run(job, clock) or {}
    figures = {"ends": clock.ends, "losses": clock.losses, "norms": clock.norms, "peak_bytes": peak_bytes(), **more}
    Path(job["result"]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
