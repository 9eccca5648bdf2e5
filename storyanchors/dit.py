"""StoryDiT: a Wan-style diffusion transformer over packed story frames with 2c+1 input channels (paper 2.1).

Parameter names are those of diffusers' WanTransformer3DModel, so Wan weights load as they are; what the paper
adds lives in the patch embedding's extra input columns and in `story_embedder`, all zero at the start: at
step 0 the network is the base model, whatever the mask and the conditions say.

Legend: B clips, F story frames, C latent channels, H W latent size, N video tokens, L caption tokens,
D width, A heads, K head width.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from storyanchors.attention import packed_attention
from storyanchors.conditioning import ClipConditions
from storyanchors.packing import patchify, rope_table, token_counts, unpatchify

SCALAR_CONDITIONS = ("fps", "frame_interval", "motion", "num_frames")


@dataclass(frozen=True)
class StoryDiTConfig:
    """Sizes of a StoryDiT; names are those of diffusers' WanTransformer3DModel where they mean the same."""

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    latent_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6
    # Adds a learned code of each frame's number to its tokens. RoPE is relative and cross-attention has no
    # positions, so without it a frame can tell its number, which the prompt speaks of, only from its distance
    # to the clip's ends. For networks trained from scratch: unlike the other new parts it starts at random.
    frame_number_embedding: bool = False

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # a list when read from JSON
        for name in ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "text_dim"):
            if not (isinstance(size := getattr(self, name), int) and size >= 1):
                raise ValueError(f"{name} must be a whole number from 1, found {size!r}")
        if self.patch_size[0] != 1 or self.patch_size[1] != self.patch_size[2]:
            raise ValueError(
                f"patch_size must be (1, p, p): story frames are never merged, found {self.patch_size}"
            )
        if self.attention_head_dim % 2 or self.attention_head_dim < 12:
            raise ValueError(
                f"attention_head_dim must be even and at least 12, found {self.attention_head_dim}"
            )

    @property
    def hidden_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def in_channels(self) -> int:
        return 2 * self.latent_channels + 1

    @classmethod
    def preset(cls, name: str) -> "StoryDiTConfig":
        """A named size: tiny (CPU), wan-1.3b or wan-14b (Wan 2.1 T2V, wan/configs of Wan-Video/Wan2.1)."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


PRESETS = {
    "tiny": dict(
        num_attention_heads=3, attention_head_dim=64, num_layers=6, ffn_dim=768, text_dim=192,
        frame_number_embedding=True,
    ),
    "wan-1.3b": dict(
        num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960, text_dim=4096,
    ),
    "wan-14b": dict(
        num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824, text_dim=4096,
    ),
}  # fmt: skip


class StoryDiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["StoryBlock"]  # noqa: RUF012 (diffusers' name and type)
    _repeated_blocks = ["StoryBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["time_embedder", "story_embedder", "scale_shift_table", "norm2"]  # noqa: RUF012

    def __init__(self, config: StoryDiTConfig):
        super().__init__()
        self.register_to_config(**dataclasses.asdict(config))
        D, patch = config.hidden_dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, D, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(D, config.freq_dim, config.text_dim)
        self.story_embedder = StoryEmbedder(D, config.freq_dim, config.frame_number_embedding)
        self.blocks = nn.ModuleList(StoryBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, D) / D**0.5)
        self.proj_out = nn.Linear(D, config.latent_channels * math.prod(patch))
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier as in Wan, and zero for everything that Wan does not have."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name in (*SCALAR_CONDITIONS, "resolution"):
            nn.init.zeros_(getattr(self.story_embedder, name).linear_2.weight)
        nn.init.zeros_(self.patch_embedding.weight[:, self.config.latent_channels :])

    @classmethod
    def from_config(cls, config: dict | StoryDiTConfig, return_unused_kwargs: bool = False, **overrides):
        """diffusers' hook behind from_pretrained; keys that StoryDiTConfig does not have are an error."""
        if isinstance(config, StoryDiTConfig):
            config = dataclasses.asdict(config)
        content = {key: value for key, value in {**config, **overrides}.items() if not key.startswith("_")}
        names = {field.name for field in dataclasses.fields(StoryDiTConfig)}
        if unknown := sorted(set(content) - names):
            raise ValueError(f"unknown keys {unknown} in a StoryDiT config, expected only {sorted(names)}")
        model = cls(StoryDiTConfig(**content))
        return (model, {}) if return_unused_kwargs else model

    def forward(
        self,
        inputs: Tensor | Sequence[Tensor],
        timesteps: Tensor,
        conditions: Sequence[ClipConditions] | None,
        captions: Sequence[Tensor],
    ) -> Tensor | list[Tensor]:
        """Velocity of B clips, in the form of inputs with C channels.

        inputs: B clips (F_i, 2C+1, H_i, W_i) of any sizes, or one tensor (B, F, 2C+1, H, W); see
        conditioning.stack_condition_channels. timesteps: (B,) in [0, 1000], 1000 sigma. conditions: one per
        clip, or None when all is unknown. captions: B embeddings (L_i, text_dim); every row is attended, so a
        caller that wants Wan's zero-padded rows passes them. ValueError where counts or channels do not fit.
        """
        conditions = [ClipConditions()] * len(inputs) if conditions is None else conditions
        self._check_inputs(inputs, timesteps, conditions, captions)
        dtype = self.patch_embedding.weight.dtype
        tokens, grids = patchify([clip.to(dtype) for clip in inputs], self.config.patch_size[1])
        lengths, caption_lengths = token_counts(grids), [len(caption) for caption in captions]
        x_ND = F.linear(tokens, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).to(dtype)
        x_ND = self.story_embedder.add_frame_numbers(x_ND, grids)
        rope = rope_table(grids, self.config.attention_head_dim, x_ND.device)
        embedder = self.condition_embedder
        caption_LD = embedder.text_embedder(torch.cat([caption.to(dtype) for caption in captions]))
        temb_BD = embedder.time_embedder(timesteps) + self.story_embedder(conditions, timesteps.device)
        modulation_B6D = embedder.time_proj(F.silu(temb_BD)).unflatten(1, (6, -1))
        for block in self.blocks:
            args = (x_ND, caption_LD, modulation_B6D, rope, lengths, caption_lengths)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_ND = self._gradient_checkpointing_func(block, *args)
            else:
                x_ND = block(*args)
        shift, scale = (self.scale_shift_table.float() + temb_BD[:, None]).unbind(1)
        x_ND = _modulated_norm(x_ND, shift, scale, lengths, self.config.eps)
        velocity = unpatchify(self.proj_out(x_ND), grids, self.config.patch_size[1])
        return torch.stack(velocity) if isinstance(inputs, Tensor) else velocity

    def _check_inputs(self, inputs, timesteps, conditions, captions) -> None:
        counts = {
            "inputs": len(inputs), "timesteps": len(timesteps),
            "conditions": len(conditions), "captions": len(captions),
        }  # fmt: skip
        if len(set(counts.values())) != 1:
            raise ValueError(f"one timestep, conditions and caption per clip are expected, found {counts}")
        expected = 2 * self.config.latent_channels + 1
        for clip in inputs:
            if clip.ndim != 4 or clip.shape[1] != expected:
                raise ValueError(
                    f"a clip must be (F, {expected}, H, W) with {expected} = "
                    f"2 x {self.config.latent_channels} + 1 channels, found {tuple(clip.shape)}"
                )
        for caption in captions:
            if caption.ndim != 2 or caption.shape[1] != self.config.text_dim or not len(caption):
                raise ValueError(
                    f"a caption embedding must be (L, {self.config.text_dim}) with L > 0, "
                    f"found {tuple(caption.shape)}"
                )


