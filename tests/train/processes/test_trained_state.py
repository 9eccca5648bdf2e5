import pytest
import torch
from torch import Tensor, nn

from train.processes.trained_state import TrainedState


def trained_network(num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer, TrainedState]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    net[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, fused=True)
    state = TrainedState.of(net, optimizer)
    for _ in range(num_steps):
        take_step(net, optimizer)
    return net, optimizer, state


def take_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def test_fragments_are_the_trained_weights_in_order_and_live():
    net, optimizer, state = trained_network(0)
    assert [fragment.name for fragment in state.fragments] == ["0.weight", "1.weight", "1.bias"]
    take_step(net, optimizer)
    for fragment, weight in zip(state.fragments, state.parameters, strict=True):
        assert torch.equal(fragment.weights.view(fragment.shape), weight)
    assert state.num_updates == 1
    assert all(moment.abs().max() > 0 for moment in state.moments()["exp_avg"])


def test_moments_that_exist_before_the_first_step_do_not_change_it():
    net, _, _ = trained_network(3)
    plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    plain.load_state_dict(trained_network(0)[0].state_dict())
    plain[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(3):
        take_step(plain, optimizer)
    assert all(map(torch.equal, net.parameters(), plain.parameters()))


def test_a_loaded_state_goes_on_as_the_first_one_does():
    first, second = trained_network(3), trained_network(1)
    state = first[2]
    moments = {name: copies(tensors) for name, tensors in state.moments().items()}
    second[2].load(copies([f.weights for f in state.fragments]), moments, state.num_updates)
    for net, optimizer, _ in (first, second):
        take_step(net, optimizer)
    assert all(map(torch.equal, first[0].parameters(), second[0].parameters()))
    assert first[2].num_updates == second[2].num_updates == 4


def test_a_fragment_of_another_size_is_refused():
    state = trained_network(0)[2]
    with pytest.raises(ValueError, match="a fragment has 5 numbers, expected 6"):
        state.load([torch.zeros(5), torch.zeros(2), torch.zeros(1)], state.moments(), 0)


def test_weights_trained_in_bfloat16_are_refused():
    net = nn.Linear(2, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight is trained in torch.bfloat16, expected float32"):
        TrainedState.of(net, torch.optim.AdamW(net.parameters()))
