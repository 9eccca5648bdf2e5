"""Checkpoints of a run: folders that exist whole or not at all.

checkpoints/step_00001000/ is written under another name, its files are synced to disk, then MANIFEST.json
with their sizes and SHA-256, then the folder gets its name. The latest is computed, never a link. Weights are
safetensors; the optimizer's state is a torch file, read with weights_only=True.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
SCHEMA_VERSION = 1


@dataclass
class CheckpointConfig:
    every_n_steps: int = 500
    keep_last: int = 2

    def __post_init__(self):
        for name in ("every_n_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class TrainingState:
    """The numbers of a checkpoint; position is the place in the data plan, in clips."""

    step: int
    position: int
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
        return TrainingState(**json.loads((self.folder / "state.json").read_text()))

    @property
    def dit_config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    def weights(self, which: str) -> dict[str, Tensor]:
        """The weights that were trained, float32: which is model or ema."""
        return load_file(self.folder / f"{which}.safetensors")

    def optimizer_state(self) -> dict:
        return torch.load(self.folder / "optimizer.pt", weights_only=True, map_location="cpu")

    def sha256(self, which: str) -> str:
        return json.loads((self.folder / MANIFEST).read_text())["files"][f"{which}.safetensors"]["sha256"]


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


def write_checkpoint(
    run_dir: Path,
    state: TrainingState,
    *,
    model: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimizer: dict,
    dit_config: dict,
) -> Checkpoint:
    """Writes checkpoints/step_<step>, whole or not at all.

    The older checkpoints stay as they are when that fails, for instance because the disk is full (OSError).
    """
    folder = run_dir / "checkpoints" / f"step_{state.step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in model.items()}, temporary / "model.safetensors"
        )
        save_file({name: tensor.contiguous() for name, tensor in ema.items()}, temporary / "ema.safetensors")
        torch.save(optimizer, temporary / "optimizer.pt")
        (temporary / "config.json").write_text(json.dumps(dit_config, indent=2) + "\n")
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        _write_manifest(temporary)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        free = shutil.disk_usage(temporary).free
        raise OSError(f"could not write {folder}: {error} ({free / 2**20:.0f} MiB are free there)") from error
    else:
        if folder.exists():  # the same step without a complete manifest
            _remove(folder)
        temporary.rename(folder)
        _sync(folder.parent)
        return Checkpoint(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint; newer ones with a fault are named in the log."""
    folders = sorted((run_dir / "checkpoints").glob("step_*"), reverse=True)
    for folder in folders:
        fault = find_fault(folder)
        if fault is None:
            return Checkpoint(folder)
        log.warning("skipped %s: %s", folder, fault)
    return None


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when it is complete."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
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
        if _sha256(path) != expected["sha256"]:
            return f"{name} is damaged: its SHA-256 is not the one in {MANIFEST}"
    return None


def remove_old_checkpoints(run_dir: Path, keep_last: int) -> None:
    """Keeps the last checkpoints; also removes what a killed process left half-written or half-removed."""
    folder = run_dir / "checkpoints"
    for old in sorted(folder.glob("step_*"))[:-keep_last]:
        _remove(old)
    for leftover in (*folder.glob(".step_*.tmp"), *folder.glob(".trash-*")):
        shutil.rmtree(leftover)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "files": files}, indent=2) + "\n")
    _sync(manifest)


def _remove(folder: Path) -> None:
    trash = folder.with_name(f".trash-{folder.name}")  # out of sight first: half-removed it looks damaged
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
