"""A file is replaced as a whole, or not at all; nothing else is left in its directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mono_quant import CheckpointError
from mono_quant.io.atomic import atomic_write


def put(path: Path, content: bytes) -> None:
    with atomic_write(path) as stream:
        stream.write(content)


def test_a_new_file_gets_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        put(tmp_path / "file", b"new")
    finally:
        os.umask(old)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_an_existing_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    put(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_the_old_file_is_whole_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def fail_halfway(path: Path, failure: BaseException) -> None:
    with atomic_write(path) as stream:
        stream.write(b"half of the ne")
        raise failure


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_any_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)):
        fail_halfway(path, failure)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_symbolic_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    put(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "elsewhere") == ["target"]


def test_a_link_to_nothing_yet_makes_its_target(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    put(link, b"new")
    assert link.is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_reader_of_the_old_file_keeps_reading_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        put(path, b"new")
        assert reader.read() == b"old"


def parent_is_a_file(tmp_path: Path) -> Path:
    (tmp_path / "plain").write_bytes(b"")
    return tmp_path / "plain" / "file"


def read_only_file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o444)
    return path


def read_only_directory(tmp_path: Path) -> Path:
    (tmp_path / "sealed").mkdir()
    (tmp_path / "sealed").chmod(0o555)
    return tmp_path / "sealed" / "file"


def device(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(os.devnull)
    return tmp_path / "link"


def loop(tmp_path: Path) -> Path:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (parent_is_a_file, "Not a directory"),
        (lambda tmp_path: tmp_path / "absent" / "file", "No such file or directory"),
        (lambda tmp_path: Path("/proc/file"), "cannot write /proc/file"),
        (lambda tmp_path: tmp_path, "it is a directory"),
        (read_only_file, "the file is read-only"),
        (read_only_directory, "is read-only"),
        (device, "not a regular file"),
        (loop, "symbolic links|File exists"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path, make: object, message: str) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as caught:
        put(path, b"new")
    assert str(path) in caught.value.message
    assert caught.value.suggestion
    assert not [name for _, _, files in os.walk(tmp_path) for name in files if name.endswith(".tmp")]


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        put(device(tmp_path), b"new")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
