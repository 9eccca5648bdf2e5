"""StoryDiT: a diffusion transformer over packed story frames with 2c+1 input channels (paper 2.1).

One network for two families: the switches of StoryDiTConfig make it Wan 2.1 (the defaults) or Step-Video.
Parameter names are those of diffusers' WanTransformer3DModel, so Wan weights load as they are; what the paper
adds lives in the patch embedding's extra input columns and in `story_embedder`, all zero at the start: at
step 0 the network is the base model, whatever the mask and the conditions say.

Legend: B clips, F story frames, C latent channels, H W latent size, N video tokens, L caption tokens,
D width, A heads, K head width.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from storyanchors.activation_checkpointing import MODES, block_modes, run_block
from storyanchors.attention import packed_attention
from storyanchors.block_cache import active_cache
from storyanchors.conditioning import ClipConditions
from storyanchors.dit_config import StoryDiTConfig
from storyanchors.embedders import SCALAR_CONDITIONS, CaptionEmbedding, ConditionEmbedder, StoryEmbedder
from storyanchors.modulation import affine_norm, gated_residual, modulated_norm
from storyanchors.packing import patchify, token_counts, unpatchify
from storyanchors.rotary import normed_heads, rope_table
from storyanchors.sequence_parallel import (
    TokenShare,
    agree_on_modes,
    check_degree,
    gather_tokens,
    self_attention,
    share_tokens,
)


class StoryDiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    config_name = "config.json"
    _no_split_modules = ["StoryBlock"]  # noqa: RUF012 (diffusers' name and type)
    _repeated_blocks = ["StoryBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = [  # noqa: RUF012
        "time_embedder", "story_embedder", "scale_shift_table", "norm1", "norm2", "norm3",
    ]  # fmt: skip

    def __init__(self, config: StoryDiTConfig):
        super().__init__()
        self.register_to_config(**dataclasses.asdict(config))
        D, patch = config.hidden_dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, D, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.story_embedder = StoryEmbedder(config)
        self.blocks = nn.ModuleList(StoryBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, D) / D**0.5)
        self.proj_out = nn.Linear(D, config.latent_channels * math.prod(patch))
        self.rope_axes = config.rope_axes
        self.activation_checkpointing = "none"
        self.sequence_group: str | None = None
        self._run_block = run_block
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier as in Wan, and zero for everything that Wan does not have."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._zero_new_parts()

    def _zero_new_parts(self) -> None:
        for name in (*SCALAR_CONDITIONS, "resolution"):
            nn.init.zeros_(getattr(self.story_embedder, name).linear_2.weight)
        nn.init.zeros_(self.patch_embedding.weight[:, self.config.latent_channels :])

    @classmethod
    def unfilled(cls, config: StoryDiTConfig, *, dtype: torch.dtype = torch.float32) -> "StoryDiT":
        """A network whose weights are to be read from a checkpoint: only memory, in dtype where it may be.

        What no base model has is initialised. Drawing 14 billion numbers to overwrite them takes minutes.
        """
        with torch.device("meta"):
            dit = cls(config)
        dit.cast(dtype)
        dit.to_empty(device="cpu")
        for name, parameter in dit.story_embedder.named_parameters():
            nn.init.xavier_uniform_(parameter) if name.endswith(".weight") else nn.init.zeros_(parameter)
        dit._zero_new_parts()
        return dit

    def cast(self, dtype: torch.dtype) -> None:
        """In place; the parts whose numbers need float32 (timesteps, conditions, tables, norms) keep it."""
        for name, parameter in self.named_parameters():
            keeps = any(kept in name for kept in self._keep_in_fp32_modules)
            parameter.data = parameter.data.to(torch.float32 if keeps else dtype)

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

    def set_activation_checkpointing(self, mode: str) -> None:
        """What blocks keep for their backward: one of activation_checkpointing.MODES, else ValueError."""
        if mode not in MODES:
            raise ValueError(f"activation_checkpointing is {mode!r}, expected one of {', '.join(MODES)}")
        self.activation_checkpointing = mode

    def set_sequence_parallel(self, group: ProcessGroup | None) -> None:
        """Splits the tokens of every pack over this group (see sequence_parallel); None: over nothing.

        ValueError where the group's size does not divide the heads.
        """
        if group is not None:
            check_degree(group.size(), self.config.num_attention_heads)
        self.sequence_group = group and group.group_name

    def compile_blocks(self, **settings) -> None:
        """Compiles one block for all layers; settings go to torch.compile.

        There is a graph for each number of clips in a batch, in which their lengths vary freely: the first
        batch of each number takes a minute or more.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self._run_block = torch.compile(run_block, **{"dynamic": True, "fullgraph": True, **settings})

    def forward(
        self,
        inputs: Tensor | Sequence[Tensor],
        timesteps: Tensor,
        conditions: Sequence[ClipConditions] | None,
        captions: Sequence[CaptionEmbedding],
    ) -> Tensor | list[Tensor]:
        """Velocity (noise - latents) of B clips, in the form of inputs with C channels.

        inputs: B clips (F_i, 2C+1, H_i, W_i) of any sizes, or one tensor (B, F, 2C+1, H, W); see
        conditioning.stack_condition_channels. timesteps: (B,) in [0, 1000], 1000 sigma. conditions: one per
        clip, or None when all is unknown. captions: B embeddings (L_i, text_dim), or pairs of CLIP rows
        (M_i, clip_text_dim) and LLM rows where the config has a clip_text_dim. Every row is attended: callers
        pass Wan's zero-padded rows, and of Step-Video's captions the valid rows alone.
        ValueError where counts or channels do not fit.
        """
        conditions = [ClipConditions()] * len(inputs) if conditions is None else conditions
        self._check_inputs(inputs, timesteps, conditions, captions)
        dtype = self.patch_embedding.weight.dtype
        tokens, grids = patchify([clip.to(dtype) for clip in inputs], self.config.patch_size[1])
        share = share_tokens(token_counts(grids), self.sequence_group)
        timesteps, conditions, captions = (part[share.clips] for part in (timesteps, conditions, captions))
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        x_ND = F.linear(tokens[share.tokens], weight, bias).to(dtype)
        x_ND = self.story_embedder.add_frame_numbers(x_ND, grids, share.tokens)
        rope = rope_table(grids, self.rope_axes, x_ND.device)[share.tokens]
        caption_LD, caption_lengths = self.condition_embedder.embed_captions(captions, dtype)
        times = 1000 - timesteps if self.config.reversed_flow else timesteps
        temb_BD = self.condition_embedder.time_embedder(times) + self.story_embedder(conditions, times.device)
        modulation_B6D = self.condition_embedder.time_proj(F.silu(temb_BD)).unflatten(1, (6, -1))
        args = (caption_LD, modulation_B6D, rope, share, caption_lengths)
        settings = (self.activation_checkpointing, self.config, x_ND, _compute_dtype(x_ND), self.parameters())
        modes = block_modes(*settings)
        if self.activation_checkpointing == "auto":
            is_sharded = hasattr(self.scale_shift_table, "ds_id")  # DeepSpeed's mark of ZeRO-3
            modes = agree_on_modes(modes, share, x_ND.device, is_sharded=is_sharded)
        blocks = [
            partial(self._run_block, block, mode) for block, mode in zip(self.blocks, modes, strict=True)
        ]
        if (cache := active_cache(self)) is not None:
            x_ND = cache.run_blocks(blocks, x_ND, *args)
        else:
            for block in blocks:
                x_ND = block(x_ND, *args)
        shift, scale = (self.scale_shift_table.float() + temb_BD[:, None]).unbind(1)
        x_ND = modulated_norm(
            x_ND, scale, shift, share.lengths, eps=self.config.eps, dtype=_compute_dtype(x_ND)
        )
        tokens = gather_tokens(self.proj_out(x_ND), share)
        velocity = unpatchify(tokens, grids, self.config.patch_size[1])
        if self.config.reversed_flow:
            velocity = [-clip for clip in velocity]
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
        text_dims = (self.config.text_dim,)
        if self.config.clip_text_dim is not None:
            text_dims = (self.config.clip_text_dim, self.config.text_dim)
        for caption in captions:
            parts = (caption,) if isinstance(caption, Tensor) else tuple(caption)
            if [part.shape[1:] for part in parts] != [(dim,) for dim in text_dims] or not all(
                map(len, parts)
            ):
                expected = " and ".join(f"(L, {dim})" for dim in text_dims)
                found = " and ".join(str(tuple(part.shape)) for part in parts)
                raise ValueError(f"a caption embedding must be {expected} with L > 0, found {found}")


