import copy
import dataclasses
import json
import logging
import re
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from storyanchors.caption_cache import PrecomputedCaptions
from storyanchors.caption_encoder import WordEncoder
from storyanchors.codec import PcaCodec, WanCodec
from storyanchors.conditioning import ClipConditions
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.flow import sampling_sigmas
from storyanchors.generator import (
    PREVIEW_SIDE,
    SamplingStopped,
    StoryGenerator,
    StoryRequest,
)
from storyanchors.lora import LORA_FILE, LoraSettings, add_lora, has_lora, save_lora
from storyanchors.model_folder import MODEL_FILE, read_story_model, save_story_model
from storyanchors.story import Event, Story
from storyanchors.story_edit import (
    delete_frames,
    edit_frames,
    extend_left,
    extend_right,
    insert_event,
    keep_frames,
    redraw_frames,
)
from storyanchors.story_request import NEGATIVE_STORY_PROMPT

SIZE = (16, 24)
INFO = {"frame_size": list(SIZE), "num_steps": 3, "guidance_scale": 2.0, "shift": 1.5}


def picture(seed, size=SIZE):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def story_of(num_frames, text="a fox runs"):
    return Story(
        [Event(1, 1, text), *(Event(n, n, f"{text} {n}") for n in range(2, num_frames + 1))], ["a fox"]
    )


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    config = StoryDiTConfig(2, 12, 2, 32, WordEncoder.text_dim, latent_channels=4, freq_dim=32)
    dit = StoryDiT(config).eval()
    with torch.no_grad():  # a trained model's mask, conditions and frame numbers matter
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dit, PcaCodec.fit(torch.rand(8, 3, *SIZE) * 2 - 1, latent_channels=4), WordEncoder()


@pytest.fixture(scope="module")
def generator(parts):
    return StoryGenerator(*parts, frame_size=SIZE, num_steps=3, guidance_scale=2.0, shift=1.5)


@contextmanager
def recorded_forwards(dit):
    """The arguments of every forward of the network."""
    calls = []
    hook = dit.register_forward_pre_hook(lambda _, args: calls.append(args))
    yield calls
    hook.remove()


def pixels(frames):
    return np.stack([np.asarray(frame) for frame in frames]).astype(int)


def test_a_story_becomes_its_number_of_frames_in_the_size_of_the_model(generator):
    frames = generator.generate(story_of(4), progress=False)
    assert [(frame.size, frame.mode) for frame in frames] == [((24, 16), "RGB")] * 4
    larger = generator.generate(story_of(2), num_frames=5, height=32, width=8, progress=False)
    assert [frame.size for frame in larger] == [(8, 32)] * 5


@pytest.mark.parametrize("numbers", [{1}, {4}, {1, 4}, {2, 3}, {1, 2, 4}])
@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_given_frames_come_back_untouched(generator, numbers, sampler):
    given = {number: picture(number) for number in numbers}
    frames = generator.generate(story_of(4), given=given, sampler=sampler, progress=False)
    for number in numbers:
        assert frames[number - 1].tobytes() == given[number].tobytes()


def test_same_seed_same_frames_and_another_seed_others(generator):
    first, again, other = (generator.generate(story_of(3), seed=seed, progress=False) for seed in (7, 7, 8))
    np.testing.assert_array_equal(pixels(first), pixels(again))
    assert np.abs(pixels(first) - pixels(other)).mean() > 1


def test_the_global_random_state_neither_matters_nor_changes(generator):
    torch.manual_seed(1)
    first = generator.generate(story_of(2), progress=False)
    after = torch.rand(1)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(1), after)
    np.testing.assert_array_equal(pixels(first), pixels(generator.generate(story_of(2), progress=False)))


def test_a_batch_of_different_stories_equals_one_by_one(generator):
    stories = [story_of(2), story_of(5, "a red bird"), story_of(3, "snow")]
    given = [{}, {1: picture(1), 4: picture(2)}, {3: picture(3)}]
    requests = [
        StoryRequest(*wanted, seed=40 + index)
        for index, wanted in enumerate(zip(stories, given, strict=True))
    ]
    batch = generator.generate_many(requests, progress=False)
    assert generator.generate_many([], progress=False) == []
    for index, (story, frames) in enumerate(zip(stories, batch, strict=True)):
        alone = generator.generate(story, given=given[index], seed=40 + index, progress=False)
        assert np.abs(pixels(frames) - pixels(alone)).max() <= 1


