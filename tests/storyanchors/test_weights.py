import copy
import json
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.dit_config import STEP_VIDEO
from storyanchors.weights import load_base_weights, part_folder, read_tensors

PATCH = "patch_embedding.weight"


@pytest.fixture
def dit(config: StoryDiTConfig) -> StoryDiT:
    torch.manual_seed(1)
    return StoryDiT(config)


@pytest.fixture
def wan_folder(wan: WanTransformer3DModel, tmp_path: Path) -> Path:
    wan.save_pretrained(tmp_path / "wan")
    return tmp_path / "wan"


def check_holds(dit: StoryDiT, tensors: dict[str, Tensor]) -> None:
    """Every parameter of dit is that of the base model, or one of the new parts at its start."""
    for name, parameter in dit.state_dict().items():
        if name == PATCH:
            assert torch.equal(parameter[:, :4], tensors[PATCH])
            assert not parameter[:, 4:].any()
        elif not name.startswith("story_embedder."):
            assert torch.equal(parameter, tensors[name]), name


def rewrite(folder: Path, change, file: str = "diffusion_pytorch_model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


# What is read


def test_a_diffusers_folder_is_loaded_and_every_tensor_accounted_for(dit, wan, wan_folder):
    with torch.no_grad():
        dit.patch_embedding.weight[:, 4:] = 7  # columns that are not the base model's go, whatever they were
    report = load_base_weights(dit, wan_folder)
    check_holds(dit, wan.state_dict())
    assert report.loaded == sorted(wan.state_dict().keys() - {PATCH})
    assert report.expanded == [PATCH]
    assert report.new == sorted(name for name in dit.state_dict() if name.startswith("story_embedder."))
    assert report.unexpected == report.dropped == report.split == report.permuted == []
    assert str(report) == (
        f"{wan_folder} (Wan 2.1, diffusers' layout): {len(report.loaded)} tensors loaded, 1 expanded "
        f"(the noisy latents' columns; condition and mask are zero), {len(report.new)} new"
    )


def test_shards_and_a_pipeline_folder_are_read(dit, wan, tmp_path):
    wan.save_pretrained(tmp_path / "transformer", max_shard_size="60KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    load_base_weights(dit, tmp_path)
    check_holds(dit, wan.state_dict())


def original_layout(wan: WanTransformer3DModel) -> dict[str, Tensor]:
    """wan's tensors under the authors' names; diffusers' own converter confirms that they are theirs."""
    pairs = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "proj_out": "head.head",
        "attn1.": "self_attn.", "attn2.": "cross_attn.",
        "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "o.",
        ".norm2.": ".norm3.", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    }  # fmt: skip
    tensors = {}
    for name, tensor in wan.state_dict().items():
        for ours, theirs in pairs.items():
            name = name.replace(ours, theirs)
        head = "head.modulation" if name == "scale_shift_table" else name
        tensors[head.replace("scale_shift_table", "modulation")] = tensor.clone()
    converted = convert_wan_transformer_to_diffusers(dict(tensors))
    assert converted.keys() == wan.state_dict().keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in wan.state_dict().items())
    return tensors


def test_the_original_layout_is_read(dit, wan, tmp_path):
    save_file(original_layout(wan), tmp_path / "diffusion_pytorch_model.safetensors")
    their_config = {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": 64,
        "num_heads": 2,
        "num_layers": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(their_config))
    report = load_base_weights(dit, tmp_path)
    check_holds(dit, wan.state_dict())
    assert report.expanded == [PATCH] and report.unexpected == []


def test_a_bundled_file_is_read_and_its_other_parts_are_left_alone(dit, wan, tmp_path):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in original_layout(wan).items()}
    save_file(tensors | {"vae.conv1.weight": torch.zeros(1)}, tmp_path / "wan.safetensors")
    report = load_base_weights(dit, tmp_path / "wan.safetensors")
    check_holds(dit, wan.state_dict())
    assert report.unexpected == ["vae.conv1.weight"]
    assert "1 of other parts left alone" in str(report)


def test_our_own_folder_comes_back_exactly(dit, config, tmp_path):
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter)
    dit.save_pretrained(tmp_path / "transformer")
    other = StoryDiT(config)
    report = load_base_weights(other, tmp_path)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in dit.state_dict().items())
    assert (report.expanded, report.new, report.unexpected) == ([], [], [])


