"""ComfyUI loads this folder from custom_nodes/ by this file. To Python it is no package: `pip install .` takes tofu_sd.

tofu_sd is loaded under its own name, whatever the folder is called: its kernels are registered with torch once in a
process, and a copy of it that is there already is the one that is used.
"""

import sys

if "comfy" in sys.modules:  # in the program: others import this file too, as pytest does
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    if "tofu_sd" not in sys.modules:
        folder = Path(__file__).parent / "tofu_sd"
        spec = spec_from_file_location("tofu_sd", folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules["tofu_sd"] = package = module_from_spec(spec)
        try:
            spec.loader.exec_module(package)
        except BaseException:
            del sys.modules["tofu_sd"]
            raise
    from tofu_sd.hosts import comfyui

    # both at once would be loaded as the older kind
    if comfyui.io is not None:
        comfy_entrypoint = comfyui.comfy_entrypoint
    else:
        NODE_CLASS_MAPPINGS = comfyui.NODE_CLASS_MAPPINGS
        NODE_DISPLAY_NAME_MAPPINGS = comfyui.NODE_DISPLAY_NAME_MAPPINGS