def test_what_is_given_the_text_and_the_conditions_matter(generator):
    plain = pixels(generator.generate(story_of(3), progress=False))
    for changed in (
        generator.generate(story_of(3), given={1: picture(1)}, progress=False),
        generator.generate(story_of(3), given={2: picture(1)}, progress=False),
        generator.generate(story_of(3, "rain"), progress=False),
        generator.generate(story_of(3), caption="rain", progress=False),
        generator.generate(story_of(3), conditions=ClipConditions(fps=24.0), progress=False),
        generator.generate(story_of(3), guidance_scale=3.0, progress=False),
    ):
        assert np.abs(pixels(changed)[2] - plain[2]).max() > 0


def test_frames_that_are_not_given_have_zero_condition_channels(generator):
    with recorded_forwards(generator.dit) as forwards:
        generator.generate(story_of(3), given={2: picture(1)}, progress=False)
    assert [len(inputs) for inputs, *_ in forwards] == [2, 2, 2]  # with and without caption in one forward
    clips = [clip for inputs, *_ in forwards for clip in inputs]
    for clip in clips:
        _, cond, mask = clip.split([4, 4, 1], dim=1)
        assert mask[:, 0].flatten(1).eq(torch.tensor([[0.0], [1.0], [0.0]])).all()
        assert not cond[[0, 2]].any() and cond[1].any()
        assert cond.equal(clips[0][:, 4:8])


def test_guidance_of_one_is_the_conditional_model_alone(generator):
    with recorded_forwards(generator.dit) as forwards:
        alone = generator.generate(story_of(2), guidance_scale=1.0, progress=False)
        nearly = generator.generate(story_of(2), guidance_scale=1.0 + 1e-9, progress=False)
    assert [len(inputs) for inputs, *_ in forwards] == [1, 1, 1, 2, 2, 2]
    assert np.abs(pixels(alone) - pixels(nearly)).max() <= 1


def test_guidance_over_the_whole_interval_is_plain_guidance(generator):
    plain = generator.generate(story_of(3), progress=False)
    whole = generator.generate(story_of(3), guidance_interval=(0.0, 1.0), progress=False)
    np.testing.assert_array_equal(pixels(whole), pixels(plain))


def test_guidance_outside_its_interval_costs_no_second_forward(generator):
    middle = sampling_sigmas(3, generator.shift)[1]  # of three steps the second
    with recorded_forwards(generator.dit) as forwards:
        within = generator.generate(story_of(2), guidance_interval=(middle, middle), progress=False)
        none = generator.generate(story_of(2), guidance_interval=(0.0, 0.01), progress=False)
    assert [len(inputs) for inputs, *_ in forwards] == [1, 2, 1, 1, 1, 1]
    np.testing.assert_array_equal(
        pixels(none), pixels(generator.generate(story_of(2), guidance_scale=1.0, progress=False))
    )
    assert np.abs(pixels(within) - pixels(none)).max() > 0


def test_guidance_leads_away_from_the_negative_prompt(generator):
    with recorded_forwards(generator.dit) as forwards:
        plain = generator.generate(story_of(2), progress=False)
        led = generator.generate(story_of(2), negative_prompt="rain", progress=False)
        itself = generator.generate(story_of(2), negative_prompt=story_of(2).prompt(), progress=False)
    read = [captions[1] for *_, captions in forwards]
    assert torch.equal(read[0], WordEncoder().encode([""])[0])
    assert torch.equal(read[3], WordEncoder().encode(["rain"])[0])
    assert np.abs(pixels(led) - pixels(plain)).max() > 0
    # away from itself is nowhere: the conditional model alone
    alone = generator.generate(story_of(2), guidance_scale=1.0, progress=False)
    assert np.abs(pixels(itself) - pixels(alone)).max() <= 1


def test_the_negative_story_prompt_does_not_speak_against_stories():
    words = NEGATIVE_STORY_PROMPT.lower()
    for wanted in ("static", "still", "motion", "shot", "cut", "scene", "camera", "background"):
        assert wanted not in words


