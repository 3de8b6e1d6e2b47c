"""AUTOMATIC1111, Forge, reForge and SD.Next: a script among their own, whose options are saved with the image.

Forge and reForge have a model patcher, which is made for each sampling. In AUTOMATIC1111 the UNet is patched in place
while its sampler runs, and restored however that ends. SD.Next has diffusers pipelines (see sdnext.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from modules import scripts, shared
from modules.ui_components import InputAccordion
from torch import Tensor

from ..config import TokenFusionConfig
from ..recipes import RECIPES
from ..utils import show_log
from . import ldm, sdnext
from .programs.call_state import Options
from .programs.model_patcher import patch_model
from .programs.ui_options import OPTIONS, PRESETS, Option, parse_values, values_of
from .programs.webui_options import (
    AXES,
    HIRES,
    INPUTS,
    PASTED,
    RATIO,
    clear_saved,
    pass_configs,
    requested_values,
    saved_name,
    saved_parameters,
    was_on,
)

TITLE = "Token Fusion (ToFu)"
PREFIX = "Token Fusion: "  # of all messages below an image
logger = logging.getLogger("tofu_sd")
show_log()


# --- patching ---------------------------------------------------------------------------------------------------------


def patch_sampling(p: Any, config: TokenFusionConfig) -> None:
    """Patches the sampling that is about to start. ValueError or RuntimeError where it cannot be patched."""
    objects = getattr(p.sd_model, "forge_objects", None)
    if objects is None:
        if config.proportional and (getattr(shared, "loaded_hypernetworks", None) or shared.opts.upcast_attn):
            raise ValueError(
                "proportional replaces the program's attention, which would drop its hypernetworks and Upcast cross "
                "attention: turn off the one or the other"
            )
        PatchedSampling.install(p.sampler, p.sd_model.model.diffusion_model, config)
        return
    model = objects.unet.model
    noise = getattr(model, "predictor", None) or getattr(model, "model_sampling", None)  # Forge, reForge
    objects.unet, summary = patch_model(objects.unet, config, attention, getattr(noise, "percent_to_sigma", None))
    logger.info(summary.headline)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: Options) -> Tensor:
    """Runs the program's own attention, as chosen when it started."""
    try:
        from backend.attention import attention_function as own  # Forge
    except ImportError:
        from ldm_patched.ldm.modules.attention import optimized_attention as own  # reForge
    out: Tensor = own(q, k, v, heads)
    return out


class PatchedSampling:
    """AUTOMATIC1111's launch_sampling, with the UNet patched while it runs and restored however it ends."""

    def __init__(self, launch: Callable[..., Any], unet: Any, config: TokenFusionConfig):
        self.launch = launch
        self.unet = unet
        self.config = config

    def __call__(self, *args: Any, **more: Any) -> Any:
        try:
            logger.info(ldm.apply(self.unet, self.config).headline)
        except (ValueError, RuntimeError) as error:  # something has wrapped the UNet since `install`
            logger.warning(f"{PREFIX}{error}. The image is generated without it.")
        try:
            return self.launch(*args, **more)
        finally:
            ldm.restore(self.unet)

    @classmethod
    def install(cls, sampler: Any, unet: Any, config: TokenFusionConfig) -> None:
        """Replaces a sampler's launch_sampling. ValueError or RuntimeError where the UNet cannot be patched."""
        if not hasattr(sampler, "launch_sampling"):
            raise RuntimeError(f"{type(sampler).__name__} has no launch_sampling to patch")
        ldm.apply(unet, config)
        ldm.restore(unet)
        sampler.launch_sampling = cls(sampler.launch_sampling, unet, config)

    @classmethod
    def uninstall(cls, sampler: Any) -> None:
        """Undoes `install`, as samplers are used again."""
        launch = getattr(sampler, "launch_sampling", None)
        if isinstance(launch, cls):
            sampler.launch_sampling = launch.launch


def check_built_in_merging(p: Any, hires: bool) -> None:
    """Raises ValueError where the program itself merges tokens in this pass."""
    ratio = p.get_token_merging_ratio(for_hr=hires)
    if ratio > 0:
        raise ValueError(
            f"the built-in token merging is on, at {ratio:g}, and tokens are not merged twice: set its ratio to 0 in "
            "the settings, or switch Token Fusion off"
        )


def report_error(p: Any, error: Exception) -> None:
    """Reports why nothing is merged: in the log and below the image, once for an image."""
    message = f"{PREFIX}{error}. The image is generated without it."
    if message not in p.comments:
        logger.warning(message)
        p.comment(message)


