"""Going on from a checkpoint: the ranks choose the newest sound one together, and read what each needs."""

import logging
import random
from pathlib import Path

import numpy as np
import torch

from train.processes.agree import from_first, gather, num_ranks, raise_together
from train.processes.trained_state import MOMENTS
from train.saving.checkpoints import (
    Checkpoint,
    find_damage,
    find_fault,
    hashed_files,
    list_checkpoints,
    refuse_damaged,
    set_aside,
)
from train.saving.tensor_ranges import TensorRange, read_whole
from train.story_module import StoryModule

log = logging.getLogger(__name__)


def choose_checkpoint(run_dir: Path, rank: int) -> Checkpoint | None:
    """The newest checkpoint without a fault, the same one on all ranks; None where there is no checkpoint.

    Each rank hashes its share of the files. Damaged ones are named and set aside once a sound one is found;
    ValueError where there are only damaged ones.
    """
    folders = from_first(list_checkpoints(run_dir))
    damaged: dict[Path, str] = {}
    for folder in folders:
        fault = from_first(find_fault(folder) if rank == 0 else None)
        if fault is None:
            faults = gather(find_damage(folder, hashed_files(folder)[rank :: num_ranks()]))
            fault = next((found for found in faults if found), None)
        if fault is None:
            if rank == 0:
                for bad, why in damaged.items():
                    log.warning("skipped %s: %s; it is %s now", bad, why, set_aside(bad).name)
            return Checkpoint(folder)
        damaged[folder] = fault
    if damaged:
        refuse_damaged(run_dir, damaged)
    return None


def restore(module: StoryModule, checkpoint: Checkpoint, rank: int) -> None:
    """Everything that was trained, by the ranges that this rank holds; OSError or ValueError on all ranks."""
    state, fragments = checkpoint.state, module.trained.fragments
    read: dict[str, list[torch.Tensor]] = {}
    error = None
    try:
        for kind, prefix in (("model", ""), ("ema", ""), *(("optimizer", f"{name}/") for name in MOMENTS)):
            ranges = [
                TensorRange(prefix + f.name, f.shape, f.start, torch.empty(len(f.weights))) for f in fragments
            ]
            checkpoint.read(kind, ranges, rank=rank)
            read[prefix or kind] = [part.values for part in ranges]
    except (OSError, ValueError) as caught:
        error = f"cannot go on from {checkpoint.folder}: {caught}"
    raise_together(error)
    moments = {name: read[f"{name}/"] for name in MOMENTS}
    module.trained.load(read["model"], moments, state.num_updates)
    module.ema.load(read["ema"], state.num_ema_updates)
    module.position = state.position
    module.skipped_in_a_row, module.num_skipped = state.skipped_in_a_row, state.num_skipped


def rng_state() -> dict[str, torch.Tensor]:
    """The global generators of this process. Nothing of ours draws from them, but a library might."""
    _, words, place, has_gauss, gauss = np.random.get_state()
    version, python_words, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*words.tolist(), place, has_gauss]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor([version, *python_words]),
        "python_gauss": torch.tensor(
            [float("nan") if python_gauss is None else python_gauss], dtype=torch.float64
        ),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def read_rng_state(checkpoint: Checkpoint, rank: int, num_ranks: int) -> dict[str, torch.Tensor] | None:
    """What rng_state() was on this rank; None where the checkpoint is of another number of ranks."""
    files = checkpoint.files("rng")
    return read_whole([files[rank]]) if len(files) == num_ranks else None


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    *words, place, has_gauss = state["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(words, np.uint32), place, has_gauss, state["numpy_gauss"].item())
    )
    version, *python_words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(python_words), None if np.isnan(gauss) else gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_rng(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
