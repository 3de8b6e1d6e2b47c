"""Starts Forge with this repository as an extension, on a CPU, asks it for pictures, and prints what came as JSON.

It needs all that Forge needs (requirements_versions.txt, its repositories/). What it draws with is a random model in
SD 1.5's layout and size, as no checkpoint can be had. See test_hosts_forge.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path.cwd()
ARGUMENTS = ["--always-cpu", "--all-in-fp32", "--skip-torch-cuda-test"]
PICTURE = {"prompt": "a torus", "seed": 1, "steps": 2, "width": 128, "height": 128, "sampler_name": "Euler"}
FAITHFUL = {"early": "mean", "late": "mean", "proportional": True, "window": 8}


def checkpoint(path: str) -> None:
    """Random weights, in a process of its own."""
    import torch
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from backend.nn.vae import IntegratedAutoencoderKL
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    published = next(PROGRAM.glob("backend/huggingface/**/stable-diffusion-v1-5"))
    parts = {
        "model.diffusion_model.": IntegratedUNet2DConditionModel(
            in_channels=4, model_channels=320, out_channels=4, num_res_blocks=[2] * 4, channel_mult=(1, 2, 4, 4),
            num_heads=8, use_spatial_transformer=True, transformer_depth=[1] * 6 + [0] * 2,
            transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, context_dim=768),
        "first_stage_model.": IntegratedAutoencoderKL.from_config(
            IntegratedAutoencoderKL.load_config(str(published / "vae"))),
        "cond_stage_model.transformer.": CLIPTextModel(CLIPTextConfig.from_pretrained(str(published / "text_encoder"))),
    }  # fmt: skip
    g, weights = torch.Generator().manual_seed(0), {}
    for prefix, part in parts.items():
        for name, weight in part.state_dict().items():
            if weight.is_floating_point():
                if weight.ndim > 1:
                    weight = torch.randn(weight.shape, generator=g) * 0.7 / weight[0].numel() ** 0.5
                else:
                    weight = torch.full_like(weight, float(name.endswith("weight")))
                weight = weight.half()
            weights[prefix + name] = weight.contiguous()
    save_file(weights, path)


class Server:
    """The program, until the end of the block; its folder of settings, models and extensions is a new one."""

    def __enter__(self) -> Server:
        self.folder = tempfile.TemporaryDirectory()
        home = Path(self.folder.name)
        (home / "extensions").mkdir()
        (home / "extensions" / "tofu_sd").symlink_to(ROOT)
        (home / "models" / "Stable-diffusion").mkdir(parents=True)
        made = home / "models" / "Stable-diffusion" / "random.safetensors"
        subprocess.run([sys.executable, __file__, *ARGUMENTS, "--checkpoint", str(made)], check=True, stdout=sys.stderr)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = home / "log"
        self.process = subprocess.Popen(
            [sys.executable, "launch.py", "--skip-prepare-environment", "--no-download-sd-model", "--api", *ARGUMENTS,
             "--data-dir", str(home), "--port", str(port)],
            stdout=self.log.open("w"), stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )  # fmt: skip
        for _ in range(300):
            time.sleep(1)
            if self.process.poll() is not None:
                break
            try:
                self.call("/sdapi/v1/script-info")
            except (urllib.error.URLError, ConnectionError):
                continue
            return self
        said = self.log.read_text()[-3000:]
        self.__exit__()
        raise RuntimeError(said)

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def call(self, path: str, body: dict | None = None) -> dict:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def draw(self, args: list | None = None, kind: str = "txt2img", **more: object) -> dict:
        """The pictures, the parameters of the first, and what the log said."""
        before = len(self.log.read_text())
        body = {**PICTURE, "override_settings": {"token_merging_ratio": 0.0}, **more}
        if args is not None:
            body["alwayson_scripts"] = {"token fusion (tofu)": {"args": args}}
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
        hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.5,
                 "hr_additional_modules": ["Use same choices"]}  # fmt: skip
        x, nothing = [axes.index("[ToFu] Ratio"), "0,0.5", []], [axes.index("Nothing"), "", []]
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
            "grid": server.draw(script_name="x/y/z plot",
                                script_args=[*x, *nothing, *nothing, False, True, *[False] * 5, 0, False]),
            "off at last": server.draw(),
        }  # fmt: skip
        return {"arguments": [arg["label"] for arg in ours["args"]], "axes": axes, "drawn": drawn}


if __name__ == "__main__":
    if "--checkpoint" in sys.argv:
        made = sys.argv.pop()
        sys.argv.remove("--checkpoint")
        checkpoint(made)
    else:
        print(json.dumps(look()))
