"""Tars that somebody else made: the members that tarfile finds, and nothing that a hostile one asks for."""

import io
import tarfile

import pytest

from data_pipeline.tar_members import BrokenTar, TarMember, tar_members


def tar_of(
    *members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, form: int = tarfile.PAX_FORMAT
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime, info.linkname = kind, len(content), 1.5, "elsewhere"
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def walk(content: bytes) -> list[TarMember]:
    return list(tar_members(lambda offset, size: content[offset : offset + size], len(content)))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_lie_where_tarfile_finds_them(form):
    long = "folder/" * 12 + "frame.jpg" if form == tarfile.USTAR_FORMAT else "folder/" * 40 + "frame.jpg"
    names = ["a.jpg", long, "empty.txt", "b/c.json"]
    if form != tarfile.USTAR_FORMAT:
        names.append("m\u00e4rchen/\u753b.png")
    content = tar_of(*((name, name.encode() * (i * 300)) for i, name in enumerate(names)), form=form)
    found = walk(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar.getmembers()]
    assert [(member.name, member.offset, member.size) for member in found] == expected
    assert not any(member.refused for member in found)


def test_folders_are_passed_over():
    folder = tar_of(("a", b""), kind=tarfile.DIRTYPE, form=tarfile.USTAR_FORMAT)[:512]
    assert [member.name for member in walk(folder + tar_of(("a/b.jpg", b"x")))] == ["a/b.jpg"]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_what_is_no_file_is_named_and_not_followed(kind):
    special = tar_of(("a.jpg", b""), kind=kind, form=tarfile.USTAR_FORMAT)[:512]
    found = walk(special + tar_of(("b.jpg", b"x")))
    assert [(member.name, bool(member.refused)) for member in found] == [("a.jpg", True), ("b.jpg", False)]


@pytest.mark.parametrize(
    "name", ["../a.jpg", "x/../../a.jpg", "/etc/a.jpg", "a\n.jpg", "a\udcff.jpg", "a" * 2000]
)
def test_names_that_lead_elsewhere_are_refused(name):
    [member] = walk(tar_of((name, b"x"), form=tarfile.GNU_FORMAT))
    assert member.refused


@pytest.mark.parametrize("end", [700, 1024, 1100, 1536])
def test_a_tar_that_is_cut_gives_what_came_before(end):
    content = tar_of(("a.jpg", b"1"), ("b.jpg", b"2" * 600), form=tarfile.USTAR_FORMAT)[:end]
    members = tar_members(lambda offset, size: content[offset : offset + size], len(content))
    with pytest.raises(BrokenTar, match="cut"):
        while True:
            assert next(members).name == "a.jpg"


def test_bytes_that_are_no_header_end_the_tar():
    content = bytearray(tar_of(("a.jpg", b"1"), ("b.jpg", b"2"), form=tarfile.USTAR_FORMAT))
    content[1024 + 5] ^= 1
    with pytest.raises(BrokenTar, match="no tar header at byte 1024"):
        walk(bytes(content))


@pytest.mark.parametrize(("magic", "name"), [(b"\x1f\x8b", "gzip"), (b"BZh", "bzip2")])
def test_a_compressed_tar_is_refused_by_name(magic, name):
    with pytest.raises(BrokenTar, match=name):
        walk(magic + bytes(1022))


def test_a_header_of_gigabytes_is_not_read():
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    block = info.tobuf(tarfile.GNU_FORMAT)
    asked = []

    def read_at(offset: int, size: int) -> bytes:
        asked.append(size)
        return block if offset == 0 else bytes(size)

    with pytest.raises(BrokenTar, match="1073741824 bytes"):
        list(tar_members(read_at, 2**40))
    assert max(asked) <= 2**16


@pytest.mark.parametrize("records", [b"junk", b"99 path=a\n", b"0 path=a\n", b"12 size=-5 \n", b"9 size=x\n"])
def test_damaged_pax_headers_end_the_tar(records):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    content = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + tar_of(("a.jpg", b"1"))
    with pytest.raises(BrokenTar, match="pax header"):
        walk(content)
