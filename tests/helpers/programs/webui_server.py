"""Starts a web UI with this repository as an extension, on a CPU, requests images and prints the results as JSON.

Run it in the folder of AUTOMATIC1111, Forge, Forge Neo or reForge. It needs the program's requirements
(requirements_versions.txt, its repositories/, the tokenizer that AUTOMATIC1111 loads from the hub's cache). The
checkpoint has SD 1.5's layout and size and random weights, as published ones are unavailable offline. See
tests/hosts/test_webui_programs.py.
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

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "tests" / "helpers" / "programs"
PROGRAM = Path.cwd()
IS_FORGE = (PROGRAM / "modules_forge").exists()  # Forge or reForge
NEO = (PROGRAM / "modules_forge" / "packages").exists()
ARGUMENTS = ["--skip-prepare-environment", "--skip-torch-cuda-test", "--no-hashing", "--api",
             *([] if NEO else ["--no-download-sd-model"]),
             *(["--cpu", "--force-fp32"] if NEO else ["--always-cpu", "--all-in-fp32"] if IS_FORGE else
               ["--use-cpu", "all", "--no-half", "--precision", "full", "--do-not-download-clip"])]  # fmt: skip
START = ["launch.py"]
if NEO:  # it imports torchvision, which may not fit a torch for CPUs
    START = ["-c", "import comfyui_torchvision, runpy; runpy.run_path('launch.py', run_name='__main__')"]
IMAGE = {"prompt": "a torus", "seed": 1, "steps": 2, "width": 128, "height": 128, "sampler_name": "Euler"}
FAITHFUL = {"early": "mean", "late": "mean", "proportional": True, "window": 8}


class Server:
    """Runs the program inside the block, with a new folder of settings, models and extensions."""

    def __enter__(self) -> Server:
        self.folder = tempfile.TemporaryDirectory()
        home = Path(self.folder.name)
        (home / "extensions").mkdir()
        (home / "extensions" / "tofu_sd").symlink_to(ROOT)
        (home / "models" / "Stable-diffusion").mkdir(parents=True)
        settings = {"live_previews_enable": False}  # previews need a model of their own
        if NEO:  # Forge Neo rejects settings of an earlier version
            version = re.search(r'VERSION_UID\b.*= "(\w+)"', (PROGRAM / "modules" / "launch_utils.py").read_text())
            settings |= {"VERSION_UID": version[1]} if version else {}
        (home / "config.json").write_text(json.dumps(settings))
        saved = {f"customscript/tofu_sd_webui.py/{tab}/Hires ratio/value": 0.25 for tab in ("txt2img", "img2img")}
        (home / "ui-config.json").write_text(json.dumps(saved))  # as Settings, Defaults writes it
        made = home / "models" / "Stable-diffusion" / "random.safetensors"
        subprocess.run([sys.executable, str(SCRIPTS / "sd15_file.py"), str(made)], check=True, stdout=sys.stderr)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = home / "log"
        paths = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
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
                continue  # the API answers before the scripts are loaded
            return self
        log = self.log.read_text()[-3000:]
        self.__exit__()
        raise RuntimeError(log)

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
        """Starts an image, interrupts it at a step, and returns the step it had reached."""
        with ThreadPoolExecutor(1) as executor:
            request = executor.submit(self.generate, steps=50, **more)
            while (step := self.call("/sdapi/v1/progress")["state"]["sampling_step"]) < at:
                assert not request.done()
                time.sleep(0.1)
            self.call("/sdapi/v1/interrupt", {})
            request.result()
        return step

    def generate(
        self, args: list | None = None, kind: str = "txt2img", beside: dict | None = None, **more: object
    ) -> dict:
        """Returns hashes of the images, the parameters of the first, log lines. beside: other scripts' arguments."""
        before = len(self.log.read_text())
        body = {**IMAGE, "override_settings": {"token_merging_ratio": 0.0}, **more}
        body["alwayson_scripts"] = {name: {"args": arguments} for name, arguments in (beside or {}).items()}
        if args is not None:
            body["alwayson_scripts"]["token fusion (tofu)"] = {"args": args}
        answer = self.call(f"/sdapi/v1/{kind}", body)
        saved = json.loads(answer["info"])["infotexts"][0].partition("Steps: ")[2]
        log = [line for line in self.log.read_text()[before:].splitlines() if "transformer blocks" in line
                or "Token Fusion" in line]  # fmt: skip
        return {"hashes": [pixels(image) for image in answer["images"]], "saved": saved, "log": log}


