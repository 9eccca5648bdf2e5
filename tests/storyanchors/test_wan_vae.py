from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storyanchors.codec import WanCodec, load_codec
from storyanchors.wan_vae import FrameVaeConfig, Norm, Upsample, frame_vae_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
EXACT = dict(atol=1e-5, rtol=1e-5)


def assert_the_authors_numbers(codec: WanCodec) -> None:
    """What the authors' own VAE made of the same frames and latents, each alone."""
    vectors = load_file(GOLDEN / "wan_vae_vectors.safetensors")
    torch.testing.assert_close(codec.encode(vectors["frames"].float()), vectors["latents"], **EXACT)
    torch.testing.assert_close(codec.decode(vectors["noise"].float()), vectors["decoded"], **EXACT)


def test_the_authors_file_gives_the_authors_numbers():
    assert_the_authors_numbers(load_codec(GOLDEN / "wan_vae.safetensors"))


def test_the_authors_pickle_is_read_on_request(tmp_path):
    torch.save(load_file(GOLDEN / "wan_vae.safetensors"), tmp_path / "Wan2.1_VAE.pth")
    assert_the_authors_numbers(load_codec(tmp_path / "Wan2.1_VAE.pth", allow_pickle=True))


def test_the_numbers_know_one_kernel_from_its_mirror_image(tmp_path):
    stored = load_file(GOLDEN / "wan_vae.safetensors")
    name = "decoder.upsamples.3.resample.1.weight"
    save_file(stored | {name: stored[name].flip(2).contiguous()}, tmp_path / "vae.safetensors")
    vectors = load_file(GOLDEN / "wan_vae_vectors.safetensors")
    decoded = load_codec(tmp_path / "vae.safetensors").decode(vectors["noise"].float())
    assert (decoded - vectors["decoded"]).abs().max() > 0.01


def test_the_names_of_every_tensor_are_known():
    """Those of the released file, whose depth and width Wan 2.1's settings have."""
    tensors = frame_vae_tensors(load_file(GOLDEN / "wan_vae.safetensors"))
    assert FrameVaeConfig.of_tensors(tensors) == FrameVaeConfig(base_dim=4, decoder_base_dim=4)


def test_upsampling_and_the_convolution_after_it_are_one_transposed_convolution():
    torch.manual_seed(0)
    conv, upsample = nn.Conv2d(6, 3, 3, padding=1), Upsample(6)
    stored = {"decoder.upsamplers.0.resample.1.weight": conv.weight.detach()}
    (kernel,) = frame_vae_tensors(stored).values()
    upsample.resample[1].load_state_dict({"weight": kernel, "bias": conv.bias})
    x = torch.randn(2, 6, 5, 7)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
    torch.testing.assert_close(upsample(x), expected, **EXACT)


def random_map(dtype: torch.dtype) -> Tensor:
    x = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[:, :, 0] = 0
    return x


def test_both_ways_to_a_norm_agree():
    """In float32 on a CPU it is computed in place; elsewhere by torch's kernel."""
    norm = Norm(8)
    norm.gamma.data.uniform_(0.5, 2)
    x = random_map(torch.float32)
    expected = F.normalize(x, dim=1) * 8**0.5 * norm.gamma[:, None, None]
    torch.testing.assert_close(norm(x), expected, **EXACT)
    other = Norm(8).double()
    other.gamma.data.copy_(norm.gamma)
    torch.testing.assert_close(other(x.double()).float(), expected, **EXACT)


def test_a_norm_overwrites_on_request_only():
    x, norm = random_map(torch.float32), Norm(8)
    before = x.clone()
    with torch.no_grad():
        normed = norm(x)
        assert torch.equal(x, before)
        assert norm(x, overwrite=True) is x
    assert torch.equal(x, normed)
