"""Simulates the data plan against equal-cost buckets and padded batches; times its solver, 2 M clips.

python benchmarks/data_plan.py > benchmarks/results/data_plan.txt

Simulated, not measured: a clip's cost is the network's FLOPs (storyanchors.flops, step-4b), a rank's time is
the cost of its clips, and all ranks wait for the slowest one after each pack, of which a rank has one a step
unless packs are capped. The mix of clips is assumed. Left out: communication, the optimizer, reading, and
that a kernel's speed depends on a clip's length.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_pipeline.build_index import CAPTION_COLUMNS, CLIP_COLUMNS
from data_pipeline.index_file import write_index
from storyanchors.dit_config import StoryDiTConfig
from storyanchors.flops import ClipSize, model_flops, num_tokens
from train.clips.clip_costs import CAPTION_TOKENS
from train.data_plan import DataPlan
from train.plan_report import pack_costs, useful_share

SIZES = [(480, 832), (832, 480), (624, 624), (720, 1280)]  # height, width
SHARES = [0.40, 0.15, 0.15, 0.30]
FRAMES = range(6, 25)
RANKS, CLIPS_PER_RANK = (8, 64, 512), (2, 4, 8)
NUM_STEPS = 64
NETWORK = StoryDiTConfig.preset("step-4b")
MANY = 2_000_000
PART = "--part-of-2-million"


def flops(num_frames: int, height: int, width: int) -> float:
    return float(model_flops(NETWORK, [ClipSize(num_frames, height // 8, width // 8, CAPTION_TOKENS)]))


class Clips:
    """Clips of the assumed mix: which size and how many frames each has, its tokens and its cost."""

    def __init__(self, num_clips: int, seed: int):
        rng = np.random.default_rng(seed)
        self.size = rng.choice(len(SIZES), p=SHARES, size=num_clips)
        self.frames = rng.integers(FRAMES.start, FRAMES.stop, size=num_clips)
        kinds = [(size, frames) for size in range(len(SIZES)) for frames in FRAMES]
        costs = np.array([flops(frames, *SIZES[size]) for size, frames in kinds])
        tokens = [
            num_tokens(NETWORK, ClipSize(frames, SIZES[size][0] // 8, SIZES[size][1] // 8, 0))
            for size, frames in kinds
        ]
        kind = self.size * len(FRAMES) + self.frames - FRAMES.start
        self.costs, self.tokens = costs[kind], np.array(tokens)[kind]
        self.kind_costs = costs
        self.kind_shares = np.repeat(np.array(SHARES) / len(FRAMES), len(FRAMES))


def padded_share(clips: Clips, num_ranks: int, per_rank: int, *, flat: bool) -> float:
    """Every rank pads its random clips: each to the most tokens, or to the most frames, height and width."""
    used = NUM_STEPS * num_ranks * per_rank
    by_rank = lambda values: values[:used].reshape(NUM_STEPS, num_ranks, per_rank)  # noqa: E731
    if flat:
        executed = per_rank * by_rank(clips.costs).max(-1)  # the dearest clip is the longest
    else:
        height, width = (np.array(SIZES)[clips.size, axis] for axis in (0, 1))
        box = np.stack([by_rank(values).max(-1) for values in (clips.frames, height, width)])
        kinds, kind = np.unique(box.reshape(3, -1), axis=1, return_inverse=True)
        executed = per_rank * np.array([flops(*map(int, kind)) for kind in kinds.T])[kind.ravel()]
        executed = executed.reshape(NUM_STEPS, num_ranks)
    return by_rank(clips.costs).sum() / (num_ranks * executed.max(-1).sum())


def bucket_share(clips: Clips, num_ranks: int, per_rank: int) -> float:
    """Every rank takes clips of one kind at a time, as many as cost about per_rank mean clips."""
    target = per_rank * (clips.kind_shares * clips.kind_costs).sum()
    counts = np.maximum(1, np.rint(target / clips.kind_costs))
    chances = clips.kind_shares / counts  # so that every clip still comes equally often
    rng = np.random.default_rng(1)
    kinds = rng.choice(len(counts), p=chances / chances.sum(), size=(NUM_STEPS, num_ranks))
    costs = (counts * clips.kind_costs)[kinds]
    return costs.sum() / (num_ranks * costs.max(-1).sum())


def plan_of(clips: Clips, num_ranks: int, per_rank: int, look_ahead: int, **cap: int) -> DataPlan:
    per_pack = cap.get("max_tokens", math.inf) / (1.2 * clips.tokens.mean())  # clips, with room to balance
    packs = num_ranks * max(1, math.ceil(per_rank / per_pack))
    return DataPlan(
        clips.tokens,
        clips.costs,
        seed=0,
        stage="benchmark",
        clips_per_batch=num_ranks * per_rank,
        packs_per_batch=packs,
        look_ahead=look_ahead,
        **cap,
    )


def plan_share(
    clips: Clips, num_ranks: int, per_rank: int, look_ahead: int, *, waits: bool = True, **cap: int
) -> float:
    """waits: for each other after each pack, not only after each step."""
    batches = pack_costs(plan_of(clips, num_ranks, per_rank, look_ahead, **cap), NUM_STEPS)
    return useful_share(batches, num_ranks, waits_each_micro_step=waits)


def compare(clips: Clips) -> None:
    longest = int(clips.tokens.max())
    ways = {
        "padded to most frames, height, width": lambda W, B: padded_share(clips, W, B, flat=False),
        "padded to most tokens": lambda W, B: padded_share(clips, W, B, flat=True),
        "buckets of one kind, equal cost": lambda W, B: bucket_share(clips, W, B),
        "ours, look_ahead 1": lambda W, B: plan_share(clips, W, B, 1),
        "ours, look_ahead 4 (default)": lambda W, B: plan_share(clips, W, B, 4),
        "ours, look_ahead 8": lambda W, B: plan_share(clips, W, B, 8),
        f"ours, 4, packs <= {longest} tokens": lambda W, B: plan_share(clips, W, B, 4, max_tokens=longest),
        "the same, ranks wait once a step": lambda W, B: plan_share(
            clips, W, B, 4, max_tokens=longest, waits=False
        ),
    }
    print(f"useful share over {NUM_STEPS} steps (work / time of all ranks), by ranks and clips per rank")
    print(f"{'ranks':36}" + "".join(f"{ranks:>20}" for ranks in RANKS))
    print(f"{'clips per rank':36}" + "".join(f"{b:>8}{c:>6}{d:>6}" for b, c, d in [CLIPS_PER_RANK] * 3))
    for name, share in ways.items():
        cells = [[share(ranks, per_rank) for per_rank in CLIPS_PER_RANK] for ranks in RANKS]
        print(f"{name:36}" + "".join(f"{a:8.3f}{b:6.3f}{c:6.3f}" for a, b, c in cells), flush=True)


def describe_batches(clips: Clips) -> None:
    print("\nclips in a step (least, mean, most) and most tokens in a pack, look_ahead 4, no cap, 64 ranks")
    for per_rank in CLIPS_PER_RANK:
        plan, position, sizes, most = plan_of(clips, 64, per_rank, 4), 0, [], 0
        for _ in range(NUM_STEPS):
            batch = plan.batch(position)
            position = batch.end
            sizes.append(batch.num_global_clips)
            most = max(most, *(clips.tokens[[clip.row for clip in pack]].sum() for pack in batch.packs))
        spread = f"{min(sizes)}, {np.mean(sizes):.0f}, {max(sizes)}"
        print(f"  {per_rank} clips per rank: {spread} clips; {most} tokens")


def time_solver(clips: Clips) -> None:
    print("\nsolver, CPU milliseconds a step, as one rank runs it (median and most of 6 windows)")
    for ranks, per_rank, cap in (
        (64, 4, {}),
        (512, 4, {}),
        (512, 16, {}),
        (512, 16, {"max_tokens": 600_000}),
    ):
        plan = plan_of(clips, ranks, per_rank, 4)
        plan.max_tokens = cap.get("max_tokens")
        packs, windows = plan.packs(0, rank=0, world_size=ranks), []
        for _ in range(6):
            start = time.process_time()
            for _ in range(4):
                next(packs)
            windows.append((time.process_time() - start) / 4 * 1000)
        capped = f", packs of at most {cap['max_tokens']} tokens" if cap else ""
        print(f"  {ranks} ranks x {per_rank} clips{capped}: {np.median(windows):.1f}, {max(windows):.1f}")


def many_clips(folder: str) -> None:
    """An index of 2 million clips with byte ranges for all their frames."""
    clips, rng = Clips(MANY, seed=2), np.random.default_rng(3)
    ends = np.concatenate([[0], np.cumsum(clips.frames)]).astype(np.int32)
    per_frame = {
        "frame_offsets": np.arange(ends[-1]) * 60_000,
        "frame_sizes": rng.integers(40_000, 80_000, size=ends[-1]),
        "frame_crc32": rng.integers(0, 2**32, size=ends[-1]),
    }
    height, width = (np.array(SIZES)[clips.size, axis] for axis in (0, 1))
    values = {
        "key": [f"film-{n // 12:06d}-{n:08d}" for n in range(MANY)],
        "shard": [f"{n // 1000:06d}" for n in range(MANY)],
        "num_frames": clips.frames,
        "height": height,
        "width": width,
        "source": [f"films/part-{n // 12000:03d}/film-{n // 12:06d}.mp4" for n in range(MANY)],
        "story_words": np.full(MANY, 90),
        "global_caption_words": np.full(MANY, 50),
    }
    lists = {name: pa.ListArray.from_arrays(ends, pa.array(v, pa.int64())) for name, v in per_frame.items()}
    fields = CLIP_COLUMNS + CAPTION_COLUMNS
    given = {name: pa.array(values[name], kind) for name, kind in fields if name in values}
    columns = [lists.get(name, given.get(name, pa.nulls(MANY, kind))) for name, kind in fields]
    write_index(Path(folder), pa.table(columns, schema=pa.schema(fields)))


def use_many_clips(folder: str) -> None:
    """What a training process does before its first batch; prints seconds and mebibytes as JSON."""
    from train.clips.clip_costs import plan_clips
    from train.clips.clip_index import ClipIndex
    from train.clips.data_config import DataConfig

    before, start, cpu_start = private_mib(), time.perf_counter(), time.process_time()
    clips, _ = ClipIndex.open(folder).with_caption("multi_event").split(0.02)
    data = DataConfig(dataset=folder, clips_per_batch=2048, max_tokens=600_000)
    clips, plan = plan_clips(
        clips, data, NETWORK, spatial_stride=8, packs_per_batch=512, seed=0, stage="multi_event"
    )
    pack = next(plan.packs(0, rank=0, world_size=512))
    rows = [clips.row(clip.row) for clip in pack.clips]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    assert len(rows) == len(pack.clips)
    print(json.dumps({"seconds": seconds, "cpu": cpu, "before": before, "after": private_mib()}))


def private_mib() -> float:
    """Memory of this process that is no file's: what every further process needs again."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(rollup.split("Anonymous:")[1].split()[0]) / 1024


