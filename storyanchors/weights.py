"""Weights on disk -> StoryDiT: Wan 2.1 text-to-video checkpoints and our own folders, read strictly.

A checkpoint is read twice. The first pass sees names and shapes only and settles where every tensor goes, so
that a checkpoint that does not fit is an error before a weight has changed. The second streams one tensor at
a time into the network's own dtype and device, so that 14B parameters are never held twice. No pickles.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from storyanchors.dit import PRESETS, StoryDiT, StoryDiTConfig

PATCH = "patch_embedding.weight"  # (D, input channels, 1, p, p)
NEW_PARTS = "story_embedder."  # with the patch embedding's extra columns, all that Wan does not have
BUNDLE_PREFIX = "model.diffusion_model."  # of the transformer in a file that may hold other parts as well

# The authors' names of Wan 2.1 in diffusers' words. Their norm3, the affine one before cross-attention, is
# diffusers' norm2; the other two norms of a block have no parameters.
WAN_MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
WAN_BLOCK_MODULES = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "self_attn.norm_q": "attn1.norm_q", "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k", "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0", "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k", "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip


@dataclass(frozen=True)
class WeightsReport:
    """What became of every tensor of a checkpoint and of every parameter that it does not hold."""

    source: str
    loaded: list[str]  # as they are
    expanded: list[str]  # from C to 2C+1 input channels; the new columns are zero
    new: list[str]  # in no checkpoint of the base model; they keep their zero-init
    unexpected: list[str]  # other parts of a bundled file, left alone

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} tensors loaded, {len(self.expanded)} expanded, {len(self.new)} new"
        others = f", {len(self.unexpected)} of other parts left alone" if self.unexpected else ""
        return f"{self.source}: {counts}{others}"


def load_base_weights(dit: StoryDiT, path: str | Path) -> WeightsReport:
    """Fills dit from a Wan 2.1 T2V checkpoint (diffusers' or the authors' layout) or from a StoryDiT folder.

    path is a .safetensors file, a folder with config.json and (sharded) safetensors, a pipeline folder with
    such a folder named transformer, or a Hub id. A base checkpoint has C input channels: they become the
    noisy columns of [noisy C | condition C | mask 1], and the other columns are set to zero.
    ValueError, with dit as it was, for sizes that differ and for any tensor that is missing, unknown or of
    another shape.
    """
    files, config = _checkpoint_files(path)
    stored = {name: tuple(tensor.shape) for name, tensor in _tensors(files, headers_only=True)}
    names = _names_in_story_dit(stored, path)
    shapes = {name: stored[stored_name] for stored_name, name in names.items()}
    _check_sizes(dit, shapes, config, path)
    parameters = dit.state_dict()  # shares the parameters' memory
    expanded, new = _check_tensors(parameters, shapes, dit.config.latent_channels, path)
    for stored_name, tensor in _tensors(files, headers_only=False):
        if stored_name not in names:
            continue
        parameter = parameters[names[stored_name]]
        if names[stored_name] in expanded:
            parameter[:, tensor.shape[1] :] = 0
            parameter = parameter[:, : tensor.shape[1]]
        parameter.copy_(tensor)
    return WeightsReport(
        source=str(path),
        loaded=sorted(shapes.keys() - expanded),
        expanded=sorted(expanded),
        new=sorted(new),
        unexpected=sorted(stored.keys() - names.keys()),
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
        raise ValueError(f"found no folder {reference}")
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


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder's safetensors, one at a time; ValueError for a missing or broken file."""
    return _tensors(_safetensors_files(folder), headers_only=False)


def _checkpoint_files(path: str | Path) -> tuple[list[Path], dict]:
    """The safetensors files of a transformer and its config.json, {} for a lone file."""
    if Path(path).is_file():
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path} is not a .safetensors file; pickled checkpoints are not read")
        return [Path(path)], {}
    folder = part_folder(path, "transformer")
    return _safetensors_files(folder), read_json(folder / "config.json")


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
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    if headers_only:
                        yield name, torch.empty(shard.get_slice(name).get_shape(), device="meta")
                    else:
                        yield name, shard.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def _names_in_story_dit(stored: Iterable[str], path: str | Path) -> dict[str, str]:
    """{stored name: our name} of the transformer's tensors; a name unknown to the layout stays as it is."""
    bundled = [name for name in stored if name.startswith(BUNDLE_PREFIX)]
    bare = {name: name.removeprefix(BUNDLE_PREFIX) for name in bundled or stored}
    if PATCH not in bare.values():
        raise ValueError(f"{path} holds no {PATCH}, expected the transformer of Wan 2.1 or a StoryDiT")
    if "head.head.weight" in bare.values():
        bare = {name: _from_wan(theirs) for name, theirs in bare.items()}
    return bare


