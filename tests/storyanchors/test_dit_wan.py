"""StoryDiT against diffusers' WanTransformer3DModel: the same network before anything is trained."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from storyanchors.conditioning import ClipConditions, stack_condition_channels
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.dit_config import PRESETS
from storyanchors.weights import load_base_weights

TOLERANCE = dict(atol=1e-5, rtol=1e-4)


@pytest.fixture
def dit(wan: WanTransformer3DModel, config: StoryDiTConfig, tmp_path: Path) -> StoryDiT:
    wan.save_pretrained(tmp_path / "wan")
    dit = StoryDiT(config).eval()
    load_base_weights(dit, tmp_path / "wan")
    return dit


def clip(F: int, H: int, W: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents (F, 4, H, W), a timestep with a fraction, and a caption whose last rows are zeros."""
    generator = torch.Generator().manual_seed(seed)
    caption = torch.randn(9, 24, generator=generator)
    caption[6:] = 0
    timestep = 1000 * torch.rand((), generator=generator)
    return torch.randn(F, 4, H, W, generator=generator), timestep, caption


def unconditioned(noisy: Tensor) -> Tensor:
    return stack_condition_channels(noisy, torch.zeros_like(noisy), torch.zeros(len(noisy)))


@torch.no_grad()
def velocity_of(wan: WanTransformer3DModel, noisy: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
    output = wan(noisy.transpose(0, 1)[None], timestep[None], caption[None]).sample  # (1, C, F, H, W)
    return output[0].transpose(0, 1)


@pytest.mark.parametrize("size", [(1, 4, 4), (1, 2, 14), (3, 8, 6), (5, 6, 10), (12, 4, 2)])
def test_wan_weights_give_what_diffusers_gives(dit, wan, size):
    noisy, timestep, caption = clip(*size)
    with torch.no_grad():
        (velocity,) = dit([unconditioned(noisy)], timestep[None], None, [caption])
    torch.testing.assert_close(velocity, velocity_of(wan, noisy, timestep, caption), **TOLERANCE)


def test_a_pack_of_clips_gives_what_diffusers_gives_for_each(dit, wan):
    clips = [clip(1, 4, 6, seed=1), clip(4, 6, 2, seed=2), clip(2, 8, 8, seed=3)]
    noisy, timesteps, captions = zip(*clips, strict=True)
    with torch.no_grad():
        velocities = dit([unconditioned(x) for x in noisy], torch.stack(timesteps), None, list(captions))
    for velocity, arguments in zip(velocities, clips, strict=True):
        torch.testing.assert_close(velocity, velocity_of(wan, *arguments), **TOLERANCE)


@pytest.mark.parametrize("given", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize(
    "conditions",
    [
        ClipConditions(),
        ClipConditions(fps=24, frame_interval=69, motion=3.5, height=480, width=832, num_frames=3),
        ClipConditions(motion=0.0, num_frames=500),
    ],
)
def test_step_zero_is_the_base_model_whatever_is_given(dit, given, conditions):
    noisy, timestep, caption = clip(3, 6, 8)
    mask = torch.zeros(3)
    mask[given] = 1
    inputs = stack_condition_channels(noisy, 1e3 * torch.randn(3, 4, 6, 8), mask)
    with torch.no_grad():
        (velocity,) = dit([inputs], timestep[None], [conditions], [caption])
        (base,) = dit([unconditioned(noisy)], timestep[None], None, [caption])
    assert torch.equal(velocity, base)  # difference exactly 0


# Image to video: 2C+4 input channels, [noisy C | mask 4 | condition C]


def image_to_video(**image_branch: int) -> WanTransformer3DModel:
    """With an image branch as in Wan 2.1, whose values are zero here, or without as in Wan 2.2."""
    generator = torch.Generator().manual_seed(3)
    sizes = dict(num_attention_heads=2, attention_head_dim=32, num_layers=3, ffn_dim=96, text_dim=24)
    model = WanTransformer3DModel(**sizes, in_channels=12, out_channels=4, **image_branch).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "add_v_proj" in name:
                parameter.zero_()
    return model


@pytest.mark.parametrize("image_branch", [{}, dict(image_dim=20, added_kv_proj_dim=64)])
def test_image_to_video_weights_give_what_diffusers_gives(config, image_branch, tmp_path):
    wan = image_to_video(**image_branch)
    wan.save_pretrained(tmp_path)
    dit = StoryDiT(config).eval()
    report = load_base_weights(dit, tmp_path)
    noisy, timestep, _ = clip(3, 6, 8)
    caption = torch.randn(512, 24)  # diffusers takes the last 512 rows for the text
    condition, mask = torch.randn(3, 4, 6, 8), torch.tensor([1.0, 0.0, 1.0])
    condition[1] = 0
    with torch.no_grad():
        (velocity,) = dit([stack_condition_channels(noisy, condition, mask)], timestep[None], None, [caption])
        masks = mask[:, None, None, None].expand(3, 4, 6, 8)
        stacked = torch.cat([noisy, masks, condition], dim=1).transpose(0, 1)[None]
        image = dict(encoder_hidden_states_image=torch.randn(1, 7, 20)) if image_branch else {}
        expected = wan(stacked, timestep[None], caption[None], **image).sample[0].transpose(0, 1)
    torch.testing.assert_close(velocity, expected, **TOLERANCE)
    assert len(report.dropped) == (8 + 3 * 5 if image_branch else 0)
    assert "mask is the sum of its four" in str(report)


def test_networks_that_begin_as_wan_have_no_frame_numbers():
    """Those do not start at zero: they are for networks that are trained from scratch."""
    with_numbers = {name for name in PRESETS if StoryDiTConfig.preset(name).frame_number_embedding}
    assert with_numbers == {"tiny"}


@pytest.mark.parametrize(
    "preset, own, expansion",
    [
        ("wan-1.3b", 1_418_996_800, 17 * 4 * 1536),
        ("wan-14b", 14_288_491_584, 17 * 4 * 5120),
        (
            "step-30b",
            29_342_478_400,
            65 * 6144,
        ),  # StepVideoModel of Step-Video-T2V, counted on the meta device
    ],
)
def test_presets_have_the_parameters_of_the_base_model_and_the_new_parts(preset, own, expansion):
    with torch.device("meta"):
        dit = StoryDiT(StoryDiTConfig.preset(preset))
    total = sum(parameter.numel() for parameter in dit.parameters())
    new = sum(parameter.numel() for parameter in dit.story_embedder.parameters())
    assert total - new - expansion == own


@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-14b"])
def test_presets_have_every_tensor_of_diffusers_in_its_shape(preset):
    config = StoryDiTConfig.preset(preset)
    with torch.device("meta"):
        ours = StoryDiT(config).state_dict()
        theirs = WanTransformer3DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            num_layers=config.num_layers,
            ffn_dim=config.ffn_dim,
            text_dim=config.text_dim,
        ).state_dict()
    shapes = {
        name: tuple(tensor.shape) for name, tensor in ours.items() if not name.startswith("story_embedder.")
    }
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    expected["patch_embedding.weight"] = (config.hidden_dim, 33, 1, 2, 2)
    assert shapes == expected
