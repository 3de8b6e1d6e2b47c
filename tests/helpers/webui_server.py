"""Starts a web UI with this repository as an extension, on a CPU, asks it for pictures, and prints what came as JSON.

It is the one whose folder this is run in: AUTOMATIC1111, Forge, Forge Neo or reForge. It needs all that the program
needs (requirements_versions.txt, its repositories/, the tokenizer that AUTOMATIC1111 loads from the hub's cache). What
is drawn with is a random model in SD 1.5's layout and size, as no checkpoint can be had. See
test_hosts_webui_programs.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
PROGRAM = Path.cwd()
FORGES = (PROGRAM / "modules_forge").exists()  # and reForge's
NEO = (PROGRAM / "modules_forge" / "packages").exists()
ARGUMENTS = ["--skip-prepare-environment", "--skip-torch-cuda-test", "--no-hashing", "--api",
             *([] if NEO else ["--no-download-sd-model"]),
             *(["--cpu", "--force-fp32"] if NEO else ["--always-cpu", "--all-in-fp32"] if FORGES else
               ["--use-cpu", "all", "--no-half", "--precision", "full", "--do-not-download-clip"])]  # fmt: skip
START = ["launch.py"]
if NEO:  # it imports torchvision, which may not fit a torch for CPUs
    START = ["-c", "import comfyui_torchvision, runpy; runpy.run_path('launch.py', run_name='__main__')"]
PICTURE = {"prompt": "a torus", "seed": 1, "steps": 2, "width": 128, "height": 128, "sampler_name": "Euler"}
FAITHFUL = {"early": "mean", "late": "mean", "proportional": True, "window": 8}


class Server:
    """The program, until the end of the block; its folder of settings, models and extensions is a new one."""

    def __enter__(self) -> Server:
        self.folder = tempfile.TemporaryDirectory()
        home = Path(self.folder.name)
        (home / "extensions").mkdir()
        (home / "extensions" / "tofu_sd").symlink_to(ROOT)
        (home / "models" / "Stable-diffusion").mkdir(parents=True)
        settings = {"live_previews_enable": False}  # they need a net of their own
        if NEO:  # which asks whoever has settings of an earlier version to install it anew
            told = re.search(r'VERSION_UID\b.*= "(\w+)"', (PROGRAM / "modules" / "launch_utils.py").read_text())
            settings |= {"VERSION_UID": told[1]} if told else {}
        (home / "config.json").write_text(json.dumps(settings))
        saved = {f"customscript/tofu_sd_webui.py/{tab}/Hires ratio/value": 0.25 for tab in ("txt2img", "img2img")}
        (home / "ui-config.json").write_text(json.dumps(saved))  # as Settings, Defaults writes it
        made = home / "models" / "Stable-diffusion" / "random.safetensors"
        subprocess.run([sys.executable, str(HELPERS / "sd15_file.py"), str(made)], check=True, stdout=sys.stderr)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = home / "log"
        paths = [str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])]
        shown = {"PYTHONPATH": os.pathsep.join(paths)} if NEO else {}
        self.process = subprocess.Popen(
            [sys.executable, *START, *ARGUMENTS, "--data-dir", str(home), "--port", str(port)],
            stdout=self.log.open("w"), stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **shown},
        )  # fmt: skip
        for _ in range(300):
            time.sleep(1)
            if self.process.poll() is not None:
                break
            try:
                self.call("/sdapi/v1/script-info")
            except (urllib.error.URLError, ConnectionError):
                continue
            if NEO and "Startup time" not in self.log.read_text():
                continue  # it answers before it knows what its scripts ask for
            return self
        said = self.log.read_text()[-3000:]
        self.__exit__()
        raise RuntimeError(said)

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        if any(error):
            print(self.log.read_text()[-2000:], file=sys.stderr)
        self.folder.cleanup()

    def call(self, path: str, body: dict | None = None) -> dict:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if body is None:
                raise
            raise RuntimeError(error.read().decode()) from None

    def stop(self, at: int, **more: object) -> int:
        """Begins a picture, interrupts it at a step, and gives the step that it had come to."""
        with ThreadPoolExecutor(1) as beside:
            begun = beside.submit(self.draw, steps=50, **more)
            while (step := self.call("/sdapi/v1/progress")["state"]["sampling_step"]) < at:
                assert not begun.done()
                time.sleep(0.1)
            self.call("/sdapi/v1/interrupt", {})
            begun.result()
        return step

    def draw(self, args: list | None = None, kind: str = "txt2img", beside: dict | None = None, **more: object) -> dict:
        """The pictures, the parameters of the first, and what the log said. beside: the arguments of other scripts."""
        before = len(self.log.read_text())
        body = {**PICTURE, "override_settings": {"token_merging_ratio": 0.0}, **more}
        body["alwayson_scripts"] = {name: {"args": told} for name, told in (beside or {}).items()}
        if args is not None:
            body["alwayson_scripts"]["token fusion (tofu)"] = {"args": args}
        answer = self.call(f"/sdapi/v1/{kind}", body)
        saved = json.loads(answer["info"])["infotexts"][0].partition("Steps: ")[2]
        said = [line for line in self.log.read_text()[before:].splitlines() if "transformer blocks" in line
                or "Token Fusion" in line]  # fmt: skip
        return {"pictures": [pixels(image) for image in answer["images"]], "saved": saved, "said": said}


def pixels(image: str) -> str:
    """A picture's, without what is saved beside them."""
    return hashlib.sha256(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB").tobytes()).hexdigest()


def start() -> str:
    """A picture to begin with."""
    content = io.BytesIO()
    Image.radial_gradient("L").resize((128, 128)).convert("RGB").save(content, "png")
    return base64.b64encode(content.getvalue()).decode()


def look() -> dict:
    with Server() as server:
        scripts = server.call("/sdapi/v1/script-info")
        ours = next(script for script in scripts if script["name"] == "token fusion (tofu)")
        grid = next(script for script in scripts if script["name"] == "x/y/z plot")
        axes = grid["args"][0]["choices"]
        faithful = [True, 0.5, 0.5, "mean", "mean", -1, True, False, 1, 0, 1, -1, 8]
        hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.5}
        if not server.call("/sdapi/v1/latent-upscale-modes"):  # Forge Neo has none
            hires["hr_upscaler"] = "None"
        if (PROGRAM / "backend").exists():  # Forge asks which text encoder
            hires["hr_additional_modules"] = ["Use same choices"]
        x, nothing = [axes.index("[ToFu] Ratio"), "0,0.5", []], [axes.index("Nothing"), "", []]
        wanted = {"Draw legend": False, "Include Sub Images": True}
        rest = [wanted.get(arg["label"], arg["value"]) for arg in grid["args"][9:]]
        drawn = {
            "off": server.draw(),
            "off again": server.draw([False]),
            "on": server.draw([True]),
            "by name": server.draw([FAITHFUL]),
            "by place": server.draw(faithful),
            "ratio 0": server.draw([{"ratio": 0}]),
            "hires": server.draw([{**FAITHFUL, "hires_ratio": 0.25}], **hires),
            "out of range": server.draw([{"ratio": 0.9}]),
            "built-in": server.draw([{}], override_settings={"token_merging_ratio": 0.3}),
            "built-in alone": server.draw(override_settings={"token_merging_ratio": 0.3}),
            "img2img off": server.draw(kind="img2img", init_images=[start()]),
            "img2img": server.draw([True], "img2img", init_images=[start()]),
            "odd off": server.draw(width=136, height=120),
            "odd": server.draw([True], width=136, height=120),
            "grid": server.draw(script_name="x/y/z plot", script_args=[*x, *nothing, *nothing, *rest]),
        }  # fmt: skip
        stopped = server.stop(2, args=[True])
        drawn["off at last"] = server.draw()
        tiled = {}
        if "hypertile_enable_unet" in server.call("/sdapi/v1/options"):  # AUTOMATIC1111's
            tiling = {"hypertile_enable_unet": True, "hypertile_max_tile_unet": 128}
            tiled = {"override_settings": {"token_merging_ratio": 0.0, **tiling}}
        elif "hypertile integrated" in [script["name"] for script in scripts]:  # reForge's
            tiled = {"beside": {"hypertile integrated": [True, 64, 1, 0, False]}}
        if tiled:  # last, as AUTOMATIC1111's own does not give the layers back
            large = {"width": 256, "height": 256}  # no tile is smaller than 128 pixels
            drawn["untiled"] = server.draw(**large)
            drawn["tiled alone"] = server.draw(**tiled, **large)
            drawn["tiled"] = server.draw([True], **tiled, **large)
        fields = [part["props"] for part in server.call("/config")["components"]]
        return {
            "arguments": [arg["label"] for arg in ours["args"]], "axes": axes, "drawn": drawn, "stopped at": stopped,
            "saved default": [field["value"] for field in fields if field.get("label") == "Hires ratio"],
        }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(look()))
