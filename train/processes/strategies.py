"""How a run is spread over processes: one device, DDP, or DeepSpeed's ZeRO stage 1, 2 and 3.

Under every strategy weights, gradients' sums, masters and moments are float32; bf16-mixed computes products
in bfloat16 by autocast. So a strategy changes memory and traffic, not numbers.
"""

import os
import warnings
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from pydantic import ValidationError
from torch import Tensor
from torch.distributed import distributed_c10d

STRATEGIES = ("auto", "ddp", "zero1", "zero2", "zero3")
START_TIMEOUT = timedelta(minutes=30)  # ranks that start wait for the slowest one, which reads the weights


def build_strategy(
    name: str,
    *,
    offload: bool,
    timeout_s: float,
    deepspeed: dict[str, Any],
    trainer: dict[str, Any],
    clip_norm: float,
) -> DDPStrategy | DeepSpeedStrategy | str:
    """What L.Trainer takes as strategy.

    auto is ddp where the trainer's devices and num_nodes ask for more than one process. offload keeps ZeRO's
    masters and moments, and stage 3's weights too, in the host's memory. deepspeed goes over DeepSpeed's own
    settings (https://www.deepspeed.ai/docs/config-json). timeout_s holds for every group of processes, from
    the first step on; before it they have START_TIMEOUT.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # a pickle never runs code, whoever loads it
    set_group_timeout(START_TIMEOUT)
    if name.startswith("zero"):
        if trainer.get("accelerator") == "cpu" or not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        settings = zero_settings(int(name[-1]), offload=offload, clip_norm=clip_norm, more=deepspeed)
        if "zero_optimization" in deepspeed:
            check_zero_optimization(settings["zero_optimization"])
        return ZeroStrategy(timedelta(seconds=timeout_s), config=settings)
    if name == "auto" and trainer.get("devices") == trainer.get("num_nodes") == 1:
        return "auto"
    return WholeStrategy(timedelta(seconds=timeout_s), gradient_as_bucket_view=True)


def zero_settings(stage: int, *, offload: bool, clip_norm: float, more: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config. No optimizer of its own in it: those compile C++ when a run starts."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 200_000_000,
        "allgather_bucket_size": 200_000_000,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # for its own log alone
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return _merged(ours, more)


def check_zero_optimization(settings: dict[str, Any]) -> None:
    """ValueError for what DeepSpeed would refuse when the network is already there."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**settings)
    except ValidationError as error:
        [wrong, *_] = error.errors()
        key = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"deepspeed.zero_optimization.{key}: {wrong['msg']}") from error


def set_group_timeout(timeout: timedelta) -> None:
    """For every group of processes, there or to come, also those DeepSpeed makes without asking for one.

    Without it a stopped process kept the others waiting for over nine minutes, with a timeout of 10 s.
    """
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


class LimitedWaiting:
    """Of a strategy: from the first step on, ranks wait for each other no longer than this."""

    def __init__(self, collective_timeout: timedelta, **settings):
        super().__init__(timeout=START_TIMEOUT, **settings)
        self.collective_timeout = collective_timeout

    def on_train_start(self) -> None:
        set_group_timeout(self.collective_timeout)


class WholeStrategy(LimitedWaiting, DDPStrategy):
    """DDP: every rank holds everything."""


class ZeroPrecision(DeepSpeedPrecision):
    """Autocast over float32 weights, as without DeepSpeed; its own bf16 would round weights and sums."""

    def forward_context(self) -> AbstractContextManager:
        from deepspeed.accelerator import get_accelerator

        device, enabled = get_accelerator().device_name(), self._desired_dtype == torch.bfloat16
        # not cached: the copies of a sharded network's weights would be a whole network
        return torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def convert_input(self, data: Any) -> Any:
        return data

    def _clip_gradients(self, *args, **kwargs) -> None:
        """DeepSpeed clips; Lightning would call the module's hook as well."""

    def backward(self, tensor: Tensor, model, optimizer, *args, **kwargs) -> None:
        # Lightning has divided by the number of micro-steps already
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


class ZeroStrategy(LimitedWaiting, DeepSpeedStrategy):
    """Lightning's, also on CPUs (gloo), so that a laptop can try the same command."""

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed wants an index

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()  # its own only refuses CPUs

    def setup_distributed(self) -> None:
        import deepspeed

        # an op of its CPU backend, compiled at start: killed meanwhile it leaves a lock that all wait for
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # its calls
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _format_config(self) -> None:
        self.precision_plugin = ZeroPrecision(self.precision_plugin.precision)
        self._format_batch_size_and_grad_accum_config()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        if self.zero_stage_3:  # one weight after the other: a GPU never holds the whole network
            deepspeed.zero.Init(model, config_dict_or_path=self.config, mem_efficient_linear=False)
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def last_norm(self) -> Tensor:
        """Of the last step's gradients, before clipping; inf where the step was skipped."""
        engine = self.deepspeed_engine
        norm = engine.get_global_grad_norm() if engine.was_step_applied() else float("inf")
        return torch.as_tensor(norm, dtype=torch.float32)


def _merged(ours: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(ours[key], value) if isinstance(ours.get(key), dict) else value
        for key, value in more.items()
    }
    return ours | both
