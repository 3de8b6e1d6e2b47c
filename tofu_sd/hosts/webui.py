"""AUTOMATIC1111, Forge, reForge and SD.Next: a script beside their own, whose options are saved with the picture.

Forge and reForge have a patcher, which is made anew for each sampling. In AUTOMATIC1111 the UNet is patched in place
while its sampler runs, and restored however that ends. SD.Next has diffusers pipelines (see sdnext.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gradio as gr
from modules import scripts, shared
from modules.ui_components import InputAccordion
from torch import Tensor

from ..config import TokenFusionConfig
from ..recipes import RECIPES
from . import ldm, sdnext
from ._attention_patches import Options
from ._model_patcher import patch_model
from ._ui_options import OPTIONS, PRESETS, Option, fusion_of, read, values_of

TITLE = "Token Fusion (ToFu)"
RATIO = OPTIONS[0]
ENABLED = Option("enabled", True, "Whether tokens are fused.")
HIRES = replace(RATIO, name="hires_ratio", tooltip="The same in the second pass of Hires. fix.")
# after "enabled", requests give them in this order, which is a promise: new ones come at the end
ASKED = (RATIO, HIRES, *OPTIONS[1:])
ALWAYS_SAVED = (RATIO.name, "early", "late")  # the others where they are not the default
AXES = "tofu_sd_axes"
SAID = "Token Fusion: "  # with this begins whatever is said below a picture
logger = logging.getLogger("tofu_sd")


# --- what is asked for, and what is saved -----------------------------------------------------------------------------


def asked(p: Any, args: tuple[Any, ...]) -> dict[str, Any] | None:
    """The options of a picture, from the screen or a request, and the axes of a grid. None where it is switched off.

    A request may name them in one mapping, in the place of the first. One that a program answers before it knows what
    its scripts ask for has none at all. ValueError and TypeError as of `read`.
    """
    if args and isinstance(args[0], Mapping):
        values = dict(args[0])
        enabled = values.pop(ENABLED.name, ENABLED.default)
    else:
        enabled, *given = args or (False,)
        values = dict(zip((option.name for option in ASKED), given, strict=False))
    axes = getattr(p, AXES, {})
    if not axes and (enabled is None or not ENABLED.read(enabled)):
        return None
    return read(ASKED, {name: value for name, value in values.items() if value is not None} | axes)


def pass_configs(values: Mapping[str, Any]) -> tuple[TokenFusionConfig, TokenFusionConfig]:
    """What is done in the first pass and in that of Hires. fix. ValueError for a value out of range."""
    told = dict(values)
    second = told.pop(HIRES.name)
    first = fusion_of(told)
    try:
        return first, replace(first, ratio=second)
    except ValueError as error:
        raise ValueError(f"hires_{error}") from None  # of its ratio, which alone is another


def key(option: Option) -> str:
    """Under which name an option is saved with a picture."""
    return f"ToFu {option.name.replace('_', ' ')}"


def parameters(values: Mapping[str, Any], hires: bool) -> dict[str, Any]:
    """What is saved with a picture, in words that `pasted` reads."""
    return {
        key(option): values[option.name]
        for option in ASKED
        if (hires if option is HIRES else option.name in ALWAYS_SAVED or values[option.name] != option.default)
    }


def _reader(option: Option) -> Callable[[Mapping[str, Any]], Any]:
    def pasted(saved: Mapping[str, Any]) -> Any:
        if key(RATIO) not in saved or (option is HIRES and key(HIRES) not in saved):
            return None  # stays as it is
        value = option.read(saved.get(key(option), option.default))
        return None if option.names and value not in option.names else value

    return pasted


# one for each option, as the buttons between the tabs know fields by it
PASTED = {option.name: _reader(option) for option in ASKED}


def was_on(saved: Mapping[str, Any]) -> bool:
    return key(RATIO) in saved


def forget(p: Any) -> None:
    """Nothing of ours is saved with the picture."""
    for name in map(key, ASKED):
        p.extra_generation_params.pop(name, None)


def tell(p: Any, error: Exception) -> None:
    """Why nothing is fused: in the log, and below the picture."""
    message = f"{SAID}{error}. The picture is made without it."
    if message not in p.comments:  # once for a picture
        logger.warning(message)
        p.comment(message)


def one_ratio(p: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options with one ratio for both passes, as a pipeline keeps its patch; said where they were to differ."""
    if getattr(p, "enable_hr", False) and values[HIRES.name] != values[RATIO.name]:
        p.comment(f"{SAID}hires_ratio does not count here; both passes have ratio {values[RATIO.name]:g}.")
    return {**values, HIRES.name: values[RATIO.name]}


