"""Fills a gap with a Wan video model through diffusers: wan_flf between both anchors, wan_i2v from the first.

Weights are a folder or a hub id of a diffusers WanImageToVideoPipeline (docs/film.md has the ids). Wan draws
4 k + 1 frames, up to the 81 that it was trained with; of those the ones nearest in time are taken, never a
mix of two, which would show everything twice. Where a clip has fewer frames than the gap, frames repeat.
"""

from math import ceil
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image

from infer.film.gap import Gap

MAX_CLIP_FRAMES = 81
NEEDED_PARTS = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")


def clip_length(frame_interval: int, *, with_last: bool) -> int:
    """Frames that Wan draws for a gap, its first anchor and, with_last, its last one among them."""
    needed = frame_interval + (2 if with_last else 1)
    return min(4 * ceil((needed - 1) / 4) + 1, MAX_CLIP_FRAMES)


def nearest_frames(frame_interval: int, *, with_last: bool) -> list[int]:
    """For every film frame of the gap the clip's frame (from 0) nearest in time.

    With a last anchor the clip spans the whole gap; without, its frames follow the first one by one. Never a
    frame that stands for an anchor: that one is in the film itself.
    """
    last_frame = clip_length(frame_interval, with_last=with_last) - 1
    pace = last_frame / (frame_interval + 1) if with_last else min(1.0, last_frame / frame_interval)
    latest = last_frame - 1 if with_last else last_frame
    return [min(max(1, round(step * pace)), latest) for step in range(1, frame_interval + 1)]


def load_wan(
    weights: str, *, device: str, dtype: torch.dtype, shift: float | None = None, offload: bool = False
) -> WanImageToVideoPipeline:
    """The pipeline of a folder or hub id that check_wan has passed.

    VAE and image encoder stay float32, as the model's makers run them. shift is of the noise levels (None: as
    the folder says); with offload, parts are on the device only while they work.
    """
    dtypes = {"default": dtype, "vae": torch.float32, "image_encoder": torch.float32}
    pipeline = WanImageToVideoPipeline.from_pretrained(weights, dtype=dtypes, use_safetensors=True)
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    if shift is not None:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=shift)
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def check_wan(weights: str, *, with_last: bool) -> None:
    """Reads the two small files that say what the model is, before gigabytes of weights.

    ValueError or OSError for what is no image-to-video model, lacks a part, or cannot take these anchors.
    """
    if not Path(weights).is_dir() and weights.strip("/").count("/") != 1:
        raise FileNotFoundError(f"weights={weights} is no folder and no hub id (owner/name)")
    index = WanImageToVideoPipeline.load_config(weights)
    present = {name for name, value in index.items() if isinstance(value, list | tuple) and value[0]}
    _check_parts(weights, NEEDED_PARTS, present)
    network = WanTransformer3DModel.load_config(weights, subfolder="transformer")
    if network.get("image_dim") is not None:
        _check_parts(weights, ("image_encoder", "image_processor"), present)
    reads_two = network.get("pos_embed_seq_len") is not None  # places for the CLIP tokens of two pictures
    if network.get("in_channels") == network.get("out_channels") and not index.get("expand_timesteps"):
        raise ValueError(f"{weights} is a text-to-video model: its network takes no image")
    if with_last and (index.get("expand_timesteps") or (network.get("image_dim") and not reads_two)):
        raise ValueError(
            f"{weights} draws from a first frame only: take interpolator=wan_i2v or a first-last model"
        )
    if not with_last and reads_two:
        raise ValueError(f"{weights} needs a first and a last frame: take interpolator=wan_flf")


def _check_parts(weights: str, needed: tuple[str, ...], present: set[str]) -> None:
    folder = Path(weights)
    for name in needed:
        if name not in present or (folder.is_dir() and not (folder / name).is_dir()):
            raise ValueError(
                f"{weights} lacks {name}; found {', '.join(sorted(present))} in model_index.json"
            )


def weight_files(weights: str) -> dict[str, list[int]]:
    """Size and time of each weight file of a folder: they tell two models apart, where hashing takes minutes.

    Of a hub id there is none: its name says which it is.
    """
    paths = sorted(Path(weights).rglob("*.safetensors"))
    return {str(path.relative_to(weights)): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def draw_gap(
    pipeline: WanImageToVideoPipeline,
    gap: Gap,
    frame_interval: int,
    *,
    with_last: bool,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    seed: int = 0,
) -> list[Image.Image]:
    """frame_interval frames in the anchors' size; Wan draws in the nearest size that its patches divide.

    The text is the gap's events (Gap.sentence). None is the pipeline's own setting.
    """
    height, width = (_divided(side, _multiple(pipeline)) for side in (gap.first.height, gap.first.width))
    chosen = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale}
    frames = pipeline(
        image=gap.first,
        last_image=gap.last if with_last else None,
        prompt=gap.sentence(),
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=clip_length(frame_interval, with_last=with_last),
        generator=torch.Generator().manual_seed(seed),
        output_type="pil",
        **{name: value for name, value in chosen.items() if value is not None},
    ).frames[0]
    wanted = [frames[index] for index in nearest_frames(frame_interval, with_last=with_last)]
    return [frame.resize(gap.first.size, Image.Resampling.LANCZOS) for frame in wanted]


def _multiple(pipeline: WanImageToVideoPipeline) -> int:
    return max(16, pipeline.vae_scale_factor_spatial * pipeline.transformer.config.patch_size[-1])


def _divided(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple
