"""srun, torchrun and Lightning's own launcher start the same run."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from train.processes.launcher import launch_settings
from train.processes.world import World

WORLD = {"rank": 3, "size": 16, "local_rank": 3, "local_size": 8, "num_nodes": 2, "host": "n0"}


def test_srun_and_torchrun_decide_how_many_processes_there_are():
    for launcher, environment in (("srun", SLURMEnvironment), ("torchrun", TorchElasticEnvironment)):
        settings = launch_settings(World(launcher, **WORLD))
        assert type(settings["plugins"][0]) is environment
        assert (settings["devices"], settings["num_nodes"]) == (8, 2)


def test_lightning_does_not_save_or_requeue_behind_the_batch_files_back():
    [environment] = launch_settings(World("srun", **WORLD))["plugins"]
    assert environment.auto_requeue is False


def test_a_shell_on_a_slurm_node_is_no_task_of_srun(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    assert SLURMEnvironment.detect()  # so Lightning would wait for seven others
    settings = launch_settings(World.of_this_process())
    assert type(settings["plugins"][0]) is LightningEnvironment and "devices" not in settings


def test_a_rank_whose_first_rank_was_killed_before_they_met_ends_by_itself():
    """It would wait for it at their meeting place, for half an hour."""
    rank = (
        "import sys, time, train.processes.launcher as launcher; from train.processes.world import World\n"
        "launcher.GRACE_S = 0\nlauncher.launch_settings(World.of_this_process({}))\ntime.sleep(60)"
    )
    first = (
        "import os, subprocess, sys; from train.processes.launcher import FIRST_RANK\n"
        "environ = os.environ | {'LOCAL_RANK': '1', FIRST_RANK: str(os.getpid())}\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]], env=environ)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", first, rank], capture_output=True, text=True, timeout=50)
    assert done.returncode == -9  # its output ends with the last process that has it
    assert "the first rank, which started this one, is gone" in done.stderr


@pytest.mark.slow
def test_torchrun_and_lightning_train_the_same_bits(dataset, tmp_path):
    bits = {}
    launchers = {
        "lightning": [sys.executable, "train/run_stage.py", "trainer.devices=2"],
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "train/run_stage.py",
        ],
    }
    for name, command in launchers.items():
        words = ["model=tiny", f"data.dataset={dataset}", f"run_dir={tmp_path}/{name}", "strategy=ddp"]
        words += ["stage.steps=2", "samples.every_n_steps=0", "trainer.accelerator=cpu", "data.num_workers=0"]
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *words], env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        bits[name] = weights(tmp_path / name)
    assert bits["torchrun"] == bits["lightning"] != {}


def weights(run_dir: Path) -> dict[str, str]:
    files = (run_dir / "checkpoints" / "step_00000002").glob("*.safetensors")
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in files}