# --- fusing -----------------------------------------------------------------------------------------------------------


def fuse(p: Any, config: TokenFusionConfig) -> None:
    """Tokens are fused in the sampling that is about to begin. ValueError or RuntimeError where they cannot be."""
    objects = getattr(p.sd_model, "forge_objects", None)
    if objects is None:
        if config.proportional and (getattr(shared, "loaded_hypernetworks", None) or shared.opts.upcast_attn):
            raise ValueError(
                "proportional weighs attention in the program's place, which would leave out its hypernetworks and "
                "Upcast cross attention: turn off the one or the other"
            )
        PatchedSampling.of(p.sampler, p.sd_model.model.diffusion_model, config)
        return
    model = objects.unet.model
    noise = getattr(model, "predictor", None) or getattr(model, "model_sampling", None)  # Forge, reForge
    objects.unet, summary = patch_model(objects.unet, config, attention, getattr(noise, "percent_to_sigma", None))
    logger.info(summary.headline)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: Options) -> Tensor:
    """The program's own attention, whichever was chosen at its start."""
    try:
        from backend.attention import attention_function as own  # Forge
    except ImportError:
        from ldm_patched.ldm.modules.attention import optimized_attention as own  # reForge
    out: Tensor = own(q, k, v, heads)
    return out


class PatchedSampling:
    """The part of AUTOMATIC1111's sampler that runs the UNet: patched as it begins, restored however it ends."""

    def __init__(self, launch: Callable[..., Any], unet: Any, config: TokenFusionConfig):
        self.launch = launch
        self.unet = unet
        self.config = config

    def __call__(self, *args: Any, **more: Any) -> Any:
        try:
            logger.info(ldm.apply(self.unet, self.config).headline)
        except (ValueError, RuntimeError) as error:  # something has taken hold of the UNet since `of`
            logger.warning(f"Token Fusion: {error}. The picture is made without it.")
        try:
            return self.launch(*args, **more)
        finally:
            ldm.restore(self.unet)

    @classmethod
    def of(cls, sampler: Any, unet: Any, config: TokenFusionConfig) -> None:
        """ValueError or RuntimeError, before anything has begun, where the UNet cannot be patched."""
        if not hasattr(sampler, "launch_sampling"):
            raise RuntimeError(f"{type(sampler).__name__} has no launch_sampling, which would be fused")
        ldm.apply(unet, config)
        ldm.restore(unet)
        sampler.launch_sampling = cls(sampler.launch_sampling, unet, config)

    @classmethod
    def undo(cls, sampler: Any) -> None:
        """A sampler that is used again is what it was."""
        launch = getattr(sampler, "launch_sampling", None)
        if isinstance(launch, cls):
            sampler.launch_sampling = launch.launch


def refuse_twice(p: Any, hires: bool) -> None:
    """ValueError where the program itself merges tokens in this pass."""
    ratio = p.get_token_merging_ratio(for_hr=hires)
    if ratio > 0:
        raise ValueError(
            f"the built-in token merging is on, at {ratio:g}, and nothing is fused twice: set its ratio to 0 in the "
            "settings, or switch Token Fusion off"
        )


# --- the script -------------------------------------------------------------------------------------------------------


