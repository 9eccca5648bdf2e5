"""The doctor says what is wrong before a job waits in the queue for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.doctor import (
    Check,
    attempt,
    check_folder,
    check_packages,
    check_python,
    check_slurm,
    checks_of_run,
    main,
)


def test_versions_are_those_that_were_tested_together(tmp_path):
    assert check_python((3, 12, 1)).advice is None
    assert "3.11 or newer" in check_python((3, 10, 0)).advice
    pins = tmp_path / "constraints.txt"
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text()
    pins.write_text(lines.replace("lightning==2.", "lightning==1."))
    check = check_packages(pins)
    assert check.found.startswith("lightning 2.") and "(tested: 1." in check.found
    assert "pip install -c constraints.txt" in check.advice
    pins.write_text("pytest==0.1\n")  # nothing that training needs
    assert check_packages(pins) == Check("packages", "0 as tested")


SCONTROL = "#!/bin/sh\necho 'ClusterName = big'\necho 'JobRequeue              = {requeue}'\n"


@pytest.mark.parametrize(("requeue", "is_fine"), [("1", True), ("0", False)])
def test_a_cluster_that_does_not_requeue_is_noticed(tmp_path, monkeypatch, requeue, is_fine):
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        (tmp_path / name).write_text(SCONTROL.format(requeue=requeue))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check = check_slurm()
    assert "cluster big" in check.found and (check.advice is None) == is_fine
    monkeypatch.setenv("PATH", "")
    assert check_slurm().found == "no sbatch, srun, scontrol, squeue here"


def test_a_folder_that_takes_no_file_is_named(tmp_path):
    assert check_folder("run_dir", tmp_path / "runs" / "s1").advice is None
    assert list(tmp_path.iterdir()) == []
    check = check_folder("run_dir", Path("/proc/self/runs"))
    assert check.advice and "/proc/self" in check.found


def checks(*arguments: str) -> dict[str, Check]:
    return {check.name: check for check in checks_of_run(list(arguments))}


def test_what_a_run_refers_to_must_be_there(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    good = checks("model=tiny", f"data.dataset={dataset}", f"run_dir={tmp_path}/run")
    assert [check for check in good.values() if check.advice] == [] and "clips" in good["dataset"].found
    bad = checks("model=tiny", f"data.dataset={tmp_path}", "run_dir=/proc/run", "model.codec=nobody/nothing")
    assert {name for name, check in bad.items() if check.advice} == {"dataset", "run_dir", "model.codec"}
    assert "hf download nobody/nothing" in bad["model.codec"].advice
    [wrong] = checks("optimizer.lrr=1", "run_dir=x").values()
    assert "unknown key 'optimizer.lrr'" in wrong.found


def test_a_batch_with_too_few_clips_for_the_nodes_is_noticed(dataset, tmp_path):
    run = ("model=tiny", f"data.dataset={dataset}", f"run_dir={tmp_path}/run", "trainer.num_nodes=8")
    shared = "model.sequence_parallel=3"  # the 16 clips are enough for 48 ranks
    few = checks(*run, "trainer.devices=8")["batch"]
    assert few.advice and "expected data.clips_per_batch=64 or more" in few.found
    for enough in (["data.clips_per_batch=64", "trainer.devices=8"], [shared, "trainer.devices=6"]):
        assert checks(*run, *enough)["batch"].advice is None
    uneven = checks(*run, shared, "trainer.devices=8")["batch"]
    assert uneven.advice and "sequence_parallel=3 does not divide the 8 ranks" in uneven.found
    assert "batch" not in checks(*run, "trainer.devices=auto")


@pytest.mark.parametrize(("words", "is_asked"), [((), True), (("trainer.accelerator=cpu",), False)])
def test_a_run_on_processors_needs_no_cuda(monkeypatch, capsys, words, is_asked):
    monkeypatch.setattr("train.doctor.checks_of_run", lambda arguments: [])
    main(list(words))
    assert (" cuda: " in capsys.readouterr().out) == is_asked


def test_an_error_is_a_line_with_what_to_do():
    def look() -> str:
        raise ValueError("found 3, expected 4")

    check = attempt("dataset", look, "build it again")
    assert str(check) == "WRONG dataset: found 3, expected 4\n      -> build it again"
    assert str(Check("dataset", "fine")) == "ok    dataset: fine"


def test_the_command_tells_by_its_status(capsys):
    assert main(["--help"]) == 0 and "python train/doctor.py" in capsys.readouterr().out
    code = "import train.doctor, sys; sys.exit(bool({'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    # -S: it can be read where no package is installed
    assert subprocess.run([sys.executable, "-S", "-c", code]).returncode == 0
