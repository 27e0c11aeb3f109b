"""Listing and reading: folders, patterns, archives; paths that escape, loops and traps are refused."""

import bz2
import errno
import gzip
import io
import lzma
import os
import tarfile
import time
import tracemalloc
import zipfile

import pytest

from data_pipelines.commands import printable
from data_pipelines.errors import InputError
from data_pipelines.files import images_in
from data_pipelines.prepare import archives
from data_pipelines.prepare.archives import Source, SourceReader, SourceUnreadable
from data_pipelines.prepare.inputs import list_sources, split_into_parts

FILES = {"b.png": b"bb", "a/x.jpg": b"x" * 5000, "a/y.jpg": b"", "c d/ü.tif": b"umlaut"}
LIMIT = 1 << 20


def fill(folder):
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_zip(path, extra=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*FILES.items(), *extra]:
            archive.writestr(name, content)


def write_tar(path, mode, extra=()):
    with tarfile.open(path, mode) as archive:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info)


def contents(listing):
    with SourceReader() as reader:
        return {source.key: reader.read(source, LIMIT) for source in listing.sources}


def reasons(listing):
    return {rejection.key: rejection.reason for rejection in listing.rejections}


def test_folder_is_listed_in_order_with_its_name_in_front(tmp_path):
    fill(tmp_path / "set")
    listing = list_sources([tmp_path / "set"])
    assert [source.key for source in listing.sources] == ["set/a/x.jpg", "set/a/y.jpg", "set/b.png", "set/c d/ü.tif"]
    assert contents(listing) == {f"set/{name}": content for name, content in FILES.items()}


def test_inputs_of_one_name_stay_apart(tmp_path):
    fill(tmp_path / "one" / "images")
    fill(tmp_path / "two" / "images")
    keys = [source.key for source in list_sources([tmp_path / "one/images", tmp_path / "two/images"]).sources]
    assert len(set(keys)) == 8 and sum(key.startswith("images~2/") for key in keys) == 4


def test_folder_inside_another_input_is_listed_once(tmp_path):
    fill(tmp_path / "set")
    listing = list_sources([tmp_path / "set", tmp_path / "set" / "a"])
    assert len(listing.sources) == 4 and reasons(listing) == {"a": "listed_twice"}


def test_patterns(tmp_path):
    fill(tmp_path / "set")
    assert [s.key for s in list_sources([f"{tmp_path}/set/**/*.jpg"]).sources] == ["set/a/x.jpg", "set/a/y.jpg"]
    assert [s.key for s in list_sources([f"{tmp_path}/set/[bc]*"]).sources] == ["set/b.png", "set/c d/ü.tif"]
    for given in (f"{tmp_path}/set/*.bmp", f"{tmp_path}/none"):
        with pytest.raises(InputError, match="none|bmp"):
            list_sources([given])
    with pytest.raises(InputError, match="repeat --input"):
        list_sources([f"{tmp_path}/set/a,{tmp_path}/set/b.png"])


@pytest.mark.parametrize("name", ["set.zip", "set.tar", "set.tar.gz", "set.tgz", "set.tar.bz2", "set.tar.xz"])
def test_archives_are_read_in_place(tmp_path, name):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if name.endswith("zip"):
        write_zip(path)
    else:
        suffix = name.split(".")[-1].replace("tgz", "gz")
        write_tar(path, "w" if suffix == "tar" else f"w:{suffix}")
    before = sorted(tmp_path.rglob("*"))
    for given, prefix in ((tmp_path / "in", f"in/{name}"), (path, name)):
        assert contents(list_sources([given])) == {f"{prefix}/{file}": content for file, content in FILES.items()}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("escape", ["../out.png", "a/../../out.png", "/etc/out.png", "..\\out.png", "C:\\out.png"])
def test_member_paths_that_leave_the_archive_are_refused(tmp_path, escape):
    write_zip(tmp_path / "z.zip", [(escape, b"evil")])
    info = tarfile.TarInfo(escape)
    write_tar(tmp_path / "t.tar", "w", [info])
    for name in ("z.zip", "t.tar"):
        listing = list_sources([tmp_path / name])
        assert len(listing.sources) == 4 and list(reasons(listing).values()) == ["unsafe_path"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_and_devices_in_tar_files_are_refused(tmp_path, mode):
    members = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo(f"special{kind!r}")
        info.type, info.linkname = kind, "/etc/passwd"
        members.append(info)
    path = tmp_path / ("t.tar" if mode == "w" else "t.tar.gz")
    write_tar(path, mode, members)
    listing = list_sources([path])
    assert len(listing.sources) == 4 and list(reasons(listing).values()) == ["not_a_file"] * 4


def test_archive_bombs_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(3_000_000))
    data = bytearray((tmp_path / "bomb.zip").read_bytes())
    # The central directory declares four gigabytes for each of two members.
    size_field = data.index(b"PK\x01\x02") + 24
    data[size_field : size_field + 4] = (2**32 - 2).to_bytes(4, "little")
    (tmp_path / "bomb.zip").write_bytes(data)
    listing = list_sources([tmp_path / "bomb.zip"])
    assert reasons(listing) == {"bomb.zip": "decompression_bomb"}