class StoryBlock(nn.Module):
    """Self-attention within a clip, cross-attention to its caption, feed-forward; AdaLN on first and last."""

    def __init__(self, config: StoryDiTConfig):
        super().__init__()
        D, eps, affine = config.hidden_dim, config.norm_eps, config.norm_affine
        self.norm1 = nn.LayerNorm(D, eps, elementwise_affine=affine)
        self.attn1 = Attention(config)
        self.norm2 = nn.LayerNorm(D, eps) if config.cross_attn_norm else None
        self.attn2 = Attention(config)
        self.norm3 = nn.LayerNorm(D, eps, elementwise_affine=affine)
        self.ffn = FeedForward(D, config.ffn_dim, config.linear_bias)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, D) / D**0.5)

    def forward(
        self,
        x_ND: Tensor,
        caption_LD: Tensor,
        modulation_B6D: Tensor,
        rope: Tensor,
        share: TokenShare,
        caption_lengths: list[int],
    ) -> Tensor:
        lengths = share.lengths
        modulation = (self.scale_shift_table.float() + modulation_B6D).unbind(1)
        shift1, scale1, gate1, shift3, scale3, gate3 = modulation  # each (B, D), float32
        h_ND = _modulated(self.norm1, x_ND, scale1, shift1, lengths)
        x_ND = gated_residual(x_ND, self.attn1(h_ND, h_ND, share, rope=rope), gate1, lengths)
        h_ND = x_ND.to(_compute_dtype(x_ND)) if self.norm2 is None else _normed(self.norm2, x_ND)
        x_ND = x_ND + self.attn2(h_ND, caption_LD, share, caption_lengths)
        h_ND = _modulated(self.norm3, x_ND, scale3, shift3, lengths)
        return gated_residual(x_ND, self.ffn(h_ND), gate3, lengths)


