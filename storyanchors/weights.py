"""Weights on disk -> StoryDiT: Wan 2.1 and Step-Video checkpoints and our own folders, read strictly.

A checkpoint is read twice. The first pass sees names and shapes only and settles where every tensor goes, so
that a checkpoint that does not fit is an error before a weight has changed. The second streams one tensor at
a time into the network's own dtype and device, so that 14B parameters are never held twice. A pickle is read
only on request, and then by torch's restricted unpickler, which makes tensors and runs no code.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from storyanchors.checkpoint_layouts import (
    DIFFUSERS,
    IMAGE_BRANCH,
    OWN,
    PATCH,
    ROTATED,
    STEP,
    Layout,
    Move,
    input_columns,
    layout_of,
    moves,
    stored_shape,
    take,
)
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.dit_config import PRESETS

NEW_PARTS = "story_embedder."  # with the patch embedding's extra columns, all that base models may not have
BUNDLE_PREFIX = "model.diffusion_model."  # of the transformer in a file that may hold other parts as well
PICKLES = (".pth", ".pt")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightsReport:
    """What became of every tensor of a checkpoint and of every parameter.

    Every parameter is in one of loaded, split, expanded and new. Names are StoryDiT's in the first four
    lists and the checkpoint's in the last two.
    """

    source: str
    layout: str
    loaded: list[str]  # as they are, but for dtype and name
    split: list[str]  # cut out of a fused tensor
    expanded: list[str]  # the patch embedding's weight, from a base model's input columns to 2C+1
    new: list[str]  # in no checkpoint of this base model; they stay as they were
    dropped: list[str]  # Wan's image branch, which StoryDiT does without
    unexpected: list[str]  # other parts of a bundled file, left alone
    permuted: list[str] = field(default_factory=list)  # among loaded and split: rows put in RoPE's order
    columns: str = ""  # which input columns the expanded weight has from the checkpoint

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} tensors loaded"]
        counts += [f"{len(self.split)} split out of fused ones"] if self.split else []
        counts += [f"with {len(self.permuted)} of all these permuted for RoPE"] if self.permuted else []
        counts += [f"{len(self.expanded)} expanded ({self.columns})"] if self.expanded else []
        counts += [f"{len(self.new)} new"] if self.new else []
        counts += [f"{len(self.dropped)} of the image branch dropped"] if self.dropped else []
        counts += [f"{len(self.unexpected)} of other parts left alone"] if self.unexpected else []
        return f"{self.source} ({self.layout}): {', '.join(counts)}"


def load_base_weights(dit: StoryDiT, path: str | Path, *, allow_pickle: bool = False) -> WeightsReport:
    """Fills dit from a Wan 2.1 or Step-Video checkpoint or from a StoryDiT folder.

    path is a .safetensors file, a folder with config.json and (sharded) safetensors, a pipeline folder with
    such a folder named transformer, or a Hub id; with allow_pickle also a .pth or .pt file of tensors. Wan's
    may be in the authors' or in diffusers' layout. A base checkpoint has C (text to video), 2C (Step-Video
    TI2V) or 2C+4 (Wan I2V, Fun-InP) input channels, of which [noisy C | condition C | mask 1] is made.
    ValueError, with dit as it was, for sizes that differ and for any tensor that is missing, unknown or of
    another shape; ValueError also where numbers are not finite, which is seen only while they are read.
    """
    files, config = _checkpoint_files(path, allow_pickle)
    stored = {name: tuple(tensor.shape) for name, tensor in _tensors(files, headers_only=True)}
    checkpoint = _Checkpoint.of(stored, str(path), dit.config.latent_channels)
    _check_sizes(dit, checkpoint, config)
    parameters = dit.state_dict()  # shares the parameters' memory
    new = _check_tensors(parameters, checkpoint, dit.config.latent_channels)
    sizes = _config_of(dit)
    for name, tensor in _tensors(files, headers_only=False):
        targets = checkpoint.plan.get(name, ())
        if targets and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
        for move in targets:
            parameters[move.parameter].copy_(take(tensor, move, checkpoint.layout, sizes))
    moved = [move for targets in checkpoint.plan.values() for move in targets]
    columns = input_columns(checkpoint.in_channels, dit.config.latent_channels, checkpoint.layout)
    expanded = [PATCH] if checkpoint.layout is not OWN else []
    split = {move.parameter for move in moved if move.num_parts > 1}
    permuted = [m.parameter for m in moved if checkpoint.layout is STEP and ROTATED.fullmatch(m.parameter)]
    return WeightsReport(
        source=str(path),
        layout=checkpoint.layout.name,
        loaded=sorted({move.parameter for move in moved} - split - set(expanded)),
        split=sorted(split),
        expanded=expanded,
        new=sorted(new),
        dropped=sorted(checkpoint.dropped),
        unexpected=sorted(stored.keys() - checkpoint.plan.keys() - checkpoint.dropped),
        permuted=sorted(permuted),
        columns=columns if expanded else "",
    )


def load_story_dit(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> StoryDiT:
    """A network that save_pretrained wrote, in the dtype where it need not be float32.

    ValueError or OSError unless the safetensors of the folder hold exactly the network of its config.json.
    """
    settings = dict(torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    try:
        dit, found = StoryDiT.from_pretrained(folder, **settings)
    except TypeError as error:
        raise ValueError(f"{folder}: its config.json is not that of a StoryDiT: {error}") from error
    for fault, names in (("lacks", found["missing_keys"]), ("has no place for", found["unexpected_keys"])):
        if names:
            raise ValueError(
                f"the network of {folder} {fault} {min(names)} and {len(names) - 1} more tensors"
            )
    return dit


def part_folder(reference: str | Path, part: str) -> Path:
    """The folder of one part (transformer, vae, text_encoder, tokenizer) of a pipeline in diffusers' layout.

    reference is the folder of the part, the folder of the pipeline, or `owner/name[/subfolder]` on the
    Hugging Face Hub, from which only this part's JSON, tokenizer and safetensors files are downloaded.
    ValueError where there is no such folder or repository.
    """
    folder = Path(reference)
    if not folder.is_dir():
        folder = _downloaded(str(reference), part)
    return folder / part if (folder / part).is_dir() else folder


def read_json(file: Path) -> dict:
    """The object in a JSON file; ValueError names the file that is not there or holds none."""
    if not file.is_file():
        raise ValueError(f"found no {file.name} in {file.parent}")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, expected a JSON object")
    return content


def _downloaded(reference: str, part: str) -> Path:
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w./-]+))?", reference)
    if match is None:
        raise ValueError(f"found no folder {reference}, which is no hub id (OWNER/NAME) either")
    repository, subfolder = match.groups()
    patterns = [f"{subfolder or part}/*.{ending}" for ending in ("json", "safetensors", "model", "txt")]
    if subfolder is None:  # the authors' own repositories keep the transformer at the top
        patterns += ["config.json", "diffusion_pytorch_model*.safetensors*"]
    try:
        snapshot = Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{reference} is neither a folder nor a repository to be had from the Hugging Face Hub: {reason}"
        ) from error
    return snapshot / subfolder if subfolder else snapshot


def read_tensors(path: Path, *, allow_pickle: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file or of a folder's safetensors, one at a time.

    ValueError for a missing or broken file, and for a pickle (.pth, .pt) without allow_pickle.
    """
    files = [_weights_file(path, allow_pickle)] if path.is_file() else _safetensors_files(path)
    return _tensors(files, headers_only=False)


