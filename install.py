"""Run by web UIs and by ComfyUI's manager before they load this extension. Nothing is installed.

All that is used is in each of these programs: another torch beside theirs would break them.
"""

import importlib.metadata
import sys

LEAST = (2, 1)

if __name__ == "__main__":
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:  # a build that does not say
        sys.exit(0)
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST:
        sys.exit(f"tofu_sd needs torch {LEAST[0]}.{LEAST[1]} or newer; this is torch {found}")
