"""Three stages under real Slurm: preempted, killed and stopped, they end with the bits of a quiet chain."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NEEDED = ("slurmctld", "slurmd", "munged")


@pytest.mark.slurm
@pytest.mark.skipif(
    not all(map(shutil.which, NEEDED)) or os.getuid() != 0, reason=f"needs root and {', '.join(NEEDED)}"
)
def test_disturbed_stages_end_as_undisturbed_ones(tmp_path):
    script = Path(__file__).with_name("run.sh")
    environ = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(script), str(tmp_path / "log.txt")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout
    assert " 0 failures\n" in done.stdout and "ranks: 512" in done.stdout
