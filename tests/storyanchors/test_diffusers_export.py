"""What stock diffusers loads is the network without given frames; what it cannot hold comes back exactly."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from storyanchors.conditioning import stack_condition_channels
from storyanchors.diffusers_export import (
    check_is_wan,
    load_diffusers_wan,
    save_diffusers_wan,
    verify_diffusers_wan,
)
from storyanchors.dit import StoryDiT, StoryDiTConfig


@pytest.fixture
def dit(config: StoryDiTConfig) -> StoryDiT:
    """A trained network: also the null vectors and the new input columns are no longer zero."""
    torch.manual_seed(0)
    dit = StoryDiT(config).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dit


@pytest.mark.parametrize(("num_frames", "height", "width"), [(1, 4, 4), (4, 6, 10)])
def test_stock_diffusers_computes_what_we_do_without_given_frames(dit, tmp_path, num_frames, height, width):
    save_diffusers_wan(dit, tmp_path)
    wan, loading = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    noisy, caption = torch.randn(num_frames, 4, height, width), torch.randn(5, 24)
    timestep = torch.tensor([321.5])
    inputs = stack_condition_channels(noisy, torch.zeros_like(noisy), torch.zeros(num_frames))
    with torch.no_grad():
        [ours] = dit([inputs], timestep, None, [caption])
        theirs = wan.eval()(noisy.transpose(0, 1)[None], timestep, caption[None]).sample[0].transpose(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_verifying_says_how_far_both_are_apart(dit, tmp_path):
    save_diffusers_wan(dit, tmp_path)
    difference, largest = verify_diffusers_wan(dit, tmp_path)
    assert difference <= 1e-5 * largest
    with torch.no_grad():
        dit.blocks[1].attn1.to_k.weight.mul_(1.5)
    assert verify_diffusers_wan(dit, tmp_path)[0] > 1e-3


def test_the_conditions_of_an_unknown_clip_are_part_of_the_view(dit, tmp_path):
    """Dropping the null vectors instead would be a visible difference."""
    save_diffusers_wan(dit, tmp_path)
    with torch.no_grad():
        for null in dit.story_embedder.null.values():
            null.zero_()
    assert verify_diffusers_wan(dit, tmp_path)[0] > 1e-3


def test_nothing_is_lost_on_the_way_back(dit, tmp_path):
    save_diffusers_wan(dit, tmp_path)
    again = load_diffusers_wan(tmp_path)
    weights = again.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in dit.state_dict().items())
    assert all(again.config[name] == dit.config[name] for name in ("num_layers", "latent_channels"))


@pytest.mark.parametrize(
    ("preset", "named"),
    [
        ("step-4b", "norm_eps=1e-05, .*qk_norm=rms_norm, .*reversed_flow=True"),
        ("tiny", "frame_number_embedding=True"),
    ],
)
def test_a_network_that_is_not_built_as_wan_is_refused(preset, named):
    with torch.device("meta"):
        dit = StoryDiT(replace(StoryDiTConfig.preset(preset), num_layers=1))
    with pytest.raises(ValueError, match=named):
        check_is_wan(dit)
