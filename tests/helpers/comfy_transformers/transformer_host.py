"""Diffusion transformers that call patches the way ComfyUI's do, with random weights.

Only what ComfyUI promises to patches is here: the names of classes and lists, the order of text and image, what a
function that replaces a block gets, and how attention is called.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from patcher_host import Executor, Patcher
from torch import Tensor, nn

WIDTH, HEADS, TEXT = 16, 2, 5


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, skip_reshape: bool = False, **more: Any
) -> Tensor:
    """The program's own attention: [B, S, H d], or [B, H, S, d] with `skip_reshape`, to [B, S, H d]."""
    if not skip_reshape:
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, **kwargs: Any) -> Tensor:
    """The same, or the override of the options."""
    override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
    return attention(*args, **kwargs) if override is None else override(attention, *args, **kwargs)


class Part(nn.Module):
    """The layers of one kind of tokens in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> list[Tensor]:
        """Returns queries, keys and values [B, H, N, d]."""
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return list(qkv)


class DoubleBlock(nn.Module):
    """A block of Flux that gets text and image apart."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.img_attn, self.txt_attn = Part(), Part()

    def forward(self, img: Tensor, txt: Tensor, attn_mask: Any, transformer_options: Any) -> tuple[Tensor, Tensor]:
        parts = zip(self.txt_attn.split(txt), self.img_attn.split(img), strict=True)
        q, k, v = (torch.cat(part, dim=2) for part in parts)
        out = optimized_attention(
            q, k, v, HEADS, skip_reshape=True, mask=attn_mask, transformer_options=transformer_options
        )
        text = txt.shape[1]
        return img + self.img_attn.proj(out[:, text:]), txt + self.txt_attn.proj(out[:, :text])


class SingleBlock(Part):
    """A block of Flux that gets one sequence, the text first."""

    def forward(self, x: Tensor, attn_mask: Any, transformer_options: Any) -> Tensor:
        q, k, v = self.split(x)
        out = optimized_attention(
            q, k, v, HEADS, skip_reshape=True, mask=attn_mask, transformer_options=transformer_options
        )
        return x + self.proj(out)


class JointBlock(nn.Module):
    """A block of SD3.5: joint attention, then attention of the image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.x_block, self.context_block = nn.Module(), nn.Module()
        self.x_block.attn, self.x_block.attn2, self.context_block.attn = Part(), Part(), Part()

    def forward(self, img: Tensor, txt: Tensor, attn_mask: Any, transformer_options: Any) -> tuple[Tensor, Tensor]:
        def merged_heads(part: nn.Module, x: Tensor) -> list[Tensor]:
            q, k, v = (y.transpose(1, 2) for y in part.split(x))  # [B, N, H, d]
            return [q.flatten(2), k.flatten(2), v]  # as in ComfyUI, values keep their heads

        own, text = merged_heads(self.x_block.attn, img), txt.shape[1]
        q, k, v = (torch.cat(p, dim=1) for p in zip(merged_heads(self.context_block.attn, txt), own, strict=True))
        out = optimized_attention(q, k, v, heads=HEADS, transformer_options=transformer_options)
        q, k, v = merged_heads(self.x_block.attn2, img)
        second = optimized_attention(q, k, v, heads=HEADS, transformer_options=transformer_options)
        img = img + self.x_block.attn.proj(out[:, text:]) + self.x_block.attn2.proj(second)
        return img, txt + self.context_block.attn.proj(out[:, :text])


class Transformer(nn.Module):
    """A model with a list of blocks that get text and image apart, and one of blocks that get one sequence."""

    double, single = "double_blocks", "single_blocks"
    kinds: tuple[Any, Any] = (DoubleBlock, SingleBlock)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_size, self.hidden_size = 2, WIDTH
        self.img_in, self.img_out = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
        for name, kind in zip((self.double, self.single), self.kinds, strict=True):
            setattr(self, name, nn.ModuleList(kind() for _ in range(2)))

    def tokens(self, x: Tensor) -> Tensor:
        """Returns the tokens [B, h w, C] of a latent [B, 4, H, W]."""
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        return self.img_in(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))

    def forward(
        self, x: Tensor, t: Any, context: Tensor, transformer_options: Any, ref_latents: Any = None,
        attention_mask: Any = None,
    ) -> Tensor:  # fmt: skip
        img, txt = torch.cat([self.tokens(y) for y in (x, *(ref_latents or ()))], dim=1), context
        more = {"attn_mask": attention_mask, "transformer_options": transformer_options}
        for i, block in enumerate(getattr(self, self.double)):
            out = self.run("double_block", i, block, {"img": img, "txt": txt, **more})
            img, txt = out["img"], out["txt"]
        both = torch.cat([txt, img], dim=1)
        for i, block in enumerate(getattr(self, self.single)):
            both = self.run("single_block", i, block, {"img": both, **more})["img"]
        return self.img_out(both[:, txt.shape[1] :])

    def run(self, kind: str, i: int, block: nn.Module, args: dict[str, Any]) -> Any:
        """Runs a block, or the function that replaces it."""

        def original(args: dict[str, Any]) -> dict[str, Tensor]:
            if kind == "single_block":
                return {"img": block(args["img"], args["attn_mask"], args["transformer_options"])}
            img, txt = block(args["img"], args["txt"], args["attn_mask"], args["transformer_options"])
            return {"img": img, "txt": txt}

        replaced = args["transformer_options"].get("patches_replace", {}).get("dit", {}).get((kind, i))
        return original(args) if replaced is None else replaced(args, {"original_block": original})


class Flux(Transformer):
    """Double and single blocks."""


class OpenAISignatureMMDITWrapper(Transformer):
    """SD3's class; its list of single blocks is empty."""

    double, kinds = "joint_blocks", (JointBlock, SingleBlock)

    def __init__(self) -> None:
        super().__init__()
        self.single_blocks = nn.ModuleList()