class StoryBlock(nn.Module):
    """Self-attention within a clip, cross-attention to its caption, feed-forward; AdaLN on first and last."""

    def __init__(self, config: StoryDiTConfig):
        super().__init__()
        D = config.hidden_dim
        self.eps = config.eps
        self.attn1 = Attention(D, config.num_attention_heads, config.eps)
        self.norm2 = nn.LayerNorm(D, eps=config.eps)
        self.attn2 = Attention(D, config.num_attention_heads, config.eps)
        self.ffn = FeedForward(D, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, D) / D**0.5)

    def forward(
        self,
        x_ND: Tensor,
        caption_LD: Tensor,
        modulation_B6D: Tensor,
        rope: Tensor,
        lengths: list[int],
        caption_lengths: list[int],
    ) -> Tensor:
        modulation = (self.scale_shift_table.float() + modulation_B6D).unbind(1)
        shift1, scale1, gate1, shift3, scale3, gate3 = modulation  # each (B, D), float32
        h_ND = _modulated_norm(x_ND, shift1, scale1, lengths, self.eps)
        x_ND = _gated_residual(x_ND, self.attn1(h_ND, h_ND, lengths, lengths, rope), gate1, lengths)
        weight, bias = self.norm2.weight.float(), self.norm2.bias.float()
        h_ND = F.layer_norm(x_ND.float(), self.norm2.normalized_shape, weight, bias, self.eps)
        x_ND = x_ND + self.attn2(h_ND.to(_compute_dtype(x_ND)), caption_LD, lengths, caption_lengths)
        h_ND = _modulated_norm(x_ND, shift3, scale3, lengths, self.eps)
        return _gated_residual(x_ND, self.ffn(h_ND), gate3, lengths)