def test_weights_that_are_not_finite_are_refused_by_name(dit, wan, tmp_path):
    spoiled = copy.deepcopy(wan)
    with torch.no_grad():
        spoiled.blocks[0].attn1.to_k.weight[0, 0] = torch.nan
    spoiled.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_k\.weight holds numbers that are not finite"):
        load_base_weights(dit, tmp_path / "nan")


def test_weights_take_the_networks_dtype(config, wan, wan_folder):
    dit = StoryDiT(config).to(torch.bfloat16)
    load_base_weights(dit, wan_folder)
    check_holds(dit, {name: tensor.bfloat16() for name, tensor in wan.state_dict().items()})


@contextmanager
def memory_for(more_bytes: int):
    """The process may take only so much more memory, as Linux counts it: private and writable."""
    (data,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData"))
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(data) + more_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_checkpoint_is_streamed(tmp_path):
    """110 MB go into a bfloat16 network where there is room for half of them."""
    dit = StoryDiT(
        StoryDiTConfig(num_attention_heads=8, attention_head_dim=64, num_layers=6, ffn_dim=2048, text_dim=64)
    )
    dit.save_pretrained(tmp_path, max_shard_size="10MB")
    dit.to(torch.bfloat16)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 100e6
    with memory_for(size // 2):
        load_base_weights(dit, tmp_path)
    with memory_for(size // 2), pytest.raises((OSError, RuntimeError, ValueError), match="memory"):
        dict(read_tensors(tmp_path))  # all of it at once


# Step-Video (the names are tested with the authors' own files in test_golden.py)


GOLDEN = Path(__file__).parents[1] / "golden"
STEP = dict(STEP_VIDEO, num_attention_heads=3, attention_head_dim=16, num_layers=2, ffn_dim=192)
STEP |= dict(text_dim=20, clip_text_dim=12, rope_axes_dim=(8, 4, 4), latent_channels=4)


@pytest.fixture
def step_dit() -> StoryDiT:
    return StoryDiT(StoryDiTConfig(**STEP, patch_size=(1, 2, 2)))


@pytest.fixture
def step_folder(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "step_t2v", tmp_path / "step")
    return tmp_path / "step"


def test_the_report_says_what_became_of_step_videos_tensors(step_dit):
    report = load_base_weights(step_dit, GOLDEN / "step_t2v")
    everything = report.loaded + report.split + report.expanded + report.new
    assert sorted(everything) == sorted(step_dit.state_dict())
    assert report.split == sorted(
        f"blocks.{i}.{name}.weight"
        for i in range(2)
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_k", "attn2.to_v")
    )
    assert report.permuted == sorted(
        f"blocks.{i}.attn1.{name}.weight" for i in range(2) for name in ("to_q", "to_k", "norm_q", "norm_k")
    )
    new_parts = {name.split(".")[1] for name in report.new if not name.startswith("story_embedder.null.")}
    assert new_parts == {"frame_interval", "motion"}
    assert report.dropped == report.unexpected == []
    assert "(Step-Video)" in str(
        report
    ) and "10 split out of fused ones, with 8 of all these permuted" in str(report)


def test_a_motion_embedder_is_loaded_and_the_mask_column_stays_zero():
    dit = StoryDiT(StoryDiTConfig(**STEP, patch_size=(1, 1, 1)))
    report = load_base_weights(dit, GOLDEN / "step_ti2v")
    stored = load_file(GOLDEN / "step_ti2v" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(dit.patch_embedding.weight[:, :8, 0], stored["pos_embed.proj.weight"].float())
    assert not dit.patch_embedding.weight[:, 8].any()
    assert "the noisy and condition latents' columns; mask is zero" in str(report)
    motion = {name for name in report.loaded if name.startswith("story_embedder.")}
    assert motion == {
        f"story_embedder.motion.linear_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")
    }


def test_a_network_of_step_videos_kind_comes_back_from_our_own_folder(step_dit, step_folder, tmp_path):
    load_base_weights(step_dit, step_folder)
    step_dit.save_pretrained(tmp_path / "ours")
    other = StoryDiT(StoryDiTConfig(**STEP))
    report = load_base_weights(other, tmp_path / "ours")
    assert report.layout == "StoryDiT" and report.permuted == report.split == []
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in step_dit.state_dict().items())


def test_step_video_without_clip_is_read(step_folder):
    """Its code also builds networks whose only text is the language model's."""
    rewrite(step_folder, lambda t: [t.pop(f"clip_projection.{leaf}") for leaf in ("weight", "bias")])
    dit = StoryDiT(StoryDiTConfig(**(STEP | dict(clip_text_dim=None))))
    load_base_weights(dit, step_folder)
    with pytest.raises(ValueError, match=r"clip_embedder.bias is missing"):
        load_base_weights(StoryDiT(StoryDiTConfig(**STEP)), step_folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("adaln_single.emb.fps_embedder.linear_2.bias"),
            "story_embedder.fps.linear_2.bias is missing",
        ),
        (
            lambda t: t.update({"transformer_blocks.1.attn1.wqkv.weight": torch.zeros(96, 48)}),
            r"transformer_blocks.1.attn1.wqkv.weight has shape \[96, 48\], expected \[144, 48\]",
        ),
        (
            lambda t: t.update({"transformer_blocks.1.attn3.wq.weight": torch.zeros(48, 48)}),
            "transformer_blocks.1.attn3.wq.weight has no place in StoryDiT",
        ),
        (
            lambda t: t.update({"patch_embedding.bias": torch.zeros(48)}),
            "patch_embedding.bias has no place in StoryDiT",
        ),
        (
            lambda t: t.update({"pos_embed.proj.weight": torch.zeros(48, 12, 2, 2)}),
            r"12 input channels, expected 4 \(text to video\), 8 \(TI2V\) or 9 \(a StoryDiT\)",
        ),
    ],
)
def test_a_step_video_checkpoint_with_a_fault_is_refused(step_dit, step_folder, change, message):
    rewrite(step_folder, change)
    before = {name: tensor.clone() for name, tensor in step_dit.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_base_weights(step_dit, step_folder)
    assert all(torch.equal(tensor, step_dit.state_dict()[name]) for name, tensor in before.items())


def test_step_videos_conventions_are_not_taken_for_wans(step_dit, wan_folder):
    """Direction of time, RoPE and eps are in no tensor: the network must be of the checkpoint's family."""
    dit = StoryDiT(StoryDiTConfig(**(STEP | dict(reversed_flow=False, norm_eps=1e-6, rope_axes_dim=None))))
    with pytest.raises(ValueError) as error:
        load_base_weights(dit, GOLDEN / "step_t2v")
    for difference in (
        "reversed_flow is True, expected False",
        "norm_eps is 1e-05, expected 1e-06",
        "rope_axes_dim is (8, 4, 4), expected None",
    ):
        assert difference in str(error.value)
    with pytest.raises(ValueError, match=r"qk_norm is rms_norm_across_heads, expected rms_norm"):
        load_base_weights(step_dit, wan_folder)


# What is refused, with the reason; the network stays as it was


def cut_file(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def only_a_pickle(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def other_heads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_attention_heads": 4, "attention_head_dim": 16})
    )


def other_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"blocks.1.attn1.to_q.bias": torch.zeros(63)}))


