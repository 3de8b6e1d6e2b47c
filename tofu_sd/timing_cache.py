"""What was measured to be faster on this machine: for this process, and in a file in the user's cache folder.

The file makes the same image on the same machine tomorrow. Without it, or where it cannot be read or written, every
process measures for itself.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("tofu_sd")

FILE = "attention-times.json"
FORMAT = 1
MOST = 1000  # measurements that the file keeps; the oldest go first
PAYS_BELOW = 0.97  # merging has to be this much faster, as a measurement is not exact


@dataclass(frozen=True)
class Timing:
    """Seconds of two ways to compute the same layer.

    Args:
        full: of the usual way: self-attention of all tokens, or a bias.
        merged: of the other one: matching and self-attention of merged tokens, or attention by size.
    """

    full: float
    merged: float

    @property
    def ratio(self) -> float:
        """How many times as long merging takes."""
        return self.merged / self.full

    @property
    def pays(self) -> bool:
        return self.ratio < PAYS_BELOW


def cache_folder() -> Path:
    """Returns this package's folder in the user's cache folder. RuntimeError without a home."""
    if own := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(own) / "tofu_sd"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "tofu_sd"


class TimingCache:
    """Timings by a text that says what was measured.

    Args:
        file: of the timings; None for the user's cache folder, found at the first use.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self._timings: dict[str, Timing] | None = None

    def get(self, key: str) -> Timing | None:
        """Returns a timing; None where there is none."""
        if self._timings is None:
            self._timings = self._read()
        return self._timings.get(key)

    def put(self, key: str, timing: Timing) -> None:
        """Keeps a timing, in the file too if it can be written. Other processes' timings stay."""
        self.get(key)
        assert self._timings is not None
        self._timings = {**self._read(), **self._timings, key: timing}
        try:
            self._write(self._timings)
        except (OSError, RuntimeError) as error:  # a read-only home, a full disk, no home
            logger.debug(f"the times of attention stay in this process: {error}")

    def _path(self) -> Path:
        return self.file or cache_folder() / FILE

    def _read(self) -> dict[str, Timing]:
        """Returns what the file holds; nothing where it is missing or damaged, or of another format."""
        try:
            found = json.loads(self._path().read_text(encoding="utf-8"))
            timings = found["timings"].items() if found["format"] == FORMAT else ()
            return {key: timing for key, value in timings if (timing := _timing(value)) is not None}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            return {}

    def _write(self, timings: dict[str, Timing]) -> None:
        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = dict(list(timings.items())[-MOST:])
        content = {"format": FORMAT, "timings": {key: [timing.full, timing.merged] for key, timing in kept.items()}}
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=FILE, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(part, path)  # readers never see half a file
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise


def _timing(value: Any) -> Timing | None:
    """Returns a timing from [full, merged]; None where that is damaged."""
    full, merged = map(float, value)
    return Timing(full, merged) if full > 0 and merged > 0 and math.isfinite(full + merged) else None


cache = TimingCache()