class NextBlock(nn.Module):
    """A block of Lumina 2 and Z-Image, which gets one sequence, the text first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Part()
        self.attention.n_local_heads = HEADS

    def forward(self, x: Tensor, transformer_options: Any) -> Tensor:
        q, k, v = self.attention.split(x)
        out = optimized_attention(q, k, v, HEADS, None, skip_reshape=True, transformer_options=transformer_options)
        return x + self.attention.proj(out)


class NextDiT(Transformer):
    """Blocks that cannot be replaced; patches see the tokens after each. The image is padded to a multiple of 32."""

    double, single, kinds = "layers", "none", (NextBlock, NextBlock)

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.pad_tokens_multiple = WIDTH, 32

    def forward(self, x: Tensor, t: Any, context: Tensor, transformer_options: Any) -> Tensor:
        img, text = self.tokens(x), context.shape[1]
        n = img.shape[1]
        both = torch.cat([context, F.pad(img, (0, 0, 0, -n % 32))], dim=1)
        for i, layer in enumerate(self.layers):
            both = layer(both, transformer_options)
            for patch in transformer_options.get("patches", {}).get("double_block", ()):
                shown = {"img": both[:, text:], "txt": both[:, :text], "block_index": i}
                out = patch({**shown, "transformer_options": transformer_options})
                both = torch.cat([both[:, :text], out["img"]], dim=1) if "img" in out else both
        return self.img_out(both[:, text : text + n])


class TransformerPatcher(Patcher):
    """A patcher whose calls pass further conditions on, as reference latents."""

    def set_model_patch_replace(self, patch: Any, name: str, block: str, number: int) -> None:
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault(name, {})[block, number] = patch

    def get_model_object(self, name: str) -> Any:
        assert name == "model_sampling"
        return Sampling

    def call(self, x: Tensor, context: Tensor, sigma: float = 5.0, **conditions: Any) -> Tensor:
        """Calls the model as samplers do."""
        options = {**self.model_options["transformer_options"], "sigmas": torch.full((len(x),), sigma)}

        def run(x: Tensor, t: Any, concat: Any, context: Tensor, control: Any, options: Any, **more: Any) -> Tensor:
            return self.model.diffusion_model(x, t, context, options, **more)

        wrappers = [w for there in options.get("wrappers", {}).get("apply_model", {}).values() for w in there]
        with torch.no_grad():
            return Executor(self.model, run, wrappers)(x, None, None, context, None, options, **conditions)


class Sampling:
    """Noise levels from 10 to 0."""

    @staticmethod
    def percent_to_sigma(percent: float) -> float:
        return 10 * (1 - percent)
