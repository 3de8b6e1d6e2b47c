"""Runs the example workflow through ComfyUI's own server, on a CPU, and prints the results as JSON.

The repository lies in custom_nodes/, like a user's clone. One run loads a checkpoint file of SD 1.5's layout and size,
with random weights. The other runs use a loader of small models from a second folder there, to save time. See
tests/hosts/test_comfyui.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "tests" / "helpers" / "programs"
TRANSFORMERS = SCRIPTS.parent / "comfy_transformers"
LOADER = """
import torch
from comfyui_run import SHAPES, random_model
from comfyui_transformers import random_model as random_transformer

class Words:
    def tokenize(self, text):
        return text
    def encode_from_tokens_scheduled(self, tokens):
        g = torch.Generator().manual_seed(len(tokens))
        words = torch.randn(1, 7, SHAPES["sd15"]["context_dim"], generator=g)
        return [[words, {"pooled_output": torch.randn(1, 16, generator=g)}]]

class Decoder:
    def decode(self, samples):
        image = samples.movedim(1, -1)[..., :3].sigmoid()
        return image.repeat_interleave(8, 1).repeat_interleave(8, 2)

class SmallCheckpoint:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "load", "tests"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": ("STRING", {})}}
    def load(self, ckpt_name):
        other = ckpt_name if ckpt_name in ("flux", "pixart") else None
        return (random_transformer(other) if other else random_model("sd15")), Words(), Decoder()

NODE_CLASS_MAPPINGS = {"SmallCheckpoint": SmallCheckpoint}
"""


def quick(workflow, **more):
    """Returns the workflow with a smaller image and fewer steps."""
    workflow = copy.deepcopy(workflow)
    for node in workflow.values():
        for name, value in {"width": 128, "height": 192, "steps": 3, **more}.items():
            if name in node["inputs"]:
                node["inputs"][name] = value
    return workflow


def small(workflow, **more):
    """Returns the workflow of `quick` with the loader of small models."""
    workflow = quick(workflow, **more)
    for node in workflow.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node["class_type"] = "SmallCheckpoint"
    return workflow


def request_json(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        return {"refused": json.loads(error.read())}


def run(port, workflow, timeout=600, meanwhile=None):
    """Returns the status, outputs and error of a prompt. meanwhile() is called once the server runs it."""
    queued = request_json(port, "/prompt", {"prompt": workflow})
    if "prompt_id" not in queued:
        return {"refused": queued["refused"]}
    for _ in range(timeout * 2):
        if meanwhile is not None and request_json(port, "/queue")["queue_running"]:
            time.sleep(3)  # the models are loaded, and sampling has started
            meanwhile()
            meanwhile = None
        done = request_json(port, f"/history/{queued['prompt_id']}").get(queued["prompt_id"])
        if done:
            errors = [details for kind, details in done["status"]["messages"] if kind == "execution_error"]
            return {"status": done["status"]["status_str"], "outputs": done["outputs"],
                    "error": errors[0]["exception_message"] if errors else None,
                    "interrupted": any(kind == "execution_interrupted" for kind, _ in done["status"]["messages"]),
                    }  # fmt: skip
        time.sleep(0.5)
    return {"status": "took too long"}


def without_token_fusion(workflow):
    """Returns the example workflow without its Token Fusion nodes."""
    others = {name: node for name, node in copy.deepcopy(workflow).items() if name not in ("2", "9", "10")}
    for node in others.values():
        if node["inputs"].get("model") == ["2", 0]:
            node["inputs"]["model"] = ["1", 0]
    return others


def example_variants(example):
    """Returns workflows of the example with small models: as it is, and as older and invalid ones."""
    merged, older, wrong, flux, pixart = (small(example) for _ in range(5))
    older["2"]["inputs"] = {"model": ["1", 0], "ratio": 0.5}  # as saved before there were other inputs
    wrong["2"]["inputs"]["ratio"] = 0.9
    wrong["9"]["inputs"]["model"] = ["1", 0]
    flux["1"]["inputs"]["ckpt_name"] = "flux"
    flux["2"]["inputs"]["min_tokens"] = 0  # on so few tokens merging is not faster
    pixart["1"]["inputs"]["ckpt_name"] = "pixart"
    unmerged = copy.deepcopy(older)
    unmerged["9"]["inputs"]["model"] = ["1", 0]
    return {
        "example": merged,
        "plain": without_token_fusion(merged),
        "older": older,
        "wrong": wrong,
        "unmerged": unmerged,
        "flux": flux,
        "pixart": pixart,
    }


def make_base(base):
    """Fills the folder of a user's ComfyUI: this repository as a node, and the loader of small models."""
    (base / "custom_nodes" / "small_checkpoint").mkdir(parents=True)
    (base / "custom_nodes" / "small_checkpoint" / "__init__.py").write_text(LOADER)
    (base / "custom_nodes" / "tofu").symlink_to(ROOT)
    (base / "page").mkdir()
    (base / "models" / "checkpoints").mkdir(parents=True)
    (base / "page" / "index.html").write_text("")


