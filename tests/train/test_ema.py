import pytest
import torch
from torch import nn

from train.ema import Ema


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_the_average_follows_its_law():
    net = network()
    ema = Ema(net.named_parameters(), decay=0.9)
    expected = net.weight.detach().clone()
    for n in range(200):
        with torch.no_grad():
            net.weight += 0.1
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(ema.state_dict()["weight"], expected)
    assert ema.num_updates == 200


def test_the_average_of_bfloat16_weights_is_float32():
    ema = Ema(network().to(torch.bfloat16).named_parameters(), decay=0.9)
    ema.update()
    assert ema.state_dict()["weight"].dtype == torch.float32


def test_swapped_in_gives_the_weights_back_after_an_error():
    net = network()
    ema = Ema(net.named_parameters(), decay=0.9)
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
    first, second = Ema(net.named_parameters(), decay=0.99), Ema(net.named_parameters(), decay=0.99)
    for _ in range(3):
        with torch.no_grad():
            net.weight *= 1.1
        first.update()
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()}, 3)
    for ema in (first, second):
        ema.update()
    assert torch.equal(first.state_dict()["weight"], second.state_dict()["weight"])


def test_frozen_weights_have_no_average():
    net = network()
    net.bias.requires_grad_(False)
    assert Ema(net.named_parameters(), decay=0.9).state_dict().keys() == {"weight"}
