"""StoryDiT -> a folder that stock diffusers loads as its WanTransformer3DModel, and back.

That class has C input channels and no clip conditions: it is the network where no frame is given and every
condition is unknown. There the new input columns multiply zeros, and the conditions add one vector, the same
for every clip, which goes into the bias of the time embedder. What this leaves out, and the bias itself, are
written to a side file, so that nothing is lost.
"""

from dataclasses import fields
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from storyanchors.conditioning import ClipConditions, stack_condition_channels
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.weights import NEW_PARTS, PATCH, load_base_weights

STORY_PARTS = "story_parts/story_parts.safetensors"  # beside it: the config.json of the StoryDiT
TIME_BIAS = "condition_embedder.time_embedder.linear_2.bias"
SIZES = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "text_dim", "freq_dim")


@torch.no_grad()
def save_diffusers_wan(dit: StoryDiT, folder: str | Path) -> None:
    """Writes config.json and safetensors for WanTransformer3DModel.from_pretrained, and STORY_PARTS.

    ValueError for a network that is not built as Wan's, naming the settings.
    """
    check_is_wan(dit)
    C, weights = dit.config.latent_channels, dit.state_dict()
    side = {name: weights.pop(name) for name in list(weights) if name.startswith(NEW_PARTS)}
    side |= {PATCH: weights[PATCH], TIME_BIAS: weights[TIME_BIAS]}
    [unknown] = dit.story_embedder([ClipConditions()], dit.device)  # (D,)
    weights[PATCH] = weights[PATCH][:, :C].contiguous()
    weights[TIME_BIAS] = weights[TIME_BIAS] + unknown
    with torch.device("meta"):
        wan = WanTransformer3DModel(
            **{name: dit.config[name] for name in SIZES},
            patch_size=dit.config.patch_size,
            in_channels=C,
            out_channels=C,
        )
    wan.load_state_dict(weights, assign=True)
    wan.save_pretrained(folder)
    file = Path(folder) / STORY_PARTS
    dit.save_config(file.parent)
    save_file(side, file)


def load_diffusers_wan(folder: str | Path) -> StoryDiT:
    """The StoryDiT, float32, that save_diffusers_wan was given."""
    file = Path(folder) / STORY_PARTS
    dit = StoryDiT.from_config(StoryDiT.load_config(file.parent))
    load_base_weights(dit, folder)
    parameters = dit.state_dict()
    for name, tensor in load_file(file).items():
        parameters[name].copy_(tensor)
    return dit


@torch.no_grad()
def verify_diffusers_wan(dit: StoryDiT, folder: str | Path) -> tuple[float, float]:
    """(largest difference, largest velocity) of one forward of dit and of stock diffusers from the folder.

    A random clip of which no frame is given and no condition is known, in the dtype of dit.
    """
    dtype, C = dit.patch_embedding.weight.dtype, dit.config.latent_channels
    wan = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).to(dit.device).eval()
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(3, C, 8, 12, generator=generator).to(dit.device, dtype)  # (F, C, H, W)
    caption = torch.randn(16, dit.config.text_dim, generator=generator).to(dit.device, dtype)
    timestep = torch.tensor([640.5], device=dit.device)
    inputs = stack_condition_channels(noisy, torch.zeros_like(noisy), torch.zeros(3, device=dit.device))
    [ours] = dit([inputs], timestep, None, [caption])
    theirs = wan(noisy.transpose(0, 1)[None], timestep, caption[None]).sample[0].transpose(0, 1)
    return float((ours.float() - theirs.float()).abs().max()), float(ours.float().abs().max())


def check_is_wan(dit: StoryDiT) -> None:
    """ValueError, naming the settings, for a network that is built otherwise than Wan's."""
    sizes = (*SIZES, "patch_size", "latent_channels")
    different = [
        f"{field.name}={dit.config[field.name]}"
        for field in fields(StoryDiTConfig)
        if field.name not in sizes and dit.config[field.name] != field.default
    ]
    if different:
        raise ValueError(
            f"the network is not built as Wan's, so diffusers' WanTransformer3DModel cannot hold it: "
            f"{', '.join(different)}"
        )
