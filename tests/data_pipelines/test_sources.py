"""Listing and reading: folders, patterns, archives; paths that escape, loops and traps are refused."""

import io
import os
import tarfile
import zipfile

import pytest

from data_pipelines.prepare.archives import Source
from data_pipelines.errors import InputError
from data_pipelines.prepare.inputs import SourceReader, SourceUnreadable, list_sources, split_into_parts

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