def pixels(image: str) -> str:
    """Returns a hash of an image's pixels, without its metadata."""
    return hashlib.sha256(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB").tobytes()).hexdigest()


def input_image() -> str:
    """Returns an input image for img2img."""
    content = io.BytesIO()
    Image.radial_gradient("L").resize((128, 128)).convert("RGB").save(content, "png")
    return base64.b64encode(content.getvalue()).decode()


def run_checks() -> dict:
    with Server() as server:
        scripts = server.call("/sdapi/v1/script-info")
        ours = next(script for script in scripts if script["name"] == "token fusion (tofu)")
        grid = next(script for script in scripts if script["name"] == "x/y/z plot")
        axes = grid["args"][0]["choices"]
        faithful = [True, 0.5, 0.5, "mean", "mean", -1, True, False, 1, 0, 1, -1, 8]
        hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.5}
        if not server.call("/sdapi/v1/latent-upscale-modes"):  # Forge Neo has none
            hires["hr_upscaler"] = "None"
        if (PROGRAM / "backend").exists():  # Forge needs a text encoder here
            hires["hr_additional_modules"] = ["Use same choices"]
        x, nothing = [axes.index("[ToFu] Ratio"), "0,0.5", []], [axes.index("Nothing"), "", []]
        wanted = {"Draw legend": False, "Include Sub Images": True}
        rest = [wanted.get(arg["label"], arg["value"]) for arg in grid["args"][9:]]
        images = {
            "off": server.generate(),
            "off again": server.generate([False]),
            "on": server.generate([True]),
            "by name": server.generate([FAITHFUL]),
            "by place": server.generate(faithful),
            "ratio 0": server.generate([{"ratio": 0}]),
            "hires": server.generate([{**FAITHFUL, "hires_ratio": 0.25}], **hires),
            "out of range": server.generate([{"ratio": 0.9}]),
            "built-in": server.generate([{}], override_settings={"token_merging_ratio": 0.3}),
            "built-in alone": server.generate(override_settings={"token_merging_ratio": 0.3}),
            "img2img off": server.generate(kind="img2img", init_images=[input_image()]),
            "img2img": server.generate([True], "img2img", init_images=[input_image()]),
            "odd off": server.generate(width=136, height=120),
            "odd": server.generate([True], width=136, height=120),
            "grid": server.generate(script_name="x/y/z plot", script_args=[*x, *nothing, *nothing, *rest]),
        }  # fmt: skip
        stopped = server.stop(2, args=[True])
        images["off at last"] = server.generate()
        tiled = {}
        if "hypertile_enable_unet" in server.call("/sdapi/v1/options"):  # AUTOMATIC1111's
            tiling = {"hypertile_enable_unet": True, "hypertile_max_tile_unet": 128}
            tiled = {"override_settings": {"token_merging_ratio": 0.0, **tiling}}
        elif "hypertile integrated" in [script["name"] for script in scripts]:  # reForge's
            tiled = {"beside": {"hypertile integrated": [True, 64, 1, 0, False]}}
        if tiled:  # last, as AUTOMATIC1111's HyperTile does not restore the layers
            large = {"width": 256, "height": 256}  # no tile is smaller than 128 pixels
            images["untiled"] = server.generate(**large)
            images["tiled alone"] = server.generate(**tiled, **large)
            images["tiled"] = server.generate([True], **tiled, **large)
        fields = [part["props"] for part in server.call("/config")["components"]]
        return {
            "arguments": [arg["label"] for arg in ours["args"]], "axes": axes, "images": images, "stopped at": stopped,
            "saved default": [field["value"] for field in fields if field.get("label") == "Hires ratio"],
        }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run_checks()))
