"""Replaces a file by another as a whole: whatever happens on the way, the old one is intact until the new one is."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mono_quant.errors import CheckpointError

_REMEDIES = {
    errno.ENOSPC: "Free some space, or save somewhere else; an older file of that name is unchanged.",
    errno.EDQUOT: "Free some of your quota, or save somewhere else; an older file of that name is unchanged.",
    errno.EFBIG: "Raise the limit on file sizes, or save somewhere else; an older file of that name is unchanged.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "Create the directory first.",
    errno.ENOTDIR: "A part of the path is a file; choose another place.",
    errno.EACCES: "Choose a place that you may write to.",
    errno.EPERM: "Choose a place that you may write to.",
    errno.EROFS: "The file system is read-only; save somewhere else.",
}


def write_error(path: Path, error: OSError) -> CheckpointError:
    """Answer the error that says that ``path`` could not be written, with what to do about it."""
    reason = error.strerror or str(error)
    remedy = _REMEDIES.get(error.errno or 0, "An older file of that name is unchanged.")
    return CheckpointError(f"cannot write {path}: {reason}", suggestion=remedy)


class PendingFile:
    """A new version of a file that nobody sees before :meth:`commit`.

    It is written to a temporary file in the directory of the target: the rename at the end then stays within one file
    system, where it happens as a whole. A symbolic link is followed, so that the link stays and what it points to is
    replaced; the permissions of an existing file are kept.

    Attributes:
        stream: Where to write.

    Raises:
        CheckpointError: The target cannot be written, or is not a regular file.
    """

    stream: BinaryIO

    def __init__(self, path: Path) -> None:
        self._path = path
        self._target = Path(os.path.realpath(path))
        self._temporary = self._target.with_name(f".{self._target.name}.{secrets.token_hex(8)}.tmp")
        try:
            self._old = _stat_target(path, self._target)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            # The umask applies, as to any new file.
            descriptor = os.open(self._temporary, flags, 0o666)
        except OSError as error:
            raise write_error(path, error) from error
        self.stream = os.fdopen(descriptor, "wb")

    def finish(self) -> None:
        """Bring the bytes to the disk; the target is still the old one.

        Raises:
            OSError: They do not fit.
        """
        self.stream.flush()
        os.fsync(self.stream.fileno())
        if self._old is not None:
            os.fchmod(self.stream.fileno(), stat.S_IMODE(self._old.st_mode))
            # Only root may give a file away; for everyone else the new file is theirs, as with any editor.
            with suppress(OSError):
                os.fchown(self.stream.fileno(), self._old.st_uid, self._old.st_gid)
        self.stream.close()

    def commit(self) -> None:
        """Put the new file in the place of the old one.

        Raises:
            OSError: It cannot be renamed.
        """
        os.replace(self._temporary, self._target)
        # The new file is whole either way; a file system that cannot sync directories just renames it later on disk.
        with suppress(OSError):
            directory = os.open(self._target.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def discard(self) -> None:
        """Remove the temporary file; without effect after :meth:`commit`."""
        with suppress(OSError):
            self.stream.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def _stat_target(path: Path, target: Path) -> os.stat_result | None:
    """Answer what is known of an existing target.

    Raises:
        CheckpointError: It may not or cannot be replaced by a file.
    """
    # root may write anywhere; what is marked read-only is still meant to stay as it is.
    parent = target.parent.stat()
    if stat.S_ISDIR(parent.st_mode) and not parent.st_mode & 0o222:
        raise CheckpointError(
            f"cannot write {path}: the directory {target.parent} is read-only",
            suggestion="Make it writable, or save somewhere else.",
        )
    try:
        old = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(old.st_mode):
        raise CheckpointError(f"cannot write {path}: it is a directory", suggestion="Name a file inside it.")
    if not stat.S_ISREG(old.st_mode):
        # Renaming would put a file in the place of a device or a pipe.
        raise CheckpointError(f"cannot write {path}: it is not a regular file", suggestion="Save somewhere else.")
    if not old.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise CheckpointError(
            f"cannot write {path}: the file is read-only",
            suggestion="Make it writable, or save under another name.",
        )
    return old


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; it changes when the block ends, as a whole, and not at all if the block fails.

    Raises:
        CheckpointError: The file cannot be written; the old one, if there is one, is unchanged.
    """
    pending = PendingFile(path)
    try:
        yield pending.stream
        pending.finish()
        pending.commit()
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        pending.discard()
