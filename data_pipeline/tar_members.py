"""Walks the headers of a tar that somebody else made: where each file lies, and which are not to be read.

Nothing is unpacked and no member's content is read here. Python's tarfile would take a long-name header of
any size into memory; here extension headers are bounded, and whatever is not a plain file is named and left.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENSION = 2**16  # bytes of a pax header or a long name
_MAX_NAME = 1024
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_SPECIAL = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}
_WITHOUT_CONTENT = (*_SPECIAL, tarfile.DIRTYPE)
_EXTENSIONS = (  # headers that speak of the next member, or of all
    tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}

ReadAt = Callable[[int, int], bytes]  # (offset, number of bytes) -> at most as many


class BrokenTar(ValueError):
    """From here on the tar cannot be read; what came before can."""


@dataclass(frozen=True)
class TarMember:
    """A file at [offset, offset + size) of the tar; `refused` says why it must not be read."""

    name: str
    offset: int
    size: int
    refused: str | None = None


def tar_members(read_at: ReadAt, num_bytes: int) -> Iterator[TarMember]:
    """Every member but folders, in the order of the tar; BrokenTar where it ends early or is damaged."""
    position, said = 0, {}
    while any(block := _whole_block(read_at(position, _BLOCK), num_bytes)):
        header = _header(block, position)
        begin = end = position + _BLOCK
        if header.type not in _WITHOUT_CONTENT:
            end += said.get("size", header.size)
        if end > num_bytes:
            raise BrokenTar(f"cut: a member from byte {position} on needs {end} bytes, found {num_bytes}")
        position = -(-end // _BLOCK) * _BLOCK
        if header.type in _EXTENSIONS:
            said |= _extension(header.type, read_at, begin, end)
            continue
        name = said.get("name", header.name)
        if header.type != tarfile.DIRTYPE:
            yield TarMember(name, begin, end - begin, _refusal(name, header.type, said))
        said = {}


def _whole_block(block: bytes, num_bytes: int) -> bytes:
    if len(block) < _BLOCK:
        raise BrokenTar(f"cut: it ends at byte {num_bytes} without the end of an archive")
    return block


def _header(block: bytes, position: int) -> tarfile.TarInfo:
    if not position and (kind := [name for magic, name in _COMPRESSED.items() if block.startswith(magic)]):
        raise BrokenTar(f"compressed with {kind[0]}: clips are read in place, unpack the tar itself first")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BrokenTar(f"no tar header at byte {position} ({error})") from error
    if header.size < 0 or header.type == tarfile.GNUTYPE_SPARSE:
        raise BrokenTar(f"{header.name!r} at byte {position} has a size that is not its own")
    return header


def _extension(kind: bytes, read_at: ReadAt, begin: int, end: int) -> dict:
    """What an extension header says of the next member: its name, its size, that it is sparse."""
    if end - begin > _MAX_EXTENSION:
        raise BrokenTar(f"a header of {end - begin} bytes at byte {begin}, at most {_MAX_EXTENSION} are read")
    content = read_at(begin, end - begin)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"name": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    records, said = dict(_pax_records(content, begin)), {}
    if b"path" in records:
        said["name"] = records[b"path"].decode("utf-8", "surrogateescape")
    if b"size" in records:
        if not re.fullmatch(rb"\d{1,18}", records[b"size"]):
            raise BrokenTar(f"the pax header at byte {begin} gives the size {records[b'size']!r}")
        said["size"] = int(records[b"size"])
    if any(key.startswith(b"GNU.sparse") for key in records):
        said["sparse"] = True
    return said


def _pax_records(content: bytes, begin: int) -> Iterator[tuple[bytes, bytes]]:
    """Each is "LENGTH KEY=VALUE\\n", the length in digits and of the whole record (POSIX.1-2001)."""
    while content.strip(b"\0"):
        start = re.match(rb"(\d{1,6}) ([^=]+)=", content)
        if not start or not start.end() < (length := int(start[1])) <= len(content):
            raise BrokenTar(f"the pax header at byte {begin} is damaged")
        yield start[2], content[start.end() : length - 1]
        content = content[length:]


def _refusal(name: str, kind: bytes, said: dict) -> str | None:
    if kind in _SPECIAL:
        return f"{_SPECIAL[kind]} is not followed"
    if kind not in _PLAIN or "sparse" in said:
        return "not a plain file"
    if len(name) > _MAX_NAME or not name.isprintable():  # control characters, and bytes that are not UTF-8
        return "its name is not printable text in UTF-8"
    if name.startswith("/") or ".." in name.split("/"):
        return "its name leads out of the tar"
    return None