def measure_many_clips() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, PART]
        subprocess.run([*command, "write", folder], check=True)
        used = subprocess.run([*command, "use", folder], check=True, capture_output=True, text=True)
        found = json.loads(used.stdout)
        size = (Path(folder) / "index.arrow").stat().st_size / 2**30
    print(f"\n{MANY} clips ({size:.2f} GiB of index.arrow), one process of 512 ranks to its first pack:")
    print(f"  {found['seconds']:.1f} s ({found['cpu']:.1f} s of CPU)")
    print(
        f"  {found['after']:.0f} MiB private, of which {found['before']:.0f} MiB for torch, numpy and pyarrow"
    )


def main() -> None:
    if PART in sys.argv:
        {"write": many_clips, "use": use_many_clips}[sys.argv[2]](sys.argv[3])
        return
    clips = Clips(600_000, seed=0)
    print("assumed mix: 480x832 40 %, 832x480 15 %, 624x624 15 %, 720x1280 30 %; frames uniform in 6 to 24;")
    mean, most = clips.costs.mean(), clips.costs.max()
    print(
        f"tokens mean {clips.tokens.mean():.0f}, p95 {np.percentile(clips.tokens, 95):.0f}, most "
        f"{clips.tokens.max()}; cost of the dearest clip {most / mean:.1f} means (step-4b, FLOPs alone)\n"
    )
    compare(clips)
    describe_batches(clips)
    time_solver(clips)
    measure_many_clips()


if __name__ == "__main__":
    main()
