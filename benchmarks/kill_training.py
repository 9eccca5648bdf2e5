"""Kills a ZeRO-2 run of two stages with SIGKILL at random moments; it must end as if nothing had been.

python benchmarks/kill_training.py --kills 100

Two processes on the CPU, the real command, started again each time. Killed are one rank, the other, or both,
at a random moment while the command starts, during steps, while a checkpoint is written, and around the
hand-over to the second stage. tests/train/killed_training.py says what is compared.
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

from data_pipeline.build_index import build_index
from data_pipeline.write_story_world import WriteStoryWorldConfig, write_dataset
from tests.train.killed_training import Audit, kill_often


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to keep the runs; default: nowhere")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr: what it is at
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        dataset = folder / "dataset"
        write_dataset(dataset, WriteStoryWorldConfig(str(dataset), num_stories=20, num_frames=[3, 5]))
        build_index(dataset, "truth")
        report(kill_often(folder, dataset, arguments.kills, arguments.seed))


def report(audit: Audit) -> None:
    print(f"{len(audit.kills)} kills in {audit.starts} starts and {audit.rounds} rounds of two stages")
    for name in ("phase", "victim", "stage"):
        print(
            f"  by {name}: "
            + ", ".join(f"{number} {word}" for word, number in audit.counts(name).most_common())
        )
    print(f"steps trained again from a checkpoint: {audit.replayed}")
    print(f"lines of keys, losses and gradient norms compared with the undisturbed run: {audit.compared}")
    seconds = [kill.survivor_s for kill in audit.kills if kill.survivor_s] or [0.0]
    print(
        f"a survivor left alone ends after {statistics.median(seconds):.1f} s, {max(seconds):.1f} s at most"
    )
    print(f"seconds per kill, restarts included: {audit.seconds / len(audit.kills):.1f}")
    print(f"faults: {len(audit.faults)}")
    for fault in audit.faults:
        print(f"  {fault}")
    if audit.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
