"""Generates images in SD.Next's own code, on a CPU, and prints the results as JSON. See tests/hosts/test_sdnext.py.

Run it in SD.Next's folder, with SD.Next's packages. Scripts, UI and processing are SD.Next's own. The pipeline is small
and has random weights; no server is started.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(sys.argv[1])
(FOLDER / "extensions").mkdir()
(FOLDER / "extensions" / "tofu_sd").symlink_to(ROOT)
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="False")
sys.path.insert(0, str(Path.cwd()))
sys.argv = ["launch.py", "--data-dir", str(FOLDER), "--models-dir", str(FOLDER / "models"), "--skip-all", "--skip-git",
            "--skip-env", "--skip-requirements", "--no-half", "--no-hashing"]  # fmt: skip
import comfyui_torchvision  # noqa: E402, F401
import torch  # noqa: E402

torch.set_num_threads(1)


def start_sdnext():
    """Starts SD.Next without its server, with a pipeline instead of a checkpoint."""
    import installer
    import launch

    launch.init_args()
    installer.args = launch.args
    installer.setup_logging(debug=False, trace=False, filename=str(FOLDER / "log"))
    launch.init_paths()
    installer.read_options()
    launch.args = installer.parse_args(launch.parser)
    launch.get_custom_args()
    import webui

    webui.initialize()
    import tiny
    from modules import modeldata, script_callbacks, shared

    pipe = tiny.sd15_pipe()
    pipe.sd_model_checkpoint, pipe.sd_model_hash = "small", "0"
    pipe.sd_checkpoint_info = types.SimpleNamespace(
        **dict.fromkeys(("name", "model_name", "title", "filename"), "small")
    )
    modeldata.model_data.sd_model, modeldata.model_data.initial = pipe, False
    shared.opts.data.update(prompt_attention="fixed", live_previews_enable=False, grid_save=False)
    script_callbacks.before_ui_callback()
    return pipe


class Txt2ImgTab:
    """The txt2img tab."""

    def __init__(self):
        import gradio
        from modules import scripts_manager

        self.runner = scripts_manager.scripts_txt2img
        with gradio.Blocks():
            self.runner.initialize_scripts(is_img2img=False)
            self.fields = self.runner.setup_ui(parent="txt2img")
        by_title = {script.title(): script for script in self.runner.alwayson_scripts}
        self.ours, self.grid = by_title["Token Fusion (ToFu)"], by_title["XYZ Grid"]
        self.axes = [axis.label for axis in self.grid.current_axis_options]

    def generate(self, args=(), axis=None, interrupted=False, **more):
        """Returns hashes of the images, the parameters of the first, and the comments. axis: its label and values."""
        from modules import processing, processing_class, shared

        values = [getattr(field, "value", None) for field in self.fields]
        values[0] = 0  # no selected script
        values[self.ours.args_from : self.ours.args_from + len(args)] = args
        if axis:
            label, axis_values = axis
            grid_values = {0: True, 1: self.axes.index(label), 2: axis_values, 10: True, 11: False, 13: True, 15: True}
            for place, value in grid_values.items():  # on, axis, values, as text, no legend, the grid, its images
                values[self.grid.args_from + place] = value
        options = {"prompt": "a fox", "seed": 1, "steps": 3, "width": 128, "height": 128, "sampler_name": "Default"}
        p = processing_class.StableDiffusionProcessingTxt2Img(**{**options, "cfg_scale": 5, "vae_type": "Full", **more})
        p.scripts, p.script_args = self.runner, values
        p.do_not_save_samples = p.do_not_save_grid = p.disable_extra_networks = True

        def interrupt(*call):  # as a user would, after the first UNet call
            shared.state.interrupted = True

        hook = shared.sd_model.unet.register_forward_hook(interrupt) if interrupted else None
        processed = processing.process_images(p)
        if hook is not None:
            assert shared.state.interrupted
            hook.remove()
            shared.state.interrupted = False
        hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in processed.images]
        return {"hashes": hashes, "saved": processed.info, "below": processed.comments}


def run_checks():
    pipe = start_sdnext()
    from modules import shared

    tab = Txt2ImgTab()
    before = [(name, type(module)) for name, module in pipe.unet.named_modules()]
    faithful = {"early": "mean", "late": "mean", "proportional": True, "window": 8}
    images = {
        "off": tab.generate(), "on": tab.generate([True]), "off again": tab.generate(),
        "quarter": tab.generate([True, 0.25]), "ratio 0": tab.generate([True, 0.0]),
        "faithful": tab.generate([faithful]), "keys": tab.generate([{"kv_only": True}]),
        "out of range": tab.generate([True, 0.9]),
        "grid": tab.generate(axis=("[ToFu] Ratio", "0,0.25,0.5")),
        "grid of words": tab.generate(axis=("[ToFu] Kv only", "False,True")),
        "grid out of range": tab.generate(axis=("[ToFu] Ratio", "0.25,0.9")),
        "interrupted": tab.generate([True], interrupted=True), "off after it": tab.generate(),
    }  # fmt: skip
    shared.opts.data.update(token_merging_method="ToMe", tome_ratio=0.3)
    images |= {"built-in": tab.generate(), "both": tab.generate([True])}
    shared.opts.data.update(token_merging_method="None", tome_ratio=0.0)
    images["off at last"] = tab.generate()
    restored = before == [(name, type(module)) for name, module in pipe.unet.named_modules()]
    shown = tab.ours.args_to - tab.ours.args_from
    return {"axes": tab.axes, "shown": shown, "images": images, "restored": restored}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # SD.Next logs to stdout
        results = run_checks()
    print(json.dumps(results))
