"""A process finds its place among the others, and a dry run of hundreds finds the one that is wrong."""

import json
import subprocess
import sys

import pytest

from train.processes.world import World, check_ranks, describe_task


def slurm_task(rank: int, *, nodes: int = 64, on_each: int = 8) -> dict[str, str]:
    """The environment that srun gives to a task."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % on_each),
        "SLURM_STEP_NUM_TASKS": str(nodes * on_each),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURMD_NODENAME": f"n{rank // on_each}",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(on_each))),
        "MASTER_ADDR": "n0",
        "MASTER_PORT": "20001",
    }


def test_srun_and_torchrun_say_the_same():
    task = slurm_task(13, nodes=2)
    world = World.of_this_process(task)
    assert world == World("srun", 13, 16, 5, 8, 2, "n1") and world.node == 1
    elastic = {"TORCHELASTIC_RUN_ID": "none", "RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}
    elastic |= {"LOCAL_WORLD_SIZE": "8", "SLURMD_NODENAME": "n1"}
    # torchrun started by srun, once on each node: the inner launcher counts
    for environ in (elastic, slurm_task(1, nodes=2, on_each=1) | elastic):
        found = World.of_this_process(environ)
        assert found == World("torchrun", 13, 16, 5, 8, 2, "n1")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_NNODES": "2"},  # the batch script itself
        {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"},  # a child of Lightning's own launcher
    ],
)
def test_where_nobody_started_the_others_lightning_does(environ):
    world = World.of_this_process(environ)
    assert (world.launcher, world.rank, world.size) == ("none", 0, 1)


def test_an_uneven_spread_is_refused():
    with pytest.raises(ValueError, match="15 tasks on 2 nodes"):
        World.of_this_process(slurm_task(1) | {"SLURM_STEP_NUM_TASKS": "15", "SLURM_STEP_NUM_NODES": "2"})


def tasks(**settings: int) -> list[dict[str, str | int]]:
    size = settings.get("nodes", 64) * settings.get("on_each", 8)
    return [describe_task(slurm_task(rank, **settings)) for rank in range(size)]


def test_the_layout_of_512_ranks():
    lines = check_ranks(tasks()[::-1]).splitlines()
    assert lines[0] == "512 ranks on 64 nodes, 8 on each; they meet at n0:20001"
    assert lines[64] == "  n63: ranks 504-511, GPUs 0,1,2,3,4,5,6,7" and len(lines) == 65


def test_what_is_wrong_in_a_layout_is_named():
    good = tasks(nodes=2)
    with pytest.raises(ValueError, match=r"15 of 16 ranks.*\[11\]"):
        check_ranks([task for task in good if task["rank"] != 11])
    with pytest.raises(ValueError, match=r"17 of 16 ranks.*\[3, 3\]"):
        check_ranks([*good, good[3]])
    wrong = {
        "rank 9 on n1 has meeting n1:20001, rank 0 has n0:20001": {"meeting": "n1:20001"},
        "rank 9 on n1 has size 1, rank 0 has 16": {"size": 1},
        "rank 9 on n1 is number 4 of its node": {"local_rank": 4},
        "rank 9 on n1 sees the GPUs 0,1": {"gpus": "0,1"},
        "n0 runs 9 ranks, expected 8": {"host": "n0"},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError) as error:
            check_ranks([task | change if task["rank"] == 9 else task for task in good])
        assert message in str(error.value).replace("rank 9 on n0", "rank 9 on n1")
    with pytest.raises(ValueError, match=r"rank 0 on n0 has no MASTER_ADDR.*SLURM_EXPORT_ENV=ALL"):
        check_ranks([task | {"meeting": "None:None"} for task in good])
    with pytest.raises(ValueError, match="no task"):
        check_ranks([])


def test_the_command_imports_nothing_heavy(tmp_path):
    code = (
        "import runpy, sys; runpy.run_path('train/processes/world.py', run_name='__main__'); "
        "sys.exit(bool({'torch', 'numpy', 'hydra', 'lightning'} & set(sys.modules)))"
    )
    # -S: without the packages of the environment nothing heavy could be imported either
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["size"] == 1
    (tmp_path / "ranks").write_text(done.stdout)
    checked = subprocess.run(
        [sys.executable, "train/processes/world.py", tmp_path / "ranks"], capture_output=True, text=True
    )
    assert checked.stdout.startswith("1 ranks on 1 nodes")
    missing = subprocess.run(
        [sys.executable, "train/processes/world.py", tmp_path / "none"], capture_output=True, text=True
    )
    assert missing.returncode == 1 and missing.stderr.startswith("error: ")
