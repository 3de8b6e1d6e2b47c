"""A program that patches models the way ComfyUI, Forge and reForge do, around the weights of a diffusers UNet.

Only what they promise to patches is here: where a block says it is, what it shows and what it takes back. The layers
are the diffusers UNet's own, so that both adapters can be held to the same images.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicTransformerBlock(nn.Module):
    """A diffusers block whose self-attention calls patches."""

    def __init__(self, block: Any):
        super().__init__()
        self.norm1, self.attn1, self.norm2, self.attn2 = block.norm1, block.attn1, block.norm2, block.attn2
        self.norm3, self.ff = block.norm3, block.ff

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        block_options = {k: v for k, v in options.items() if k not in ("patches", "patches_replace")}
        block_options |= {"n_heads": self.attn1.heads, "dim_head": self.attn1.inner_dim // self.attn1.heads}
        patches = options.get("patches", {})
        q = k = v = self.norm1(x)
        for patch in patches.get("attn1_patch", ()):
            q, k, v = patch(q, k, v, block_options)
        q, k, v = self.attn1.to_q(q), self.attn1.to_k(k), self.attn1.to_v(v)
        place, replaced = (
            (*options["block"], options["block_index"]),
            options.get("patches_replace", {}).get("attn1", {}),
        )
        instead = replaced.get(place, replaced.get(place[:2]))
        out = (
            attention(q, k, v, block_options["n_heads"], block_options)
            if instead is None
            else instead(q, k, v, block_options)
        )
        out = self.attn1.to_out[0](out)
        for patch in patches.get("attn1_output_patch", ()):
            out = patch(out, block_options)
        x = out + x
        x = self.attn2(self.norm2(x), encoder_hidden_states=context) + x
        return self.ff(self.norm3(x)) + x


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: Any) -> Tensor:
    """The program's own attention."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Attention of latent diffusion: forward(x, context, mask)."""

    def __init__(self, inner: Any):
        super().__init__()
        self.heads, self.to_q, self.to_k, self.to_v = inner.heads, inner.to_q, inner.to_k, inner.to_v
        self.to_out = nn.Sequential(*inner.to_out)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        out = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, None)
        return self.to_out(out)


class PlainBlock(nn.Module):
    """A block of a program without patches (AUTOMATIC1111)."""

    def __init__(self, block: Any):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.ff = block.norm1, block.norm2, block.norm3, block.ff
        self.attn1, self.attn2 = CrossAttention(block.attn1), CrossAttention(block.attn2)

    def forward(self, x: Tensor, context: Tensor, options: Any) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, transformer: Any, block: type[nn.Module] = BasicTransformerBlock):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
        self.linear = transformer.use_linear_projection
        self.transformer_blocks = nn.ModuleList(block(b) for b in transformer.transformer_blocks)

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        _, _, h, w = x.shape
        if options.pop("tells_size", True):
            options["activations_shape"] = list(x.shape)
        y = self.norm(x)
        y = y if self.linear else self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)
        y = self.proj_in(y) if self.linear else y
        for i, block in enumerate(self.transformer_blocks):
            options["block_index"] = i
            y = block(y, context, options)
        y = self.proj_out(y) if self.linear else y
        y = y.transpose(1, 2).unflatten(2, (h, w))
        return x + (y if self.linear else self.proj_out(y))


class Downsample(nn.Module):
    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Upsample(Downsample):
    def forward(self, x: Tensor, size: Any = None) -> Tensor:
        return self.inner(x, size)


