"""The folder of one run: its settings, where its weights came from, and whether it starts or goes on.

run_dir/{config.yaml, provenance.json, codec/, caption_encoder/, checkpoints/, samples/, metrics.jsonl}
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.lora import WHOLE, LoraSettings, add_lora, merge_lora
from storyanchors.model_folder import MODEL_FILE, read_story_model
from storyanchors.weights import load_base_weights, load_story_dit
from train.saving.checkpoints import (
    NEWEST,
    Checkpoint,
    checkpoint_to_take,
    expected_step,
    find_fault,
    list_checkpoints,
    load_trained_weights,
    newest_checkpoint,
    refuse_damaged,
    set_aside,
    weights_sha256,
)
from train.saving.naming_errors import naming_errors

log = logging.getLogger(__name__)

CONFIG, PROVENANCE = "config.yaml", "provenance.json"
# what may differ when a run goes on; everything else decides what is learned, or which bits come out
MAY_CHANGE = (
    "strategy",
    "offload",
    "collective_timeout_s",
    "deepspeed",
    "run_dir",
    "init_from",
    "resume",
    "logger",
    "log_every_n_steps",
    "peak_tflops",
    "checkpoint",
    "samples",
    "held_out",
    "plan_report",
    "dry_run",
    "preflight",
    "trainer",
)
MAY_CHANGE_INSIDE = (
    "data.dataset",
    "data.num_workers",
    "data.prefetch_mb",
    "data.max_broken_share",
    "data.log_keys",
    "model.base_weights",
    "model.activation_checkpointing",
    "model.caption_cache",
    "model.sequence_parallel",
    "stage.steps",
)


@dataclass(frozen=True)
class HandedOver:
    """Weights that a new run begins with, and what to remember of them."""

    read_weights: Callable[[], dict[str, Tensor]]  # by the first rank, which gives them to the others
    dit_config: dict[str, Any]
    codec: Path
    source: dict[str, Any]  # path, step, which, sha256
    history: list[dict[str, Any]]  # of the stages before, oldest first
    base: dict[str, Any] | None = None  # what the weights are a LoRA of; None = they are the whole network


def start_or_resume(run_dir: Path, settings: dict[str, Any], *, resume: str) -> Checkpoint | None:
    """The newest checkpoint by its files' sizes, or None for a new run; training compares their hashes.

    ValueError when the run was made with other settings, when it has had checkpoints and none can be used,
    and when resume=never meets a run with one that can.
    """
    if resume not in ("auto", "never"):
        raise ValueError(f"resume is {resume!r}, expected auto or never")
    if not (run_dir / CONFIG).is_file():
        return None
    if resume == "never":
        if rank_zero_only.rank == 0:  # the first rank has begun when the others start
            _forget_checkpoints(run_dir)
        return None
    faults = {}
    for folder in list_checkpoints(run_dir):  # older ones are not looked at: every rank asks for every file
        faults[folder] = find_fault(folder)
        if faults[folder] is None:
            usable = folder
            break
    else:
        if faults:
            refuse_damaged(run_dir, faults)
        if (step := expected_step(run_dir)) is not None:
            raise ValueError(
                f"{run_dir} has had a checkpoint of step {step}, and there is none now: put it back, or give "
                "resume=never to start the run anew"
            )
        return None
    _check_settings(read_settings(run_dir), settings, run_dir / CONFIG)
    return Checkpoint(usable)


def _forget_checkpoints(run_dir: Path) -> None:
    """Puts damaged checkpoints out of the way of a run that is started anew; ValueError if one is sound."""
    if checkpoint := newest_checkpoint(run_dir):
        raise ValueError(
            f"{run_dir} holds a run already ({checkpoint.folder.name}): choose another run_dir, or "
            "resume=auto to go on with it"
        )
    for folder in list_checkpoints(run_dir):
        log.warning("%s is %s now", folder, set_aside(folder).name)
    (run_dir / "checkpoints" / NEWEST).unlink(missing_ok=True)


def write_settings(run_dir: Path, settings: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / CONFIG, yaml.safe_dump(settings, sort_keys=False))


def read_settings(run_dir: Path) -> dict[str, Any]:
    if not (run_dir / CONFIG).is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no {CONFIG}")
    try:
        return yaml.safe_load((run_dir / CONFIG).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{run_dir / CONFIG} is damaged: {error}") from error


def write_provenance(
    run_dir: Path,
    *,
    stage: str,
    preset: str,
    frame_size: tuple[int, int],
    handed_over: HandedOver | None,
    base: dict[str, Any] | None,
) -> None:
    """frame_size: (height, width) in pixels that the network has seen most of. base: see describe_base."""
    run_dir.mkdir(parents=True, exist_ok=True)
    provenance = {
        "schema_version": 1,
        "tool_version": version("storyanchors"),
        "stage": stage,
        "preset": preset,
        "frame_size": list(frame_size),
        "base": base,
        "init_from": handed_over.source if handed_over else None,
        "history": handed_over.history if handed_over else [],
    }
    write_text(run_dir / PROVENANCE, json.dumps(provenance, indent=2) + "\n")


def read_provenance(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / PROVENANCE).read_text())


def stage_history(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The stages that the weights of this run have been through, oldest first, this one included."""
    provenance = read_provenance(run_dir)
    return [*provenance["history"], {"stage": provenance["stage"], "steps": step, "run": run_dir.name}]


