"""What a plan makes of its clips, in words: what an epoch is, how busy ranks are, what is read a second."""

from collections import Counter

import numpy as np

from train.clips.clip_index import ClipIndex
from train.data_plan import DataPlan, packs_of_rank
from train.watching.hardware import PEAK_TFLOPS

NUM_BATCHES = 64  # that the useful share is measured over
ASSUMED_GPU, ASSUMED_MFU = "H100", 0.4
TRAIN_FACTOR = 3  # a step's work over a forward's
MOST_SIZES = 6  # frame sizes that are listed


def pack_costs(plan: DataPlan, num_batches: int) -> list[list[float]]:
    """The cost of every pack of the first batches, dearest first."""
    batches, position = [], 0
    for _ in range(num_batches):
        batch = plan.batch(position)
        batches.append([float(plan.costs[[clip.row for clip in pack]].sum()) for pack in batch.packs])
        position = batch.end
    return batches


def useful_share(batches: list[list[float]], world_size: int, *, waits_each_micro_step: bool) -> float:
    """Work over the time of all ranks, which wait for each other after a step or after each micro-step."""
    time = 0.0
    for costs in batches:
        of_ranks = np.array([packs_of_rank(costs, rank, world_size) for rank in range(world_size)])
        time += of_ranks.max(0).sum() if waits_each_micro_step else of_ranks.sum(1).max()
    return sum(map(sum, batches)) / (world_size * time)


def describe_plan(clips: ClipIndex, plan: DataPlan, *, held_out: int, dropped: int, num_steps: int) -> str:
    """clips are those that the plan counts; held_out and dropped (above the cap) are numbers of clips."""
    lines = [f"{len(clips)} clips in the plan; {held_out} held out, {dropped} dropped for their length"]
    lines += _datasets(clips, plan)
    lines += [
        *_sizes(clips),
        *_work(plan),
        *_batches(clips, plan, num_steps),
        *_ranks(plan),
        *_bytes(clips, plan),
    ]
    return "\n".join(lines)


def _datasets(clips: ClipIndex, plan: DataPlan) -> list[str]:
    sources, start = clips.texts("source"), 0
    weights = plan.mix.weights if plan.mix else clips.num_clips
    lines = []
    for name, num_clips, weight in zip(clips.datasets, clips.num_clips, weights, strict=True):
        num_sources = len(set(sources[start : start + num_clips]))
        start += num_clips
        share = weight / sum(weights)
        lines.append(
            f"  {name}: {num_clips} clips of {num_sources} videos, {share:.1%} of what is trained on"
        )
    return lines


def _sizes(clips: ClipIndex) -> list[str]:
    frames = clips.numbers("num_frames")
    sizes = Counter(zip(clips.numbers("width").tolist(), clips.numbers("height").tolist(), strict=True))
    listed = [f"{w}x{h} {count / len(clips):.1%}" for (w, h), count in sizes.most_common(MOST_SIZES)]
    others = [f"{len(sizes) - MOST_SIZES} others"] if len(sizes) > MOST_SIZES else []
    return [f"frames: {_spread(frames)}", f"sizes:  {', '.join(listed + others)}"]


def _work(plan: DataPlan) -> list[str]:
    return [f"tokens: {_spread(plan.tokens)}", f"TFLOP:  {_spread(TRAIN_FACTOR * plan.costs / 1e12)} a clip"]


def _spread(values: np.ndarray) -> str:
    least, median, p95, most = np.percentile(values, [0, 50, 95, 100])
    return f"mean {values.mean():,.4g}, median {median:,.4g}, p95 {p95:,.4g}, {least:,.4g} to {most:,.4g}"


def _batches(clips: ClipIndex, plan: DataPlan, num_steps: int) -> list[str]:
    batches, position = [], 0
    for _ in range(_num_batches(plan)):
        batches.append(plan.batch(position))
        position = batches[-1].end
    sizes = [batch.num_global_clips for batch in batches]
    tokens = [
        int(plan.tokens[[clip.row for clip in pack]].sum()) for batch in batches for pack in batch.packs
    ]
    cap = "no cap" if plan.max_tokens is None else f"the cap is {plan.max_tokens}"
    per_epoch = len(clips) / np.mean(sizes)
    return [
        f"batch:  {np.mean(sizes):.1f} clips ({min(sizes)} to {max(sizes)}) in {plan.packs_per_batch} packs; "
        f"a pack has {min(tokens)} to {max(tokens)} tokens, {cap}; 0 tokens of padding",
        f"epoch:  {per_epoch:.1f} steps; {num_steps} steps are {num_steps / per_epoch:.2f} epochs",
    ]


def _num_batches(plan: DataPlan) -> int:
    return -(-NUM_BATCHES // plan.look_ahead) * plan.look_ahead  # whole windows


def _ranks(plan: DataPlan) -> list[str]:
    batches = pack_costs(plan, _num_batches(plan))
    lines = [
        f"useful share of {len(batches)} steps by the model's FLOPs, where ranks wait for each other once a "
        "step, and after each pack (ZeRO-2, ZeRO-3):"
    ]
    for world_size in range(1, plan.packs_per_batch + 1):
        if plan.packs_per_batch % world_size == 0:
            at_end, at_each = (
                useful_share(batches, world_size, waits_each_micro_step=waits) for waits in (False, True)
            )
            packs = plan.packs_per_batch // world_size
            lines.append(f"  {world_size:5} ranks, {packs:4} packs each: {at_end:.3f}, {at_each:.3f}")
    return lines


def _bytes(clips: ClipIndex, plan: DataPlan) -> list[str]:
    num_bytes = clips.frame_bytes().mean()
    seconds = TRAIN_FACTOR * plan.costs.mean() / (PEAK_TFLOPS[ASSUMED_GPU] * 1e12 * ASSUMED_MFU)
    return [
        f"bytes:  {num_bytes / 1e6:.3g} MB a clip, {num_bytes / seconds / 1e6:.3g} MB/s for each GPU "
        f"(assumed: {ASSUMED_GPU} at {ASSUMED_MFU:.0%} MFU, {1 / seconds:.3g} clips/s)"
    ]
