"""Atomic writes, messages for errors of the file system, and files that other programs saved."""

from __future__ import annotations

import codecs
import errno
import hashlib
import io
import itertools
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from .. import EvalError

ADVICE = {  # what to do about an error of the system
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space: the quota of that disk is used up",
    errno.EROFS: "nothing can be written on that disk; give a path on another",
    errno.EACCES: "change the permissions of that path, or give another",
    errno.EPERM: "change the permissions of that path, or give another",
    errno.EEXIST: "a file or a link is in the place of that folder; remove it or give another path",
    errno.ENOTDIR: "a part of that path is a file; give another path",
    errno.EISDIR: "a folder is in the place of that file; remove it or give another path",
    errno.ENOENT: "that path does not exist or cannot be made; give another",
    errno.ELOOP: "its links lead in a circle; give another path",
    errno.ENAMETOOLONG: "give a shorter path",
}
TEMPORARY = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}  # a later try can succeed


def write(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: readers, and a run that was killed, have the old file or the new one."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename != str(path.parent):
            raise OSError(
                error.errno, error.strerror, str(path)
            ) from error  # the user does not know the temporary file
        raise


def write_results(path: Path, value: Any) -> None:
    """Writes results as JSON. Different earlier results are kept under the next free number (`name.1.json`).

    A line on stderr names the file that holds them.
    """
    content = to_json(value)
    if path.is_file() and path.read_bytes() != content.encode():
        kept = next(p for n in itertools.count(1) if not (p := path.with_suffix(f".{n}{path.suffix}")).exists())
        path.rename(kept)
        print(f"{path.name} held earlier results, which are kept in {kept.name}", file=sys.stderr)
    write(path, content)


def explain(error: OSError) -> str:
    """An error of the system in one line: what, where and, if known, what to do."""
    text = " ".join(without_paths(str(error)).split())
    advice = ADVICE.get(error.errno or 0)
    return f"{text}: {advice}" if advice else text


def shown(path: Path) -> str:
    """The name of a path in a message: its last part, or all of it for paths such as '.' and '/'."""
    return path.name or str(path)


def check_exists(path: Path, option: str = "") -> None:
    """EvalError for a file or folder that does not exist. option: that names it, for the message."""
    if not path.exists():
        raise EvalError(f"{option} {without_paths(str(path))} does not exist".strip())


def check_place(path: Path, option: str, folder: bool = False) -> None:
    """Checks that a file or folder can be written, without writing: a full disk is not noticed.

    Args:
        path: the file or folder.
        option: that names it, for the message.
        folder: whether it is a folder.

    Raises:
        EvalError: something is in its place or above it.
    """
    what = f"{option} {shown(path)}"
    if path.is_dir() and not folder:
        raise EvalError(f"{what}: there is a folder of that name, and a file is written; give another path")
    if folder and path.exists() and not path.is_dir():
        raise EvalError(f"{what}: there is a file of that name, and a folder is needed; give another path")
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if there.is_symlink() and not there.exists():
        target = without_paths(os.readlink(there))
        raise EvalError(f"{what}: {shown(there)} is a link to {target!r}, which does not exist; give another path")
    if there != path and not there.is_dir():
        raise EvalError(f"{what}: {shown(there)!r} is a file, and no folder can be inside; give another path")
    if not os.access(there, os.W_OK):
        raise EvalError(f"{what}: {shown(there.absolute())!r} cannot be written to; {ADVICE[errno.EACCES]}")


ABANDONED = 3600.0  # seconds after which no process is still writing a file


def remove_temp_files(folder: Path) -> int:
    """Removes the temporary files of killed processes from a folder of images; returns how many."""
    removed = 0
    for path in list(folder.rglob(".*")):
        with suppress(FileNotFoundError):  # another process has finished with it
            if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name) and time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
                removed += 1
    return removed


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write(path, to_json(value))


def to_json(value: Any) -> str:
    """A value as indented JSON. ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any | None:
    """The content of a JSON file; None where it is missing or broken."""
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError):
        return None


def read_text(path: Path) -> str:
    """The text of a file as any program saves it, without a byte order mark and Windows' line ends.

    ValueError if it is not UTF-8.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def parse_json(text: str) -> Any:
    """The content of a JSON text. ValueError in one line for what is none; NaN and infinity are none."""

    def refuse(name: str) -> None:
        raise ValueError(f"not JSON: it holds {name}")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: it is nested too deeply") from error


def check_shape(found: Any, schema: dict[str, Any], name: str, writer: str) -> None:
    """EvalError where JSON of a file `name` has another shape than `writer` gives it. schema: a JSON Schema."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    wrong = best_match(Draft202012Validator(schema).iter_errors(found))
    if wrong is not None:
        at = "".join(f"[{part!r}]" for part in wrong.absolute_path)
        message = " ".join(wrong.message.split())[:200]
        raise EvalError(f"{name} is not as {writer} writes it: {f'in {at} ' if at else ''}{message}")


ABSOLUTE = re.compile(r"(?<![\w.:/<])(?:/|~/|[A-Za-z]:\\)(?:[^\s'\"<>:,;/\\]+[/\\])+([^\s'\"<>:,;/\\]*)")


def without_paths(text: str) -> str:
    """The text with absolute paths cut to their last part, as results are read on other machines."""
    return ABSOLUTE.sub(r"\1", text)


def digest(*paths: Path) -> str:
    """Hash of the names and contents of files."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def png(image: Image.Image) -> bytes:
    """An image as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
