import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from conf.command import read_config
from infer.film.gap import Gap
from infer.film.wan import check_wan, clip_length, draw_gap, load_wan, nearest_frames
from infer.interpolate_story import InterpolateStoryConfig, main
from storyanchors.story import Event, Story

STORY = Story([Event(1, 1, "a fox sleeps"), Event(2, 2, "it rains")], ["a fox"], "ink")


def pipeline_of(kind):
    """A whole pipeline of random parts, as small as they get: flf and i2v as Wan 2.1, no_clip as Wan 2.2."""
    torch.manual_seed(0)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\u2581", -2.0)]
    vocabulary += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,. "]
    text_config = UMT5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    vision_config = CLIPVisionConfig(
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    clip = dict(
        image_encoder=CLIPVisionModel(vision_config),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
    )
    image_input = {
        "flf": dict(image_dim=4, pos_embed_seq_len=2 * (4 * 4 + 1)),
        "i2v": dict(image_dim=4),
        "no_clip": {},
    }[kind]
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        text_dim=32,
        ffn_dim=32,
        num_layers=2,
        **image_input,
    )
    return WanImageToVideoPipeline(
        tokenizer=T5Tokenizer(vocab=vocabulary, extra_ids=0),
        text_encoder=UMT5EncoderModel(text_config),
        vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
        **(clip if image_input else {}),
    )


@pytest.fixture(scope="module", params=["flf", "i2v", "no_clip"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    pipeline_of(request.param).save_pretrained(folder)
    return request.param, str(folder)


def gap_of(size):
    rng = np.random.default_rng(0)
    first, last = (
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(2)
    )
    return Gap(first, last, STORY)


def test_a_saved_pipeline_fills_a_gap_and_the_same_seed_gives_the_same_frames(saved):
    kind, folder = saved
    with_last, gap = kind != "i2v", gap_of((40, 24))
    check_wan(folder, with_last=with_last)
    pipeline = load_wan(folder, device="cpu", dtype=torch.float32)
    draw = lambda **changed: draw_gap(  # noqa: E731
        pipeline, changed.pop("gap", gap), 3, with_last=with_last, **{"num_steps": 2, "seed": 5, **changed}
    )
    first, again = draw(), draw()
    assert [(frame.size, frame.mode) for frame in first] == [((40, 24), "RGB")] * 3
    assert [frame.tobytes() for frame in first] == [frame.tobytes() for frame in again]
    other_end = Gap(gap.first, gap_of((40, 24)).first.transpose(Image.Transpose.FLIP_LEFT_RIGHT), STORY)
    other_text = Gap(gap.first, gap.last, Story([Event(1, 2, "snow")]))
    for name, changed in {
        "seed": {"seed": 6},
        "text": {"gap": other_text},
        "end": {"gap": other_end},
    }.items():
        same = [frame.tobytes() for frame in draw(**changed)] == [frame.tobytes() for frame in first]
        assert same == (name == "end" and not with_last), name


def test_shift_goes_to_the_scheduler(saved):
    _, folder = saved
    pipeline = load_wan(folder, device="cpu", dtype=torch.bfloat16, shift=7.0)
    assert pipeline.scheduler.config.flow_shift == 7.0
    assert (pipeline.transformer.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)


def test_a_model_for_other_anchors_is_refused_before_its_weights_are_read(saved, tmp_path):
    kind, folder = saved
    expected = {
        "flf": (False, "take interpolator=wan_flf"),
        "i2v": (True, "take interpolator=wan_i2v"),
        "no_clip": (None, ""),
    }
    with_last, message = expected[kind]
    for wanted in (False, True):
        if wanted == with_last:
            with pytest.raises(ValueError, match=message):
                check_wan(folder, with_last=wanted)
        else:
            check_wan(folder, with_last=wanted)


@pytest.mark.parametrize("part", ["image_encoder", "image_processor", "vae", "text_encoder", "transformer"])
def test_a_folder_that_lacks_a_part_is_named_with_it(saved, tmp_path, part):
    kind, folder = saved
    shutil.copytree(folder, tmp_path / "model")
    if kind == "no_clip" and part.startswith("image"):
        return check_wan(str(tmp_path / "model"), with_last=True)
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(ValueError, match=f"model lacks {part}"):
        check_wan(str(tmp_path / "model"), with_last=kind != "i2v")


def test_what_is_no_image_to_video_model_is_refused(saved, tmp_path):
    _, folder = saved
    with pytest.raises(OSError, match="no folder and no hub id"):
        check_wan(str(tmp_path / "nothing" / "here"), with_last=True)
    with pytest.raises(OSError, match=r"model_index\.json"):
        check_wan(str(tmp_path), with_last=True)
    shutil.copytree(folder, tmp_path / "model")
    config = tmp_path / "model" / "transformer" / "config.json"
    text_only = json.loads(config.read_text()) | {
        "in_channels": 16,
        "image_dim": None,
        "pos_embed_seq_len": None,
    }
    config.write_text(json.dumps(text_only))
    with pytest.raises(ValueError, match="is a text-to-video model"):
        check_wan(str(tmp_path / "model"), with_last=True)


@pytest.mark.parametrize("with_last", [True, False])
def test_clips_are_of_wans_lengths_and_give_every_film_frame_its_nearest(with_last):
    for frame_interval in range(1, 300):
        length, chosen = (
            clip_length(frame_interval, with_last=with_last),
            nearest_frames(frame_interval, with_last=with_last),
        )
        assert length % 4 == 1 and 5 <= length <= 81 and len(chosen) == frame_interval
        assert chosen == sorted(chosen) and chosen[0] > 0 and chosen[-1] < length
        if frame_interval <= 79:
            assert len(set(chosen)) == frame_interval  # none is shown twice
        if with_last:
            assert chosen[-1] < length - 1  # the last anchor has a place of its own
            mirrored = [length - 1 - index for index in reversed(chosen)]
            assert max(abs(a - b) for a, b in zip(chosen, mirrored, strict=True)) <= 1
    assert (clip_length(69, with_last=True), clip_length(139, with_last=True)) == (73, 81)


def test_the_command_makes_a_film_with_it(saved, tmp_path):
    kind, folder = saved
    (tmp_path / "frames").mkdir()
    gap = gap_of((32, 16))
    for number, anchor in enumerate((gap.first, gap.last), start=1):
        anchor.save(tmp_path / "frames" / f"{number}.png")
    STORY.to_file(tmp_path / "story.yaml")
    arguments = [f"frames={tmp_path}/frames", f"story={tmp_path}/story.yaml", f"out={tmp_path}/film.mp4"]
    interpolator = "wan_i2v" if kind == "i2v" else "wan_flf"
    settings = [f"interpolator={interpolator}", f"weights={folder}", "frame_interval=2", "num_steps=1"]
    main(read_config(InterpolateStoryConfig, "interpolate_story", [*arguments, *settings, "device=cpu"]))
    frames = [Image.open(path) for path in sorted((tmp_path / "film.parts" / "frames").glob("*.png"))]
    assert [frame.size for frame in frames] == [(32, 16)] * 4
    assert (frames[0].tobytes(), frames[3].tobytes()) == (gap.first.tobytes(), gap.last.tobytes())