def _from_wan(theirs: str) -> str:
    if theirs == "head.modulation":
        return "scale_shift_table"
    module, _, leaf = theirs.rpartition(".")
    if match := re.fullmatch(r"(blocks\.\d+)(?:\.(.+))?", module):
        block, module = match.groups()
        if (module, leaf) == (None, "modulation"):
            return f"{block}.scale_shift_table"
        return f"{block}.{WAN_BLOCK_MODULES[module]}.{leaf}" if module in WAN_BLOCK_MODULES else theirs
    return f"{WAN_MODULES[module]}.{leaf}" if module in WAN_MODULES else theirs


def _check_sizes(dit: StoryDiT, shapes: dict[str, tuple], config: dict, path: str | Path) -> None:
    """ValueError where the tensors or config.json disagree with dit.config; names a preset that fits."""
    names = [field.name for field in dataclasses.fields(StoryDiTConfig)]
    expected = StoryDiTConfig(**{name: dit.config[name] for name in names})
    found = {name: config[name] for name in names if name in config}
    if "num_heads" in config:  # the authors' word
        found["num_attention_heads"] = config["num_heads"]
    if "patch_size" in found:
        found["patch_size"] = tuple(found["patch_size"])
    blocks = [int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")]
    found |= {"hidden_dim": shapes[PATCH][0], "num_layers": 1 + max(blocks, default=-1)}
    for field, name, axis in (
        ("ffn_dim", "blocks.0.ffn.net.0.proj.weight", 0),
        ("text_dim", "condition_embedder.text_embedder.linear_1.weight", 1),
    ):
        if name in shapes:
            found[field] = shapes[name][axis]
    differences = [
        f"{field} is {value}, expected {getattr(expected, field)}"
        for field, value in found.items()
        if value != getattr(expected, field)
    ]
    if differences:
        presets = {name: StoryDiTConfig.preset(name) for name in PRESETS}
        fitting = [
            n for n, p in presets.items() if all(getattr(p, field) == value for field, value in found.items())
        ]
        hint = f" (it fits the preset {fitting[0]})" if fitting else ""
        raise ValueError(f"{path} is of another size than the network: {'; '.join(differences)}{hint}")


def _check_tensors(
    parameters: dict[str, Tensor], shapes: dict[str, tuple], latent_channels: int, path: str | Path
) -> tuple[set[str], set[str]]:
    """Names of the expanded and of the new tensors; ValueError for all that is not explained by them."""
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("the network is on the meta device and has no memory to load into")
    is_base = shapes[PATCH][1] == latent_channels
    expanded = {PATCH} if is_base else set()
    new = {name for name in parameters if name.startswith(NEW_PARTS)} if is_base else set()
    problems = [f"{name} is missing" for name in sorted(parameters.keys() - new - shapes.keys())]
    problems += [
        f"{name} has no place in StoryDiT" for name in sorted(shapes.keys() - (parameters.keys() - new))
    ]
    for name in sorted(shapes.keys() & parameters.keys()):
        expected = list(parameters[name].shape)
        if name in expanded:
            expected[1] = latent_channels
        if list(shapes[name]) != expected:
            problems.append(f"{name} has shape {list(shapes[name])}, expected {expected}")
    if shapes[PATCH][1] not in (latent_channels, 2 * latent_channels + 1):
        problems.insert(
            0,
            f"{shapes[PATCH][1]} input channels, expected {latent_channels} (the base model) or "
            f"{2 * latent_channels + 1} (a StoryDiT)",
        )
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path} does not fit the network: {'; '.join(problems[:8])}{more}")
    return expanded, new
