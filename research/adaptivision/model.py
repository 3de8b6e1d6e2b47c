"""AdaptiVision: a vision transformer that clusters its patches; complex images get more super-tokens.

It has dynamic token clustering, attention modulated by the whole image, cross-attention to guidance tokens, and three
losses. Where the paper leaves something open, or its shapes do not fit, a docstring says what was chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu_sd.core.matching import soft_assignment


@dataclass(frozen=True)
class Clusters:
    """The clusters of a batch.

    Args:
        tokens: [B, K, D], the super-tokens.
        weights: [B, N, K], the share of each token in each cluster.
        used: [B, K] bool, whether an image uses a cluster.
        distance: mean over the batch of sum_ik a_ik ||z_i - mu_k||^2, divided by N (Eq. 14).
    """

    tokens: Tensor
    weights: Tensor
    used: Tensor
    distance: Tensor


class DynamicTokenClustering(nn.Module):
    """Soft k-means of N tokens into K super-tokens (section 3.2); K depends on the image.

    The clustering starts at learned centroids, which `iterations` rounds of k-means move to the image's tokens. The
    complexity of an image is the entropy of its tokens over all centroids, divided by log(most). K grows with it from
    `fewest` to `most`, and the K centroids with the most tokens are kept, largest first. A batch keeps as many as its
    most complex image needs; the others mask what they do not use.
    """

    def __init__(self, width: int, fewest: int, most: int, temperature: float = 150.0, iterations: int = 1):
        super().__init__()
        if not 1 <= fewest <= most:
            raise ValueError(f"fewest is {fewest} and most is {most}: clusters need 1 <= fewest <= most")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.fewest, self.most, self.temperature, self.iterations = fewest, most, temperature, iterations
        self.centroids = nn.Parameter(torch.randn(most, width))

    def complexity(self, weights: Tensor) -> Tensor:
        """Returns the complexity, in 0..1, of assignments [B, N, most]: [B]."""
        if self.most == 1:
            return weights.new_zeros(len(weights))
        spread = weights.mean(dim=1)
        return -(spread * spread.clamp_min(1e-12).log()).sum(dim=-1) / math.log(self.most)

    def forward(self, z: Tensor) -> Clusters:
        weights = soft_assignment(z, self.centroids.expand(len(z), -1, -1), self.temperature)
        clusters_needed = self.fewest + self.complexity(weights) * (self.most - self.fewest)
        K = clusters_needed.round().long().clamp(self.fewest, self.most)
        order = weights.sum(dim=1).argsort(dim=1, descending=True, stable=True)[:, : int(K.max())]
        centroids = self.centroids[order]
        used = torch.arange(order.shape[1], device=z.device) < K.unsqueeze(1)
        for _ in range(self.iterations):
            weights = soft_assignment(z, centroids, self.temperature, used)
            mass = weights.sum(dim=1).unsqueeze(-1)
            centroids = torch.where(mass > 1e-6, weights.mT @ z / mass.clamp_min(1e-6), centroids)
        weights = soft_assignment(z, centroids, self.temperature, used)
        distance = (weights * torch.cdist(z, centroids).square()).sum(dim=(1, 2)).mean() / z.shape[1]
        return Clusters(weights.mT @ z, weights, used, distance)


class TokenSelection(nn.Module):
    """The alternatives to clusters in the paper's table 5: `most` of the tokens are kept and the others dropped.

    "random" keeps tokens by a hash of their values, so that an image always keeps the same. "importance" keeps those of
    the largest learned score and scales them by it, so that it can be learned (after DynamicViT, which drops tokens in
    several layers; here they are dropped once, in place of the clustering).
    """

    KINDS = ("random", "importance")

    def __init__(self, width: int, most: int, kind: str):
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"kind is {kind!r}; it must be {' or '.join(self.KINDS)}")
        self.most, self.kind = most, kind
        self.score = nn.Linear(width, 1)
        self.score.requires_grad_(kind == "importance")

    def forward(self, z: Tensor) -> Clusters:
        score = self.score(z).squeeze(-1)  # [B, N]
        chance = torch.frac(1e4 * score.detach().float()) if self.kind == "random" else score
        kept = chance.topk(self.most, dim=1).indices.sort(dim=1).values  # [B, K]
        weights = F.one_hot(kept, z.shape[1]).mT.to(z.dtype)  # [B, N, K]
        tokens = z.gather(1, kept.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
        if self.kind == "importance":
            tokens = tokens * score.gather(1, kept).sigmoid().unsqueeze(-1)
        return Clusters(tokens, weights, torch.ones_like(kept, dtype=torch.bool), z.new_zeros(()))


class AdaptiveFocusAttention(nn.Module):
    """Self-attention whose scores are multiplied by a matrix M that the pooled image predicts (Eq. 4-7).

    The paper's M is K x K, and K differs between images. Here it is made for `most` clusters, largest first, and cut to
    K. It is one plus the product of two thin matrices that are linear in the pooled tokens. One of them starts at zero,
    so that training starts from ordinary attention.
    """

    def __init__(self, width: int, heads: int, most: int, rank: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}; it must be a multiple of the {heads} heads")
        self.heads, self.most, self.rank = heads, most, rank
        self.qkv, self.out, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)
        self.rows, self.columns = nn.Linear(width, most * rank), nn.Linear(width, most * rank)
        nn.init.zeros_(self.rows.weight)
        nn.init.zeros_(self.rows.bias)

    def modulation(self, s: Tensor, used: Tensor) -> Tensor:
        """Returns M [B, K, K] of the tokens s [B, K, D]."""
        pooled = pool(s, used)
        rows, columns = (layer(pooled).unflatten(-1, (self.most, self.rank)) for layer in (self.rows, self.columns))
        K = s.shape[1]
        return 1 + rows[:, :K] @ columns[:, :K].mT / math.sqrt(self.rank)

    def forward(self, s: Tensor, used: Tensor) -> Tensor:
        q, k, v = self.qkv(s).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, K, d]
        scores = q @ k.mT / math.sqrt(q.shape[-1]) * self.modulation(s, used).unsqueeze(1)
        attended = scores.masked_fill(~used[:, None, None], -math.inf).softmax(dim=-1) @ v
        out: Tensor = self.norm(s + self.out(attended.transpose(1, 2).flatten(2)))
        return out


class CrossModalTokenFusion(nn.Module):
    """Gated cross-attention to guidance tokens (Eq. 8-10). Without guidance nothing is added.

    Eq. 10 as printed adds the gate itself. Here, as in the text, the gate scales what is added.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.gate = nn.Linear(width, width)

    def forward(self, s: Tensor, guidance: Tensor | None) -> Tensor:
        if guidance is None:
            return s
        attended, _ = self.attention(s, guidance, guidance, need_weights=False)
        out: Tensor = s + self.gate(attended).sigmoid() * attended
        return out


