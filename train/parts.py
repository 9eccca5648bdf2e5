"""The parts of a run: the network of a preset, the frozen codec and the frozen caption encoder."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from omegaconf import MISSING
from torch import Tensor

from storyanchors.activation_checkpointing import MODES
from storyanchors.caption_cache import CachedCaptions, PrecomputedCaptions
from storyanchors.caption_encoder import WORDS, load_caption_encoder
from storyanchors.clip import frames_to_tensor
from storyanchors.codec import PcaCodec, load_codec
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.embedders import CaptionEmbedding
from storyanchors.lora import LoraSettings
from storyanchors.output_folder import output_folder
from storyanchors.sequence_parallel import check_degree
from storyanchors.weights import read_json
from train.clips.clip_index import ClipIndex
from train.clips.clip_reader import BrokenSample, ClipReader
from train.clips.clip_stream import epoch_order
from train.clips.quarantine import MAX_REPLACEMENTS
from train.settings import above_zero, at_least, naming

log = logging.getLogger(__name__)

CODEC, CAPTION_ENCODER = "codec", "caption_encoder"  # folders in a run folder
FITTED_CODEC = "pca"  # instead of a folder or reference: made here, no files needed


class Codec(Protocol):
    latent_channels: int
    spatial_stride: int

    def encode(self, frames: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def save_pretrained(self, folder: str | Path) -> None: ...
    def to(self, device: torch.device, dtype: torch.dtype) -> "Codec": ...


class CaptionEncoder(Protocol):
    text_dim: int
    clip_text_dim: int | None
    max_tokens: int | None

    def encode(self, texts: list[str]) -> list[CaptionEmbedding]: ...
    def count_tokens(self, text: str) -> int: ...
    def save_pretrained(self, folder: str | Path) -> None: ...
    def to(self, device: torch.device, dtype: torch.dtype) -> "CaptionEncoder": ...


@dataclass
class ModelConfig:
    """A preset of StoryDiT with its frozen parts; sizes that are None are the preset's."""

    preset: str = MISSING
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    num_layers: int | None = None
    ffn_dim: int | None = None
    base_weights: str | None = None  # Wan or Step-Video checkpoint; None = random weights
    codec: str = MISSING  # pca (fitted on the data set) or a folder or hub id
    pca_frames: int = 2048  # story frames that the pca codec is fitted on
    caption_encoder: str = MISSING  # words or a folder or hub id
    caption_cache: str | None = None  # a folder of embeddings that runs share; None = encode every time
    sigma_shift: float = 1.0  # toward noise, for training and sampling alike
    activation_checkpointing: str = "none"  # none | selective | full | auto
    compile: str | None = None  # backend of torch.compile for the blocks: inductor; None = not compiled
    sequence_parallel: int = 1  # ranks of a node that share the tokens of every clip; divides the heads
    lora: LoraSettings = field(default_factory=LoraSettings)  # lora.rank=16 trains an adapter of base_weights

    def __post_init__(self):
        if isinstance(self.lora, dict):  # as a run's config.yaml has it
            self.lora = LoraSettings(**self.lora)
        sizes = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim")
        at_least(1, self, "model.", "sequence_parallel", "pca_frames", *sizes)
        above_zero(self, "model.", "sigma_shift")
        if self.preset != MISSING:
            with naming("model"):
                self.dit_config  # noqa: B018 -- it checks its sizes
        if self.activation_checkpointing not in MODES:
            raise ValueError(
                f"model.activation_checkpointing is {self.activation_checkpointing!r}, expected one of "
                f"{', '.join(MODES)}"
            )
        if self.compile is not None:
            check_backend(self.compile)
        if self.sequence_parallel != 1:
            check_degree(
                self.sequence_parallel, self.dit_config.num_attention_heads, "model.sequence_parallel"
            )
        if self.lora.rank is not None and self.base_weights is None:
            raise ValueError(
                f"model.lora.rank={self.lora.rank} needs model.base_weights, the network to adapt: a "
                "published checkpoint or a model folder"
            )
        if self.base_weights is not None and self.codec == FITTED_CODEC:
            raise ValueError(
                f"model.base_weights={self.base_weights} knows the latents of one codec, and model.codec="
                f"{FITTED_CODEC} would fit another: name its own, for a model folder FOLDER/{CODEC}"
            )

    @property
    def dit_config(self) -> StoryDiTConfig:
        names = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim")
        sizes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(StoryDiTConfig.preset(self.preset), **sizes)


