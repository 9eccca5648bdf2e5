"""Tells on a login node whether a run could start from here, line by line, and what to do where it could not.

    python train/doctor.py
    python train/doctor.py model=wan-1.3b data.dataset=DATASET run_dir=runs/s1     # of this very run, too
    python train/doctor.py ... trainer.num_nodes=8 trainer.devices=8    # and whether a batch is large enough

The settings are those of train/run_stage.py. It exits with 1 where something is wrong.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"
# what the network's parts are read from, by the setting that names it
PARTS = {
    "codec": ("vae",),
    "caption_encoder": ("text_encoder", "tokenizer"),
    "base_weights": ("transformer",),
}
MADE_HERE = ("pca", "words")


@dataclass(frozen=True)
class Check:
    name: str
    found: str
    advice: str | None = None  # what to do; None = all is well

    def __str__(self) -> str:
        colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        mark = "ok   " if self.advice is None else "WRONG"
        if colours:
            mark = f"{GREEN if self.advice is None else RED}{mark}{PLAIN}"
        return f"{mark} {self.name}: {self.found}" + (f"\n      -> {self.advice}" if self.advice else "")


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    found = f"{'.'.join(map(str, version))}, {sys.executable}"
    advice = None if version >= (3, 11) else "storyanchors needs Python 3.11 or newer: make a .venv with it"
    return Check("python", found, advice)


def check_packages(constraints: Path = ROOT / "constraints.txt") -> Check:
    """Against the versions that were tested together; a build's own suffix (+cu128) does not count."""
    missing, other = [], []
    needed = _needed_to_train()
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", constraints.read_text(), re.MULTILINE)
    pins = [(name, pinned) for name, pinned in pins if name in needed]
    for name, pinned in pins:
        try:
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found != pinned:
            other.append(f"{name} {found} (tested: {pinned})")
    if missing:
        return Check("packages", f"missing: {', '.join(missing)}", _install(constraints))
    if other:
        return Check("packages", ", ".join(other), _install(constraints))
    return Check("packages", f"{len(pins)} as tested")


def _needed_to_train() -> set[str]:
    lines = [line.partition(";") for line in metadata.requires("storyanchors") or []]
    return {
        re.match(r"[\w.-]+", requirement)[0]
        for requirement, _, marker in lines
        if "extra" not in marker or "train" in marker
    }


def _install(constraints: Path) -> str:
    return f"in {ROOT}: {sys.executable} -m pip install -c {constraints.name} -e '.[train]'"


def check_commit() -> Check:
    git = ["git", "-C", str(ROOT)]
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    if not commit:
        return Check("commit", "not a git checkout: nothing will say what code a run had")
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return Check("commit", f"{commit}, {len(changed.splitlines())} files changed" if changed else commit)


def check_slurm() -> Check:
    if absent := [tool for tool in ("sbatch", "srun", "scontrol", "squeue") if not shutil.which(tool)]:
        return Check("slurm", f"no {', '.join(absent)} here", "log in to a node with the Slurm client")
    config = _output(["scontrol", "show", "config"])
    if not config:
        return Check("slurm", "the controller does not answer", "try: scontrol ping; is SLURM_CONF right?")
    settings = dict(re.findall(r"^(\w+)\s*= (.*)$", config, re.MULTILINE))
    found = f"{settings.get('SLURM_VERSION')}, cluster {settings.get('ClusterName')}"
    if settings.get("JobRequeue") == "0":
        return Check("slurm", f"{found}, JobRequeue=0", "ask its administrators whether --requeue is allowed")
    return Check("slurm", found)


def check_cuda() -> Check:
    import torch  # here, since it may be what is missing

    num = torch.cuda.device_count()
    gpus = f"{num} x {torch.cuda.get_device_name(0)}" if num else "no GPU here (as on most login nodes)"
    if torch.version.cuda is None and "gpu" in _output(["sinfo", "--noheader", "--format=%G"]):
        return Check("cuda", f"torch {torch.__version__} was built without it", "pip install torch with CUDA")
    return Check("cuda", f"torch {torch.__version__}, CUDA {torch.version.cuda}, {gpus}")


def check_folder(name: str, folder: Path) -> Check:
    """The folder, or the nearest one above it that exists, takes a file and has room."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"storyanchors")
    except OSError as error:
        return Check(name, f"cannot write to {folder}: {error.strerror}", "choose another folder")
    return Check(name, f"{folder}, {shutil.disk_usage(folder).free / 1e9:.0f} GB free")


def checks_of_run(arguments: list[str]) -> Iterator[Check]:
    """Of the settings, and of what they refer to."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # as in the job: what is not on disk now will not be there then
    read_config = importlib.import_module("conf.command").read_config
    schema = importlib.import_module("train.run_config").RunStageConfig
    try:
        config = read_config(schema, "run_stage", arguments)
    except ValueError as error:
        yield Check("settings", str(error), "see python train/run_stage.py --help")
        return
    yield Check("settings", f"stage {config.stage.name}, model {config.model.preset}")
    yield check_folder("run_dir", Path(config.run_dir).absolute())
    if str(config.trainer.get("devices")).isdigit():  # "auto" is as many as the job will have
        advice = (
            "for trainer.num_nodes and trainer.devices of the job; python -m train.estimate says what fits"
        )
        yield attempt("batch", lambda: _count_packs(config), advice)
    for dataset in config.data.datasets:
        yield attempt("dataset", lambda dataset=dataset: _count_clips(dataset), "see docs/data_format.md")
    for setting, parts in PARTS.items():
        reference = getattr(config.model, setting)
        if reference is not None and reference not in MADE_HERE:
            advice = f"on a node with internet: hf download {reference}"
            yield attempt(f"model.{setting}", lambda r=reference, p=parts: _find_parts(r, p), advice)


def attempt(name: str, look: Callable[[], str], advice: str) -> Check:
    """What look returns, or the error it raises."""
    try:
        return Check(name, look())
    except (ValueError, OSError) as error:
        return Check(name, str(error), advice)


def _count_packs(config: Any) -> str:
    run_stage = importlib.import_module("train.run_stage")
    on_node, num_nodes = int(config.trainer["devices"]), config.trainer.get("num_nodes", 1)
    if on_node % (shared_by := config.model.sequence_parallel):
        raise ValueError(f"model.sequence_parallel={shared_by} does not divide the {on_node} ranks of a node")
    data = run_stage.with_pinned_packs(config).data
    num_packs = run_stage.count_packs(data, on_node // shared_by * num_nodes)
    return f"{data.clips_per_batch} clips in {num_packs} packs on {on_node * num_nodes} processes"


def _count_clips(dataset: str) -> str:
    index = importlib.import_module("train.clips.clip_index").ClipIndex.open(dataset)
    return f"{dataset}, {len(index)} clips"


def _find_parts(reference: str, parts: tuple[str, ...]) -> str:
    """ValueError for a part that is not on disk whole."""
    part_folder: Any = importlib.import_module("storyanchors.weights").part_folder
    for part in parts if not Path(reference).is_file() else ():
        folder = part_folder(reference, part)
        if not any(folder.iterdir()):
            raise ValueError(f"{folder} is empty")
    return reference


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    checks = [check_python(), check_packages(), check_commit(), check_slurm()]
    checks.append(check_folder("scratch", Path(tempfile.gettempdir())))
    if not checks[1].found.startswith("missing"):  # else nothing below could be imported
        if not {"trainer.accelerator=cpu", "cluster=cpu"} & set(arguments):
            checks.append(check_cuda())
        checks += checks_of_run(arguments) if arguments else []
    for check in checks:
        print(check)
    return int(any(check.advice for check in checks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
