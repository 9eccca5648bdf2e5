"""Looks over the machines of a run before it starts: stops within a minute or two, and names rank and host.

    srun python train/preflight.py stage=global_caption model=tiny data.dataset=DATASET run_dir=runs/s1

The settings are those of train/run_stage.py; slurm/train_stage.sbatch runs it before every start. Every rank
posts what it finds in a store on the first node, which compares; then the network is measured.
"""

if __name__ == "__main__":
    from conf.verdict import report_crashes
    from train.processes.stop_signals import leave_on_stop_signals

    report_crashes()
    leave_on_stop_signals()

import os
import platform
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from conf.command import HardwareFault, run
from storyanchors.shard_store import ShardStore, join
from train.costs.memory_model import Network
from train.costs.training_cost import checkpoint_bytes
from train.processes.hardware_faults import hardware_faults
from train.processes.meeting import Meeting, Watchdog
from train.processes.network_speed import Speeds, find_slow, measure
from train.processes.world import World
from train.run_config import RunStageConfig
from train.saving.checkpoints import list_checkpoints

COMPARED = ("torch", "lightning", "deepspeed", "diffusers", "transformers", "storyanchors")
PROBES = "preflight"  # folder in a run folder: one file of each node, to see whether all write to the same


@dataclass
class Finding:
    """What one rank tells the first one."""

    host: str
    device: str = "cpu"  # or the name of its GPU
    versions: dict[str, str] = field(default_factory=dict)
    problem: str | None = None  # what is wrong with this machine or with what it reaches
    is_hardware: bool = False


def main(config: RunStageConfig) -> None:
    world = World.of_this_process()
    with Watchdog(world, config.preflight.limit_s) as watchdog, hardware_faults():
        meeting = Meeting(world, config.preflight.limit_s)
        watchdog.phase = "looking at its own machine"
        finding = examine(config, world)
        watchdog.phase = "waiting for the other ranks"
        findings = [Finding(**fields) for fields in meeting.gather("finding", asdict(finding))]
        if world.rank == 0:
            compare(findings)
            check_run_dir(Path(config.run_dir), world)
            check_disk(config)
        if not meeting.agree("healthy"):
            return  # the first rank says why
        watchdog.phase = "measuring the network"
        speeds = measure(world, meeting.store, on_gpu=finding.device != "cpu")
        measured = [Speeds(**fields) for fields in meeting.gather("speeds", asdict(speeds))]
        if world.rank == 0:
            report(config, findings, measured)
        meeting.agree("fast")


def examine(config: RunStageConfig, world: World) -> Finding:
    finding = Finding(host=world.host, versions=installed_versions())
    try:
        finding.device = try_gpu(config.trainer.get("accelerator", "auto"), world)
        if world.local_rank == 0:
            for dataset in config.data.datasets:
                ShardStore().size(join(dataset, "index.parquet"))
            leave_probe(Path(config.run_dir), world)
    except (ValueError, OSError, HardwareFault) as error:
        finding.problem, finding.is_hardware = str(error), isinstance(error, HardwareFault)
    return finding


def installed_versions() -> dict[str, str]:
    found = {name: version(name) for name in COMPARED}
    return found | {"python": platform.python_version(), "cuda": str(torch.version.cuda)}


def try_gpu(accelerator: str, world: World) -> str:
    """The name of this rank's GPU, which has computed something, or cpu; HardwareFault for one that fails."""
    if accelerator == "cpu":
        return "cpu"
    given, found = os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count()
    if not found and not given and accelerator == "auto":
        return "cpu"
    expected = len(given.split(",")) if given else world.local_size
    if found not in (1, expected) or found == 0:
        raise HardwareFault(f"{found} GPUs answer, expected {expected} (CUDA_VISIBLE_DEVICES={given})")
    device = torch.device("cuda", world.local_rank % found)
    torch.cuda.set_device(device)
    product = torch.full((1024, 1024), 2.0, device=device) @ torch.ones(1024, 1024, device=device)
    if not bool((product == 2048).all()):
        raise HardwareFault(f"GPU {device.index} multiplies wrongly")
    return torch.cuda.get_device_name(device)


def compare(findings: list[Finding]) -> None:
    """HardwareFault or ValueError for what is wrong or not as everywhere else, with rank and host."""
    broken = [(rank, finding) for rank, finding in enumerate(findings) if finding.problem]
    if broken:
        lines = [f"rank {rank} on {finding.host}: {finding.problem}" for rank, finding in broken]
        is_hardware = all(finding.is_hardware for _, finding in broken)
        more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
        raise (HardwareFault if is_hardware else ValueError)("; ".join(lines[:4]) + more)
    for name in findings[0].versions:
        _check_same(name, [finding.versions[name] for finding in findings], findings)
    _check_same("GPU", [finding.device for finding in findings], findings)


def _check_same(name: str, values: list[str], findings: list[Finding]) -> None:
    usual = Counter(values).most_common(1)[0][0]
    for rank, value in enumerate(values):
        if value != usual:
            raise ValueError(
                f"rank {rank} on {findings[rank].host} has {name} {value}, most ranks have {usual}: "
                "the nodes of a run need one environment"
            )


def leave_probe(run_dir: Path, world: World) -> None:
    (run_dir / PROBES).mkdir(parents=True, exist_ok=True)
    (run_dir / PROBES / f"node_{world.node:05d}").write_text(world.host)


def check_run_dir(run_dir: Path, world: World) -> None:
    """ValueError when what the nodes have written to the run folder is not all here: it is not shared."""
    expected = {f"node_{node:05d}" for node in range(world.num_nodes)}
    missing = sorted(expected - set(os.listdir(run_dir / PROBES)))
    shutil.rmtree(run_dir / PROBES)
    if missing:
        raise ValueError(
            f"run_dir {run_dir} on {world.host} lacks what {missing[0]} wrote there: expected a folder of a "
            "file system that all nodes share"
        )


def check_disk(config: RunStageConfig) -> None:
    """ValueError when the run folder's disk has no room for what is still to come of the checkpoints that
    are kept and one more."""
    one, keep_last = checkpoint_bytes(Network.of(config.model)), config.checkpoint.keep_last
    num = max(1, keep_last + 1 - len(list_checkpoints(Path(config.run_dir))))
    free = shutil.disk_usage(config.run_dir).free
    if free < one * num:
        raise ValueError(
            f"run_dir {config.run_dir} has {free / 1e9:.1f} GB free, expected {one * num / 1e9:.1f} GB for "
            f"{num} more checkpoints of {one / 1e9:.1f} GB (checkpoint.keep_last={keep_last} and one more)"
        )


def report(config: RunStageConfig, findings: list[Finding], measured: list[Speeds]) -> None:
    """Prints what was found on one line; HardwareFault for a network below its floor."""
    hosts = [finding.host for finding in findings]
    if findings[0].device != "cpu" and (slow := find_slow(measured, hosts, config.preflight)):
        raise HardwareFault(slow)
    speeds = ", ".join(
        f"{name} {min(values):.1f} GB/s"
        for name in ("inside", "between", "overall")
        if (values := [getattr(speed, name) for speed in measured if getattr(speed, name)])
    )
    print(
        f"preflight: {len(findings)} ranks on {len(set(hosts))} nodes with {findings[0].device}, torch "
        f"{findings[0].versions['torch']}; slowest all-reduce or exchange: {speeds or 'one rank, no network'}"
    )


if __name__ == "__main__":
    run(main, RunStageConfig, "run_stage")
