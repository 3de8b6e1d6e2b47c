"""What log(n_i) on the keys costs in attention alone, by each way to say it and on each backend.

`python -m benchmarks.proportional [--device cuda --dtype bfloat16]`. Per shape and backend: milliseconds without it;
and as ratios to that, with a mask, with two more channels (`tofu_sd.core.proportional`), with an attention for each
size of group (`tofu_sd.core.attention_by_size`; half of the keys stand for two tokens), with FlexAttention, compiled.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from eval.speed.contender import BACKENDS
from tofu_sd.core.attention_by_size import attend_by_size
from tofu_sd.core.proportional import by_channel, by_mask
from tofu_sd.timing import synchronize

SHAPES = {  # (heads, channels of one, tokens) of the highest resolution, half of which are fused
    "SD 1.5, 512 px": (8, 40, 4096),
    "SD 1.5, 1024 px": (8, 40, 16384),
    "SD 2.1, 768 px": (5, 64, 9216),
    "SDXL, 1024 px": (10, 64, 4096),
    "SDXL, 2048 px": (10, 64, 16384),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--most", type=int, default=20000, help="leave out shapes of more tokens")
    o = p.parse_args()
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, {o.dtype}, torch {torch.__version__}, 2 samples, median of {o.rounds} in turns\n")
    print("| shape | backend | without | mask | channels | by size | FlexAttention |\n|---|---|--:|--:|--:|--:|--:|")
    for shape, (heads, channels, tokens) in SHAPES.items():
        for backend in ("default", "flash", "efficient", "cudnn", "math") if tokens <= o.most else ():
            cells = row(heads, channels, tokens // 2, backend, device, dtype, o.rounds)
            print(f"| {shape} | {backend} | {' | '.join(cells)} |", flush=True)


def row(
    heads: int, channels: int, tokens: int, backend: str, device: torch.device, dtype: torch.dtype, rounds: int
) -> list[str]:
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> torch.Tensor:
        x = torch.randn(2, tokens, heads * channels, generator=generator, device=device, dtype=dtype)
        return x.view(2, tokens, heads, channels).transpose(1, 2)

    q, k, v = draw(), draw(), draw()
    classes = ((tokens // 2, 2), (tokens - tokens // 2, 1))
    size = torch.ones(2, tokens, device=device)
    size[:, : tokens // 2] = 2
    mask = size.log().to(dtype)[:, None, None].expand(2, heads, 1, tokens)
    flex = torch.compile(flex_attention, dynamic=False)
    ways = {
        "without": lambda: F.scaled_dot_product_attention(q, k, v),
        "mask": lambda: by_mask(q, k, v, mask),
        "channels": lambda: by_channel(q, k, v, mask),
        "size": lambda: attend_by_size(q, k, v, classes),
        "flex": lambda: flex(q, k, v, score_mod=lambda score, b, h, i, j: score + mask[b, h, 0, j]),
    }
    if backend != "default":
        del ways["flex"], ways["size"]  # these choose their kernel themselves
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad(), BACKENDS[backend]():
        for name in list(ways):
            try:
                for _ in range(3):
                    ways[name]()
                synchronize(device)
            except Exception:  # a backend that has no kernel for it says so in many ways
                del ways[name]
        for _ in range(rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                synchronize(device)
                times[name].append(time.perf_counter() - began)
    medians = {name: sorted(each)[len(each) // 2] for name, each in times.items() if each}
    base = medians.get("without")
    cells = [f"{1000 * base:.2f} ms" if base else "–"]
    return cells + [
        f"{medians[n] / base:.2f}" if base and n in medians else "–" for n in ("mask", "channels", "size", "flex")
    ]


if __name__ == "__main__":
    main()
