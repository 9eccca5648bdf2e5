import pytest
import torch

from storyanchors.flow import add_noise, sampling_sigmas, shift_sigmas, velocity
from storyanchors.sampling import SAMPLERS, guided


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return SAMPLERS[request.param]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0, 16.0])
def test_exact_velocity_recovers_the_data(sampler, num_steps, shift):
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    found = sampler(lambda *_: velocity(latents, noise), noise, sampling_sigmas(num_steps, shift))
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)


def test_exact_denoiser_of_a_point_recovers_it(sampler):
    """The velocity depends on the latents here: the data are one point, and every path ends there."""
    torch.manual_seed(0)
    latents, noise = torch.randn(4, 8), torch.randn(4, 8)
    found = sampler(lambda noisy, sigma: (noisy - latents) / sigma, noise, sampling_sigmas(10, 3.0))
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)


def test_the_network_sees_our_sigmas_and_they_are_shifted_once(sampler):
    seen = []

    def denoise(latents, sigma):
        seen.append(float(sigma))
        return torch.zeros_like(latents)

    sampler(denoise, torch.zeros(5), sampling_sigmas(8, 5.0))
    expected = shift_sigmas(torch.linspace(1, 0, 9), 5.0)[:-1]
    torch.testing.assert_close(torch.tensor(seen), expected)


def test_both_samplers_approach_the_same_answer_and_unipc_sooner():
    """Gaussian data of spread 0.5 has an exact velocity, E[noise - data | noisy], linear in the latents."""
    spread = 0.5

    def denoise(noisy, sigma):
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        return noisy * (sigma - (1 - sigma) * spread**2) / variance

    noise = torch.linspace(-2, 2, 9)
    exact = spread * noise  # the flow of a Gaussian scales it
    errors = {
        name: [float((s(denoise, noise, sampling_sigmas(n, 1.0)) - exact).abs().max()) for n in (8, 32, 128)]
        for name, s in SAMPLERS.items()
    }
    for found in errors.values():
        assert found[0] > found[1] > found[2]
    assert errors["unipc"][1] < errors["euler"][1] / 4


def test_shapes_do_not_matter(sampler):
    """One flat tensor of all clips gives what the clips give: this is what packing relies on."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 3), torch.randn(5)
    denoise = lambda noisy, sigma: torch.sin(3 * noisy) * sigma  # noqa: E731
    sigmas = sampling_sigmas(6, 2.0)
    packed = sampler(denoise, torch.cat([first.flatten(), second]), sigmas)
    alone = torch.cat([sampler(denoise, first, sigmas).flatten(), sampler(denoise, second, sigmas)])
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-6)


def test_callback_sees_every_step_and_the_guess_of_the_data(sampler):
    latents, noise = torch.zeros(3), torch.ones(3)
    calls = []
    sampler(
        lambda *_: velocity(latents, noise),
        noise,
        sampling_sigmas(4, 1.0),
        lambda step, x: calls.append((step, x)),
    )
    assert [step for step, _ in calls] == [1, 2, 3, 4]
    for _, guess in calls:
        torch.testing.assert_close(guess, latents, atol=1e-5, rtol=0)


def test_guidance_extrapolates_from_unconditional_to_conditional():
    conditional = lambda latents, sigma: latents + 1  # noqa: E731
    both = lambda latents, sigma: (latents + 1, latents)  # noqa: E731
    for scale in (0.0, 1.0, 4.5):
        found = guided(conditional, both, scale)(torch.zeros(3), torch.tensor(0.5))
        torch.testing.assert_close(found, torch.full((3,), scale))


def test_guidance_acts_within_its_interval_and_costs_nothing_outside(sampler):
    seen = {"conditional": [], "both": []}

    def conditional(latents, sigma):
        seen["conditional"].append(float(sigma))
        return latents + 1

    def both(latents, sigma):
        seen["both"].append(float(sigma))
        return latents + 1, latents

    sigmas = sampling_sigmas(8, 1.0)  # 1, 7/8, ...
    sampler(guided(conditional, both, 3.0, (0.25, 0.75)), torch.zeros(3), sigmas)
    assert seen == {"conditional": [1.0, 0.875, 0.125], "both": [0.75, 0.625, 0.5, 0.375, 0.25]}


def test_noising_and_one_exact_step_are_inverse(sampler):
    latents, noise, sigma = torch.randn(3), torch.randn(3), torch.tensor([0.7])
    noisy = add_noise(latents[None], noise[None], sigma)[0]
    found = sampler(lambda *_: velocity(latents, noise), noisy, torch.tensor([0.7, 0.0]))
    torch.testing.assert_close(found, latents, atol=1e-5, rtol=1e-5)
