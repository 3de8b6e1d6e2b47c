"""ComfyUI loads this folder from custom_nodes/ by this file. To Python it is no package: `pip install .` takes tofu_sd.

tofu_sd is loaded under its own name, whatever the folder is called: its kernels are registered with torch once in a
process, and a copy of it that is there already is the one that is used. Where the folder itself is called tofu_sd and
Python runs in the folder above it, `import tofu_sd` finds this file first; it then gives the package.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def _load_package():
    """Imports the package below this folder as tofu_sd, in the place of what has that name."""
    folder, before = Path(__file__).parent / "tofu_sd", sys.modules.get("tofu_sd")
    spec = spec_from_file_location("tofu_sd", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tofu_sd"] = package = module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules["tofu_sd"]
        if before is not None:
            sys.modules["tofu_sd"] = before
        raise


if __name__ == "tofu_sd":  # imported by that name: Python takes what stands in sys.modules after this
    _load_package()
elif "comfy" in sys.modules:  # in the program: others import this file too, as pytest does
    if "tofu_sd" not in sys.modules:
        _load_package()
    from tofu_sd.hosts import comfyui

    WEB_DIRECTORY = "./web"  # reads workflows that were saved before the node had a preset
    # both at once would be loaded as the older kind
    if comfyui.io is not None:
        comfy_entrypoint = comfyui.comfy_entrypoint
    else:
        NODE_CLASS_MAPPINGS = comfyui.NODE_CLASS_MAPPINGS
        NODE_DISPLAY_NAME_MAPPINGS = comfyui.NODE_DISPLAY_NAME_MAPPINGS
