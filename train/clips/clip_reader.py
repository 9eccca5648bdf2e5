"""Frames and captions of index rows, one ranged read each; every byte is checked before it is decoded.

The index says where the bytes lie, how many they are and what their checksum is. What does not fit is a
BrokenSample; what cannot be read at all is an OSError.
"""

import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from storyanchors.clip import CaptionRecord, decode_image, decode_jpeg, frame_member, frames_to_levels
from storyanchors.conditioning import ClipConditions
from storyanchors.shard_store import ShardStore, TruncatedFile, printable, scheme_of
from train.clips.clip_index import ClipRow, captions_path, tar_path

MAX_MEMBER_BYTES = 2**26
MAX_OTHER_BYTES = 2**24  # of other members between the frames of a clip
MAX_CAPTION_BYTES = 2**20
CHECK_THREADS = 32


@dataclass
class LoadedClip:
    key: str
    epoch: int
    frames: Tensor  # (F, 3, H, W), uint8 levels 0..255: a quarter of the bytes that pixels would be
    conditions: ClipConditions
    captions: dict[str, str]  # by kind, those that the clip has


class BrokenSample(ValueError):
    """A clip whose bytes are not what the index says."""

    def __init__(self, path: str, member: str, reason: str):
        super().__init__(path, member, reason)
        self.path = printable(path)
        self.member = member
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.member}: {self.reason}"


class ClipReader:
    """Frames and captions of index rows, from the files of their datasets."""

    def __init__(self, store: ShardStore | None = None):
        self.store = store or ShardStore()

    def load(self, row: ClipRow, epoch: int) -> LoadedClip:
        """A whole clip, or BrokenSample."""
        frames = frames_to_levels(self.frames(row))
        return LoadedClip(row.key, epoch, frames, row.conditions, caption_texts(self.caption(row)))

    def frames(self, row: ClipRow) -> list[Image.Image]:
        """The clip's story frames, or BrokenSample."""
        size = (row.conditions.width, row.conditions.height)
        decode = decode_jpeg if row.location is None else decode_image
        frames = []
        for number, content in enumerate(self.contents(row), start=1):
            try:
                frames.append(decode(content, size))
            except ValueError as error:
                raise _broken_frame(row, number, str(error)) from error
        return frames

    def contents(self, row: ClipRow) -> list[bytes]:
        """The files of the clip's frames, with the checksums that the index knows, or BrokenSample."""
        start, data = self._read_clip(row)
        contents = []
        ranges = zip(row.frame_offsets, row.frame_sizes, row.frame_crc32, strict=True)
        for number, (offset, num_bytes, crc32) in enumerate(ranges, start=1):
            contents.append(bytes(data[offset - start : offset - start + num_bytes]))
            if (found := zlib.crc32(contents[-1])) != crc32:
                raise _broken_frame(row, number, f"crc32 is {found:08x}, the index expects {crc32:08x}")
        return contents

    def _read_clip(self, row: ClipRow) -> tuple[int, memoryview]:
        """The offset in the tar of the clip's first frame, and all bytes from there to its last one."""
        path = tar_path(row.dataset, row.shard, row.location)
        start = min(row.frame_offsets)
        end = max(map(sum, zip(row.frame_offsets, row.frame_sizes, strict=True)))
        too_large = max(row.frame_sizes) > MAX_MEMBER_BYTES
        if too_large or end - start > sum(row.frame_sizes) + MAX_OTHER_BYTES:
            reason = f"its frames lie in {end - start} bytes: they are too large or too far apart"
            raise BrokenSample(path, f"clip {row.key}", reason)
        try:
            return start, memoryview(self.store.read(path, start, end - start))
        except TruncatedFile as error:
            raise BrokenSample(path, f"clip {row.key}", f"the tar is cut short ({error})") from error

    def caption(self, row: ClipRow) -> CaptionRecord:
        """The clip's captions, or BrokenSample; an empty record where the index knows none."""
        if row.caption_run is None:
            return CaptionRecord(row.key)
        path, member = captions_path(row.dataset, row.caption_run, row.shard), f"caption of clip {row.key}"
        if row.caption_size > MAX_CAPTION_BYTES:
            raise BrokenSample(
                path, member, f"{row.caption_size} bytes, at most {MAX_CAPTION_BYTES} are read"
            )
        try:
            record = CaptionRecord.from_json(self.store.read(path, row.caption_offset, row.caption_size))
        except (ValueError, RecursionError) as error:  # also a file that is cut short
            found = f"{error}; where captions were written after the index, write the index again"
            raise BrokenSample(path, member, found) from error
        if record.key != row.key:
            raise BrokenSample(path, member, f"the line belongs to {record.key}; write the index again")
        if record.story and record.story.num_frames != row.conditions.num_frames:
            found = f"its story has {record.story.num_frames} frames, the clip {row.conditions.num_frames}"
            raise BrokenSample(path, member, found)
        return record


def caption_texts(record: CaptionRecord) -> dict[str, str]:
    """The clip's text of each kind that it has."""
    texts = {"global": record.global_caption, "multi_event": record.story.prompt() if record.story else ""}
    return {kind: text for kind, text in texts.items() if text}


def check_files(paths: Iterable[str]) -> None:
    """ValueError that counts the files that are missing, empty or not of a scheme that is read.

    Asks for every file's size, many at a time; of servers also, once each, whether they know byte ranges.
    """
    paths, store, servers = list(paths), ShardStore(), {}
    for path in paths:
        if scheme_of(path):
            servers.setdefault(path.split("/")[2], path)
    for path in servers.values():
        try:
            store.check_ranges(path)
        except FileNotFoundError:
            continue  # counted below
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        problems = [problem for problem in pool.map(lambda path: _problem(store, path), paths) if problem]
    if problems:
        raise ValueError(f"{len(problems)} of {len(paths)} files of the dataset {problems[0]}")


def _problem(store: ShardStore, path: str) -> str:
    try:
        return "" if store.size(path) else f"are missing or empty, such as {printable(path)}"
    except (FileNotFoundError, NotADirectoryError):
        return f"are missing or empty, such as {printable(path)}"
    except OSError as error:
        return f"cannot be read: {error}"


def _broken_frame(row: ClipRow, number: int, reason: str) -> BrokenSample:
    if row.location is None:
        member = f"member {row.key}.{frame_member(number)}"
    else:  # names in tars made by others are not in the index
        member = f"frame {number} of clip {row.key} at byte {row.frame_offsets[number - 1]}"
    return BrokenSample(tar_path(row.dataset, row.shard, row.location), member, reason)