def describe_base(dit: StoryDiT, weights: str, lora: LoraSettings) -> dict[str, Any]:
    """What a LoRA belongs to: the reference and the bits of what stays frozen in dit, before it gets one.

    The modules that learn whole are the adapter's own; a published base has not even all of them.
    """
    sha256 = weights_sha256(dit, leave_out=WHOLE)
    return {"weights": weights, "sha256": sha256, "rank": lora.rank, "alpha": lora.alpha}


def check_base(found: dict[str, Any], expected: dict[str, Any] | None, where: Path) -> None:
    """ValueError unless an adapter of where fits the present base; the reference to the base may differ."""
    if expected is None:
        raise ValueError(
            f"{where} holds a whole network, no LoRA: give it as model.base_weights, or leave out model.lora"
        )
    for name in ("rank", "alpha", "sha256"):
        if found[name] != expected[name]:
            if name == "sha256":
                raise ValueError(
                    f"{where} holds a LoRA of {expected['weights']} as it was, with weights of SHA-256 "
                    f"{expected[name][:16]}..., but {found['weights']} has other weights now, "
                    f"{found[name][:16]}...: a LoRA fits no other base"
                )
            raise ValueError(
                f"{where} holds a LoRA with model.lora.{name}={expected[name]}, found {name}={found[name]}"
            )


def read_network(run_dir: Path, checkpoint: Checkpoint, which: str) -> StoryDiT:
    """The network of a checkpoint, float32; that of a LoRA run is its base, read again, with the adapter.

    ValueError where the base is no longer what the run was trained on.
    """
    dit = StoryDiT.unfilled(StoryDiTConfig(**checkpoint.dit_config))
    base = read_provenance(run_dir).get("base")
    if base:
        lora = LoraSettings(base["rank"], base["alpha"])
        weights = read_settings(run_dir)["model"]["base_weights"]  # it may have moved since base was written
        log.info("%s", load_base_weights(dit, weights))
        check_base(describe_base(dit, weights, lora), base, run_dir)
        add_lora(dit, lora)
    load_trained_weights(dit, checkpoint.weights(which))
    return dit


def read_init_from(
    path: str | Path, dit_config: dict[str, Any], preset: str, base: dict[str, Any] | None
) -> HandedOver:
    """The EMA weights of a run folder or of one of its checkpoints, or the transformer of a model folder.

    base describes what the new run trains a LoRA of, None = all weights. A LoRA is handed over to the next
    one as it is, and to a run that trains all weights merged into its base.
    ValueError when the folder is none of these, its newest checkpoint cannot be used, or it does not fit the
    new run.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        handed_over = _from_run(path, None, merged=base is None)
    elif path.parent.name == "checkpoints" and (path.parents[1] / CONFIG).is_file():
        handed_over = _from_run(path.parents[1], path.name, merged=base is None)
    elif (path / MODEL_FILE).is_file():
        handed_over = _from_model(path)
    else:
        raise ValueError(
            f"init_from {path} is neither a run folder ({CONFIG}), one of its checkpoints, nor a model "
            f"folder ({MODEL_FILE})"
        )
    for name, expected in dit_config.items():
        found = handed_over.dit_config.get(name)
        if found != expected:
            raise ValueError(
                f"{path} holds a network with {name}={found}, the preset {preset} expects {expected}"
            )
    if base:
        check_base(base, handed_over.base, path)
    return handed_over


def _from_run(run_dir: Path, name: str | None, *, merged: bool) -> HandedOver:
    checkpoint = checkpoint_to_take(run_dir, "ema", name=name, option="init_from={folder}")
    step = checkpoint.state.step
    source = {"path": str(run_dir), "step": step, "which": "ema", "sha256": checkpoint.sha256("ema")}
    history, base = stage_history(run_dir, step), read_provenance(run_dir).get("base")
    if base and merged:
        read_weights, base = partial(_merged_weights, run_dir, checkpoint), None
    else:
        read_weights = partial(checkpoint.weights, "ema")
    # settings that are newer than the checkpoint: it was trained with what is their default now
    newer = {field.name: field.default for field in fields(StoryDiTConfig) if field.default is not MISSING}
    sizes = json.loads(json.dumps({**newer, **checkpoint.dit_config}))
    return HandedOver(read_weights, sizes, run_dir / "codec", source, history, base)


def _merged_weights(run_dir: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    dit = read_network(run_dir, checkpoint, "ema")
    merge_lora(dit)
    return dit.state_dict()


def _from_model(folder: Path) -> HandedOver:
    info = read_story_model(folder)
    dit = load_story_dit(folder / "transformer")
    provenance = info.get("provenance", {})
    source = {"path": str(folder), "which": "export", "provenance": provenance}
    history = provenance.get("history", [])
    return HandedOver(partial(_float_weights, dit), plain_config(dit), folder / "codec", source, history)


def _float_weights(dit: StoryDiT) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in dit.state_dict().items()}


def plain_config(dit: StoryDiT) -> dict[str, Any]:
    """The sizes of a network as JSON knows them."""
    public = {name: value for name, value in dit.config.items() if not name.startswith("_")}
    return json.loads(json.dumps(public))


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with naming_errors(f"write {path}"):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a machine that loses power leaves the name without the content
        os.replace(temporary, path)


def _check_settings(earlier: dict[str, Any], settings: dict[str, Any], where: Path) -> None:
    before, now = _flatten(earlier), _flatten(settings)
    for name in sorted(before.keys() | now.keys()):
        may_change = name.split(".")[0] in MAY_CHANGE or name in MAY_CHANGE_INSIDE
        if not may_change and before.get(name) != now.get(name):
            raise ValueError(
                f"{where} was written with {name}={before.get(name)}, found {name}={now.get(name)}: "
                "a run goes on with the same settings; choose another run_dir to start anew"
            )


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