def test_the_block_cache_lives_for_one_call_and_skips_blocks(generator):
    calls = []
    hook = generator.dit.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    plain = generator.generate(story_of(3), num_steps=6, progress=False)
    num_plain = len(calls)
    never = generator.generate(story_of(3), num_steps=6, cache_threshold=1e-9, progress=False)
    calls.clear()
    generator.generate(story_of(3), num_steps=6, cache_threshold=1e9, progress=False)
    skipped = num_plain - len(calls)
    again = generator.generate(story_of(3), num_steps=6, progress=False)
    hook.remove()
    assert (num_plain, skipped) == (6, 5)
    np.testing.assert_array_equal(pixels(never), pixels(plain))
    np.testing.assert_array_equal(pixels(again), pixels(plain))


def test_known_conditions_are_kept_and_sizes_filled_in(generator):
    with recorded_forwards(generator.dit) as forwards:
        generator.generate(story_of(3), conditions=ClipConditions(frame_interval=69), progress=False)
    seen = {condition for _, _, conditions, _ in forwards for condition in conditions}
    assert seen == {ClipConditions(frame_interval=69, height=16, width=24, num_frames=3)}


def test_a_caption_that_is_too_long_is_cut_with_a_warning(parts, caplog):
    encoder = WordEncoder()
    encoder.max_tokens = encoder.count_tokens(Story(story_of(3).events[:2]).prompt())
    generator = StoryGenerator(
        *parts[:2], encoder, frame_size=SIZE, num_steps=1, guidance_scale=2.0, shift=1.5
    )
    with caplog.at_level(logging.WARNING):
        generator.generate_many([StoryRequest(story_of(3)), StoryRequest(story_of(1))], progress=False)
    [record] = caplog.records
    assert record.message.startswith("story 1: the caption is too long for its text encoder and loses")
    assert "the subject 'a fox', the event '[3] a fox runs 3'" in record.message
    with recorded_forwards(generator.dit) as forwards:
        generator.generate(story_of(3), progress=False)
        caption = Story(story_of(3).events[:2]).prompt()
        generator.generate(story_of(3), caption=caption, progress=False)
    (*_, first), (*_, second) = forwards
    assert all(map(torch.equal, first, second))


def test_without_guidance_no_empty_caption_is_asked_for(parts, tmp_path):
    made = PrecomputedCaptions.create(tmp_path, encoder="words", text_dim=WordEncoder.text_dim)
    made.write(story_of(2).prompt(), WordEncoder().encode([story_of(2).prompt()])[0])
    settings = dict(frame_size=SIZE, num_steps=2, shift=1.5)
    expected = StoryGenerator(*parts, **settings).generate(story_of(2), guidance_scale=1.0, progress=False)
    generator = StoryGenerator(*parts[:2], made, **settings)
    frames = generator.generate(story_of(2), guidance_scale=1.0, progress=False)
    np.testing.assert_array_equal(pixels(frames), pixels(expected))
    with pytest.raises(ValueError, match="holds no embedding of the empty caption"):
        generator.generate(story_of(2), guidance_scale=2.0, progress=False)
    with pytest.raises(ValueError, match="holds no embedding of the caption 'Consistency Event"):
        generator.generate(story_of(3), guidance_scale=1.0, progress=False)


def test_a_step_video_network_reads_pairs(parts, tmp_path):
    text = dict(text_dim=10, clip_text_dim=6, text_norm=True)
    step = dict(norm_affine=True, norm_eps=1e-5, cross_attn_norm=False, qk_norm="rms_norm", linear_bias=False)
    config = StoryDiTConfig(
        2, 12, 2, 32, **text, **step, rope_axes_dim=(4, 4, 4), reversed_flow=True, latent_channels=4
    )
    torch.manual_seed(0)
    dit = StoryDiT(config).eval()
    made = PrecomputedCaptions.create(
        tmp_path / "made", encoder="random numbers", text_dim=10, clip_text_dim=6
    )
    for number, caption in enumerate(["", story_of(2).prompt(), story_of(3).prompt()]):
        made.write(caption, (torch.randn(7, 6), torch.randn(3 + number, 10)))
    info = INFO | {"caption_encoder": {"reference": str(tmp_path / "made")}}
    save_story_model(tmp_path / "model", dit, parts[1], made, info=info)
    generator = StoryGenerator.from_pretrained(tmp_path / "model")
    with recorded_forwards(generator.dit) as forwards:
        frames = generator.generate_many([StoryRequest(story_of(n)) for n in (2, 3)], progress=False)
    assert [len(one) for one in frames] == [2, 3]
    sizes = [tuple(part.shape for part in pair) for pair in forwards[0][3]]
    assert sizes == [((7, 6), (4, 10)), ((7, 6), (5, 10)), ((7, 6), (3, 10)), ((7, 6), (3, 10))]
    save_story_model(tmp_path / "model", dit, parts[1], WordEncoder(), info=INFO)
    with pytest.raises(ValueError, match="text_dim 192 for a network of 10"):
        StoryGenerator.from_pretrained(tmp_path / "model")