def with_one_ratio(p: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with the first pass's ratio for both passes, as a pipeline keeps its patch.

    Adds a comment to the image where they differ.
    """
    if getattr(p, "enable_hr", False) and values[HIRES.name] != values[RATIO.name]:
        p.comment(f"{PREFIX}hires_ratio is ignored here; both passes have ratio {values[RATIO.name]:g}.")
    return {**values, HIRES.name: values[RATIO.name]}


# --- the script -------------------------------------------------------------------------------------------------------


class TokenFusionScript(scripts.Script):  # type: ignore[misc]
    """The script that the programs load and call."""

    sorting_priority = 15

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """Builds the inputs; the programs return their values in this order: enabled, then INPUTS."""
        fields: dict[str, Any] = {}

        def row(*names: str) -> None:
            with gr.Row():
                for option in INPUTS:
                    if option.name in names:
                        fields[option.name] = make_field(option, visible=not (is_img2img and option is HIRES))

        with InputAccordion(False, label=TITLE) as enabled:
            row(RATIO.name, HIRES.name)
            with gr.Row():
                buttons = {name: gr.Button(name, size="sm", min_width=80) for name in PRESETS}
            row("early", "late")
            row("kv_early", "kv_late")
            row("proportional", "kv_only")
            with gr.Accordion("More", open=False):
                row("start_percent", "end_percent")
                row("depth_split", "levels")
                row("window", "match_interval")
                row("share_across_blocks", "min_tokens")
                row("grid_seed")
        changed = [option.name for option in OPTIONS[1:]]
        for name, button in buttons.items():
            values = [values_of(RECIPES[name])[option] for option in changed]
            button.click(fn=lambda values=values: values, inputs=[], outputs=[fields[option] for option in changed])
        self.infotext_fields = [(enabled, was_on), *((fields[name], target) for name, target in PASTED.items())]
        self.paste_field_names = [target for _, target in self.infotext_fields]
        return [enabled, *(fields[option.name] for option in INPUTS)]

    def process(self, p: Any, *args: Any) -> None:
        """Saves the options with the image, before the program writes its parameters."""
        clear_saved(p)
        pipeline = sdnext.runs_pipeline(p)
        if pipeline:  # `postprocess` is not called after an interrupt
            sdnext.stop(p)
        try:
            values = requested_values(p, args)
            if values is None:
                return
            if pipeline:
                values = with_one_ratio(p, values)
                sdnext.start(p, pass_configs(values)[0], shared.opts)
            elif not hasattr(scripts.Script, "process_before_every_sampling"):
                raise RuntimeError("this program is too old; AUTOMATIC1111 has the needed hook from 1.10 on")
            pass_configs(values)
            p.extra_generation_params.update(saved_parameters(values, bool(getattr(p, "enable_hr", False))))
        except (ValueError, TypeError, RuntimeError) as error:
            report_error(p, error)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        """Restores a pipeline, and shows the messages about it."""
        if sdnext.runs_pipeline(p):
            sdnext.stop(p)
            sdnext.show_comments(p, processed, PREFIX)

    def process_before_every_sampling(self, p: Any, *args: Any, **more: Any) -> None:
        """Patches the pass that is about to start."""
        PatchedSampling.uninstall(getattr(p, "sampler", None))
        hires = bool(getattr(p, "is_hr_pass", False))
        try:
            values = requested_values(p, args)
            if values is None:
                return
            config = pass_configs(values)[hires]
            check_built_in_merging(p, hires)
            if config.ratio > 0:
                patch_sampling(p, config)
        except (ValueError, TypeError, RuntimeError) as error:
            report_error(p, error)
            if was_on(p.extra_generation_params):
                p.extra_generation_params[saved_name(HIRES if hires else RATIO)] = 0


def make_field(option: Option, visible: bool) -> Any:
    """Returns the gradio component of an option."""
    common = {"value": option.default, "label": option.label, "info": option.tooltip, "visible": visible}
    if option.names:
        return gr.Dropdown(choices=list(option.names), **common)
    if isinstance(option.default, bool):
        return gr.Checkbox(**common)
    if option.high is not None and option.high > 1000:
        return gr.Number(precision=0, **common)  # without limits: beyond them gradio would refuse to generate at all
    return gr.Slider(minimum=option.low, maximum=option.high, step=option.step, **common)


def add_axes() -> None:
    """Adds every option as an axis of the program's own X/Y/Z plot, where it has one."""
    grids, options = sdnext.grids(), tuple(option for option in INPUTS if option is not HIRES)
    if not grids:
        options = INPUTS
        grids = [
            data.module
            for data in scripts.scripts_data
            if data.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid")
        ]
    for grid in grids:
        labels = {axis.label for axis in grid.axis_options}
        for option in options:
            label = f"[ToFu] {option.label}"
            if label not in labels:
                grid.axis_options.append(make_axis(grid, label, option))


def make_axis(grid: Any, label: str, option: Option) -> Any:
    """Returns an axis that sets an option, which also switches Token Fusion on."""
    choices = option.names or (("False", "True") if isinstance(option.default, bool) else ())
    kind = str if choices else type(option.default)

    def apply(p: Any, value: Any, values: Any) -> None:
        setattr(p, AXES, {**getattr(p, AXES, {}), option.name: value})

    def confirm(p: Any, values: Any) -> None:
        """Raises ValueError, before anything is generated, for a value that could not be applied."""
        for value in values:
            pass_configs(parse_values(INPUTS, {option.name: value}))

    axis_class = grid.AxisOptionTxt2Img if option is HIRES else grid.AxisOption
    return axis_class(label, kind, apply, confirm=confirm, choices=(lambda: list(choices)) if choices else None)
