"""The last word of a process for the batch script. Standard library only: it is there before the imports.

srun tells the highest status of all ranks; one that ends with 1 has the others killed, and so srun says 137.
"""

import os
import sys
from pathlib import Path
from types import TracebackType

STOPPED = 75  # EX_TEMPFAIL: a scheduler may start the same command again
HARDWARE = 69  # EX_UNAVAILABLE: so it may after this, as long as that helps
UNHEALTHY = 70  # EX_SOFTWARE: and not after this, which would come again
VERDICTS = "STORYANCHORS_VERDICTS"  # the folder for them, set by the batch script


def write_verdict(status: int, reason: str) -> None:
    """STATUS REASON in a file of this rank, where a batch script waits for it."""
    if not (folder := os.environ.get(VERDICTS)):
        return
    path = Path(folder, f"rank_{int(os.environ.get('SLURM_PROCID', 0)):05d}")
    try:
        path.with_suffix(".tmp").write_text(f"{status} {' '.join(reason.split())}\n")
        path.with_suffix(".tmp").replace(path)
    except OSError as error:
        print(f"cannot write the verdict {path}: {error}", file=sys.stderr)


def report_crashes() -> None:
    """From now on an error that nobody catches leaves a verdict too: a package that is missing, say."""
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # what cannot be read while importing was there a moment ago: a file system under the load of all ranks
    write_verdict(HARDWARE if issubclass(kind, OSError) else 1, f"error: {kind.__name__}: {error}")
    sys.__excepthook__(kind, error, trace)
