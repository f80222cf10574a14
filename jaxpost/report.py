"""What a run left in its workdir, as one HTML page; several runs compared.

python -m jaxpost.report --workdir=runs/mine
python -m jaxpost.report runs/*
"""

import sys

from jaxpost.errors import UserError
from jaxpost.reporting.report import comparison, write


def main(argv) -> int:
    """The command line; see the module's docstring."""
    folders = [*filter(None, [flags.FLAGS.workdir]), *argv[1:]]
    try:
        if not folders:
            raise UserError("--workdir=... is required: the run to report on; or several folders, to be compared.")
        if len(folders) == 1:
            print(write(folders[0], flags.FLAGS.out))
        else:
            path, text = comparison(folders, flags.FLAGS.out or "compare.html")
            print(text, path, sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from absl import app, flags

    # Defined only here, since the training command, which writes a report at its end, has a --workdir of its own.
    flags.DEFINE_string("workdir", None, "The folder of the run to report on: what --workdir was in training.")
    flags.DEFINE_string(
        "out", None, "The HTML file to write. Default: report.html in the work folder; of several runs compare.html here."
    )
    app.run(main)
