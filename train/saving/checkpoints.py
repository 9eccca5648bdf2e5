"""Checkpoints of a run: folders that exist whole or not at all, one format for every strategy and world size.

checkpoints/step_00001000/ has state.json, config.json of the network, and safetensors files by kind and rank:
model-00000-of-00002.safetensors, ema-..., optimizer-... (exp_avg/NAME, exp_avg_sq/NAME), rng-...; and
MANIFEST.json with their sizes and SHA-256, written last, before the folder gets its name. The newest is
computed, never a link. train/saving/checkpoint_writer.py writes what is read here.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from train.saving.tensor_ranges import TensorRange, read_into, read_whole
from train.settings import above_zero, at_least

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
NEWEST = "newest.json"  # the step that was written last: only to notice when it is missing
SCHEMA_VERSION = 2
KINDS = ("model", "ema", "optimizer", "rng")


@dataclass
class CheckpointConfig:
    """When to save, and what to keep; a file `save` or `save_quit` in the run folder asks for one too."""

    every_n_steps: int = 500
    every_minutes: float | None = 30.0
    keep_last: int = 2
    keep_every_n_steps: int | None = None  # these are saved too, and never removed

    def __post_init__(self):
        at_least(1, self, "checkpoint.", "every_n_steps", "keep_last", "keep_every_n_steps")
        above_zero(self, "checkpoint.", "every_minutes")

    def is_due(self, step: int) -> bool:
        return step % self.every_n_steps == 0 or self.is_milestone(step)

    def is_milestone(self, step: int) -> bool:
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0


@dataclass(frozen=True)
class TrainingState:
    """The numbers of a checkpoint; position is the place in the data plan, in clips."""

    step: int
    position: int
    num_updates: int  # of Adam
    num_ema_updates: int
    skipped_in_a_row: int
    num_skipped: int
    stage: str
    preset: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path

    @property
    def state(self) -> TrainingState:
        try:
            return TrainingState(**json.loads((self.folder / "state.json").read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.folder / 'state.json'} is damaged: {error}") from error

    @property
    def dit_config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    def files(self, kind: str) -> list[Path]:
        """Those of one kind, in the order of the ranks that wrote them."""
        return sorted(self.folder.glob(f"{kind}-*.safetensors"))

    def weights(self, which: str) -> dict[str, Tensor]:
        """The whole weights that were trained, float32: which is model or ema."""
        return read_whole(self.files(which))

    def read(self, kind: str, ranges: list[TensorRange], *, rank: int) -> None:
        """Fills ranges; a rank begins with its own file, which holds all that it needs if nothing changed."""
        files = self.files(kind)
        start = rank % max(1, len(files))
        read_into(files[start:] + files[:start], ranges)

    def sha256(self, which: str) -> str:
        """Of one kind's files, by the manifest."""
        recorded = _read_manifest(self.folder)["files"]
        lines = [f"{path.name} {recorded[path.name]['sha256']}\n" for path in self.files(which)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The folders that have a checkpoint's name, newest first, damaged ones included."""
    return sorted((run_dir / "checkpoints").glob("step_????????"), reverse=True)


def newest_checkpoint(run_dir: Path, *kinds: str) -> Checkpoint | None:
    """The newest complete checkpoint; newer ones with a fault are named in the log.

    The hashes of state, config and the files of these kinds are compared; of all kinds where none is named.
    """
    for folder in list_checkpoints(run_dir):
        fault = find_fault(folder) or find_damage(folder, hashed_files(folder, *kinds))
        if fault is None:
            return Checkpoint(folder)
        log.warning("skipped %s: %s", folder, fault)
    return None


def checkpoint_to_take(run_dir: Path, which: str, *, name: str | None, option: str) -> Checkpoint:
    """What is exported or handed over: the checkpoint of this name, else the newest ever written.

    ValueError where that one is gone or damaged, or is of a step that was skipped: an older one is less than
    was trained, and taken only by its name. option says how, with {folder} and {step} to fill in.
    """
    if name is not None:
        named = run_dir / "checkpoints" / name
        if fault := _why_not(named, which):
            raise ValueError(f"{named}: {fault}")
        return Checkpoint(named)
    if (newest := _newest_written(run_dir)) is None:
        raise ValueError(f"{run_dir} has no complete checkpoint under checkpoints/")
    fault = _why_not(newest, which) or _not_to_ship(Checkpoint(newest).state)
    if fault is None:
        return Checkpoint(newest)
    whole = (folder for folder in list_checkpoints(run_dir) if _why_not(folder, which) is None)
    sound = next((folder for folder in whole if not _not_to_ship(Checkpoint(folder).state)), None)
    instead = ""
    if sound:
        step = int(sound.name.removeprefix("step_"))
        instead = f", or take the newest sound one with {option.format(folder=sound, step=step)}"
    raise ValueError(
        f"{newest}, the newest checkpoint of {run_dir}, cannot be used: {fault}; start its run again{instead}"
    )


def _newest_written(run_dir: Path) -> Path | None:
    """The newest checkpoint that there ever was, which may be gone."""
    names = [folder.name for folder in list_checkpoints(run_dir)[:1]]
    if (step := expected_step(run_dir)) is not None:
        names.append(f"step_{step:08d}")
    return run_dir / "checkpoints" / max(names) if names else None


def _why_not(folder: Path, which: str) -> str | None:
    if not folder.is_dir():
        return "it is not there"
    return find_fault(folder) or find_damage(folder, hashed_files(folder, which))


def _not_to_ship(state: TrainingState) -> str | None:
    if state.skipped_in_a_row:
        return f"its last {state.skipped_in_a_row} steps had no finite gradient and were skipped"
    return None


def find_fault(folder: Path) -> str | None:
    """What is missing in a checkpoint folder or has another size, or None; only its JSON files are read."""
    try:
        manifest = _read_manifest(folder)
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not finished"
    except ValueError as error:
        return f"{MANIFEST} is not JSON ({error})"
    if manifest.get("schema_version") != SCHEMA_VERSION:
        return f"schema version {manifest.get('schema_version')}, expected {SCHEMA_VERSION}"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {MANIFEST} expects {expected['bytes']}"
    return find_damage(folder, [name for name in manifest["files"] if name.endswith(".json")])


def hashed_files(folder: Path, *kinds: str) -> list[str]:
    """The names in the manifest: all, or state, config and the files of these kinds."""
    names = sorted(_read_manifest(folder)["files"])
    return [name for name in names if not kinds or name.endswith(".json") or name.split("-")[0] in kinds]


def find_damage(folder: Path, names: list[str]) -> str | None:
    """The first of these files whose bytes are not those that were written, in words, or None."""
    recorded = _read_manifest(folder)["files"]
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if found != recorded[name]["sha256"]:
            return f"{name} is damaged: its SHA-256 is not the one in {MANIFEST}"
    return None


def expected_step(run_dir: Path) -> int | None:
    """The step of the newest checkpoint that was ever written here, or None."""
    try:
        return json.loads((run_dir / "checkpoints" / NEWEST).read_text())["step"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run_dir / 'checkpoints' / NEWEST} is damaged: {error}") from error


def refuse_damaged(run_dir: Path, faults: dict[Path, str]) -> NoReturn:
    """ValueError that names every one of them."""
    named = "; ".join(f"{folder.name}: {fault}" for folder, fault in faults.items())
    raise ValueError(
        f"no checkpoint of {run_dir} can be used ({named}): put a sound one back, or give resume=never to "
        "start the run anew"
    )


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that it neither counts nor stands in the way; nothing is removed."""
    aside = folder.with_name(f"damaged_{folder.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"damaged_{folder.name}_{number}")
    return folder.rename(aside)


def remove_old_checkpoints(run_dir: Path, config: CheckpointConfig) -> None:
    """Keeps the last ones and the milestones."""
    for folder in list_checkpoints(run_dir)[config.keep_last :]:
        if not config.is_milestone(int(folder.name.removeprefix("step_"))):
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    trash = folder.with_name(f".trash-{folder.name}")  # out of sight first: half-removed it looks damaged
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash)


def remove_leftovers(run_dir: Path) -> None:
    """What killed processes left half-written or half-removed; only under the run's lock."""
    for pattern in (".step_*.tmp", ".trash-*"):
        for leftover in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)  # a process that is dying may still write there


def trained_weights(dit: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a network: all of it, or of a frozen one with a LoRA what that trains."""
    return {name: weight.detach() for name, weight in dit.named_parameters() if weight.requires_grad}


def load_trained_weights(dit: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts trained_weights back; ValueError, with dit as it was, where names or shapes differ."""
    trained = trained_weights(dit)
    for name in sorted(trained.keys() | weights.keys()):
        found, expected = (list(w[name].shape) if name in w else "none" for w in (weights, trained))
        if found != expected:
            raise ValueError(f"{name} has shape {found} among the saved weights, expected {expected}")
    for name, weight in trained.items():
        weight.copy_(weights[name])


def weights_sha256(dit: nn.Module, *, leave_out: tuple[str, ...] = ()) -> str:
    """Of the name and bits of every weight, but for modules of these names: the same for the same network."""
    digest = hashlib.sha256()
    for name, weight in dit.state_dict().items():
        if name.split(".")[0] in leave_out:
            continue
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())