def test_callback_sees_the_guess_of_the_latents_after_every_step(generator):
    calls = []
    generator.generate(
        story_of(3), progress=False, callback=lambda step, latents: calls.append((step, latents))
    )
    assert [step for step, _ in calls] == [1, 2, 3]
    assert all(len(latents) == 1 and latents[0].shape == (3, 4, 4, 6) for _, latents in calls)


def test_requests_of_different_sizes_share_a_forward(generator):
    requests = [StoryRequest(story_of(2)), StoryRequest(story_of(2), height=32, width=8, seed=3)]
    with recorded_forwards(generator.dit) as forwards:
        small, tall = generator.generate_many(requests, progress=False)
    assert len(forwards) == 3
    assert [small[0].size, tall[0].size] == [(24, 16), (8, 32)]
    alone = generator.generate(story_of(2), height=32, width=8, seed=3, progress=False)
    assert np.abs(pixels(tall) - pixels(alone)).max() <= 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_false_from_the_callback_ends_the_sampling_there(generator, number):
    steps = []

    def callback(step, latents):
        steps.append(step)
        return step < number

    with pytest.raises(SamplingStopped) as stopped:
        generator.generate(story_of(2), progress=False, callback=callback)
    assert steps == list(range(1, number + 1))
    assert stopped.value.frames == {}


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal; what a shell starts in the background ignores it."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


def test_ctrl_c_ends_the_sampling_alike(generator, interruptible):
    def press(step, latents):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SamplingStopped):
        generator.generate(story_of(2), progress=False, callback=press)


def test_a_preview_is_what_the_last_guess_decodes_to(generator):
    guesses = []
    frames = generator.generate(story_of(3), progress=False, callback=lambda _, x: guesses.append(x[0]))
    np.testing.assert_array_equal(pixels(generator.preview(guesses[-1])), pixels(frames))


