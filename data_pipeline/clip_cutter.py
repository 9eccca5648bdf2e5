"""One video -> its clips of story frames, and a report of what became of it."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from data_pipeline.picture import PictureForm, motion_between, motion_luma, story_frame_size, to_story_frame
from data_pipeline.shard_writer import ShardWriter, VideoReport
from data_pipeline.video import (
    Inexact,
    SourceFrame,
    VideoError,
    VideoFacts,
    plan_is_worthwhile,
    planned_frames,
    read_facts,
    sequential_frames,
)
from storyanchors.clip import ClipInfo, StoryClip


@dataclass(frozen=True)
class Recipe:
    """What decides the clips of a video."""

    frame_interval: int  # source frames strictly between two story frames
    max_frames: int  # story frames of a clip
    min_frames: int
    max_pixels: int  # of a story frame

    @property
    def stride(self) -> int:
        return self.frame_interval + 1

    def wants(self, number: int) -> bool:
        """Story frames, and the frame after each: what moves between the two is the motion score."""
        return number % self.stride in (0, 1)


@dataclass(frozen=True)
class Video:
    """A source: its id (the path below the videos' folder), its place, and the prefix of its clips' keys."""

    id: str
    path: Path
    key: str


def readable_key(source_id: str) -> str:
    """What keys of clips of a source begin with: a half that can be read, and one that is unique."""
    readable = re.sub("[^a-z0-9]+", "-", Path(source_id).stem.lower())[:40].strip("-") or "video"
    return f"{readable}-{hashlib.sha1(source_id.encode()).hexdigest()[:12]}"


@dataclass
class StoryFrame:
    number: int  # in the source
    seconds: float
    image: Image.Image
    form: PictureForm
    interlaced: bool
    motion: float | None = None  # mean absolute luma difference to the next source frame, levels of 255


def cut_video(video: Video, recipe: Recipe, folder: Path, name: str, progress: Callable[[int], None]) -> None:
    """Writes shard `name` with the clips of one video; one that is unusable gives a shard without clips.

    progress hears how many clips there are so far; that may go back, where they are cut again or rejected.
    """
    try:
        facts = read_facts(video.path)
        if plan_is_worthwhile(facts, recipe.wants):
            try:
                return _write_clips(video, facts, "planned", recipe, folder, name, progress)
            except Inexact:
                pass
        _write_clips(video, facts, "sequential", recipe, folder, name, progress)
    except VideoError as error:
        write_rejection(video.id, str(error), folder, name)
        progress(0)


def write_rejection(video_id: str, reason: str, folder: Path, name: str) -> None:
    """A shard without clips, which says why."""
    with ShardWriter(folder, name) as shard:
        shard.finish([VideoReport(video=video_id, rejected=reason)])


def story_frames(frames: Iterator[SourceFrame], recipe: Recipe, sample_aspect: float) -> Iterator[StoryFrame]:
    """Source frames 0, stride, 2 stride, ... as story frames, with the motion to the frame after each."""
    form = pending = luma = None
    for source in frames:
        form = form or PictureForm.of(source.picture, sample_aspect)
        form.check_same(source.picture, source.number)
        luma_before, luma = luma, motion_luma(source.picture, form)
        if pending and source.number == pending.number + 1:
            pending.motion = motion_between(luma_before, luma)
        if source.number % recipe.stride == 0:
            if pending:
                yield pending
            size = story_frame_size(form.display_size, recipe.max_pixels)
            image = to_story_frame(source.picture, form, size)
            pending = StoryFrame(source.number, source.seconds, image, form, source.picture.interlaced_frame)
    if pending:
        yield pending


def _write_clips(
    video: Video,
    facts: VideoFacts,
    decoding: str,
    recipe: Recipe,
    folder: Path,
    name: str,
    progress: Callable[[int], None],
) -> None:
    decode = planned_frames if decoding == "planned" else sequential_frames
    frames = story_frames(decode(facts, recipe.wants), recipe, facts.sample_aspect)
    num_clips = num_frames = short_rest = 0
    with ShardWriter(folder, name) as shard:
        while clip := list(islice(frames, recipe.max_frames)):
            last = clip[-1]
            if len(clip) < recipe.min_frames:
                short_rest = len(clip)
                continue
            info = _clip_info(f"{video.key}-{num_clips:05d}", video, clip, facts, recipe)
            shard.add(info.key, StoryClip(info, [frame.image for frame in clip]).to_members())
            num_clips, num_frames = num_clips + 1, num_frames + len(clip)
            progress(num_clips)
        num_source_frames = len([packet for packet in facts.packets if not packet.is_discard])
        report = VideoReport(
            video=video.id,
            num_clips=num_clips,
            num_frames=num_frames,
            short_rest=short_rest,
            source_frames=num_source_frames,
            source_seconds=round(num_source_frames / facts.fps, 3) if facts.fps else 0.0,
            codec=facts.codec,
            decoding=decoding,
            colours=last.form.colours,
            rotation=last.form.rotation,
            interlaced=last.interlaced,
        )
        shard.finish([report])


def _clip_info(key: str, video: Video, clip: list[StoryFrame], facts: VideoFacts, recipe: Recipe) -> ClipInfo:
    motions = [frame.motion for frame in clip if frame.motion is not None]
    return ClipInfo(
        key=key,
        source=video.id,
        fps=round(facts.fps, 6) if facts.fps else None,
        frame_interval=recipe.frame_interval,
        frame_numbers=tuple(frame.number for frame in clip),
        seconds=tuple(round(frame.seconds, 6) for frame in clip),
        height=clip[0].image.height,
        width=clip[0].image.width,
        motion=round(sum(motions) / len(motions), 4) if motions else None,
    )