def check_backend(name: str) -> None:
    """ValueError for a name that torch.compile does not know."""
    if name not in torch.compiler.list_backends(()):
        usual = ", ".join(torch.compiler.list_backends())
        raise ValueError(f"model.compile is {name!r}, expected null, inductor or another of {usual}")


def build_dit(config: ModelConfig, seed: int, *, unfilled: bool = False) -> StoryDiT:
    """The network in float32: weights drawn from the seed, or unfilled, to be read from somewhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit = StoryDiT.unfilled(config.dit_config) if unfilled else StoryDiT(config.dit_config)
    dit.set_activation_checkpointing(config.activation_checkpointing)
    if config.compile:
        dit.compile_blocks(backend=config.compile)
    return dit


def open_codec(config: ModelConfig, fitted: Path) -> Codec:
    """The codec that the config refers to; for pca the one that an earlier run has saved."""
    with naming("model.codec"):
        return load_codec(fitted if config.codec == FITTED_CODEC else config.codec)


def spatial_stride(config: ModelConfig) -> int:
    """Pixels of a latent on a side: of the codec that is there, else of the preset's; no weights are read."""
    if config.codec == FITTED_CODEC:
        return 4
    record = Path(config.codec, "config.json")
    if record.is_file() and "patch" in (settings := read_json(record)):  # a PcaCodec
        return settings["patch"]
    return 16 if config.preset == "step-30b" else 8


def fit_codec(config: ModelConfig, index: ClipIndex, seed: int) -> PcaCodec:
    """A codec for the story frames of these clips."""
    return PcaCodec.fit(_first_frames(index, config.pca_frames, seed))


def open_caption_encoder(config: ModelConfig) -> CaptionEncoder:
    """The encoder that the config refers to, behind a cache where one is asked for."""
    with naming("model.caption_encoder"):
        encoder = load_caption_encoder(config.caption_encoder)
    if isinstance(encoder, PrecomputedCaptions):
        encoder.read("")  # dropout and guidance ask for it: better now than after some steps
    if config.caption_cache is None:
        return encoder
    if isinstance(encoder, PrecomputedCaptions):
        raise ValueError(f"model.caption_cache={config.caption_cache}: {encoder.folder} is on disk already")
    return CachedCaptions(encoder, config.caption_cache)


def check_parts(dit: StoryDiT, codec: Codec, caption_encoder: CaptionEncoder) -> None:
    """ValueError where the frozen parts are not those that the network expects."""
    parts = {"latent_channels": codec, "text_dim": caption_encoder, "clip_text_dim": caption_encoder}
    for name, part in parts.items():
        if (found := getattr(part, name)) != dit.config[name]:
            key = "model.codec" if part is codec else "model.caption_encoder"
            raise ValueError(f"{key} has {name}={found}, the network expects {dit.config[name]}")


def save_own_parts(config: ModelConfig, run_dir: Path, codec: Codec, caption_encoder: CaptionEncoder) -> None:
    """Writes the parts that we made, in this run or one before, to the run folder; no published ones."""
    if isinstance(codec, PcaCodec):
        with output_folder(run_dir / CODEC, made_with="config.json") as folder:
            codec.save_pretrained(folder)
    if config.caption_encoder == WORDS:
        with output_folder(run_dir / CAPTION_ENCODER, made_with="config.json") as folder:
            caption_encoder.save_pretrained(folder)


def _first_frames(index: ClipIndex, num_frames: int, seed: int) -> Tensor:
    """About num_frames story frames (N, 3, H, W) of shuffled clips, cut to their least height and width."""
    reader, clips, broken = ClipReader(), [], []
    for number in epoch_order(len(index), seed, "codec"):
        try:
            clips.append(frames_to_tensor(reader.frames(index.row(int(number)))))
        except BrokenSample as error:
            broken.append(error)
        if sum(map(len, clips)) >= num_frames or len(broken) > MAX_REPLACEMENTS:
            break
    if not clips:
        raise ValueError(f"none of {len(broken)} clips can be read to fit a codec; the last: {broken[-1]}")
    if broken:
        log.warning("the codec is fitted without %d broken clips such as %s", len(broken), broken[0])
    height, width = (min(clip.shape[axis] for clip in clips) for axis in (2, 3))
    return torch.cat([clip[:, :, :height, :width] for clip in clips])