@contextmanager
def running_server(program, base):
    """Runs the server inside the block and yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import comfyui_torchvision, runpy; runpy.run_path('main.py', run_name='__main__')"
    options = ["--cpu", "--port", str(port), "--listen", "127.0.0.1", "--base-directory", str(base),
               "--front-end-root", str(base / "page"), "--disable-api-nodes", "--cache-none"]  # fmt: skip
    with (base / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", start, *options], cwd=program, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (program, SCRIPTS, TRANSFORMERS)))},
        )  # fmt: skip
        try:
            for _ in range(240):
                try:
                    request_json(port, "/queue")
                    break
                except OSError:
                    assert server.poll() is None, (base / "log.txt").read_text()[-3000:]
                    time.sleep(0.5)
            yield port
        finally:
            server.terminate()
            server.wait(20)


def run_checks(port, base):
    example = json.loads((ROOT / "examples" / "comfyui" / "token-fusion-api.json").read_text())
    (saving,) = (name for name, node in example.items() if node["inputs"].get("filename_prefix") == "token-fusion")

    def image_hash(workflow):
        """Returns a hash of the image's pixels."""
        result = run(port, workflow)
        assert result["status"] == "success", f"{result}\n{(base / 'log.txt').read_text()[-3000:]}"
        (image,) = result["outputs"][saving]["images"]
        pixels = Image.open(base / "output" / image["filename"]).tobytes()
        return hashlib.sha256(pixels).hexdigest()

    variants = example_variants(example)
    merged, plain = variants["example"], variants["plain"]
    results = {
        "nodes": sorted(name for name in request_json(port, "/object_info") if name.startswith("TokenFusion")),
        "about": request_json(port, "/object_info/TokenFusion")["TokenFusion"],
        **{name: run(port, workflow) for name, workflow in variants.items()},
        "before": [image_hash(plain), image_hash(merged)],
        "stopped": run(port, small(example, steps=2000), meanwhile=lambda: request_json(port, "/interrupt", {})),
        "after": [image_hash(plain), image_hash(merged)],
    }
    made = base / "models" / "checkpoints" / example["1"]["inputs"]["ckpt_name"]
    subprocess.run([sys.executable, str(SCRIPTS / "sd15_file.py"), str(made)], check=True, stdout=sys.stderr)
    whole = quick(example, steps=2)
    results["file"] = {**run(port, whole), "images": [image_hash(whole), image_hash(without_token_fusion(whole))]}
    log = (base / "log.txt").read_text()
    results["log"] = [line for line in log.splitlines() if "transformer blocks" in line]
    results["images"] = sorted(path.name for path in (base / "output").glob("*.png"))
    return results


def main(program, folder):
    base = Path(folder)
    make_base(base)
    with running_server(program, base) as port:
        print(json.dumps(run_checks(port, base)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else folder)
