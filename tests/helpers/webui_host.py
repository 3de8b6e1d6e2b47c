"""A stand-in of a web UI: AUTOMATIC1111 with a model patched in place, Forge with a patcher.

It implements what scripts rely on: when hooks are called and with which arguments, and how parameters are saved and
pasted. An error in a script is recorded, and the image is generated without it.
"""

from __future__ import annotations

import copy
import re
import sys
import types
from typing import Any

import tiny
import torch
from patcher_host import ForgePatcher, PlainBlock, UNetModel, attention

T = (900.0, 500.0, 100.0)  # the timesteps of a sampling


class Component:
    """A gradio field or layout block."""

    def __init__(self, *args: Any, **options: Any):
        self.args, self.options, self.click_options = args, options, {}
        self.value, self.label = options.get("value"), options.get("label")

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def click(self, **options: Any) -> None:
        self.click_options = options


class Script:
    def process_before_every_sampling(self, p: Any, *args: Any, **more: Any) -> None:
        pass


class AxisOption:
    def __init__(self, label: str, type: Any, apply: Any, confirm: Any = None, choices: Any = None):
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


class AxisOptionTxt2Img(AxisOption):
    pass


def modules(forge: bool) -> dict[str, Any]:
    """Returns the modules that the script imports, by name."""
    buttons: list[Component] = []

    class Button(Component):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            buttons.append(self)

    kinds = {
        name: type(name, (Component,), {}) for name in ("Row", "Accordion", "Dropdown", "Checkbox", "Number", "Slider")
    }
    gradio = {**kinds, "Button": Button, "buttons": buttons}
    scripts = {"Script": type("Script", (Script,), {}), "AlwaysVisible": object(), "scripts_data": []}
    contents = {
        "gradio": gradio, "modules": {}, "modules.scripts": scripts,
        "modules.shared": {"loaded_hypernetworks": [], "opts": types.SimpleNamespace(upcast_attn=False)},
        "modules.ui_components": {"InputAccordion": lambda value, **options: Component(value=value, **options)},
    }  # fmt: skip
    if forge:
        contents |= {
            "backend": {},
            "backend.attention": {"attention_function": lambda q, k, v, heads: attention(q, k, v, heads, None)},
        }
    installed = {}
    for name, content in contents.items():
        installed[name] = types.ModuleType(name)
        vars(installed[name]).update(content)
    vars(installed["modules"]).update(scripts=installed["modules.scripts"], shared=installed["modules.shared"])
    return installed


class Sampler:
    """AUTOMATIC1111's sampler: every UNet call goes through launch_sampling."""

    def __init__(self) -> None:
        self.model: Any = None

    def launch_sampling(self, steps: int, run: Any) -> Any:
        return run()


class Processing:
    """The settings of one image."""

    def __init__(self, program: Any, **options: Any):
        self.sd_model = program.sd_model
        self.sampler: Any = None
        self.enable_hr = self.is_hr_pass = False
        self.built_in: dict[bool, float] = {}
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: dict[str, int] = {}
        self.fails_at: tuple[bool, float] | None = None  # (in the second pass, at which timestep)
        vars(self).update(options)

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        return self.built_in.get(for_hr, 0.0)


