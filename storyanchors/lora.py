"""LoRA of a StoryDiT: low-rank updates of every attention and feed-forward matrix, by PEFT.

What Wan does not have learns whole: the patch embedding, whose new input columns start at zero, and the
embedders of the clip conditions. Everything else is frozen. An adapter is one safetensors file in diffusers'
layout; its header holds rank and alpha, without which the same matrices mean another update.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from storyanchors.dit import StoryDiT

LORA_FILE = "pytorch_lora_weights.safetensors"
LOW_RANK = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")  # of every block
WHOLE = ("patch_embedding", "story_embedder")


@dataclass
class LoraSettings:
    rank: int | None = None  # None = no LoRA: the whole network learns
    alpha: float | None = None  # the update is alpha / rank B A; None = rank

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}, expected at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha is {self.alpha}, expected a number above 0")
        if self.alpha is not None and self.rank is None:
            raise ValueError(f"lora.alpha is {self.alpha}, expected lora.rank with it")


def add_lora(dit: StoryDiT, settings: LoraSettings, *, seed: int = 0) -> None:
    """Puts an adapter over the network, in place; only what the adapter trains still requires gradients.

    The update begins at zero: the network computes what it did. Base weights are to be loaded before, since
    the adapted matrices change their names. ValueError where the network has an adapter already.
    """
    _check_has_none(dit)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        target_modules=list(LOW_RANK),
        modules_to_save=list(WHOLE),
    )
    dit.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit.add_adapter(config)


def has_lora(dit: StoryDiT) -> bool:
    return bool(getattr(dit, "peft_config", None))


def cast_base(dit: StoryDiT, dtype: torch.dtype) -> None:
    """Keeps the frozen matrices under the LoRA in another dtype, in place.

    Under autocast to that dtype the same bits come out, from half the memory and without a cast in each step.
    """
    for module in dit.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().to(dtype)


def save_lora(dit: StoryDiT, folder: str | Path) -> None:
    """Writes LORA_FILE: the low-rank matrices, the modules that learn whole, and the settings."""
    config = dit.peft_config["default"]
    settings = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "modules_to_save": sorted(config.modules_to_save),
    }
    tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(dit).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    # one key, since safetensors writes several in an order that differs from call to call
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(settings)}
    save_file(tensors, Path(folder) / LORA_FILE, metadata=metadata)


def load_lora(dit: StoryDiT, path: str | Path) -> LoraSettings:
    """Puts an adapter of save_lora, its folder or its file, over the base network that it was trained on.

    ValueError, with dit as it was, unless the file's settings are there and its tensors are exactly those of
    such an adapter of this network.
    """
    _check_has_none(dit)
    file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
    settings = _check_file(dit, file)
    dit.load_lora_adapter(
        str(file.parent),
        weight_name=file.name,
        prefix=None,
        use_safetensors=True,
        adapter_name="default",
    )
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(".default." in name)
    return settings


def merge_lora(dit: StoryDiT) -> None:
    """Adds the update to the weights, in place: the network of the same output with its own names again."""
    for name, module in list(dit.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            dit.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            dit.set_submodule(name, module.modules_to_save[module.active_adapter])
    del dit.peft_config
    dit._hf_peft_config_loaded = False  # diffusers' sign that add_adapter has been called
    dit.requires_grad_(True)


def _check_has_none(dit: StoryDiT) -> None:
    if has_lora(dit):
        raise ValueError("the network has a LoRA already; merge_lora makes it part of the weights")


def _check_file(dit: StoryDiT, file: Path) -> LoraSettings:
    if not file.is_file():
        raise ValueError(f"found no LoRA at {file}, expected the {LORA_FILE} of save_lora, or its folder")
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            found = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
    if LORA_ADAPTER_METADATA_KEY not in metadata:
        raise ValueError(f"{file} does not say its rank and alpha ({LORA_ADAPTER_METADATA_KEY} is missing)")
    config = json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
    settings = LoraSettings(config["r"], config["lora_alpha"])
    expected = _shapes(dit, settings.rank)
    for fault, names in (("lacks", expected.keys() - found.keys()), ("has", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{file} does not fit the network: it {fault} {min(names)}{more}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{file}: {name} has shape {found[name]}, the network expects {shape}")
    return settings


def _shapes(dit: StoryDiT, rank: int) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter file, under PEFT's names."""
    shapes = {}
    for name, module in dit.named_modules():
        if name.endswith(tuple(f".{part}" for part in LOW_RANK)):
            shapes[f"{name}.lora_A.weight"] = (rank, module.in_features)
            shapes[f"{name}.lora_B.weight"] = (module.out_features, rank)
        elif name in WHOLE:
            shapes |= {f"{name}.{part}": tuple(tensor.shape) for part, tensor in module.state_dict().items()}
    return shapes
