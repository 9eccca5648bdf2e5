"""What the clips of an index cost a network, and the plan that balances it."""

import logging

import numpy as np

from storyanchors.dit_config import StoryDiTConfig
from storyanchors.flops import ClipSize, model_flops
from train.clips.clip_index import ClipIndex
from train.clips.data_config import DataConfig
from train.data_plan import DataPlan

log = logging.getLogger(__name__)

DEAREST_OVER_MEDIAN = 100  # above it one clip's step may take minutes where others take seconds
CAPTION_TOKENS = 512  # Wan pads to this; shorter captions make a clip of 9,360 tokens at most 2 % cheaper


def clip_flops(index: ClipIndex, config: StoryDiTConfig, spatial_stride: int) -> np.ndarray:
    """FLOPs (N,) of a forward over each clip alone; spatial_stride: pixels of a latent on a side."""
    frames = index.numbers("num_frames")
    height, width = (index.numbers(name) // spatial_stride for name in ("height", "width"))
    sizes = (frames << 40) + (height << 20) + width  # one number sorts faster than three
    kinds, kind_of_clip = np.unique(sizes, return_inverse=True)
    low = (1 << 20) - 1
    flops = [
        model_flops(config, [ClipSize(kind >> 40, kind >> 20 & low, kind & low, CAPTION_TOKENS)])
        for kind in kinds.tolist()
    ]
    return np.array(flops, dtype=np.float64)[kind_of_clip]


def plan_clips(
    index: ClipIndex,
    data: DataConfig,
    dit_config: StoryDiTConfig,
    *,
    spatial_stride: int,
    packs_per_batch: int,
    seed: int,
    stage: str,
) -> tuple[ClipIndex, DataPlan]:
    """The plan, and the clips that its rows count: all of the index but those that data.drop_too_long drops.

    ValueError that names a clip above data.max_tokens, unless it is to be dropped.
    """
    tokens = index.num_tokens(spatial_stride * dit_config.patch_size[-1])
    if data.max_tokens is not None and (too_long := tokens > data.max_tokens).any():
        index, tokens = _drop_too_long(index, tokens, too_long, data)
    costs = clip_flops(index, dit_config, spatial_stride)
    _warn_of_dearest(index, tokens, costs)
    plan = DataPlan(
        tokens,
        costs,
        seed=seed,
        stage=stage,
        clips_per_batch=data.clips_per_batch,
        packs_per_batch=packs_per_batch,
        max_tokens=data.max_tokens,
        look_ahead=data.look_ahead,
        mix=data.mix_of(index.num_clips),
    )
    return index, plan


def _warn_of_dearest(index: ClipIndex, tokens: np.ndarray, costs: np.ndarray) -> None:
    number, median = int(costs.argmax()), float(np.median(costs))
    if costs[number] > DEAREST_OVER_MEDIAN * median:
        log.warning(
            "clip %s with %d video tokens costs %.0f times as much as the median clip, so will its step: "
            "data.max_tokens=... with data.drop_too_long=true leaves out longer clips",
            index.row(number).key,
            tokens[number],
            costs[number] / median,
        )


def _drop_too_long(
    index: ClipIndex, tokens: np.ndarray, too_long: np.ndarray, data: DataConfig
) -> tuple[ClipIndex, np.ndarray]:
    number, count = int(too_long.argmax()), int(too_long.sum())
    first = f"{index.row(number).key} with {tokens[number]}"
    found = f"{count} of {len(index)} clips have more than data.max_tokens={data.max_tokens} video tokens"
    if not data.drop_too_long:
        raise ValueError(f"{found}, such as {first}: raise it, or set data.drop_too_long=true")
    if count == len(index):
        raise ValueError(f"{found}: none is left to train on")
    log.warning("%s and are left out, such as %s", found, first)
    return index.only(~too_long), tokens[~too_long]
