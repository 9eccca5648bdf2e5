"""StoryDiTConfig: sizes and switches of a StoryDiT, and the named ones."""

from dataclasses import dataclass

QK_NORMS = ("rms_norm_across_heads", "rms_norm")


@dataclass(frozen=True)
class StoryDiTConfig:
    """Sizes and switches of a StoryDiT, with Wan 2.1's values as defaults.

    Names are those of diffusers' WanTransformer3DModel where they mean the same.
    """

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    latent_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6  # of the output norm and the norms of queries and keys
    norm_eps: float = 1e-6  # of the norms at the head of a block's three parts
    norm_affine: bool = False  # whether the norms before self-attention and feed-forward have weights
    cross_attn_norm: bool = True  # whether there is one, with weights, before cross-attention
    qk_norm: str = "rms_norm_across_heads"  # or rms_norm: of every head alone
    linear_bias: bool = True  # of the linears in attention and feed-forward
    rope_axes_dim: tuple[int, int, int] | None = None  # time, height, width of a head; None = Wan's split
    text_norm: bool = False  # LayerNorm without weights on the caption embedding
    clip_text_dim: int | None = None  # width of a second caption embedding, which goes first
    # The base model's time runs from noise (0) to data, its velocity is data - noise. Callers never see it.
    reversed_flow: bool = False
    resolution_divisor: int = 1  # pixels for one unit of the resolution embedder
    # Adds a learned code of each frame's number to its tokens. RoPE is relative and cross-attention has no
    # positions, so without it a frame can tell its number, which the prompt speaks of, only from its distance
    # to the clip's ends. For networks trained from scratch: unlike the other new parts it starts at random.
    frame_number_embedding: bool = False

    def __post_init__(self):
        for name in ("patch_size", "rope_axes_dim"):
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(size))  # a list when read from JSON
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
        axes = self.rope_axes
        if sum(axes) != self.attention_head_dim or any(dim < 2 or dim % 2 for dim in axes):
            raise ValueError(
                f"rope_axes_dim must be three even sizes that sum to {self.attention_head_dim}, found {axes}"
            )
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm is {self.qk_norm!r}, expected {' or '.join(QK_NORMS)}")

    @property
    def hidden_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def in_channels(self) -> int:
        return 2 * self.latent_channels + 1

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """How a head is shared by the rotations of time, height and width; Wan: 44/42/42 of 128."""
        if self.rope_axes_dim is not None:
            return self.rope_axes_dim
        spatial_dim = 2 * (self.attention_head_dim // 6)
        return (self.attention_head_dim - 2 * spatial_dim, spatial_dim, spatial_dim)

    @classmethod
    def preset(cls, name: str) -> "StoryDiTConfig":
        """A named size.

        tiny: for a CPU. wan-1.3b, wan-14b: Wan 2.1 T2V (wan/configs of Wan-Video/Wan2.1). step-30b:
        Step-Video-T2V and -TI2V with their own 64-channel codec. step-4b: the paper's base, whose config was
        never released: Step-Video's block at a width and depth that give 4 billion parameters, for WanVAE.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


STEP_VIDEO = dict(
    text_dim=6144, clip_text_dim=1024, text_norm=True, norm_eps=1e-5, norm_affine=True,
    cross_attn_norm=False, qk_norm="rms_norm", linear_bias=False, rope_axes_dim=(64, 32, 32),
    reversed_flow=True, resolution_divisor=16,
)  # fmt: skip
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
    "step-4b": dict(
        num_attention_heads=24, attention_head_dim=128, num_layers=26, ffn_dim=12288, **STEP_VIDEO,
    ),
    "step-30b": dict(
        num_attention_heads=48, attention_head_dim=128, num_layers=48, ffn_dim=24576, **STEP_VIDEO,
        latent_channels=64, patch_size=(1, 1, 1),
    ),
}  # fmt: skip
