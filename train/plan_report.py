"""What a plan makes of its clips, in words: what an epoch is, how busy ranks are, what is read a second."""

import numpy as np

from train.clips.clip_index import ClipIndex
from train.data_plan import DataPlan, packs_of_rank
from train.watching.hardware import PEAK_TFLOPS

NUM_BATCHES = 64  # that the useful share is measured over
ASSUMED_GPU, ASSUMED_MFU = "H100", 0.4
TRAIN_FACTOR = 3  # a step's work over a forward's
MOST_SIZES = 6  # frame sizes that are listed
FLOP_UNITS = {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}


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
    shares = clip_shares(clips, plan)
    lines += _datasets(clips, plan)
    lines += [
        *_sizes(clips, shares),
        *_work(plan, shares),
        *_batches(clips, plan, num_steps),
        *_ranks(plan),
        *_bytes(clips, plan, shares),
    ]
    return "\n".join(lines)


def clip_shares(clips: ClipIndex, plan: DataPlan) -> np.ndarray:
    """Share (N,) of every clip in what is trained on: a mix shows a small dataset's clips more often."""
    weights = plan.mix.weights if plan.mix else clips.num_clips
    of_datasets = np.array(weights) / sum(weights)
    return np.repeat(of_datasets / clips.num_clips, clips.num_clips)


def _datasets(clips: ClipIndex, plan: DataPlan) -> list[str]:
    sources, start = clips.texts("source"), 0
    shares = clip_shares(clips, plan)
    lines = []
    for name, num_clips in zip(clips.datasets, clips.num_clips, strict=True):
        own = slice(start, start + num_clips)
        start += num_clips
        num_sources, share = len(set(sources[own])), shares[own].sum()
        lines.append(
            f"  {name}: {num_clips} clips of {num_sources} videos, {share:.1%} of what is trained on"
        )
    return lines


def _sizes(clips: ClipIndex, shares: np.ndarray) -> list[str]:
    sizes = np.stack([clips.numbers("width"), clips.numbers("height")])
    kinds, kind_of_clip = np.unique(sizes, axis=1, return_inverse=True)
    of_kinds = np.bincount(kind_of_clip.ravel(), shares)
    most = np.argsort(-of_kinds, kind="stable")[:MOST_SIZES]
    listed = [f"{kinds[0, kind]}x{kinds[1, kind]} {of_kinds[kind]:.1%}" for kind in most]
    others = [f"{len(of_kinds) - MOST_SIZES} others"] if len(of_kinds) > MOST_SIZES else []
    return [
        f"frames: {_spread(clips.numbers('num_frames'), shares)}",
        f"sizes:  {', '.join(listed + others)}",
    ]


def _work(plan: DataPlan, shares: np.ndarray) -> list[str]:
    flops = TRAIN_FACTOR * plan.costs
    unit = next((unit for unit, size in FLOP_UNITS.items() if np.median(flops) >= size), "MFLOP")
    return [
        f"tokens: {_spread(plan.tokens, shares)}",
        f"{unit}:  {_spread(flops / FLOP_UNITS[unit], shares)} a clip",
    ]


def _spread(values: np.ndarray, shares: np.ndarray) -> str:
    """Of the clips as they are trained on: each counts by its share (N,)."""
    median, p95 = np.quantile(values, [0.5, 0.95], weights=shares, method="inverted_cdf")
    mean, least, most = np.average(values, weights=shares), values.min(), values.max()
    middle = f"mean {_number(mean)}, median {_number(median)}, p95 {_number(p95)}"
    return f"{middle}, {_number(least)} to {_number(most)}"


def _number(value: float) -> str:
    """Three digits, or all before the point, never in powers of ten unless it is tiny."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _batches(clips: ClipIndex, plan: DataPlan, num_steps: int) -> list[str]:
    batches, position = [], 0
    for _ in range(_num_batches(plan)):
        batches.append(plan.batch(position))
        position = batches[-1].end
    sizes = [batch.num_global_clips for batch in batches]
    tokens = [
        int(plan.tokens[[clip.row for clip in pack]].sum()) for batch in batches for pack in batch.packs
    ]
    cap = "no cap" if plan.max_tokens is None else f"the cap is {plan.max_tokens:,}"
    clips_per_step = float(np.mean(sizes))
    return [
        f"batch:  {np.mean(sizes):.1f} clips ({min(sizes)} to {max(sizes)}) in {plan.packs_per_batch} packs; "
        f"a pack has {min(tokens):,} to {max(tokens):,} tokens, {cap}; 0 tokens of padding",
        *_epochs(clips, plan, clips_per_step, num_steps),
    ]


def _epochs(clips: ClipIndex, plan: DataPlan, clips_per_step: float, num_steps: int) -> list[str]:
    """Of all clips, or of each dataset of a mix, which has epochs of its own."""
    datasets, num_clips, shares = [""], [len(clips)], [1.0]
    if plan.mix:
        datasets, num_clips = [f" of {name}" for name in clips.datasets], clips.num_clips
        shares = np.array(plan.mix.weights) / sum(plan.mix.weights)
    lines = []
    for dataset, count, share in zip(datasets, num_clips, shares, strict=True):
        steps = count / (share * clips_per_step)
        epochs = _number(num_steps / steps)
        lines.append(f"epoch{dataset}:  {steps:,.1f} steps; {num_steps} steps are {epochs} epochs")
    return lines


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


def _bytes(clips: ClipIndex, plan: DataPlan, shares: np.ndarray) -> list[str]:
    num_bytes = np.average(clips.frame_bytes(), weights=shares)
    flops = TRAIN_FACTOR * np.average(plan.costs, weights=shares)
    seconds = flops / (PEAK_TFLOPS[ASSUMED_GPU] * 1e12 * ASSUMED_MFU)
    megabytes = num_bytes / 1e6
    return [
        f"bytes:  {_number(megabytes)} MB a clip, {_number(megabytes / seconds)} MB/s for each GPU "
        f"(assumed: {ASSUMED_GPU} at {ASSUMED_MFU:.0%} MFU, {_number(1 / seconds)} clips/s)"
    ]