class UNetModel(nn.Module):
    """A diffusers UNet's layers in the order and under the names of latent diffusion."""

    def __init__(self, unet: Any, block: type[nn.Module] = BasicTransformerBlock):
        super().__init__()
        self.unet = unet
        self.block = block
        self.input_blocks = nn.ModuleList([nn.ModuleList([unet.conv_in])])
        for stage in unet.down_blocks:
            self._layers(stage, self.input_blocks)
            for layer in stage.downsamplers or ():
                self.input_blocks.append(nn.ModuleList([Downsample(layer)]))
        middle = unet.mid_block
        self.middle_block = nn.ModuleList(
            [middle.resnets[0], SpatialTransformer(middle.attentions[0], block), middle.resnets[1]]
        )
        self.output_blocks = nn.ModuleList()
        for stage in unet.up_blocks:
            self._layers(stage, self.output_blocks)
            for layer in stage.upsamplers or ():
                self.output_blocks[-1].append(Upsample(layer))

    def _layers(self, stage: Any, blocks: nn.ModuleList) -> None:
        attentions = getattr(stage, "attentions", [None] * len(stage.resnets))
        for resnet, transformer in zip(stage.resnets, attentions, strict=True):
            blocks.append(
                nn.ModuleList(
                    [resnet] if transformer is None else [resnet, SpatialTransformer(transformer, self.block)]
                )
            )

    def forward(self, x: Tensor, timesteps: Any, context: Tensor, options: Any = None, added: Any = None) -> Tensor:
        t = torch.as_tensor(timesteps)
        options = {**(options or {}), "original_shape": list(x.shape)}
        silent = options.pop("silent", False)
        emb = self.unet.time_embedding(self.unet.time_proj(t.expand(len(x))))
        aug = self.unet.get_aug_embed(emb, context, added)
        emb = emb if aug is None else emb + aug

        def run(layers: Any, x: Tensor, side: str, number: int, size: Any = None) -> Tensor:
            options["block"] = (side, number)
            for layer in layers:
                for modifier in options.get("block_inner_modifiers", ()):
                    x = modifier(x, "before", layer, 0, layers, options)
                if isinstance(layer, SpatialTransformer):
                    if silent:  # older programs do not pass the size
                        options["tells_size"] = False
                    x = layer(x, context, options)
                elif isinstance(layer, Upsample):
                    x = layer(x, size)
                elif isinstance(layer, Downsample) or layer is self.unet.conv_in:
                    x = layer(x)
                else:
                    x = layer(x, emb)
            return x

        skips = []
        for number, layers in enumerate(self.input_blocks):
            x = run(layers, x, "input", number)
            skips.append(x)
        x = run(self.middle_block, x, "middle", 0)
        for number, layers in enumerate(self.output_blocks):
            x = torch.cat([x, skips.pop()], dim=1)
            x = run(layers, x, "output", number, skips[-1].shape[-2:] if skips else None)
        return self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(x)))


class OlderPatcher:
    """The object that nodes pass on: a model and its patches, cloned before it is changed."""

    def __init__(self, unet: Any):
        self.model = SimpleNamespace(diffusion_model=unet)
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Any:
        other = copy.copy(self)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def _patch(self, patch: Any, name: str) -> None:
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault(name, []).append(patch)

    def set_model_attn1_patch(self, patch: Any) -> None:
        self._patch(patch, "attn1_patch")

    def set_model_attn1_output_patch(self, patch: Any) -> None:
        self._patch(patch, "attn1_output_patch")

    def set_model_attn1_replace(self, patch: Any, side: str, number: int, index: int | None = None) -> None:
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("attn1", {})
        replaced[(side, number) if index is None else (side, number, index)] = patch

    def predict(self, x: Tensor, t: float, context: Tensor, added: Any = None, **more_options: Any) -> Tensor:
        """Calls the model with the options that samplers pass to patches."""
        options = {
            **self.model_options["transformer_options"],
            "sigmas": torch.full((len(x),), t / 100),
            **more_options,
        }
        options.setdefault("cond_or_uncond", [1, 0])
        with torch.no_grad():
            return self._apply(x, torch.tensor(float(t)), context, options, added)

    def _apply(self, x: Tensor, t: Tensor, context: Tensor, options: Any, added: Any) -> Tensor:
        return self.model.diffusion_model(x, t, context, options, added)


class Executor:
    """Runs nested wrappers around a model call."""

    def __init__(self, model: Any, run: Any, wrappers: list[Any]):
        self.class_obj, self.run, self.wrappers = model, run, wrappers

    def __call__(self, *args: Any, **more: Any) -> Any:
        if not self.wrappers:
            return self.run(*args, **more)
        return self.wrappers[0](Executor(self.class_obj, self.run, self.wrappers[1:]), *args, **more)


class Patcher(OlderPatcher):
    """A patcher with wrappers around the model call, as in ComfyUI since the end of 2024."""

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        wrappers = self.model_options["transformer_options"].setdefault("wrappers", {}).setdefault(kind, {})
        wrappers.setdefault(key, []).append(wrapper)

    def _apply(self, x: Tensor, t: Tensor, context: Tensor, options: Any, added: Any) -> Tensor:
        def run(
            x: Tensor, t: Tensor, concat: Any, context: Tensor, control: Any, options: Any, y: Any = None
        ) -> Tensor:
            return self.model.diffusion_model(x, t, context, options, y)

        wrappers = [w for there in options.get("wrappers", {}).get("apply_model", {}).values() for w in there]
        return Executor(self.model, run, wrappers)(x, t, None, context, None, options, y=added)


class ForgePatcher(OlderPatcher):
    """A patcher that calls modifiers with the map before each layer and does not pass its size."""

    def add_block_inner_modifier(self, modifier: Any) -> None:
        self.model_options["transformer_options"].setdefault("block_inner_modifiers", []).append(modifier)

    def predict(self, *args: Any, **more_options: Any) -> Tensor:
        return super().predict(*args, silent=True, **more_options)