def test_a_preview_is_small(generator):
    wide = generator.preview(torch.randn(2, 4, 50, 200))  # of 200 x 800 pixels
    assert [frame.size for frame in wide] == [(PREVIEW_SIDE, PREVIEW_SIDE // 4)] * 2


STORY = story_of(4)
FRAMES = {number: picture(number) for number in range(1, 5)}  # before the edit


@pytest.mark.parametrize(
    "edit",
    [
        keep_frames(STORY, [1, 2]),
        redraw_frames(STORY, [2]),
        edit_frames(STORY, {3: "it rains"}),
        insert_event(STORY, 2, "it rains", 2),
        extend_left(STORY, [("it rains", 1)]),
        extend_right(STORY, [("it rains", 5)]),
        delete_frames(STORY, [2]).then(extend_right(story_of(3), [("it rains", 1)])),
    ],
    ids=lambda edit: edit.what,
)
@pytest.mark.parametrize("window", [None, 3])
def test_redraw_draws_what_the_edit_does_not_keep(generator, edit, window):
    frames = generator.redraw(edit, FRAMES, window=window, progress=False)
    assert len(frames) == edit.story.num_frames
    for number, frame in enumerate(frames, start=1):
        if number in edit.kept:
            assert frame is FRAMES[edit.kept[number]]
        else:
            assert frame not in FRAMES.values() and frame.size == (24, 16)
    again = generator.redraw(edit, list(FRAMES.values()), window=window, progress=False)
    np.testing.assert_array_equal(pixels(again), pixels(frames))
    other = generator.redraw(edit, FRAMES, window=window, seed=1, progress=False)
    assert all(np.abs(pixels(other) - pixels(frames))[number - 1].max() > 0 for number in edit.drawn())


def test_a_redraw_of_one_window_is_a_call_of_generate(generator):
    edit = insert_event(STORY, 2, "it rains")
    given = {number: FRAMES[before] for number, before in edit.kept.items()}
    expected = generator.generate(edit.story, given=given, seed=5, progress=False)
    np.testing.assert_array_equal(
        pixels(generator.redraw(edit, FRAMES, seed=5, progress=False)), pixels(expected)
    )


def test_a_window_sees_its_part_of_the_story_and_all_that_is_known_of_it(generator):
    edit = extend_right(STORY, [("it rains", 4)])
    first, second = generator.windows(edit, window=4, overlap=2)
    assert (first.given, first.drawn, second.given, second.drawn) == ((3, 4), (5, 6), (5, 6), (7, 8))
    frames = generator.redraw(edit, FRAMES, window=4, overlap=2, seed=7, progress=False)
    rain = Event(3, 4, "it rains")
    told = Story([Event(1, 1, "a fox runs 3"), Event(2, 2, "a fox runs 4"), rain], ["a fox"])
    expected = generator.generate(told, given={1: FRAMES[3], 2: FRAMES[4]}, seed=7, progress=False)
    np.testing.assert_array_equal(pixels(frames[4:6]), pixels(expected[2:]))
    told = Story([Event(1, 4, "it rains")], ["a fox"])
    expected = generator.generate(told, given={1: frames[4], 2: frames[5]}, seed=8, progress=False)
    np.testing.assert_array_equal(pixels(frames[6:]), pixels(expected[2:]))


def test_the_model_says_how_long_a_window_is(parts):
    settings = dict(frame_size=SIZE, num_steps=2, guidance_scale=1.0, shift=1.5)
    generator = StoryGenerator(*parts, **settings, max_frames=4)
    with recorded_forwards(generator.dit) as forwards:
        frames = generator.redraw(keep_frames(story_of(9), []), {}, progress=False)
    assert len(frames) == 9
    assert {len(clip) for inputs, *_ in forwards for clip in inputs} == {4}


def test_a_window_that_shows_no_neighbours_is_refused(generator):
    for window in (0, 2):
        with pytest.raises(ValueError, match=f"a window of {window} cannot show both sides"):
            generator.redraw(redraw_frames(STORY, [2]), FRAMES, window=window, progress=False)


def test_redraw_by_windows_tells_of_each_and_goes_on_where_it_was_stopped(generator):
    edit = extend_right(STORY, [("it rains", 6)])
    finished, steps = [], []
    arguments = dict(window=4, overlap=2, progress=False)
    whole = generator.redraw(
        edit,
        FRAMES,
        **arguments,
        finished=finished.append,
        callback=lambda step, latents: steps.append((step, len(latents[0]))),
    )
    assert [sorted(known) for known in finished] == [list(range(1, n + 1)) for n in (6, 8, 10)]
    assert steps == [(step, 4) for step in range(1, 10)]
    with pytest.raises(SamplingStopped) as stopped:
        generator.redraw(edit, FRAMES, **arguments, callback=lambda step, _: step != 4)
    known = stopped.value.frames
    assert sorted(known) == [1, 2, 3, 4, 5, 6]
    rest = keep_frames(edit.story, sorted(known))
    resumed = generator.redraw(rest, known, **arguments, seed=1)
    np.testing.assert_array_equal(pixels(resumed), pixels(whole))


def test_a_mere_deletion_runs_no_network(generator):
    with recorded_forwards(generator.dit) as forwards:
        frames = generator.redraw(delete_frames(STORY, [2, 3]), FRAMES)
    assert frames == [FRAMES[1], FRAMES[4]] and not forwards


def test_frames_of_another_size_than_the_models_stay_in_theirs(generator):
    frames = {number: picture(number, (32, 8)) for number in (1, 2)}
    drawn = generator.redraw(keep_frames(story_of(3), [1, 2]), frames, progress=False)
    assert [frame.size for frame in drawn] == [(8, 32)] * 3
    with pytest.raises(ValueError, match="given frame 2 has 24 x 16 pixels, expected 8 x 32"):
        generator.redraw(keep_frames(story_of(3), [1, 2]), frames | {2: picture(2)}, progress=False)
    with pytest.raises(ValueError, match=r"keeps frames \[2\], found frames \[1\]"):
        generator.redraw(keep_frames(story_of(3), [1, 2]), {1: frames[1]}, progress=False)
    with pytest.raises(ValueError, match=r"frame 2: found '002\.png', expected a PIL image"):
        generator.redraw(keep_frames(story_of(3), [1, 2]), frames | {2: "002.png"}, progress=False)


@pytest.mark.parametrize(
    "arguments, found, expected",
    [
        ({"given": {0: picture(1)}}, "frame 0", "1..3"),
        ({"given": {4: picture(1)}}, "frame 4", "1..3"),
        ({"given": {"1": picture(1)}}, "'1'", "1..3"),
        ({"given": {2: picture(1, (24, 24))}}, "24 x 24", "24 x 16"),
        ({"given": {2: picture(1).convert("RGBA")}}, "RGBA", "RGB"),
        ({"given": {n: picture(n) for n in (1, 2, 3)}}, "all 3 frames", "none to generate"),
        ({"num_frames": 2}, "num_frames=2", "3 frames"),
        ({"height": 20}, "height=20", "multiple of 8"),
        ({"width": 0}, "width=0", "multiple of 8"),
        ({"num_steps": 0}, "num_steps=0", "at least one"),
        ({"guidance_scale": float("nan")}, "nan", "number"),
        ({"guidance_scale": -1.0}, "-1.0", "from 0"),
        ({"shift": 0.0}, "0.0", "above 0"),
        ({"sampler": "ddim"}, "'ddim'", "euler, unipc"),
        ({"seed": -1}, "-1", "below 0"),
        ({"guidance_interval": (0.5, 0.2)}, "[0.5, 0.2]", "[low, high]"),
        ({"guidance_interval": (0.0, 2.0)}, "2.0", "between 0 (data) and 1 (noise)"),
        ({"cache_threshold": -0.1}, "-0.1", "from 0"),
    ],
)
def test_bad_requests_say_what_was_found_and_expected(generator, arguments, found, expected):
    with pytest.raises(ValueError) as error:
        generator.generate(story_of(3), progress=False, **arguments)
    assert found in str(error.value) and expected in str(error.value)


def test_a_saved_model_gives_the_same_frames(parts, generator, tmp_path):
    save_story_model(tmp_path / "model", *parts, info=INFO | {"preset": "test", "stage": "multi_event"})
    loaded = StoryGenerator.from_pretrained(tmp_path / "model")
    frames, again = (g.generate(story_of(3), progress=False) for g in (generator, loaded))
    np.testing.assert_array_equal(pixels(frames), pixels(again))
    assert read_story_model(tmp_path / "model")["stage"] == "multi_event"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_in_bfloat16_gives_about_the_same_frames(parts, generator, tmp_path):
    save_story_model(tmp_path / "model", *parts, info=INFO)
    loaded = StoryGenerator.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    frames, half = (g.generate(story_of(3), progress=False) for g in (generator, loaded))
    assert np.abs(pixels(frames) - pixels(half)).mean() < 8


def test_parts_may_be_references(parts, generator, tmp_path):
    parts[1].save_pretrained(tmp_path / "shared_codec")
    info = INFO | {"codec": {"reference": str(tmp_path / "shared_codec")}}
    save_story_model(tmp_path / "model", *parts, info=info)
    assert not (tmp_path / "model" / "codec").exists()
    loaded = StoryGenerator.from_pretrained(tmp_path / "model")
    frames, again = (g.generate(story_of(2), progress=False) for g in (generator, loaded))
    np.testing.assert_array_equal(pixels(frames), pixels(again))


def test_wans_codec_fits_in(vae, tmp_path):
    config = StoryDiTConfig(2, 12, 1, 32, WordEncoder.text_dim, latent_channels=16, freq_dim=32)
    save_story_model(tmp_path / "model", StoryDiT(config), WanCodec.from_vae(vae), WordEncoder(), info=INFO)
    generator = StoryGenerator.from_pretrained(tmp_path / "model")
    given = {2: picture(2, (32, 48))}
    frames = generator.generate(story_of(3), height=32, width=48, given=given, progress=False)
    assert [frame.size for frame in frames] == [(48, 32)] * 3
    assert frames[1].tobytes() == given[2].tobytes()
    with pytest.raises(ValueError, match="multiple of 16"):
        generator.generate(story_of(3), height=40, width=48, progress=False)


def test_saving_replaces_a_model_but_no_other_folder_and_leaves_nothing_half_written(parts, tmp_path):
    save_story_model(tmp_path / "model", *parts, info=INFO)
    save_story_model(tmp_path / "model", *parts, info=INFO | {"num_steps": 9})
    assert read_story_model(tmp_path / "model")["num_steps"] == 9
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        save_story_model(tmp_path / "notes", *parts, info=INFO)
    broken = dataclasses.make_dataclass("Broken", [])()  # has no save_pretrained
    with pytest.raises(AttributeError):
        save_story_model(tmp_path / "model", parts[0], broken, parts[2], info=INFO | {"num_steps": 1})
    assert read_story_model(tmp_path / "model")["num_steps"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes"]


def test_an_adapter_is_merged_into_the_network(parts, tmp_path):
    save_story_model(tmp_path / "model", *parts, info=INFO)
    adapted = copy.deepcopy(parts[0])
    add_lora(adapted, LoraSettings(rank=2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_lora(adapted, tmp_path / "adapter")
    expected = StoryGenerator(adapted, *parts[1:], frame_size=SIZE, num_steps=3, guidance_scale=2, shift=1.5)
    expected = pixels(expected.generate(story_of(2), progress=False))
    for lora in (tmp_path / "adapter", tmp_path / "adapter" / LORA_FILE):
        loaded = StoryGenerator.from_pretrained(tmp_path / "model", lora=lora)
        assert not has_lora(loaded.dit)
        frames = pixels(loaded.generate(story_of(2), progress=False))
        assert np.abs(frames - expected).max() <= 1
    plain = StoryGenerator.from_pretrained(tmp_path / "model")
    assert np.abs(pixels(plain.generate(story_of(2), progress=False)) - expected).max() > 1
    save_story_model(tmp_path / "model", StoryDiT(StoryDiTConfig.preset("tiny")), *parts[1:], info=INFO)
    with pytest.raises(ValueError, match="does not fit the network"):
        StoryGenerator.from_pretrained(tmp_path / "model", lora=tmp_path / "adapter")


@pytest.mark.parametrize(
    "part", ["transformer", "codec", "caption_encoder", "transformer/config.json", "codec/codec.safetensors"]
)
def test_a_missing_part_is_named(parts, tmp_path, part):
    save_story_model(tmp_path / "model", *parts, info=INFO)
    path = tmp_path / "model" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path / "model"))) as error:
        StoryGenerator.from_pretrained(tmp_path / "model")
    assert part.split("/")[-1].split(".")[0] in str(error.value)


def test_broken_model_folders_are_named(parts, tmp_path):
    with pytest.raises(OSError, match="has no story_model"):
        StoryGenerator.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_steps"):
        save_story_model(
            tmp_path / "model", *parts, info={"frame_size": [8, 8], "guidance_scale": 1, "shift": 1}
        )
    save_story_model(tmp_path / "model", *parts, info=INFO)
    info = tmp_path / "model" / MODEL_FILE
    info.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        StoryGenerator.from_pretrained(tmp_path / "model")
    info.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version 99, expected 1"):
        StoryGenerator.from_pretrained(tmp_path / "model")
    save_story_model(tmp_path / "model", *parts, info=INFO | {"codec": {"reference": str(tmp_path / "none")}})
    with pytest.raises((OSError, ValueError), match="none"):
        StoryGenerator.from_pretrained(tmp_path / "model")
    save_story_model(tmp_path / "model", *parts, info=INFO | {"max_frames": 8})
    assert StoryGenerator.from_pretrained(tmp_path / "model").max_frames == 8
    for wrong in (2, True, "8"):
        info.write_text(json.dumps(read_story_model(tmp_path / "model") | {"max_frames": wrong}))
        with pytest.raises(ValueError, match=f"max_frames is {wrong!r}, expected at least 3 frames"):
            StoryGenerator.from_pretrained(tmp_path / "model")
        info.write_text(json.dumps(json.loads(info.read_text()) | {"max_frames": 8}))
    other = PcaCodec.fit(torch.rand(8, 3, *SIZE), latent_channels=6)
    save_story_model(tmp_path / "model", parts[0], other, parts[2], info=INFO)
    with pytest.raises(ValueError, match="latent_channels 6 for a network of 4"):
        StoryGenerator.from_pretrained(tmp_path / "model")
