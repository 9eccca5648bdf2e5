"""What the batch files decide, with stand-ins for srun, scontrol and sbatch; run.sh has a real cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BATCH_FILES = sorted((ROOT / "slurm").glob("*.s*")) + sorted((ROOT / "tests" / "slurm").glob("*.sh"))

SRUN = """#!/bin/bash
# takes the first outcome left for its module: the status of srun, then the verdicts of ranks 0, 1, ...
while [ "$1" != -m ]; do shift; done
echo "$*" >>"$FAKE/calls"
echo "$SLURM_EXPORT_ENV $MASTER_ADDR" >>"$FAKE/exported"
file=$FAKE/outcomes_$2
outcome=$(head -n 1 "$file" 2>/dev/null)
[ -n "$outcome" ] || exit 0
sed -i 1d "$file"
IFS='|' read -r -a words <<<"$outcome"
for ((rank = 1; rank < ${#words[@]}; rank++)); do
    [ -n "${words[rank]}" ] && echo "${words[rank]}" >"$STORYANCHORS_VERDICTS/rank_0000$((rank - 1))"
done
exit "${words[0]}"
"""
SCONTROL = """#!/bin/bash
case "$*" in
*hostnames*) echo n0 ;;
*node*) echo "NodeName=n0 NodeAddr=10.0.0.1 NodeHostName=n0 Version=22" ;;
*) echo "scontrol $*" >>"$FAKE/calls" ;;
esac
"""
SBATCH = """#!/bin/bash
echo "$*" >>"$FAKE/calls"
wc -l <"$FAKE/calls"
"""


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A folder with the stand-ins, first on the PATH; what they were called with stands in FAKE/calls."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "sbatch": SBATCH,
        "sleep": "#!/bin/bash\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "calls").write_text("")
    own = Path(sys.executable).parent  # a machine may have no other `python`
    monkeypatch.setenv("PATH", f"{folder}:{own}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    return folder


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.name)
def test_the_shell_understands_every_batch_file(path):
    subprocess.run(["bash", "-n", path], check=True)


class Job:
    """One job of train_stage.sbatch that Slurm starts again and again."""

    def __init__(self, fake: Path, run_dir: Path):
        self.fake, self.run_dir, self.num_starts = fake, run_dir, 0

    def start(
        self, outcome: str, *, step: int | None = None, module: str = "train.run_stage", **environ: str
    ):
        """-> exit status, what scontrol was asked for, what the script said on stderr."""
        if step is not None:
            folder = self.run_dir / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "MANIFEST.json").write_text("{}")
        (self.fake / f"outcomes_{module}").write_text(outcome + "\n")
        (self.fake / "calls").write_text("")
        environ |= {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[0-1]",
            "SLURM_NTASKS": "2",
            "SLURM_NNODES": "2",
        }
        environ |= {"SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": "python"}
        if self.num_starts:
            environ["SLURM_RESTART_COUNT"] = str(self.num_starts)
        self.num_starts += 1
        command = ["bash", str(ROOT / "slurm" / "train_stage.sbatch"), "stage=s", f"run_dir={self.run_dir}"]
        done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=60)
        calls = (self.fake / "calls").read_text().splitlines()
        return done.returncode, [call for call in calls if call.startswith("scontrol")], done.stderr


@pytest.fixture
def job(fake, tmp_path) -> Job:
    return Job(fake, tmp_path / "run")


REQUEUE, HOLD = ["scontrol requeue 7"], ["scontrol requeuehold 7"]
DECISIONS = {
    "done": ("0", 0, []),
    "the user's error, and srun kills the other rank": ("137||1 error: no such dataset", 1, []),
    "an error that others notice as a lost peer": ("137|69 hardware: lost rank 1|1 error: disk full", 1, []),
    "unhealthy wins over all": ("137|69 hardware: lost rank 1|70 unhealthy: no finite gradient", 70, []),
    "stopped with a checkpoint": ("75|75 stopped: SIGUSR1 after step 3|75 stopped: SIGUSR1", 0, REQUEUE),
    "stopped, and a rank broke on its way out": ("75|75 stopped: SIGUSR1|69 hardware: gloo", 0, REQUEUE),
    "stopped by the user's file": ("75|75 stopped: save_quit after step 3", 0, HOLD),
    "hardware": ("69|69 hardware: rank 0 lost another rank", 0, REQUEUE),
    "killed without a word": ("137", 0, REQUEUE),
    "a signal before anyone listens": ("138", 0, REQUEUE),
    "python is not there on a node": ("127", 1, []),
    "the same, as srun says it": ("2", 1, []),
    "a rank's verdict counts more than srun's 2": ("2|69 hardware: rank 0 lost another rank", 0, REQUEUE),
}


@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("module", ["train.preflight", "train.run_stage"])
def test_what_ranks_leave_behind_decides_what_comes_next(job, module, name):
    outcome, status, asked = DECISIONS[name]
    found_status, found, said = job.start(outcome, module=module)
    assert (found_status, found) == (status, asked)
    if "|" in outcome and status:
        assert outcome.rpartition(f"{status} ")[2].split("|")[0] in said
    ran = "train.run_stage" in (job.fake / "calls").read_text()
    assert ran == (module == "train.run_stage" or outcome == "0")


FAULT = "69|69 hardware: rank 0 lost another rank"
STOP = "75|75 stopped: SIGUSR1 after step 3"


@pytest.mark.parametrize(("outcome", "status"), [(FAULT, 69), (STOP, 75), ("138", 75)])
def test_a_job_is_given_up_when_nothing_new_is_saved(job, outcome, status):
    requeued = [job.start(outcome, step=step)[1] == REQUEUE for step in (None, 10, 20, None, None, None)]
    assert requeued == [True] * 6
    found, asked, said = job.start(outcome)
    assert (found, asked) == (status, []) and "4 starts without a new checkpoint" in said
    assert ("is the time limit longer than start-up" in said) == (status == 75)


def test_a_stop_does_not_start_the_count_again_but_its_checkpoint_does(job):
    for outcome, step in ((FAULT, None), (STOP, None), (FAULT, None), (STOP, 3), (FAULT, None)):
        assert job.start(outcome, step=step)[1] == REQUEUE
    assert job.start(FAULT, MAX_IDLE_RESTARTS="1")[0] == 69


def test_who_holds_the_job_by_hand_may_do_so_for_ever(job):
    for _ in range(5):
        _, asked, said = job.start("75|75 stopped: save_quit after step 3")
        assert asked == HOLD and "after `scontrol release 7`" in said and "queued again" not in said
    assert job.start(FAULT, MAX_IDLE_RESTARTS="1")[1] == REQUEUE


def test_srun_hands_on_what_is_set_whatever_sbatch_was_told(job):
    job.start("0", SLURM_EXPORT_ENV="NONE")
    assert (job.fake / "exported").read_text() == "ALL 10.0.0.1\n" * 2  # preflight and run_stage


def test_a_checkpoint_without_manifest_is_no_progress(job):
    (job.run_dir / "checkpoints" / "step_00000010").mkdir(parents=True)
    _, _, said = job.start("137")
    assert "go on from none" in said


def test_verdicts_of_the_start_before_do_not_count(job):
    assert job.start("137|75 stopped: SIGUSR1")[1] == REQUEUE
    assert "no rank has said why" in job.start("137")[2]


def test_what_the_batch_file_needs_is_asked_for(fake, tmp_path):
    environ = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    command = ["bash", str(ROOT / "slurm" / "train_stage.sbatch"), "stage=s"]
    elsewhere = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert elsewhere.returncode == 1 and "found no train/run_stage.py" in elsewhere.stderr
    environ["SLURM_SUBMIT_DIR"] = str(ROOT)
    nowhere = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert nowhere.returncode == 1 and "expected run_dir=FOLDER" in nowhere.stderr
    environ["PYTHON"] = str(tmp_path / "python")
    command.append(f"run_dir={tmp_path}/run")
    inactive = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert inactive.returncode == 1 and f"found no {tmp_path}/python: submit with" in inactive.stderr
    assert (fake / "calls").read_text() == "" and not (tmp_path / "run").exists()


def all_stages(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "slurm" / "all_stages.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def finish(run_dir: Path, steps: int) -> None:
    (run_dir / "checkpoints" / f"step_{steps:08d}").mkdir(parents=True)
    (run_dir / "checkpoints" / f"step_{steps:08d}" / "MANIFEST.json").write_text("{}")
    (run_dir / "config.yaml").write_text(f"stage:\n  name: x\n  steps: {steps}\nmodel:\n  steps: 1\n")


def test_each_stage_waits_for_the_one_before_and_begins_with_its_weights(fake, tmp_path):
    done = all_stages(f"{tmp_path}/runs", "-N", "8", "--", "model=tiny", "data.dataset='a b'")
    assert done.stdout.splitlines() == [
        f"global_caption: job 1, {tmp_path}/runs/1_global_caption",
        f"multi_event: job 2 after job 1, {tmp_path}/runs/2_multi_event",
        f"continuation: job 3 after job 2, {tmp_path}/runs/3_continuation",
    ]
    calls = (fake / "calls").read_text().splitlines()
    for number, call in enumerate(calls, start=1):
        assert "-N 8" in call and call.endswith("model=tiny data.dataset='a b'")
        waits = f"--dependency=afterok:{number - 1} --kill-on-invalid-dep=yes"
        assert (waits in call) == (number > 1)
        assert ("init_from=" in call) == (number > 1)
    assert f"init_from={tmp_path}/runs/2_multi_event" in calls[2]


def test_a_finished_stage_is_not_run_again(fake, tmp_path):
    finish(tmp_path / "1_global_caption", 100)
    (tmp_path / "2_multi_event").mkdir()
    done = all_stages(str(tmp_path), "--", "model=tiny").stdout.splitlines()
    assert done[0] == f"global_caption: done, 100 steps in {tmp_path}/1_global_caption"
    assert done[1:] == [
        f"multi_event: job 1, {tmp_path}/2_multi_event",
        f"continuation: job 2 after job 1, {tmp_path}/3_continuation",
    ]
    first, _ = (fake / "calls").read_text().splitlines()
    assert f"init_from={tmp_path}/1_global_caption" in first and "dependency" not in first
    longer = all_stages(str(tmp_path), "--", "model=tiny", "stage.steps=200").stdout
    assert longer.startswith("global_caption: job ")


@pytest.mark.parametrize("arguments", [(), ("-N", "8"), ("model=tiny",), ("runs", "-N", "8")])
def test_a_line_that_lacks_something_submits_nothing(fake, arguments):
    done = all_stages(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: expected")
    assert (fake / "calls").read_text() == ""


def test_jobs_that_would_not_find_the_code_are_not_submitted(fake, tmp_path):
    done = all_stages("runs", "--", "model=tiny", cwd=tmp_path)
    assert done.returncode == 1 and "submit from the folder of storyanchors" in done.stderr
    assert (fake / "calls").read_text() == "" and not (tmp_path / "runs").exists()
