"""The samples of a tar made by others: clips that are used where they lie, and videos that are to be cut.

A sample is what webdataset makes one of: members in a row whose names are equal up to the first dot behind
the last slash. Its images, by name (numbers by their value), are the story frames; or it holds one video.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data_pipeline.clip_cutter import readable_key
from data_pipeline.image_facts import story_frame_size_of
from data_pipeline.tar_members import BrokenTar, ReadAt, TarMember, tar_members
from storyanchors.clip import CaptionRecord
from storyanchors.story import Story

IMAGES = ("jpg", "jpeg", "png", "webp")
VIDEOS = ("mp4", "m4v", "mov", "mkv", "webm")
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")  # webdataset's
_MAX_IMAGE_BYTES = 2**26
_MAX_TEXT_BYTES = 2**20
_MAX_CAPTION_BYTES = 2**19
_MAX_GAP_BYTES = 2**24  # of other members among a clip's images, which are read in one piece


class Refused(ValueError):
    """The sample cannot be used, in words for rejected.jsonl."""


@dataclass(frozen=True)
class SampleRules:
    """What decides the clips of a tar."""

    min_frames: int
    max_frames: int
    max_pixels: int  # of an image: in place, none is made smaller
    caption_key: str  # of the sample's json: the global caption
    story_key: str  # of the sample's json: a story, in the shape of a story file
    source_key: str | None  # of the sample's json: the video it comes from; None: every sample is its own


@dataclass(frozen=True)
class Sample:
    """Images in story frame order, or one video; what its json or txt says; its key in our dataset."""

    name: str
    key: str
    source: str
    images: list[TarMember]
    video: TarMember | None
    caption: CaptionRecord


@dataclass
class TarContents:
    """What became of every member of a tar."""

    rows: list[dict] = field(default_factory=list)  # of the index, without shard and location
    videos: list[Sample] = field(default_factory=list)
    captions: list[CaptionRecord] = field(default_factory=list)  # of the rows
    rejected: list[tuple[str | None, str]] = field(default_factory=list)  # (sample or None = the tar, reason)


def read_tar(
    read_at: ReadAt, num_bytes: int, tar_id: str, rules: SampleRules, progress: Callable[[int], None]
) -> TarContents:
    """Goes through a tar once; progress hears up to which byte. Keys are made of tar_id and sample names.

    A tar that is cut or damaged gives what came before, but for its last sample, which may be a half.
    """
    contents, seen, ignored = TarContents(), set(), Counter()
    for name, members in _groups(read_at, num_bytes, contents, ignored):
        progress(members[-1].offset)
        try:
            if name in seen:
                raise Refused("its name comes again after other samples")
            seen.add(name)
            sample = _sample(read_at, name, members, tar_id, rules, ignored)
            if sample.video:
                contents.videos.append(sample)
            else:
                contents.rows.append(_row(read_at, sample, rules))
                contents.captions.append(sample.caption)
        except Refused as reason:
            contents.rejected.append((name, str(reason)))
    for what, count in sorted(ignored.items()):
        contents.rejected.append((None, f"{count} members are not read: {what}"))
    if not (contents.rows or contents.videos or contents.rejected):
        contents.rejected.append((None, "there is no file in it"))
    progress(num_bytes)
    return contents


def _groups(
    read_at: ReadAt, num_bytes: int, contents: TarContents, ignored: Counter
) -> Iterator[tuple[str, list[TarMember]]]:
    """(name, members) of each sample; members that are in none are counted, and a broken tar is said."""
    name, members = None, []
    try:
        for member in tar_members(read_at, num_bytes):
            found = _NAME.fullmatch(member.name)
            if not found:
                ignored[member.refused or "names without a key and a suffix"] += 1
                continue
            if found[1] != name:
                if members:
                    yield name, members
                name, members = found[1], []
            members.append(member)
    except BrokenTar as error:
        contents.rejected.append((None, str(error)))
        if members:
            contents.rejected.append((name, "the tar is broken in it or right behind it"))
    else:
        if members:
            yield name, members


def _sample(
    read_at: ReadAt, name: str, members: list[TarMember], tar_id: str, rules: SampleRules, ignored: Counter
) -> Sample:
    parts: dict[str, TarMember] = {}
    for member in members:
        suffix = _NAME.fullmatch(member.name)[2].lower()
        if member.refused:
            raise Refused(f"{member.name!r}: {member.refused}")
        if suffix in parts:
            raise Refused(f"it has {suffix} twice")
        parts[suffix] = member
    of_kind = {kind: [s for s in parts if s.rpartition(".")[2] in kind] for kind in (IMAGES, VIDEOS)}
    images, videos = of_kind[IMAGES], of_kind[VIDEOS]
    for suffix in set(parts) - {*images, *videos, "json", "txt"}:
        ignored[f".{suffix.rpartition('.')[2]}"] += 1
    if bool(images) + len(videos) != 1:
        raise Refused(f"{len(images)} images and {len(videos)} videos, expected images or one video")
    facts = _json(read_at, parts["json"]) if "json" in parts else {}
    sample_id = f"{tar_id}/{name}"
    key = readable_key(sample_id)
    story = _story(facts.get(rules.story_key))
    text = _text(read_at, parts["txt"]).strip() if "txt" in parts else ""
    text = _as_text(facts, rules.caption_key) or text or (story.global_caption if story else "")
    source = _as_text(facts, rules.source_key) if rules.source_key else ""
    caption = CaptionRecord(key, text, story)
    if (num_bytes := len(caption.to_json().encode())) > _MAX_CAPTION_BYTES:
        raise Refused(f"its captions have {num_bytes} bytes, at most {_MAX_CAPTION_BYTES} are kept")
    return Sample(
        name,
        key,
        source or sample_id,
        images=[parts[suffix] for suffix in sorted(images, key=_by_number)],
        video=parts[videos[0]] if videos else None,
        caption=caption,
    )


def _row(read_at: ReadAt, sample: Sample, rules: SampleRules) -> dict:
    """The clip's part of the index; every image's header is decoded and its bytes are summed."""
    images = sample.images
    if not rules.min_frames <= len(images) <= rules.max_frames:
        raise Refused(
            f"{len(images)} images, expected min_frames={rules.min_frames} to max_frames={rules.max_frames}"
        )
    story = sample.caption.story
    if story and story.num_frames != len(images):
        raise Refused(f"its story has {story.num_frames} frames, the sample {len(images)} images")
    span = max(image.offset + image.size for image in images) - min(image.offset for image in images)
    if span - sum(image.size for image in images) > _MAX_GAP_BYTES:
        raise Refused(f"more than {_MAX_GAP_BYTES} bytes of other members lie among its images")
    sizes, checksums = [], []
    for image in images:
        content = _content(read_at, image, _MAX_IMAGE_BYTES)
        try:
            sizes.append(story_frame_size_of(content))
        except ValueError as error:
            raise Refused(f"{image.name!r}: {error}") from error
        checksums.append(zlib.crc32(content))
    if len(set(sizes)) > 1:
        raise Refused(f"its images have different sizes, such as {_size(sizes[0])} and {_size(sizes[-1])}")
    height, width = sizes[0]
    if height * width > rules.max_pixels:
        raise Refused(f"images of {_size(sizes[0])} pixels, at most {rules.max_pixels} (max_pixels)")
    return {
        "key": sample.key,
        "frame_offsets": [image.offset for image in images],
        "frame_sizes": [image.size for image in images],
        "frame_crc32": checksums,
        "num_frames": len(images),
        "height": height,
        "width": width,
        "source": sample.source,
    }


def _json(read_at: ReadAt, member: TarMember) -> dict:
    try:
        facts = json.loads(_text(read_at, member))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{member.name!r} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise Refused(f"{member.name!r} holds a {type(facts).__name__}, expected an object")
    return facts


def _story(content: object) -> Story | None:
    if content is None:
        return None
    try:
        return Story.from_dict(content)
    except (ValueError, TypeError, AttributeError) as error:
        raise Refused(f"its story: {error}") from error


def _as_text(facts: dict, key: str) -> str:
    """The text under a key of the json, "" where there is none."""
    text = facts.get(key)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise Refused(f"its {key} is of type {type(text).__name__}, expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character
        raise Refused(f"its {key} is not text in UTF-8") from error
    return text.strip()


def _text(read_at: ReadAt, member: TarMember) -> str:
    try:
        return _content(read_at, member, _MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{member.name!r} is not text in UTF-8") from error


def _content(read_at: ReadAt, member: TarMember, most: int) -> bytes:
    if not 0 < member.size <= most:
        raise Refused(f"{member.name!r} has {member.size} bytes, expected 1 to {most}")
    return read_at(member.offset, member.size)


def _by_number(name: str) -> tuple:
    """2.jpg comes before 10.jpg."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts], name


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