class Program:
    """Runs one script; generate() returns a latent in one or two passes."""

    def __init__(self, unet: Any, forge: bool):
        self.forge = forge
        self.errors: list[Exception] = []  # that the script does not catch
        self.model = UNetModel(unet) if forge else UNetModel(unet, PlainBlock)
        self.script: Any = None
        if forge:
            self.patcher = ForgePatcher(self.model)
            self.patcher.model.predictor = types.SimpleNamespace(percent_to_sigma=lambda percent: 10 * (1 - percent))
            self.sd_model = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=self.patcher))
        else:
            self.sd_model = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=self.model))

    def _call(self, hook: str, p: Processing, args: Any, **more: Any) -> None:
        try:
            getattr(self.script, hook)(p, *args, **more)
        except Exception as error:
            self.errors.append(error)

    def generate(self, args: Any, *, batches: int = 1, **options: Any) -> tuple[torch.Tensor, Processing]:
        p = options.pop("p", None) or Processing(self, **options)
        self._call("process", p, args)
        p.sampler = Sampler()  # used again for every batch, as in img2img
        for _ in range(batches):
            p.is_hr_pass = False
            x = self._sample(p, args, tiny.noise(2, 4, 16, 16))
            if p.enable_hr:
                p.is_hr_pass, p.sampler = True, Sampler()
                if self.forge:  # Forge calls the hook once more before it selects the pass's model
                    self._call("process_before_every_sampling", p, args, x=x, noise=x, c=None, uc=None)
                x = self._sample(p, args, torch.nn.functional.interpolate(x, scale_factor=2))
        return x, p

    def _sample(self, p: Processing, args: Any, x: torch.Tensor) -> torch.Tensor:
        if self.forge:
            self.sd_model.forge_objects = types.SimpleNamespace(unet=self.patcher)
        self._call("process_before_every_sampling", p, args, x=x, noise=x, c=None, uc=None)
        context = tiny.inputs(self.model.unet)["encoder_hidden_states"]

        def run() -> torch.Tensor:
            y = x
            for t in T:
                if p.fails_at == (p.is_hr_pass, t):
                    raise InterruptedError("stopped by the user")
                if self.forge:
                    y = y - 0.1 * self.sd_model.forge_objects.unet.predict(y, t, context)
                else:
                    with torch.no_grad():
                        y = y - 0.1 * self.model(y, torch.full((len(y),), t), context, None)
            return y

        latent: torch.Tensor = run() if self.forge else p.sampler.launch_sampling(len(T), run)
        return latent


class PipelineProgram:
    """SD.Next: generates with a diffusers pipeline. Scripts get a postprocess call unless it is interrupted."""

    def __init__(self, pipe: Any):
        self.sd_model, self.script, self.processed = pipe, None, types.SimpleNamespace()
        self.errors: list[Exception] = []

    def _call(self, hook: str, *args: Any) -> None:
        try:
            getattr(self.script, hook)(*args)
        except Exception as error:
            self.errors.append(error)

    def run_pipeline(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images: torch.Tensor = self.sd_model(
            "a fox", num_inference_steps=4, output_type="latent", generator=generator
        ).images
        return images

    def generate(self, args: Any, *, interrupted: bool = False, **options: Any) -> tuple[torch.Tensor, Processing]:
        p = options.pop("p", None) or Processing(self, **options)
        self._call("process", p, *args)
        if interrupted:
            return torch.zeros(0), p
        x = self.run_pipeline()
        self.processed = types.SimpleNamespace(comments="")  # a request's own comments are not shown
        self._call("postprocess", p, self.processed, *args)
        return x, p


def saved(p: Processing) -> str:
    """Returns the parameters saved with an image."""

    def quoted(value: Any) -> str:
        return f'"{value}"' if re.search(r"[,:\n]", str(value)) else str(value)

    return ", ".join(f"{k}: {quoted(v)}" for k, v in p.extra_generation_params.items() if v is not None)


def paste(script: Any, text: str) -> dict[str, Any]:
    """Returns the values that an image's parameters set, by field label. Unchanged fields are omitted."""
    parameters = dict(re.findall(r"(\w[\w \-/]+): ([^,]*)(?:, |$)", text))
    pasted = {field.label: target(parameters) for field, target in script.infotext_fields}
    return {label: value for label, value in pasted.items() if value is not None}


def state(program: Program) -> list[Any]:
    """Returns all state that a patch could change: the layers and, in Forge, the patcher of each sampling."""
    options = program.patcher.model_options if program.forge else None
    return [copy.deepcopy(options), *((name, type(module), sorted(vars(module)), len(module._forward_pre_hooks))
            for name, module in program.model.named_modules())]  # fmt: skip


def cell(p: Processing) -> Processing:
    """Returns a grid's copy of the settings of an image."""
    return copy.copy(p)


def install(monkeypatch: Any, forge: bool) -> dict[str, Any]:
    installed = modules(forge)
    for name, module in installed.items():
        monkeypatch.setitem(sys.modules, name, module)
    return installed
