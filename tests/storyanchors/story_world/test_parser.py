import io
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from storyanchors.codec import PcaCodec
from storyanchors.story_world import (
    FrameFacts,
    ParsedSubject,
    Subject,
    WorldStory,
    parse_frame,
    render_frame,
    sample_story,
)
from storyanchors.story_world.world import ACTIONS, COLOURS, PANS, SCENES, SHAPES, ZOOMS

STORIES = [sample_story(seed) for seed in range(30)]
FRAMES = [
    (story, event.facts, render_frame(story, event.facts)) for story in STORIES for event in story.events
]


def test_every_pose_is_read_exactly():
    scenes, colours = list(SCENES), list(COLOURS)
    poses = product(ZOOMS, PANS, SHAPES, ACTIONS)
    for number, (zoom, pan, shape, action) in enumerate(poses):
        story = WorldStory((Subject(colours[number % 6], shape),), ())
        facts = FrameFacts(scenes[number % 8], zoom, pan, ((0, action),))
        assert_reads(render_frame(story, facts), story, facts, max_rmse=0)


def test_story_frames_are_read_exactly():
    for story, facts, frame in FRAMES:
        assert_reads(frame, story, facts, max_rmse=0)


def test_jpeg_does_not_hide_a_fact():
    for story, facts, frame in FRAMES:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=95, subsampling=0)
        assert_reads(Image.open(file), story, facts, max_rmse=4)


def test_the_tiny_codec_does_not_hide_a_fact():
    frames = np.stack([frame for _, _, frame in FRAMES])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    codec = PcaCodec.fit(pixels, latent_channels=16)
    decoded = (
        ((codec.decode(codec.encode(pixels)) + 1) * 127.5).clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    )
    assert 5 < np.square(decoded - frames).mean() < 60  # lossy: 30 to 41 dB
    for (story, facts, _), frame in zip(FRAMES, decoded, strict=True):
        assert_reads(frame, story, facts, max_rmse=20)


def test_noise_of_32_steps_does_not_hide_a_fact():
    rng = np.random.default_rng(0)
    for story, facts, frame in FRAMES:
        assert_reads(frame + rng.normal(0, 32, frame.shape), story, facts, max_rmse=35)


@pytest.mark.parametrize(
    "image", [np.full((64, 64, 3), 128), np.random.default_rng(0).integers(0, 256, (64, 64, 3))]
)
def test_no_subject_is_read_where_there_is_none(image):
    parsed = parse_frame(image)
    assert parsed.subjects == () and parsed.pan is None
    assert parsed.legal_rmse > 20


def test_legal_rmse_is_the_distance_to_the_frame_without_the_change():
    frame = FRAMES[0][2]
    changed = frame.astype(float)
    changed[:4, :4] += 60
    assert parse_frame(changed).legal_rmse == pytest.approx(np.sqrt(np.square(changed - frame).mean()))


@pytest.mark.parametrize("shape", [(64, 64), (32, 64, 3), (64, 64, 4)])
def test_an_image_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"found a frame of shape .* expected \(64, 64, 3\)"):
        parse_frame(np.zeros(shape))


def assert_reads(image, story: WorldStory, facts: FrameFacts, *, max_rmse: float) -> None:
    parsed = parse_frame(image)
    assert (parsed.scene, parsed.zoom, parsed.pan) == (facts.scene, facts.zoom, facts.pan)
    expected = [(story.cast[member], action) for member, action in facts.actions]
    assert parsed.subjects == tuple(ParsedSubject(one.colour, one.shape, action) for one, action in expected)
    assert parsed.legal_rmse <= max_rmse
