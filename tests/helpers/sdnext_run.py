"""Draws in SD.Next's own code, on a CPU, and prints what came as JSON. See test_hosts_sdnext.py.

Run in the program's folder, with the packages that it names. Its scripts, its screen and its processing are its own;
the pipeline is small and has random weights, and no server is started.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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


def begin():
    """Starts the program but for its server, with a pipeline in the place of a checkpoint."""
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


class Screen:
    """The tab for pictures from words."""

    def __init__(self):
        import gradio
        from modules import scripts_manager

        self.runner = scripts_manager.scripts_txt2img
        with gradio.Blocks():
            self.runner.initialize_scripts(is_img2img=False)
            self.fields = self.runner.setup_ui(parent="txt2img")
        named = {script.title(): script for script in self.runner.alwayson_scripts}
        self.ours, self.grid = named["Token Fusion (ToFu)"], named["XYZ Grid"]
        self.axes = [axis.label for axis in self.grid.current_axis_options]

    def draw(self, args=(), axis=None, interrupted=False, **more):
        """The pictures, the parameters of the first, and what stands below. axis: its label and values."""
        from modules import processing, processing_class, shared

        values = [getattr(field, "value", None) for field in self.fields]
        values[0] = 0  # no script that is chosen
        values[self.ours.args_from : self.ours.args_from + len(args)] = args
        if axis:
            label, given = axis
            told = {0: True, 1: self.axes.index(label), 2: given, 10: True, 11: False, 13: True, 15: True}
            for place, value in told.items():  # on, axis, values, as text, no legend, the grid, its images
                values[self.grid.args_from + place] = value
        told = {"prompt": "a fox", "seed": 1, "steps": 3, "width": 128, "height": 128, "sampler_name": "Default"}
        p = processing_class.StableDiffusionProcessingTxt2Img(**{**told, "cfg_scale": 5, "vae_type": "Full", **more})
        p.scripts, p.script_args = self.runner, values
        p.do_not_save_samples = p.do_not_save_grid = p.disable_extra_networks = True

        def interrupt(*told):  # by a person, after the first call of the UNet
            shared.state.interrupted = True

        hook = shared.sd_model.unet.register_forward_hook(interrupt) if interrupted else None
        drawn = processing.process_images(p)
        if hook is not None:
            assert shared.state.interrupted
            hook.remove()
            shared.state.interrupted = False
        pictures = [hashlib.sha256(image.tobytes()).hexdigest() for image in drawn.images]
        return {"pictures": pictures, "saved": drawn.info, "below": drawn.comments}


def look():
    pipe = begin()
    from modules import shared

    screen = Screen()
    before = [(name, type(module)) for name, module in pipe.unet.named_modules()]
    faithful = {"early": "mean", "late": "mean", "proportional": True, "window": 8}
    drawn = {
        "off": screen.draw(), "on": screen.draw([True]), "off again": screen.draw(),
        "quarter": screen.draw([True, 0.25]), "ratio 0": screen.draw([True, 0.0]),
        "faithful": screen.draw([faithful]), "keys": screen.draw([{"kv_only": True}]),
        "out of range": screen.draw([True, 0.9]),
        "grid": screen.draw(axis=("[ToFu] Ratio", "0,0.25,0.5")),
        "grid of words": screen.draw(axis=("[ToFu] Kv only", "False,True")),
        "grid out of range": screen.draw(axis=("[ToFu] Ratio", "0.25,0.9")),
        "interrupted": screen.draw([True], interrupted=True), "off after it": screen.draw(),
    }  # fmt: skip
    shared.opts.data.update(token_merging_method="ToMe", tome_ratio=0.3)
    drawn |= {"built-in": screen.draw(), "both": screen.draw([True])}
    shared.opts.data.update(token_merging_method="None", tome_ratio=0.0)
    drawn["off at last"] = screen.draw()
    left = before == [(name, type(module)) for name, module in pipe.unet.named_modules()]
    shown = screen.ours.args_to - screen.ours.args_from
    return {"axes": screen.axes, "shown": shown, "drawn": drawn, "nothing is left": left}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # which is the program's log
        found = look()
    print(json.dumps(found))
