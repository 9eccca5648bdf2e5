"""The trained state under DeepSpeed's ZeRO: every rank holds the fragments of its own optimizer partition.

DeepSpeed keeps a partition as flat tensors, one for each group of parameters: the masters, float32, which the
inner Adam steps. Read with deepspeed 0.19: stage 1 and 2 cut the concatenated group into equal parts (a
parameter may lie in several ranks), stage 3 cuts each parameter into equal parts.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.processes.trained_state import MOMENTS, Fragment, TrainedState, copy_all


@dataclass(frozen=True)
class Place:
    """Where a fragment lies: the range [offset, offset + n) of the master with this number."""

    master: int
    offset: int


class ZeroState(TrainedState):
    is_sharded = True

    def __init__(self, dit: nn.Module, optimizer, masters: list[Tensor]):
        self.dit = dit
        self.optimizer = optimizer  # DeepSpeed's, around torch's AdamW
        self.masters = masters
        self.places: list[Place] = []
        self.fragments = []
        for name, parameter in dit.named_parameters():
            if parameter.requires_grad and (found := self._find(parameter)) is not None:
                place, shape, start, size = found
                self.places.append(place)
                self.fragments.append(Fragment(name, shape, start, self._part(masters, place, size)))
        for master in masters:  # as AdamW's first step does, which finds them then
            moments = {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
            self._adam[master] = {"step": torch.zeros((), device=master.device), **moments}

    @abstractmethod
    def _find(self, parameter: nn.Parameter) -> tuple[Place, tuple[int, ...], int, int] | None:
        """(place, shape of the whole parameter, first number, count of numbers) of this rank's fragment."""

    @abstractmethod
    def _publish(self, weights: list[Tensor]) -> None:
        """Makes the network of all ranks compute with these."""

    @property
    def _adam(self) -> dict:
        return self.optimizer.optimizer.state

    def _part(self, flat: list[Tensor], place: Place, size: int) -> Tensor:
        return flat[place.master].detach().narrow(0, place.offset, size)

    def moments(self) -> dict[str, list[Tensor]]:
        flat = {name: [self._adam[master][name] for master in self.masters] for name in MOMENTS}
        sizes = [len(fragment.weights) for fragment in self.fragments]
        return {
            name: [self._part(flat[name], *place) for place in zip(self.places, sizes, strict=True)]
            for name in MOMENTS
        }

    @property
    def num_updates(self) -> int:
        return int(self._adam[self.masters[0]]["step"])

    def load(self, weights: list[Tensor], moments: dict[str, list[Tensor]], num_updates: int) -> None:
        own = [fragment.weights for fragment in self.fragments]
        copy_all(own, weights)
        for name, tensors in self.moments().items():
            copy_all(tensors, moments[name])
        for master in self.masters:
            self._adam[master]["step"].fill_(num_updates)
        self._publish(own)


class ReplicatedWeights(ZeroState):
    """ZeRO stage 1 and 2: all ranks hold the network's weights, each steps a part of them."""

    def __init__(self, dit: nn.Module, optimizer):
        super().__init__(dit, optimizer, optimizer.single_partition_of_fp32_groups)

    def _find(self, parameter: nn.Parameter) -> tuple[Place, tuple[int, ...], int, int] | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        place = Place(mapping.param_group_index, mapping.hp_fragment_address.start)
        address = mapping.lp_fragment_address
        return place, tuple(parameter.shape), address.start, address.numel

    def _publish(self, weights: list[Tensor]) -> None:
        from deepspeed import comm
        from deepspeed.runtime.utils import all_gather_dp_groups

        zero = self.optimizer
        groups = zip(zero.parallel_partitioned_bit16_groups, zero.real_dp_process_group, strict=True)
        parts = [parts[comm.get_rank(group=group)].detach() for parts, group in groups]
        network = [
            self._part(parts, place, len(part)) for place, part in zip(self.places, weights, strict=True)
        ]
        copy_all(network, weights)
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    @contextmanager
    def network_holds(self, weights: list[Tensor]) -> Iterator[None]:
        self._publish(weights)
        yield  # not in a finally: after an error on one rank the others never come to this collective
        self._publish([fragment.weights for fragment in self.fragments])


class ShardedWeights(ZeroState):
    """ZeRO stage 3: each rank holds a part of every weight, and gathers a block's when it is computed."""

    def __init__(self, dit: nn.Module, optimizer):
        super().__init__(dit, optimizer, optimizer.fp32_partitioned_groups_flat)
        trained = {id(parameter): parameter for parameter in dit.parameters() if parameter.requires_grad}
        self.parameters = [p for p in trained.values() if self._find(p) is not None]

    def _find(self, parameter: nn.Parameter) -> tuple[Place, tuple[int, ...], int, int] | None:
        from deepspeed import comm

        group, offset, share = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = share * comm.get_rank(group=parameter.ds_process_group)
        size = min(share, parameter.ds_numel - start)  # the last share is padded
        return (Place(group, offset), tuple(parameter.ds_shape), start, size) if size > 0 else None

    def _publish(self, weights: list[Tensor]) -> None:
        self.optimizer._partition_all_parameters()  # what is gathered already would stay as it was
        for parameter, part in zip(self.parameters, weights, strict=True):
            parameter.ds_tensor.data.narrow(0, 0, len(part)).copy_(part)
        if persistent := self.optimizer.persistent_parameters:  # small ones that are never released
            persistent[0].all_gather(persistent)

    @contextmanager
    def network_holds(self, weights: list[Tensor]) -> Iterator[None]:
        own = [parameter.ds_tensor.data for parameter in self.parameters]
        for parameter in self.parameters:  # the masters may be the same memory
            parameter.ds_tensor.data = parameter.ds_tensor.data.clone()
        self._publish(weights)
        yield  # not in a finally, as above
        for parameter, data in zip(self.parameters, own, strict=True):
            parameter.ds_tensor.data = data
        self._publish([fragment.weights for fragment in self.fragments])