class Attention(nn.Module):
    """Multi-head attention over packed clips, with RMS-normalised queries and keys.

    The norm runs over all heads together (Wan) or over each one (Step-Video).
    """

    def __init__(self, config: StoryDiTConfig):
        super().__init__()
        D, bias = config.hidden_dim, config.linear_bias
        self.head_dim = config.attention_head_dim
        self.to_q = nn.Linear(D, D, bias)
        self.to_k = nn.Linear(D, D, bias)
        self.to_v = nn.Linear(D, D, bias)
        self.to_out = nn.ModuleList([nn.Linear(D, D, bias)])
        norm_dim = D if config.qk_norm == "rms_norm_across_heads" else self.head_dim
        self.norm_q = nn.RMSNorm(norm_dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(norm_dim, eps=config.eps)

    def forward(
        self,
        x_ND: Tensor,
        context_MD: Tensor,
        share: TokenShare,
        caption_lengths: list[int] | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """The context is a caption for each of the share's clips, or x itself: then whole clips attend."""
        v_MAK = self.to_v(context_MD).unflatten(-1, (-1, self.head_dim))
        norms = ((self.to_q(x_ND), self.norm_q), (self.to_k(context_MD), self.norm_k))
        q_NAK, k_MAK = (
            normed_heads(y, norm.weight, rope, head_dim=self.head_dim, eps=norm.eps, dtype=v_MAK.dtype)
            for y, norm in norms
        )
        if caption_lengths is None:
            attended_NAK = self_attention(q_NAK, k_MAK, v_MAK, share)
        else:
            attended_NAK = packed_attention(q_NAK, k_MAK, v_MAK, share.lengths, caption_lengths)
        return self.to_out[0](attended_NAK.flatten(1))


class FeedForward(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, bias: bool):
        super().__init__()
        layers = [GeluProjection(dim, ffn_dim, bias), nn.Identity(), nn.Linear(ffn_dim, dim, bias)]
        self.net = nn.ModuleList(layers)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.net[2](self.net[0](x_ND))


class GeluProjection(nn.Module):
    """Linear and tanh-GELU; a module of its own because checkpoints name it `net.0.proj`."""

    def __init__(self, dim: int, ffn_dim: int, bias: bool):
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim, bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.gelu(self.proj(x_ND), approximate="tanh")


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the next products will be computed in: one cast here, not one in each under autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _modulated(norm: nn.LayerNorm, x_ND: Tensor, scale: Tensor, shift: Tensor, lengths: list[int]) -> Tensor:
    return modulated_norm(
        x_ND,
        scale,
        shift,
        lengths,
        eps=norm.eps,
        dtype=_compute_dtype(x_ND),
        weight_D=norm.weight,
        bias_D=norm.bias,
    )


def _normed(norm: nn.LayerNorm, x_ND: Tensor) -> Tensor:
    return affine_norm(x_ND, norm.weight, norm.bias, eps=norm.eps, dtype=_compute_dtype(x_ND))
