"""What a StoryDiT is told beside its frames: the time, the caption, and the facts of the clip (paper 2.1).

All that becomes AdaLN is computed in float32: timesteps and counts mean nothing in bf16.
Legend: B clips, N video tokens, L caption tokens, T text_dim, D width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storyanchors.conditioning import ClipConditions
from storyanchors.dit_config import StoryDiTConfig

SCALAR_CONDITIONS = ("fps", "frame_interval", "motion", "num_frames")

CaptionEmbedding = Tensor | tuple[Tensor, Tensor]  # (L, text_dim), or (CLIP rows, LLM rows) for Step-Video


class ConditionEmbedder(nn.Module):
    """Timestep and caption embeddings, under the names of Wan's checkpoints."""

    def __init__(self, config: StoryDiTConfig):
        super().__init__()
        D = config.hidden_dim
        self.eps, self.text_norm = config.eps, config.text_norm
        self.time_embedder = SinusoidMlp(config.freq_dim, D)
        self.time_proj = Float32Linear(D, 6 * D)
        self.text_embedder = TextProjection(config.text_dim, D)
        self.clip_embedder = nn.Linear(config.clip_text_dim, D) if config.clip_text_dim else None

    def embed_captions(
        self, captions: Sequence[CaptionEmbedding], dtype: torch.dtype
    ) -> tuple[Tensor, list[int]]:
        """All captions in one (L, D), and the rows of each; a pair's CLIP rows go before its LLM rows."""
        if self.clip_embedder is None:
            lengths = [len(caption) for caption in captions]
            return self._embed_text(torch.cat([caption.to(dtype) for caption in captions])), lengths
        clip, text = (torch.cat([part.to(dtype) for part in parts]) for parts in zip(*captions, strict=True))
        clip_lengths, text_lengths = ([len(part) for part in parts] for parts in zip(*captions, strict=True))
        clip_rows = self.clip_embedder(clip).split(clip_lengths)
        text_rows = self._embed_text(text).split(text_lengths)
        rows = [row for pair in zip(clip_rows, text_rows, strict=True) for row in pair]
        return torch.cat(rows), [a + b for a, b in zip(clip_lengths, text_lengths, strict=True)]

    def _embed_text(self, text_LT: Tensor) -> Tensor:
        if self.text_norm:
            text_LT = F.layer_norm(text_LT.float(), text_LT.shape[-1:], eps=self.eps).to(text_LT.dtype)
        return self.text_embedder(text_LT)


class TextProjection(nn.Module):
    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, caption_LT: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(caption_LT), approximate="tanh"))


class StoryEmbedder(nn.Module):
    """The clip conditions that the paper adds to the timestep embedding, and the optional frame numbers.

    One embedder per scalar; height and width share one of half the width and are concatenated. An unknown
    condition is its null vector, never the embedding of 0. Last layers and null vectors start at zero.
    """

    def __init__(self, config: StoryDiTConfig):
        super().__init__()
        D, freq_dim = config.hidden_dim, config.freq_dim
        self.resolution_divisor = config.resolution_divisor
        for name in SCALAR_CONDITIONS:
            setattr(self, name, SinusoidMlp(freq_dim, D))
        self.resolution = SinusoidMlp(freq_dim, D // 2)
        names = (*SCALAR_CONDITIONS, "resolution")
        self.null = nn.ParameterDict({name: nn.Parameter(torch.zeros(D)) for name in names})
        self.frame_number = SinusoidMlp(freq_dim, D) if config.frame_number_embedding else None

    def forward(self, conditions: Sequence[ClipConditions], device: torch.device) -> Tensor:
        """Sum of the five embeddings (B, D), float32."""
        total = 0
        for name in SCALAR_CONDITIONS:
            values = [getattr(condition, name) for condition in conditions]
            total = total + self._embed_known(name, values, 0.0, lambda known, embed: embed(known), device)
        unit = self.resolution_divisor
        sizes = [None if c.height is None else (c.height / unit, c.width / unit) for c in conditions]
        both = lambda known, embed: embed(known.flatten()).unflatten(0, (-1, 2)).flatten(1)  # noqa: E731
        return total + self._embed_known("resolution", sizes, (0.0, 0.0), both, device)

    def _embed_known(self, name: str, values: list, unused, embed, device: torch.device) -> Tensor:
        known = torch.tensor([value is not None for value in values], device=device)
        filled = [unused if value is None else value for value in values]
        values_B = torch.tensor(filled, dtype=torch.float32, device=device)
        # both are computed whatever is known, so that every rank has a gradient for every parameter
        return torch.where(known[:, None], embed(values_B, getattr(self, name)), self.null[name].float())

    def add_frame_numbers(self, x_ND: Tensor, grids: Sequence[tuple[int, int, int]], tokens: slice) -> Tensor:
        """x holds the tokens in this slice of those of all grids."""
        if self.frame_number is None:
            return x_ND
        most = max(frames for frames, _, _ in grids)
        numbers = torch.arange(1, most + 1, dtype=torch.float32, device=x_ND.device)
        code = self.frame_number(numbers).to(x_ND.dtype)
        expanded = [code[:frames].repeat_interleave(h * w, dim=0) for frames, h, w in grids]
        return x_ND + torch.cat(expanded)[tokens]


class SinusoidMlp(nn.Module):
    """Sinusoid of a number -> Linear -> SiLU -> Linear (diffusers' TimestepEmbedding), all in float32."""

    def __init__(self, freq_dim: int, dim: int):
        super().__init__()
        self.freq_dim = freq_dim
        self.linear_1 = Float32Linear(freq_dim, dim)
        self.linear_2 = Float32Linear(dim, dim)

    def forward(self, values_B: Tensor) -> Tensor:
        half = self.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=values_B.device) / half
        angles = values_B.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
        return self.linear_2(F.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class Float32Linear(nn.Linear):
    """Computes in float32 whatever autocast and the weights' dtype are: timesteps mean nothing in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())