def test_member_that_unpacks_to_more_than_declared_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "liar.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(3_000_000))
    data = bytearray((tmp_path / "liar.zip").read_bytes())
    size_field = data.index(b"PK\x01\x02") + 24
    data[size_field : size_field + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "liar.zip").write_bytes(data)
    (source,) = list_sources([tmp_path / "liar.zip"]).sources
    with SourceReader() as reader, pytest.raises(SourceUnreadable):
        reader.read(source, LIMIT)


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.xz"])
@pytest.mark.parametrize("damage", ["garbage", "cut", "empty"])
def test_damaged_archives_are_accounted_for(tmp_path, name, damage):
    path = tmp_path / name
    if name.endswith("zip"):
        write_zip(path)
    else:
        write_tar(path, "w" if name.endswith("tar") else f"w:{name.split('.')[-1]}")
    whole = path.read_bytes()
    path.write_bytes({"garbage": os.urandom(500), "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    listing = list_sources([path])
    assert listing.rejections or listing.sources
    with SourceReader() as reader:
        for source in listing.sources:
            try:
                assert reader.read(source, LIMIT) in FILES.values()
            except SourceUnreadable as error:
                assert "\n" not in error.detail


def test_one_name_twice_in_an_archive_gives_two_keys(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(tmp_path / "z.zip", [("b.png", b"again")])
    assert contents(list_sources([tmp_path / "z.zip"]))["z.zip/b.png~2"] == b"again"


def test_large_and_vanished_files_are_refused(tmp_path):
    fill(tmp_path / "set")
    listing = list_sources([tmp_path / "set"])
    (tmp_path / "set" / "b.png").unlink()
    by_key = {source.key: source for source in listing.sources}
    with SourceReader() as reader:
        with pytest.raises(SourceUnreadable, match="file_too_large: 5000 bytes"):
            reader.read(by_key["set/a/x.jpg"], 4999)
        with pytest.raises(SourceUnreadable, match="unreadable: No such file"):
            reader.read(by_key["set/b.png"], LIMIT)


def test_a_vanished_archive_does_not_spoil_the_reading_of_the_one_before(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, "w")
    first, second = (list_sources([tmp_path / name]).sources[0] for name in ("a.tar", "b.tar"))
    (tmp_path / "b.tar").unlink()
    with SourceReader() as reader:
        before = reader.read(first, LIMIT)
        with pytest.raises(SourceUnreadable, match="b.tar: No such file"):
            reader.read(second, LIMIT)
        assert reader.read(first, LIMIT) == before


def test_names_of_any_bytes_become_printable_keys(tmp_path):
    folder = os.fsencode(tmp_path / "set")
    os.mkdir(folder)
    for name in (b"latin\xe9.png", b"new\nline.png"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"data")
    listing = list_sources([tmp_path / "set"])
    assert sorted(source.key for source in listing.sources) == ["set/latin\\xe9.png", "set/new\\x0aline.png"]
    assert set(contents(listing).values()) == {b"data"}


def test_members_of_a_compressed_tar_file_stay_in_one_part():
    def source(key, path, sequential=False):
        return Source(key, path, 1, 0, "m", 0, sequential)

    sources = [
        *[source(f"f{i}", f"f{i}") for i in range(5)],
        *[source(f"t{i}", "t.tar.gz", True) for i in range(7)],
        *[source(f"u{i}", "u.tar.gz", True) for i in range(2)],
        *[source(f"g{i}", f"g{i}") for i in range(3)],
    ]
    parts = split_into_parts(sources, 3)
    assert [len(part) for part in parts] == [3, 2, 7, 2, 3]
    assert [item for part in parts for item in part] == sources


def tar_header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def hostile(kind: str) -> tuple[str, bytes]:
    """A small archive that asks for gigabytes, minutes or a deep stack: its name and bytes."""
    if kind == "long name":
        return "x.tar.gz", gzip.compress(tar_header("n", tarfile.GNUTYPE_LONGNAME, 6 << 30) + bytes(1 << 22))
    if kind == "pax header":
        return "x.tgz", gzip.compress(tar_header("p", tarfile.XHDTYPE, 3 << 30) + bytes(1 << 22))
    if kind == "negative size":
        return "x.tar", tar_header("n", tarfile.REGTYPE, -512) + bytes(10_240)
    if kind == "nested headers":
        pax = tar_header("p", tarfile.XHDTYPE, 12) + b"12 path=abc\n".ljust(512, b"\0")
        return "x.tar.xz", lzma.compress(pax * 5000)
    if kind == "sparse without end":
        text = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=1\n19 GNU.sparse.x=1\n"
        data = b"99999999\n".ljust(512, b"\0")
        blocks = tar_header("p", tarfile.XHDTYPE, len(text)) + text.ljust(512, b"\0")
        return "x.tar", blocks + tar_header("s", tarfile.REGTYPE, 512) + data
    if kind == "empty members":
        member = tar_header("m", tarfile.REGTYPE, 0)
        return "x.tar.bz2", bz2.compress(member * 6_000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("zeros.bin", bytes(1 << 20))
    data = bytearray(buffer.getvalue())
    if kind == "zip, lzma damaged":
        data[40:60] = bytes(20)
    return "x.zip", bytes(data)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("long name", "decompression_bomb"), ("pax header", "decompression_bomb"), ("negative size", None),
     ("nested headers", "archive_unreadable"), ("sparse without end", None), ("empty members", "decompression_bomb"),
     ("zip, lzma damaged", "unreadable")],
)  # fmt: skip
def test_hostile_archives_are_refused_by_name_in_bounded_time_and_memory(tmp_path, kind, reason, monkeypatch):
    monkeypatch.setattr(archives, "_ALWAYS_ALLOWED_MEMBERS", 5_000)
    name, data = hostile(kind)
    (tmp_path / name).write_bytes(data)
    started = time.monotonic()
    tracemalloc.start()
    listing = list_sources([tmp_path])
    found = {rejection.reason for rejection in listing.rejections}
    with SourceReader() as reader:
        for source in listing.sources:
            try:
                reader.read(source, 1 << 28)
            except SourceUnreadable as error:
                found.add(error.reason)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - started < 20 and peak < 100 << 20
    assert found == {reason} if reason else found <= {"archive_unreadable", "unreadable", "not_a_file"}


def test_a_bad_archive_does_not_end_the_others(tmp_path):
    fill(tmp_path / "set")
    for kind in ("long name", "nested headers", "zip, lzma damaged"):
        name, data = hostile(kind)
        (tmp_path / "set" / name).write_bytes(data)
    write_zip(tmp_path / "set" / "good.zip")
    keys = {source.key for source in list_sources([tmp_path / "set"]).sources}
    assert len({key for key in keys if "x.zip" not in key}) == 2 * len(FILES)


def test_a_zip_is_opened_once_for_all_its_parts(tmp_path, monkeypatch):
    write_zip(tmp_path / "z.zip")
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *options: opened.append(options) or real(*options))
    sources = list_sources([tmp_path / "z.zip"]).sources
    for source in sources:
        with SourceReader() as reader:
            reader.read(source, LIMIT)
    assert len(opened) == 1


def test_control_characters_never_reach_a_key(tmp_path):
    for number, name in enumerate(("a\x1b[31m.png", "b\x85.png", "c\u202egnp.exe", "d\u2066.png")):
        (tmp_path / name).write_bytes(bytes([number]))
        write_zip(tmp_path / f"{number}.zip", [(name, b"data")])
    keys = [source.key for source in list_sources([tmp_path]).sources]
    assert len(keys) == 4 * (2 + len(FILES))
    assert all(key.isprintable() for key in keys)
    assert printable("\ud800 \udce9 \n") == "\\ud800 \\xe9 \\x0a"


def test_brackets_in_the_names_of_folders_are_no_pattern(tmp_path):
    fill(tmp_path / "set [1]")
    assert len(list_sources([tmp_path / "set [1]"]).sources) == 4
    assert len(list_sources([f"{tmp_path}/set [1]/**/*.jpg"]).sources) == 2


def test_pictures_of_this_project_are_no_images(tmp_path):
    made = {
        "shards": ("manifest.json", "train-0.array_record"), "work": ("prepare_plan",),
        "run": ("config.json", "events.jsonl"), "predictions": ("settings.json", "predictions.jsonl"),
        "scores": ("scores.json", "scores.txt"),
    }  # fmt: skip
    for folder, names in {**made, "mine": ("config.json",)}.items():
        for name in (*names, "pictures/p.png"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"p")
    (tmp_path / "a.png").write_bytes(b"a")
    listing = list_sources([tmp_path])
    assert sorted(reasons(listing).values()) == ["shard_set"] * len(made)
    mine = [tmp_path / "a.png", tmp_path / "mine" / "pictures" / "p.png"]
    assert list(images_in([tmp_path])) == mine
    found = {source.path for source in listing.sources}
    assert found == {*map(str, mine), f"{tmp_path}/mine/config.json"}
    assert list(images_in([tmp_path / "run"])) == [tmp_path / "run" / "pictures" / "p.png"]  # asked for by name


def test_too_many_open_files_are_not_the_fault_of_an_image(tmp_path, monkeypatch):
    fill(tmp_path / "set")
    (source, *_) = list_sources([tmp_path / "set"]).sources

    def full(*options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("builtins.open", full)
    with SourceReader() as reader, pytest.raises(InputError, match="ulimit"):
        reader.read(source, LIMIT)
