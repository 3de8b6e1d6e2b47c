"""The InvokeAI node from docs/invokeai.md, with stand-ins of the InvokeAI modules that it imports."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch

import tofu_sd
from tofu_sd import recipes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "invokeai.md"


class DenoiseLatentsInvocation:
    def __init__(self, unet, **fields):
        self.unet = unet
        vars(self).update(fields)

    @staticmethod
    def parse_controlnet_field(exit_stack, context, control_input, ext_manager):
        ext_manager.parsed = True

    def _new_invoke(self, context):
        manager = types.SimpleNamespace(extensions=[], parsed=False)
        manager.add_extension = manager.extensions.append
        with contextlib.ExitStack() as stack:
            self.parse_controlnet_field(stack, context, None, manager)
            for extension in manager.extensions:
                stack.enter_context(extension.patch_unet(self.unet, None))
            assert manager.parsed
            if context == "fails":
                raise InterruptedError
            return tiny.predict(self.unet)


@pytest.fixture
def node(monkeypatch, tmp_path):
    names = {
        "invokeai.app.invocations.denoise_latents": {"DenoiseLatentsInvocation": DenoiseLatentsInvocation},
        "invokeai.app.invocations.fields": {"InputField": lambda default, **options: default},
        "invokeai.backend.stable_diffusion.extensions.base": {"ExtensionBase": object},
        "invokeai.invocation_api": {"invocation": lambda name, **options: lambda kind: kind, "LatentsOutput": object},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        while "." in name:
            name = name.rpartition(".")[0]
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name, types.ModuleType(name)))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "node_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "node_of_the_page", raising=False)
    return importlib.import_module("node_of_the_page").TokenFusionDenoiseInvocation


@pytest.mark.parametrize(("fields", "preset"), [({}, "asymmetric"), ({"preset": "faithful"}, "faithful")])
def test_node_matches_the_package_and_restores_the_unet(node, fields, preset):
    unet = tiny.sd15_unet()
    plain = tiny.predict(unet)
    result = node(unet, ratio=0.25, **fields).invoke(None)
    with pytest.raises(InterruptedError):
        node(unet).invoke("fails")
    assert torch.equal(tiny.predict(unet), plain)
    with tofu_sd.patched(unet, recipes.named(preset, ratio=0.25)):
        assert torch.equal(result, tiny.predict(unet))
    assert not torch.equal(result, plain)
