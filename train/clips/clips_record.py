"""Which clips a run was begun with: a position in the data plan means nothing for others."""

import json
from pathlib import Path

from train.clips.clip_index import ClipIndex
from train.run_folder import write_text

RECORD = "clips.json"


def write_clips(run_dir: Path, clips: ClipIndex) -> None:
    record = {"clips": len(clips), "sha256": clips.fingerprint()}
    write_text(run_dir / RECORD, json.dumps(record) + "\n")


def check_clips(run_dir: Path, clips: ClipIndex) -> None:
    """ValueError where the clips are not those of the run's start: some would come twice, some never."""
    record = json.loads((run_dir / RECORD).read_text())
    if record["sha256"] == clips.fingerprint():
        return
    found = f"{len(clips)} clips of {clips}, its plan is of {record['clips']}"
    if len(clips) == record["clips"]:
        found = f"the {len(clips)} clips of {clips} are not those that it was begun with"
    raise ValueError(
        f"{run_dir} cannot go on: {found} ({run_dir / RECORD}); give back the dataset as it was, or begin a "
        "new run with init_from"
    )