def fun_control(folder: Path) -> None:
    """Wan2.1-Fun-Control has 48 input channels, three times its latents'."""
    rewrite(folder, lambda t: t.update({PATCH: torch.zeros(64, 12 + 1, 1, 2, 2)}))


def image_branch(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"blocks.0.attn2.add_k_proj.bias": torch.zeros(64)}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda f: rewrite(f, lambda t: t.pop("blocks.2.ffn.net.2.bias")),
            "blocks.2.ffn.net.2.bias is missing",
        ),
        (lambda f: rewrite(f, lambda t: t.update(extra=torch.zeros(1))), "extra has no place in StoryDiT"),
        (other_shape, r"blocks.1.attn1.to_q.bias has shape \[63\], expected \[64\]"),
        (
            fun_control,
            r"13 input channels, expected 4 \(text to video\), 12 \(I2V\) or 9 \(a StoryDiT\)",
        ),
        (image_branch, "blocks.0.attn2.add_k_proj.bias has no place in StoryDiT"),
        (
            lambda f: rewrite(f, lambda t: t.pop(PATCH)),
            f"holds no {PATCH}, expected the transformer of Wan 2.1",
        ),
        (other_heads, "num_attention_heads is 4, expected 2; attention_head_dim is 16, expected 32"),
        (cut_file, "is not a complete safetensors file"),
        (only_a_pickle, r"pickles are not read\); it holds \['config.json', 'diffusion_pytorch_model.bin'\]"),
        (lambda f: (f / "config.json").unlink(), "found no config.json in"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(dit, wan_folder, spoil, message):
    spoil(wan_folder)
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_base_weights(dit, wan_folder)
    assert str(wan_folder) in str(error.value)
    assert all(torch.equal(tensor, dit.state_dict()[name]) for name, tensor in before.items())


def test_another_size_names_the_fields_and_the_preset_that_fits(dit, tmp_path):
    StoryDiT(StoryDiTConfig.preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_layers is 6, expected 3.*\(it fits the preset tiny\)"):
        load_base_weights(dit, tmp_path)


def test_one_shard_too_few_is_named(dit, wan, tmp_path):
    wan.save_pretrained(tmp_path, max_shard_size="60KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(ValueError, match=f"lacks {second.name}, which .*index.json names"):
        load_base_weights(dit, tmp_path)


def test_an_incomplete_folder_of_ours_is_not_taken_for_a_base_model(dit, tmp_path):
    dit.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("story_embedder.fps.linear_1.weight"))
    with pytest.raises(ValueError, match=r"story_embedder.fps.linear_1.weight is missing"):
        load_base_weights(dit, tmp_path)


def test_a_network_without_memory_is_refused(config, wan_folder):
    with torch.device("meta"):
        dit = StoryDiT(config)
    with pytest.raises(ValueError, match="meta device"):
        load_base_weights(dit, wan_folder)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_a_pickle_is_read_only_on_request(dit, wan, tmp_path, suffix):
    file = tmp_path / f"wan{suffix}"
    torch.save(original_layout(wan), file)
    with pytest.raises(ValueError, match=f"wan{suffix} is a pickle, which is read only with allow_pickle"):
        load_base_weights(dit, file)
    load_base_weights(dit, file, allow_pickle=True)
    check_holds(dit, wan.state_dict())


class Payload:
    """A pickle that runs code when it is opened the ordinary way."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_cannot_run_code(dit, tmp_path):
    torch.save({PATCH: Payload(tmp_path / "touched")}, tmp_path / "wan.pth")
    with pytest.raises(ValueError, match=r"wan.pth is not a file of tensors that torch.save wrote"):
        load_base_weights(dit, tmp_path / "wan.pth", allow_pickle=True)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.zeros(1)], "holds list, expected names and tensors"),
        ({"step": 3}, "holds int under step, expected a tensor"),
        ({"model": {PATCH: torch.zeros(1)}}, "holds dict under model, expected a tensor"),
    ],
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(dit, tmp_path, content, message):
    torch.save(content, tmp_path / "wan.pth")
    with pytest.raises(ValueError, match=message):
        load_base_weights(dit, tmp_path / "wan.pth", allow_pickle=True)


def test_a_file_of_another_kind_is_refused(dit, tmp_path):
    (tmp_path / "wan.gguf").touch()
    with pytest.raises(ValueError, match=r"wan.gguf is not a .safetensors file, nor .pth or .pt"):
        load_base_weights(dit, tmp_path / "wan.gguf")


def test_another_part_of_the_pipeline_is_not_taken_for_the_transformer(dit, vae: AutoencoderKLWan, tmp_path):
    vae.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected the transformer of Wan 2\.1, of Step-Video or a StoryDiT"
    ):
        load_base_weights(dit, tmp_path)


@pytest.mark.parametrize("reference", ["/no/such/folder", "./folder", "folder", "a/../b"])
def test_a_folder_that_is_not_there_is_not_asked_for_on_the_hub(reference):
    with pytest.raises(ValueError, match="found no folder"):
        part_folder(reference, "vae")


@pytest.mark.parametrize("reference", ["maker/wan", "maker/wan/transformer"])
def test_a_hub_id_is_looked_up_in_the_cache_without_a_network(dit, wan, tmp_path, monkeypatch, reference):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    revision = "0" * 40
    wan.save_pretrained(tmp_path / "models--maker--wan" / "snapshots" / revision / "transformer")
    (tmp_path / "models--maker--wan" / "refs").mkdir()
    (tmp_path / "models--maker--wan" / "refs" / "main").write_text(revision)
    load_base_weights(dit, reference)
    check_holds(dit, wan.state_dict())


def test_a_hub_id_that_is_not_to_be_had_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="nobody/nothing is neither a folder nor a repository"):
        part_folder("nobody/nothing", "vae")
