"""Files that are whole or not there, and no paths of this machine in what is written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image


def write(path: Path, content: bytes | str) -> None:
    """Writes a file at once: whoever looks, or whatever stops us, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


ABANDONED = 3600.0  # seconds after which no one is still writing a file


def tidy(folder: Path) -> int:
    """Removes what writers that were killed have left behind in a folder of pictures; how many files it were."""
    left = 0
    for path in list(folder.rglob(".*")):
        with suppress(FileNotFoundError):  # another process is done with it
            if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name) and time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
                left += 1
    return left


def write_json(path: Path, value: Any) -> None:
    write(path, to_json(value))


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any | None:
    """The content of a JSON file; None where there is none or it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


ABSOLUTE = re.compile(r"(?<![\w.:/<])(?:/|~/|[A-Za-z]:\\)(?:[^\s'\"<>:,;/\\]+[/\\])+([^\s'\"<>:,;/\\]*)")


def without_paths(text: str) -> str:
    """The text with absolute paths cut down to their last part: results travel, machines do not."""
    return ABSOLUTE.sub(r"\1", text)


def digest(*paths: Path) -> str:
    """Changes with any of these files."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def listed(names: Sequence[str], most: int = 5) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
