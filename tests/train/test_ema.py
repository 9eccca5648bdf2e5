import pytest
import torch
from torch import nn

from train.ema import Ema
from train.processes.trained_state import TrainedState


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def average_of(net: nn.Module, decay: float) -> Ema:
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return Ema(TrainedState.of(net, torch.optim.AdamW(trained)), decay)


def test_the_average_follows_its_law():
    net = network()
    ema = average_of(net, decay=0.9)
    expected = net.weight.detach().clone()
    for n in range(200):
        with torch.no_grad():
            net.weight += 0.1
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(ema.average[0], expected.flatten())
    assert ema.num_updates == 200


def test_swapped_in_gives_the_weights_back_after_an_error():
    net = network()
    ema = average_of(net, decay=0.9)
    average = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1
    own = net.weight.detach().clone()
    with pytest.raises(KeyError), ema.swapped_in():
        assert torch.equal(net.weight, average)
        raise KeyError
    assert torch.equal(net.weight, own)


def test_a_restored_average_goes_on_as_the_first_one_does():
    net = network()
    first, second = average_of(net, decay=0.99), average_of(net, decay=0.99)
    for _ in range(3):
        with torch.no_grad():
            net.weight *= 1.1
        first.update()
    second.load([average.clone() for average in first.average], 3)
    for ema in (first, second):
        ema.update()
    assert all(map(torch.equal, first.average, second.average))


def test_frozen_weights_have_no_average():
    net = network()
    net.bias.requires_grad_(False)
    assert [average.shape for average in average_of(net, decay=0.9).average] == [(6,)]