class TokenFusionScript(scripts.Script):  # type: ignore[misc]
    sorting_priority = 15

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """What is on the screen; the values come back in the order of ASKED, behind the switch."""
        fields: dict[str, Any] = {}

        def row(*names: str) -> None:
            with gr.Row():
                for option in ASKED:
                    if option.name in names:
                        fields[option.name] = field(option, visible=not (is_img2img and option is HIRES))

        with InputAccordion(False, label=TITLE) as enabled:
            row(RATIO.name, HIRES.name)
            with gr.Row():
                buttons = {name: gr.Button(name, size="sm", min_width=80) for name in PRESETS}
            row("early", "late")
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
        return [enabled, *(fields[option.name] for option in ASKED)]

    def process(self, p: Any, *args: Any) -> None:
        """Saves the options with the picture, before the program writes its parameters down."""
        forget(p)
        pipeline = sdnext.runs_pipeline(p)
        if pipeline:  # `postprocess` is not called for an image that is interrupted
            sdnext.stop(p)
        try:
            values = asked(p, args)
            if values is None:
                return
            if pipeline:
                values = one_ratio(p, values)
                sdnext.start(p, pass_configs(values)[0], shared.opts)
            elif not hasattr(scripts.Script, "process_before_every_sampling"):
                raise RuntimeError("this program is too old for it; AUTOMATIC1111 has what it takes from 1.10 on")
            pass_configs(values)
            p.extra_generation_params.update(parameters(values, bool(getattr(p, "enable_hr", False))))
        except (ValueError, TypeError, RuntimeError) as error:
            tell(p, error)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        """Restores a pipeline, and shows what was said of it."""
        if sdnext.runs_pipeline(p):
            sdnext.stop(p)
            sdnext.show(p, processed, SAID)

    def process_before_every_sampling(self, p: Any, *args: Any, **more: Any) -> None:
        """Fuses in the pass that is about to begin."""
        PatchedSampling.undo(getattr(p, "sampler", None))
        hires = bool(getattr(p, "is_hr_pass", False))
        try:
            values = asked(p, args)
            if values is None:
                return
            config = pass_configs(values)[hires]
            refuse_twice(p, hires)
            if config.ratio > 0:
                fuse(p, config)
        except (ValueError, TypeError, RuntimeError) as error:
            tell(p, error)
            if was_on(p.extra_generation_params):
                p.extra_generation_params[key(HIRES if hires else RATIO)] = 0


def field(option: Option, visible: bool) -> Any:
    """The field in which an option is entered."""
    told = {"value": option.default, "label": option.label, "info": option.tooltip, "visible": visible}
    if option.names:
        return gr.Dropdown(choices=list(option.names), **told)
    if isinstance(option.default, bool):
        return gr.Checkbox(**told)
    if option.most is not None and option.most > 1000:
        return gr.Number(precision=0, **told)  # without limits: beyond them gradio would refuse to draw at all
    return gr.Slider(minimum=option.least, maximum=option.most, step=option.step, **told)


def add_axes() -> None:
    """Every option becomes an axis of the program's own X/Y/Z plot, where it has one."""
    grids, options = sdnext.grids(), tuple(option for option in ASKED if option is not HIRES)
    if not grids:
        options = ASKED
        grids = [
            found.module
            for found in scripts.scripts_data
            if found.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid")
        ]
    for grid in grids:
        there = {axis.label for axis in grid.axis_options}
        for option in options:
            label = f"[ToFu] {option.label}"
            if label not in there:
                grid.axis_options.append(axis(grid, label, option))


def axis(grid: Any, label: str, option: Option) -> Any:
    """An axis that sets an option, and by that switches Token Fusion on."""
    choices = option.names or (("False", "True") if isinstance(option.default, bool) else ())
    kind = str if choices else type(option.default)

    def apply(p: Any, value: Any, values: Any) -> None:
        setattr(p, AXES, {**getattr(p, AXES, {}), option.name: value})

    def confirm(p: Any, values: Any) -> None:
        """Before anything is drawn: ValueError for a value that would leave its cells unfused."""
        for value in values:
            pass_configs(read(ASKED, {option.name: value}))

    made = grid.AxisOptionTxt2Img if option is HIRES else grid.AxisOption
    return made(label, kind, apply, confirm=confirm, choices=(lambda: list(choices)) if choices else None)
