"""A machine, a folder or a network that would stop a run is named before the run starts."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conf.command import HardwareFault, read_config
from train import preflight
from train.preflight import Finding, check_disk, check_run_dir, compare, examine, leave_probe, report, try_gpu
from train.processes.meeting import Meeting
from train.processes.network_speed import PreflightConfig, Speeds, find_slow
from train.processes.world import World
from train.run_stage import RunStageConfig

ALONE = World("none", 0, 1, 0, 1, 1, "here")


def settings(tmp_path: Path, *more: str) -> RunStageConfig:
    words = ["model=tiny", f"data.dataset={tmp_path}", f"run_dir={tmp_path}/run", "trainer.accelerator=cpu"]
    return read_config(RunStageConfig, "run_stage", [*words, *more])


def found(**changes: dict[int, str]) -> list[Finding]:
    """What 4 ranks on 2 nodes find; changes by rank."""
    findings = [Finding(f"n{rank // 2}", "H100", {"torch": "2.13", "nccl": "2.27"}) for rank in range(4)]
    for name, of_rank in changes.items():
        for rank, value in of_rank.items():
            findings[rank] = replace(findings[rank], **{name: value})
    return findings


def test_ranks_that_are_alike_pass():
    compare(found())


def test_a_rank_that_is_not_as_the_others_is_named():
    other = {"torch": "2.12", "nccl": "2.27"}
    with pytest.raises(ValueError, match=r"rank 0 on n0 has torch 2\.12, most ranks have 2\.13"):
        compare(found(versions={0: other}))
    with pytest.raises(ValueError, match="rank 3 on n1 has GPU A100, most ranks have H100"):
        compare(found(device={3: "A100"}))
    with pytest.raises(HardwareFault, match="rank 2 on n1: 7 GPUs answer"):
        compare(found(problem={2: "7 GPUs answer"}, is_hardware={2: True}))
    with pytest.raises(ValueError, match="rank 1 on n0: no index; rank 2 on n1: 7 GPUs answer"):
        compare(found(problem={1: "no index", 2: "7 GPUs answer"}, is_hardware={2: True}))


def test_gpus_that_slurm_gave_must_answer(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert try_gpu("cpu", ALONE) == "cpu"
    with pytest.raises(HardwareFault, match="0 GPUs answer, expected 2"):
        try_gpu("auto", ALONE)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert try_gpu("auto", ALONE) == "cpu"
    with pytest.raises(HardwareFault, match="0 GPUs answer"):
        try_gpu("gpu", ALONE)


def test_a_dataset_that_is_not_there_is_found_by_the_first_rank_of_a_node(tmp_path):
    config = settings(tmp_path)
    assert "index.parquet" in examine(config, ALONE).problem
    assert examine(config, replace(ALONE, local_rank=1)).problem is None


def test_a_run_folder_that_is_not_shared_is_noticed(tmp_path):
    first, second = World("srun", 0, 4, 0, 2, 2, "n0"), World("srun", 2, 4, 0, 2, 2, "n1")
    leave_probe(tmp_path, first)
    leave_probe(tmp_path, second)
    check_run_dir(tmp_path, first)
    assert list(tmp_path.iterdir()) == []
    leave_probe(tmp_path, first)
    with pytest.raises(ValueError, match="lacks what node_00001 wrote"):
        check_run_dir(tmp_path, first)


def test_a_disk_too_small_for_the_checkpoints_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    config = settings(tmp_path)
    one = preflight.checkpoint_bytes(preflight.Network.of(config.model))
    needed = one * (config.checkpoint.keep_last + 1)
    assert needed > 16 * 4_000_000
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)))
    for free, fits in ((needed, True), (needed - 1, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("shutil.disk_usage", lambda path, usage=usage: usage)
        if fits:
            check_disk(config)
        else:
            with pytest.raises(ValueError, match="GB free, expected"):
                check_disk(config)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    usage.free = needed - one  # a run that goes on needs no room for the checkpoint that is there
    check_disk(config)


def test_a_slow_network_is_placed(tmp_path, capsys):
    floors, hosts = PreflightConfig(inside_gb_s=100, between_gb_s=10), ["n0", "n0", "n1", "n1"]
    good = [Speeds(300, 40, 38)] * 4
    assert find_slow(good, hosts, floors) is None
    slow_link = find_slow([*good[:2], Speeds(300, 4, 4), good[3]], hosts, floors)
    assert slow_link.startswith("the network between n0 and n1 gives 4.0 GB/s to rank 2, expected 10")
    slow_node = find_slow([*good[:3], Speeds(20, 40, 38)], hosts, floors)
    assert slow_node.startswith("the network inside n1 gives 20.0 GB/s to rank 3, expected 100")
    assert find_slow([Speeds()], ["n0"], floors) is None
    config = replace(settings(tmp_path), preflight=floors)
    with pytest.raises(HardwareFault, match="inside n1"):
        report(config, found(), [*good[:3], Speeds(20, 40, 38)])
    report(config, found(), good)
    assert "4 ranks on 2 nodes with H100" in capsys.readouterr().out


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_silent_rank_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", free_port())
    meeting = Meeting(World("srun", 0, 3, 0, 3, 1, "here"), limit_s=1)
    meeting.store.set("finding/2", "{}")
    with pytest.raises(HardwareFault, match=r"no word \(finding\) from 1 of 3 ranks: rank 1 on node 0"):
        meeting.gather("finding", {})


def start_rank(rank: int, port: str, tmp_path: Path, *more: str) -> subprocess.Popen:
    environ = os.environ | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "OMP_NUM_THREADS": "1"}
    environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_PORT": port}
    environ |= {"MASTER_ADDR": "127.0.0.1", "STORYANCHORS_VERDICTS": str(tmp_path), "SLURMD_NODENAME": "n0"}
    words = ["model=tiny", f"data.dataset={tmp_path}", f"run_dir={tmp_path}/run", "trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "train.preflight", *words, *more]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_pass_and_one_that_waits_in_vain_ends_by_itself(tmp_path):
    (tmp_path / "index.parquet").write_bytes(b"there")
    port = free_port()
    ranks = [start_rank(rank, port, tmp_path) for rank in (0, 1)]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "preflight: 2 ranks on 1 nodes with cpu" in outputs[0][0] and "inside" in outputs[0][0]
    # rank 0 never comes
    alone = start_rank(1, free_port(), tmp_path, "preflight.limit_s=3")
    _, error = alone.communicate(timeout=120)
    assert alone.returncode == 69 and "rank 1 of 2 on n0" in error
    assert (tmp_path / "rank_00001").read_text().startswith("69 hardware: ")