class Attention(nn.Module):
    """Multi-head attention over packed clips; queries and keys are RMS-normalised across all heads (Wan)."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)

    def forward(
        self,
        x_ND: Tensor,
        context_MD: Tensor,
        lengths: list[int],
        context_lengths: list[int],
        rope: Tensor | None = None,
    ) -> Tensor:
        split_heads = lambda y: y.unflatten(-1, (self.num_heads, -1))  # noqa: E731
        q_NAK = split_heads(_rms_norm(self.to_q(x_ND), self.norm_q))
        k_MAK = split_heads(_rms_norm(self.to_k(context_MD), self.norm_k))
        v_MAK = split_heads(self.to_v(context_MD))
        if rope is not None:
            q_NAK, k_MAK = _rotate(q_NAK, rope), _rotate(k_MAK, rope)
        q_NAK, k_MAK = q_NAK.to(v_MAK.dtype), k_MAK.to(v_MAK.dtype)
        return self.to_out[0](packed_attention(q_NAK, k_MAK, v_MAK, lengths, context_lengths).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim)])

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.net[2](self.net[0](x_ND))


class GeluProjection(nn.Module):
    """Linear and tanh-GELU; a module of its own because Wan's checkpoints name it `net.0.proj`."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.gelu(self.proj(x_ND), approximate="tanh")


class ConditionEmbedder(nn.Module):
    """Timestep and caption embeddings, under the names of Wan's checkpoints."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int):
        super().__init__()
        self.time_embedder = SinusoidMlp(freq_dim, dim)
        self.time_proj = Float32Linear(dim, 6 * dim)
        self.text_embedder = TextProjection(text_dim, dim)


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

    def __init__(self, dim: int, freq_dim: int, frame_number: bool):
        super().__init__()
        for name in SCALAR_CONDITIONS:
            setattr(self, name, SinusoidMlp(freq_dim, dim))
        self.resolution = SinusoidMlp(freq_dim, dim // 2)
        names = (*SCALAR_CONDITIONS, "resolution")
        self.null = nn.ParameterDict({name: nn.Parameter(torch.zeros(dim)) for name in names})
        self.frame_number = SinusoidMlp(freq_dim, dim) if frame_number else None

    def forward(self, conditions: Sequence[ClipConditions], device: torch.device) -> Tensor:
        """Sum of the five embeddings (B, D), float32."""
        total = 0
        for name in SCALAR_CONDITIONS:
            values = [getattr(condition, name) for condition in conditions]
            total = total + self._embed_known(name, values, 0.0, lambda known, embed: embed(known), device)
        sizes = [None if c.height is None else (c.height, c.width) for c in conditions]
        both = lambda known, embed: embed(known.flatten()).unflatten(0, (-1, 2)).flatten(1)  # noqa: E731
        return total + self._embed_known("resolution", sizes, (0.0, 0.0), both, device)

    def _embed_known(self, name: str, values: list, unused, embed, device: torch.device) -> Tensor:
        known = torch.tensor([value is not None for value in values], device=device)
        filled = [unused if value is None else value for value in values]
        values_B = torch.tensor(filled, dtype=torch.float32, device=device)
        # both are computed whatever is known, so that every rank has a gradient for every parameter
        return torch.where(known[:, None], embed(values_B, getattr(self, name)), self.null[name].float())

    def add_frame_numbers(self, x_ND: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        if self.frame_number is None:
            return x_ND
        most = max(frames for frames, _, _ in grids)
        numbers = torch.arange(1, most + 1, dtype=torch.float32, device=x_ND.device)
        code = self.frame_number(numbers).to(x_ND.dtype)
        expanded = [code[:frames].repeat_interleave(h * w, dim=0) for frames, h, w in grids]
        return x_ND + torch.cat(expanded)


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


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the next products will be computed in: one cast here, not one in each under autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _modulated_norm(
    x_ND: Tensor, shift_BD: Tensor, scale_BD: Tensor, lengths: list[int], eps: float
) -> Tensor:
    """LayerNorm without weights, then (1 + scale) x + shift by clip, in float32, for the next products."""
    normed = F.layer_norm(x_ND.float(), x_ND.shape[-1:], eps=eps)
    # slices, not a gather by segment id: the gather's backward adds rows one by one, in bf16 with 4e-2 error
    parts = zip(shift_BD, normed.split(lengths), 1 + scale_BD, strict=True)
    return torch.cat([torch.addcmul(shift, x, scale) for shift, x, scale in parts]).to(_compute_dtype(x_ND))


def _gated_residual(x_ND: Tensor, y_ND: Tensor, gate_BD: Tensor, lengths: list[int]) -> Tensor:
    """x + gate y by clip, computed in float32."""
    parts = zip(x_ND.float().split(lengths), y_ND.float().split(lengths), gate_BD, strict=True)
    return torch.cat([torch.addcmul(x, y, gate) for x, y, gate in parts]).to(x_ND.dtype)


def _rms_norm(x_ND: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMSNorm in float32, as Wan computes it; the result stays float32 for RoPE."""
    x_ND = x_ND.float()
    return x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()


def _rotate(x_NAK: Tensor, rope: Tensor) -> Tensor:
    """Rotates pairs (2i, 2i+1) of every head by the token's angles, in float32."""
    pairs = torch.view_as_complex(x_NAK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2)
