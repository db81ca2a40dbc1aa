"""The working directory of a run, and the files in it that an agent may read and write. Blocking: not for the loop."""

import os
import shutil
import stat
from pathlib import Path

_MAX_FILE_BYTES = 4 << 20
_MAX_SKIPPED_BYTES = 256 << 20


class Refused(Exception):
    """The agent may not have what it asks for; the message says why."""


class WorkingDirectory:
    """An absolute path; `created` says that it was made for the run, so that it may be removed with it."""

    def __init__(self, path: Path, *, created: bool) -> None:
        self.path = path
        self.created = created

    @classmethod
    def make(cls, path: Path) -> "WorkingDirectory":
        """Make the directory where it is not there yet. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if not path.is_dir():
                raise NotADirectoryError(f"{path} is no directory") from None
            return cls(path, created=False)
        return cls(path, created=True)

    def remove(self) -> None:
        """Remove it with all that is in it, if it was made for the run."""
        if self.created:
            shutil.rmtree(self.path, ignore_errors=True)

    def inside(self, path: str) -> Path:
        """Return where a path leads, links followed. Raises Refused outside of the directory."""
        if "\0" in path:
            raise Refused("The path has a NUL character.")
        root = os.path.realpath(self.path)
        real = os.path.realpath(os.path.join(root, path))
        if real != root and not real.startswith(root.rstrip(os.sep) + os.sep):
            raise Refused(f"{path} is outside of the working directory {self.path}; only files in it can be used.")
        return Path(real)

    def read_text(self, path: str, line: int | None, limit: int | None) -> str:
        """Return a file's text: `limit` lines from `line`, which counts from 1. Raises Refused, FileNotFoundError."""
        real = self.inside(path)
        # Not to wait for who writes into a named pipe.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            _check_regular(path, os.fstat(descriptor).st_mode)
            parts: list[bytes] = []
            number = 1
            size = skipped = 0
            last = None if limit is None else (line or 1) + limit
            while (last is None or number < last) and (text := file.readline(_MAX_FILE_BYTES)):
                if number >= (line or 1):
                    size += len(text)
                    if size > _MAX_FILE_BYTES:
                        raise Refused(f"{path} has more than {_MAX_FILE_BYTES} bytes; ask for it by line and limit.")
                    parts.append(text)
                else:
                    skipped += len(text)
                    if skipped > _MAX_SKIPPED_BYTES:
                        raise Refused(f"{path} has more than {_MAX_SKIPPED_BYTES} bytes before line {line}.")
                number += text.endswith(b"\n")
        try:
            return b"".join(parts).decode()
        except UnicodeDecodeError:
            raise Refused(f"{path} is no text in UTF-8.") from None

    def write_text(self, path: str, text: str) -> None:
        """Write a file, made with its folders where it is not there. Raises Refused, OSError."""
        real = self.inside(path)
        data = text.encode()
        if len(data) > _MAX_FILE_BYTES:
            raise Refused(f"A file may have {_MAX_FILE_BYTES} bytes, this one has {len(data)}.")
        real.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(real, flags, 0o666), "wb") as file:
            _check_regular(path, os.fstat(file.fileno()).st_mode)
            file.truncate(0)
            file.write(data)


def _check_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise Refused(f"{path} is no regular file.")
