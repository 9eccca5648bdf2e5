"""Labels thousands of clips over HTTP while servers fail in every way and the process is killed; audits it.

python benchmarks/labeling_faults.py --clips 2000 --kills 20

The story world goes through all three stages twice, once undisturbed. The servers of tests/vlm_servers.py
speak OpenAI's protocol (global) and Gemini's through Google's SDK (events, story), each with the other one to
fall back on for what it refuses. Every fault comes at 5 % of the requests; faults of an answer come once per
question at most, since a second one is rightly a quarantine. SIGKILL comes at random numbers of requests.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from data_pipeline.write_story_world import WriteStoryWorldConfig, write_dataset
from tests.data_pipeline.labeling.killed_labeling import (
    Audit,
    captions_bytes,
    files_with_key,
    label_all,
    labels_without_cost,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.05)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "dataset"
        config = WriteStoryWorldConfig(
            str(dataset), num_stories=arguments.clips, num_frames=[6, 14], clips_per_shard=50
        )
        write_dataset(dataset, config)
        clean = label_all(
            dataset,
            "clean",
            rate=0.0,
            num_kills=0,
            num_requests=dict.fromkeys(("global", "events", "story"), 1),
        )
        report("without faults", clean)
        num_requests = {audit.stage: audit.requests for audit in clean}
        hurt = label_all(
            dataset, "hurt", rate=arguments.rate, num_kills=arguments.kills, num_requests=num_requests
        )
        report(f"every fault at {arguments.rate:.0%}, {arguments.kills} kills", hurt)
        same = labels_without_cost(dataset, "hurt") == labels_without_cost(dataset, "clean")
        same_captions = captions_bytes(dataset, "hurt") == captions_bytes(dataset, "clean")
        print(f"label lines without their cost are identical: {same}")
        print(f"captions are identical, byte by byte: {same_captions}")
        print(f"files that hold the API key: {len(files_with_key(dataset))}")


def report(title: str, audits: list[Audit]) -> None:
    print(f"{title}:")
    for audit in audits:
        statuses = ", ".join(f"{number} {status}" for status, number in audit.statuses.most_common())
        print(
            f"  {audit.stage}: {statuses}; {audit.requests} requests, {audit.starts} starts, "
            f"{audit.kills} kills, {audit.seconds:.0f} s"
        )
        print(
            f"    servers charged {audit.server_usd:.6f} USD, the ledger has {audit.ledger_usd:.6f}, "
            f"{audit.lost_usd:.6f} were of {audit.lost} answers lost with a killed process "
            f"({audit.in_doubt} requests in doubt); difference {audit.balance:.9f}"
        )
        print(f"    answers twice in the ledger of a shard: {audit.repeated}")
        print(f"    good answers given again because the first was lost: {audit.again}", flush=True)
    faults = sum((audit.faults for audit in audits), Counter())
    if faults:
        print(
            "  faults: " + ", ".join(f"{number} {fault}" for fault, number in faults.most_common()),
            flush=True,
        )


if __name__ == "__main__":
    main()
