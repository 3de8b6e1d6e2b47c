"""Runs the example workflow through ComfyUI's own server, on a CPU, and prints what it found as JSON.

The repository lies in custom_nodes/ as a user would have cloned it. Once the workflow loads a checkpoint file of SD
1.5's layout and size, with random weights; for the rest a second folder there has a loader of small models, which take
less time. See test_hosts_comfyui.py.
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
import urllib.request
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
LOADER = """
import torch
from comfyui_run import SHAPES, random_flux, random_model

class Words:
    def tokenize(self, text):
        return text
    def encode_from_tokens_scheduled(self, tokens):
        g = torch.Generator().manual_seed(len(tokens))
        return [[torch.randn(1, 7, SHAPES["sd15"]["context_dim"], generator=g), {}]]

class Decoder:
    def decode(self, samples):
        picture = samples.movedim(1, -1)[..., :3].sigmoid()
        return picture.repeat_interleave(8, 1).repeat_interleave(8, 2)

class SmallCheckpoint:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "load", "tests"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": ("STRING", {})}}
    def load(self, ckpt_name):
        return (random_flux() if "flux" in ckpt_name else random_model("sd15")), Words(), Decoder()

NODE_CLASS_MAPPINGS = {"SmallCheckpoint": SmallCheckpoint}
"""


def quick(workflow, **more):
    """The workflow with a smaller picture and fewer steps."""
    workflow = copy.deepcopy(workflow)
    for node in workflow.values():
        for name, value in {"width": 128, "height": 192, "steps": 3, **more}.items():
            if name in node["inputs"]:
                node["inputs"][name] = value
    return workflow


def small(workflow, **more):
    """The same with the loader of small models."""
    workflow = quick(workflow, **more)
    for node in workflow.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node["class_type"] = "SmallCheckpoint"
    return workflow


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        return {"refused": json.loads(error.read())}


def run(port, workflow, patience=600, meanwhile=None):
    """How a prompt ended, with what, and what was said; meanwhile() is done once the server is at it."""
    queued = ask(port, "/prompt", {"prompt": workflow})
    if "prompt_id" not in queued:
        return {"refused": queued["refused"]}
    for _ in range(patience * 2):
        if meanwhile is not None and ask(port, "/queue")["queue_running"]:
            time.sleep(3)  # the models are made, and sampling has begun
            meanwhile()
            meanwhile = None
        done = ask(port, f"/history/{queued['prompt_id']}").get(queued["prompt_id"])
        if done:
            errors = [told for kind, told in done["status"]["messages"] if kind == "execution_error"]
            return {"status": done["status"]["status_str"], "outputs": done["outputs"],
                    "error": errors[0]["exception_message"] if errors else None,
                    "interrupted": any(kind == "execution_interrupted" for kind, _ in done["status"]["messages"]),
                    }  # fmt: skip
        time.sleep(0.5)
    return {"status": "took too long"}


def main(program, folder):
    base = Path(folder)
    (base / "custom_nodes" / "small_checkpoint").mkdir(parents=True)
    (base / "custom_nodes" / "small_checkpoint" / "__init__.py").write_text(LOADER)
    (base / "custom_nodes" / "tofu").symlink_to(ROOT)
    (base / "page").mkdir()
    (base / "models" / "checkpoints").mkdir(parents=True)
    (base / "page" / "index.html").write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import comfyui_torchvision, runpy; runpy.run_path('main.py', run_name='__main__')"
    options = ["--cpu", "--port", str(port), "--listen", "127.0.0.1", "--base-directory", str(base),
               "--front-end-root", str(base / "page"), "--disable-api-nodes", "--cache-none"]  # fmt: skip
    log = (base / "log.txt").open("w")
    server = subprocess.Popen(
        [sys.executable, "-c", start, *options], cwd=program, stdout=log, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": f"{program}{os.pathsep}{HELPERS}"},
    )  # fmt: skip
    try:
        for _ in range(240):
            try:
                ask(port, "/queue")
                break
            except OSError:
                assert server.poll() is None, (base / "log.txt").read_text()[-3000:]
                time.sleep(0.5)
        example = json.loads((ROOT / "examples" / "comfyui" / "token-fusion-api.json").read_text())
        (saving,) = (name for name, node in example.items() if node["inputs"].get("filename_prefix") == "token-fusion")

        def drawn(workflow):
            """The pixels of its picture."""
            ended = run(port, workflow)
            assert ended["status"] == "success", f"{ended}\n{(base / 'log.txt').read_text()[-3000:]}"
            (picture,) = ended["outputs"][saving]["images"]
            pixels = Image.open(base / "output" / picture["filename"]).tobytes()
            return hashlib.sha256(pixels).hexdigest()

        def without(workflow):
            """The same but for our nodes."""
            kept = {name: node for name, node in copy.deepcopy(workflow).items() if name not in ("2", "9", "10")}
            for node in kept.values():
                if node["inputs"].get("model") == ["2", 0]:
                    node["inputs"]["model"] = ["1", 0]
            return kept

        fused, older, wrong, flux = (small(example) for _ in range(4))
        plain = without(fused)
        older["2"]["inputs"] = {"model": ["1", 0], "ratio": 0.5}  # before there were other inputs
        wrong["2"]["inputs"]["ratio"] = 0.9
        wrong["9"]["inputs"]["model"] = ["1", 0]
        flux["1"]["inputs"]["ckpt_name"] = "flux"
        unfused = copy.deepcopy(older)
        unfused["9"]["inputs"]["model"] = ["1", 0]
        found = {
            "nodes": sorted(name for name in ask(port, "/object_info") if name.startswith("TokenFusion")),
            "about": ask(port, "/object_info/TokenFusion")["TokenFusion"],
            "example": run(port, fused),
            "plain": run(port, plain),
            "older": run(port, older),
            "wrong": run(port, wrong),
            "unfused": run(port, unfused),
            "flux": run(port, flux),
            "before": [drawn(plain), drawn(fused)],
            "stopped": run(port, small(example, steps=2000), meanwhile=lambda: ask(port, "/interrupt", {})),
            "after": [drawn(plain), drawn(fused)],
        }
        made = base / "models" / "checkpoints" / example["1"]["inputs"]["ckpt_name"]
        subprocess.run([sys.executable, str(HELPERS / "sd15_file.py"), str(made)], check=True, stdout=sys.stderr)
        whole = quick(example, steps=2)
        found["file"] = {**run(port, whole), "pictures": [drawn(whole), drawn(without(whole))]}
        log.flush()
        found["log"] = [line for line in (base / "log.txt").read_text().splitlines() if "transformer blocks" in line]
        found["pictures"] = sorted(path.name for path in (base / "output").glob("*.png"))
        print(json.dumps(found))
    finally:
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else folder)
