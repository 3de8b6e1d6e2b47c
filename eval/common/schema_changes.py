"""Converts results that earlier versions of this package wrote."""

from __future__ import annotations

import re
from typing import Any

RENAMED = {  # options of TokenFusionConfig, in method names and commands
    "keys_only": "kv_only",
    "share_level": "share_across_blocks",
    "share_guidance": "share_across_cfg",
    "match_every": "match_interval",
    "threshold_least": "threshold_min",
}
_OLD = re.compile(rf"(?<!\w)({'|'.join(RENAMED)})(?!\w)")


def convert(value: Any) -> Any:
    """A JSON value in which all strings and keys have the names of this version."""
    if isinstance(value, str):
        return _OLD.sub(lambda name: RENAMED[name[1]], value)
    if isinstance(value, list):
        return [convert(one) for one in value]
    if isinstance(value, dict):
        return {convert(key): convert(one) for key, one in value.items()}
    return value
