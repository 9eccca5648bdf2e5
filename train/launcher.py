"""How Lightning learns of the other processes: from srun, from torchrun, or by starting them itself."""

from typing import Any

from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from train.world import World


def launch_settings(world: World) -> dict[str, Any]:
    """Arguments of L.Trainer. srun and torchrun decide how many processes there are; else the config does.

    Lightning takes any process with SLURM_NTASKS for one of srun's, also in a shell on a node; its handlers
    of Slurm's signals would save inside the handler and queue the job again, behind the batch script's back.
    """
    settings = {"plugins": [_environment(world)]}
    if world.launcher == "none":
        return settings
    return settings | {"devices": world.local_size, "num_nodes": world.num_nodes}


def _environment(world: World) -> ClusterEnvironment:
    if world.launcher == "srun":
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if world.launcher == "torchrun" else LightningEnvironment()