def _checkpoint_files(path: str | Path, allow_pickle: bool) -> tuple[list[Path], dict]:
    """The files of a transformer's weights and its config.json, {} for a lone file."""
    if Path(path).is_file():
        return [_weights_file(Path(path), allow_pickle)], {}
    folder = part_folder(path, "transformer")
    return _safetensors_files(folder), read_json(folder / "config.json")


def _weights_file(file: Path, allow_pickle: bool) -> Path:
    if file.suffix in PICKLES and not allow_pickle:
        raise ValueError(f"{file} is a pickle, which is read only with allow_pickle=True")
    if file.suffix not in (".safetensors", *PICKLES):
        raise ValueError(f"{file} is not a .safetensors file, nor {' or '.join(PICKLES)}")
    return file


def _safetensors_files(folder: Path) -> list[Path]:
    files, indices = sorted(folder.glob("*.safetensors")), sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        files = [folder / name for name in sorted(set(read_json(indices[0]).get("weight_map", {}).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {indices[0].name} names")
    elif len(files) != 1:
        found = [file.name for file in sorted(folder.iterdir())]
        raise ValueError(
            f"{folder} must hold one .safetensors file, or several and their index (pickles are not read); "
            f"it holds {found}"
        )
    return files


def _tensors(files: Iterable[Path], *, headers_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its stored name, one at a time; headers_only gives tensors of the meta device."""
    for file in files:
        if file.suffix in PICKLES:
            for name, tensor in _unpickled(file).items():
                yield name, tensor.to("meta") if headers_only else tensor
            continue
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    if headers_only:
                        yield name, torch.empty(shard.get_slice(name).get_shape(), device="meta")
                    else:
                        yield name, shard.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped from the file rather than read into memory."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the restricted unpickler's is in a module that no file of ours may import
        reason = str(error).split("\n")[0]
        raise ValueError(f"{file} is not a file of tensors that torch.save wrote: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, expected names and tensors")
    if others := [name for name, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{file} holds {type(content[others[0]]).__name__} under {others[0]}, expected a tensor"
        )
    return content


@dataclass(frozen=True)
class _Checkpoint:
    """Where the tensors of a transformer go, by the names under which they are stored."""

    path: str
    layout: Layout
    shapes: dict[str, Shape]
    plan: dict[str, list[Move]]  # [] for a tensor that has no place
    dropped: set[str]
    in_channels: int

    @classmethod
    def of(cls, stored: dict[str, Shape], path: str, latent_channels: int) -> "_Checkpoint":
        bundled = [name for name in stored if name.startswith(BUNDLE_PREFIX)]
        bare = {name: name.removeprefix(BUNDLE_PREFIX) for name in bundled or stored}
        stored_as = {theirs: name for name, theirs in bare.items()}
        layout = layout_of(stored_as)
        if layout is None or layout.patch not in stored_as:
            raise ValueError(
                f"{path} holds no {(layout or DIFFUSERS).patch}, expected the transformer of Wan 2.1, of "
                "Step-Video or a StoryDiT"
            )
        in_channels = stored[stored_as[layout.patch]][1]
        if layout is DIFFUSERS and in_channels == 2 * latent_channels + 1:
            layout = OWN
        is_image_to_video = layout is not STEP and in_channels == 2 * latent_channels + 4
        dropped = {n for n, theirs in bare.items() if is_image_to_video and IMAGE_BRANCH.fullmatch(theirs)}
        plan = {name: moves(theirs, layout) for name, theirs in bare.items() if name not in dropped}
        return cls(path, layout, {name: stored[name] for name in bare}, plan, dropped, in_channels)

    def shape_of(self, parameter: str) -> Shape | None:
        """Shape of the stored tensor that becomes this parameter alone."""
        found = (name for name, targets in self.plan.items() if Move(parameter) in targets)
        return self.shapes.get(next(found, None))


def _config_of(dit: StoryDiT) -> StoryDiTConfig:
    return StoryDiTConfig(
        **{field.name: dit.config[field.name] for field in dataclasses.fields(StoryDiTConfig)}
    )


def _check_sizes(dit: StoryDiT, checkpoint: _Checkpoint, config: dict) -> None:
    """ValueError where the tensors or config.json disagree with dit.config; names a preset that fits."""
    expected = _config_of(dit)
    found = _found_sizes(checkpoint, config)
    differences = [
        f"{name} is {value}, expected {getattr(expected, name)}"
        for name, value in found.items()
        if value != getattr(expected, name)
    ]
    if differences:
        presets = {name: StoryDiTConfig.preset(name) for name in PRESETS}
        fitting = [
            name for name, preset in presets.items()
            if all(getattr(preset, field) == value for field, value in found.items())
        ]  # fmt: skip
        hint = f" (it fits the preset {fitting[0]})" if fitting else ""
        found = _first_eight(differences)
        raise ValueError(f"{checkpoint.path} is of another size or kind than the network: {found}{hint}")


def _found_sizes(checkpoint: _Checkpoint, config: dict) -> dict[str, Any]:
    """Fields of StoryDiTConfig and hidden_dim, from config.json, the layout and the tensors' shapes."""
    names = [field.name for field in dataclasses.fields(StoryDiTConfig)]
    if checkpoint.layout is STEP:  # its norm_eps is another norm's, its patch_size a number: the tensors say
        names = ["num_attention_heads", "attention_head_dim"]
    found = {name: config[name] for name in names if name in config}
    found |= {name: tuple(found[name]) for name in ("patch_size", "rope_axes_dim") if found.get(name)}
    if "num_heads" in config:  # the word of Wan's authors
        found["num_attention_heads"] = config["num_heads"]
    if checkpoint.layout is OWN and config:  # what a config of ours does not say has its default
        fields = dataclasses.fields(StoryDiTConfig)
        defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        found = defaults | found
    reached = [move.parameter for targets in checkpoint.plan.values() for move in targets]
    blocks = [int(match[1]) for name in reached if (match := re.match(r"blocks\.(\d+)\.", name))]
    hidden_dim, *_, patch = checkpoint.shape_of(PATCH)
    found |= {"hidden_dim": hidden_dim, "num_layers": 1 + max(blocks, default=-1)}
    found["patch_size"] = (1, patch, patch)
    if shape := checkpoint.shape_of("proj_out.weight"):
        found["latent_channels"] = shape[0] // patch**2
    for name, parameter, axis in (
        ("ffn_dim", "blocks.0.ffn.net.0.proj.weight", 0),
        ("text_dim", "condition_embedder.text_embedder.linear_1.weight", 1),
        ("clip_text_dim", "condition_embedder.clip_embedder.weight", 1),
    ):
        if shape := checkpoint.shape_of(parameter):
            found[name] = shape[axis]
    if checkpoint.layout is STEP and (shape := checkpoint.shape_of("blocks.0.attn1.norm_q.weight")):
        K = shape[0]  # its RoPE's split of 128 is written in its code: 64, 32, 32
        found |= {"attention_head_dim": K, "rope_axes_dim": (K // 2, K // 4, K // 4)}
    return found | checkpoint.layout.switches


def _check_tensors(parameters: dict[str, Tensor], checkpoint: _Checkpoint, latent_channels: int) -> set[str]:
    """Names of the new parameters; ValueError for every parameter and tensor that nothing explains."""
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("the network is on the meta device and has no memory to load into")
    C, layout, in_channels = latent_channels, checkpoint.layout, checkpoint.in_channels
    problems = []
    if layout is not OWN and input_columns(in_channels, C, layout) is None:
        ways = f"{2 * C} (TI2V)" if layout is STEP else f"{2 * C + 4} (I2V)"
        problems.append(
            f"{in_channels} input channels, expected {C} (text to video), {ways} or {2 * C + 1} (a StoryDiT)"
        )
    reached = [move.parameter for targets in checkpoint.plan.values() for move in targets]
    new = set()
    if layout is not OWN:  # an embedder is new as a whole; half of one is a fault
        part_of = lambda name: name.split(".linear_")[0]  # noqa: E731
        found = {part_of(name) for name in reached}
        new = {name for name in parameters if name.startswith(NEW_PARTS) and part_of(name) not in found}
    problems += [f"{name} is missing" for name in sorted(parameters.keys() - new - set(reached))]
    for name, targets in sorted(checkpoint.plan.items()):
        if not targets or any(move.parameter not in parameters for move in targets):
            problems.append(f"{name} has no place in StoryDiT")
            continue
        shape = tuple(parameters[targets[0].parameter].shape)
        expected = stored_shape(targets[0], layout, shape, in_channels)
        if checkpoint.shapes[name] != expected:
            problems.append(f"{name} has shape {list(checkpoint.shapes[name])}, expected {list(expected)}")
    if problems:
        raise ValueError(f"{checkpoint.path} does not fit the network: {_first_eight(problems)}")
    return new


def _first_eight(problems: list[str]) -> str:
    return "; ".join(problems[:8]) + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")