class Layer(nn.Module):
    """Attention, cross-attention to guidance, and a feed-forward layer, which the paper does not specify."""

    def __init__(self, width: int, heads: int, most: int, focus: bool, guided: bool):
        super().__init__()
        self.attention = AdaptiveFocusAttention(width, heads, most)
        if not focus:
            for modulation in (self.attention.rows, self.attention.columns):
                modulation.requires_grad_(False)  # M stays 1
        self.fusion = CrossModalTokenFusion(width, heads) if guided else None
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, s: Tensor, used: Tensor, guidance: Tensor | None) -> Tensor:
        s = self.attention(s, used)
        if self.fusion is not None:
            s = self.fusion(s, guidance)
        out: Tensor = self.norm(s + self.feed_forward(s))
        return out


STRATEGIES = ("clusters", *TokenSelection.KINDS)


class LinearEmbedding(nn.Module):
    """Maps patches of images [B, 3, H, W] linearly to tokens [B, N, width] (section 3.1)."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


@dataclass(frozen=True)
class Size:
    """The size of a transformer.

    Args:
        side, patch: of the images and patches, in pixels.
        width, depth, heads, classes: channels of a token, and numbers of layers, heads and classes.
    """

    side: int
    patch: int
    width: int
    depth: int
    heads: int
    classes: int

    def __post_init__(self) -> None:
        if self.side % self.patch:
            raise ValueError(f"side is {self.side}; it must be a multiple of the patch's {self.patch} pixels")

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2


class AdaptiVision(nn.Module):
    """Classifies images [B, 3, side, side]: scores [B, classes].

    Args:
        size: of the transformer.
        clusters: (fewest, most) super-tokens; None keeps all patches.
        strategy: "clusters"; "random" or "importance" keep `most` patches instead.
        focus: whether attention is modulated.
        guided: width of the guidance tokens [B, M, guided]; 0 without guidance.
        temperature: of the assignment, in squared distances. The paper's 150 is far above the distances in models
            trained here, which gives every image `most` clusters; 1 is close to them.
        embed: images -> tokens [B, N, width], instead of the linear embedding.

    Raises:
        ValueError: sizes or options that do not fit.
    """

    def __init__(
        self, size: Size, clusters: tuple[int, int] | None = (16, 64), strategy: str = "clusters", focus: bool = True,
        guided: int = 0, temperature: float = 150.0, embed: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        tokens, width = size.tokens, size.width
        if clusters is not None and not 1 <= clusters[0] <= clusters[1]:
            raise ValueError(f"clusters is {clusters}; it must be the fewest and the most, each >= 1")
        if clusters is not None and clusters[1] > tokens:
            raise ValueError(f"clusters is {clusters}; an image has {tokens} patches, so at most as many")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}")
        if clusters is None and strategy != "clusters":
            raise ValueError(f"strategy is {strategy!r}, and clusters is None, which keeps all patches")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        most = tokens if clusters is None else clusters[1]
        self.embed = LinearEmbedding(size.patch, width) if embed is None else embed
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.condense: nn.Module | None = None
        if clusters is not None and strategy == "clusters":
            self.condense = DynamicTokenClustering(width, *clusters, temperature)
        elif clusters is not None:
            self.condense = TokenSelection(width, most, strategy)
        self.guide = nn.Linear(guided, width) if guided else None
        self.layers = nn.ModuleList()
        self.layers.extend(Layer(width, size.heads, most, focus, bool(guided)) for _ in range(size.depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size.classes))

    def features(self, images: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Clusters | None]:
        """Returns (the pooled super-tokens of the last layer [B, D], the clusters)."""
        s = self.embed(images) + self.position
        clusters = None if self.condense is None else self.condense(s)
        used = torch.ones(s.shape[:2], dtype=torch.bool, device=s.device) if clusters is None else clusters.used
        s = s if clusters is None else clusters.tokens
        guidance = self._guidance(guidance)
        for layer in self.layers:
            s = layer(s, used, guidance)
        return pool(s, used), clusters

    def _guidance(self, guidance: Tensor | None) -> Tensor | None:
        """Projects guidance [B, M, guided] to the width of the tokens; None without guidance."""
        if guidance is None or self.guide is None:
            return None
        embedded: Tensor = self.guide(guidance)
        return embedded

    def forward(self, images: Tensor, guidance: Tensor | None = None) -> Tensor:
        scores: Tensor = self.head(self.features(images, guidance)[0])
        return scores

    def loss(
        self, images: Tensor, labels: Tensor, guidance: Tensor | None = None, clustering: float = 0.01,
        alignment: float = 0.1,
    ) -> Tensor:  # fmt: skip
        """Returns the loss (Eq. 12): cross-entropy, clustering distance and alignment, weighted."""
        pooled, clusters = self.features(images, guidance)
        total = F.cross_entropy(self.head(pooled), labels)
        if clusters is not None:
            total = total + clustering * clusters.distance
        projected = self._guidance(guidance)
        if projected is not None:
            total = total + alignment * alignment_loss(pooled, projected.mean(dim=1))
        return total


def pool(s: Tensor, used: Tensor) -> Tensor:
    """Returns the mean [B, D] of the tokens s [B, K, D] that are used [B, K]."""
    weight = used.unsqueeze(-1).to(s.dtype)
    return (s * weight).sum(dim=1) / weight.sum(dim=1)


def alignment_loss(images: Tensor, guidance: Tensor, temperature: float = 0.1) -> Tensor:
    """Returns the contrastive loss (Eq. 15) of pooled images and guidance [B, D]; the rest of the batch is negative."""
    scores = F.normalize(images, dim=-1) @ F.normalize(guidance, dim=-1).mT / temperature
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
