"""Floating-point operations of a StoryDiT, counted from its config: the base of MFU and of a clip's cost.

Only products of matrices count, two operations for a multiplication and an addition, as torch's
FlopCounterMode counts them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from storyanchors.dit_config import StoryDiTConfig
from storyanchors.embedders import SCALAR_CONDITIONS, CaptionEmbedding


class ClipSize(NamedTuple):
    """What the cost of a clip depends on; height and width are those of its latents."""

    num_frames: int
    height: int
    width: int
    caption_tokens: int
    clip_caption_tokens: int = 0  # of the second caption embedding (Step-Video)

    @classmethod
    def of(cls, latents: Tensor, caption: CaptionEmbedding) -> "ClipSize":
        """latents (F, C, H, W) of a clip, and its caption's embedding."""
        clip_caption, caption = caption if isinstance(caption, tuple) else ((), caption)
        frames, _, height, width = latents.shape
        return cls(frames, height, width, len(caption), len(clip_caption))


def num_tokens(config: StoryDiTConfig, clip: ClipSize) -> int:
    """Video tokens of a clip."""
    return clip.num_frames * clip.height * clip.width // math.prod(config.patch_size)


def model_flops(config: StoryDiTConfig, clips: Sequence[ClipSize]) -> int:
    """FLOPs of one forward over these clips.

    Linear layers cost in proportion to the tokens, self-attention to the square of each clip's tokens,
    cross-attention to their product with the caption's.
    """
    D = config.hidden_dim
    patch = math.prod(config.patch_size)
    tokens = [num_tokens(config, clip) for clip in clips]
    contexts = [clip.caption_tokens + clip.clip_caption_tokens for clip in clips]
    scores = sum(2 * D * n * (n + m) for n, m in zip(tokens, contexts, strict=True))  # twice: scores, values
    ends = sum(tokens) * patch * D * (config.in_channels + config.latent_channels)
    texts = sum(clip.caption_tokens for clip in clips) * (config.text_dim * D + D * D)
    texts += sum(clip.clip_caption_tokens for clip in clips) * (config.clip_text_dim or 0) * D
    time = len(clips) * (config.freq_dim * D + D * D + 6 * D * D)
    rest = 2 * (config.num_layers * scores + ends + texts + time)
    return rest + _block_linear_flops(config, clips) + _condition_flops(config, clips)


def train_flops(config: StoryDiTConfig, clips: Sequence[ClipSize], *, is_lora: bool = False) -> int:
    """FLOPs that a training step over these clips needs: forward, gradients of activations and of weights.

    Those of the frozen weights under a LoRA are not computed. What checkpointing computes again is not
    counted, so that MFU compares ways to train the same thing.
    """
    flops = 3 * model_flops(config, clips)
    return flops - _block_linear_flops(config, clips) if is_lora else flops


def _block_linear_flops(config: StoryDiTConfig, clips: Sequence[ClipSize]) -> int:
    """Linear layers of all blocks: q k v o, q o, both of the feed-forward; k v of text."""
    D, ffn = config.hidden_dim, config.ffn_dim
    N = sum(num_tokens(config, clip) for clip in clips)
    M = sum(clip.caption_tokens + clip.clip_caption_tokens for clip in clips)
    return 2 * config.num_layers * (N * (6 * D * D + 2 * D * ffn) + M * 2 * D * D)


def _condition_flops(config: StoryDiTConfig, clips: Sequence[ClipSize]) -> int:
    D, half = config.hidden_dim, config.hidden_dim // 2
    scalars = len(SCALAR_CONDITIONS) * (config.freq_dim * D + D * D)
    resolution = 2 * (config.freq_dim * half + half * half)  # height and width
    flops = 2 * len(clips) * (scalars + resolution)
    if config.frame_number_embedding:
        flops += 2 * max(clip.num_frames for clip in clips) * (config.freq_dim * D + D * D)
    return flops
