"""AdaptiVision: a vision transformer that condenses its patches into as many super-tokens as a picture is complex.

Dynamic token clustering, attention modulated by the whole picture, fusion with tokens of another kind, and the three
losses. Where the paper is silent, or its shapes do not fit each other, what was chosen is said beside it.
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
    """tokens [B, K, D]: the super-tokens. weights [B, N, K]: how much of each token is in each. used [B, K]: bool.

    distance: the mean over the batch of sum_ik a_ik ||z_i - mu_k||^2, divided by N (Eq. 14).
    """

    tokens: Tensor
    weights: Tensor
    used: Tensor
    distance: Tensor


class DynamicTokenClustering(nn.Module):
    """Soft k-means of N tokens into K super-tokens (section 3.2); K follows the picture.

    The learned centroids are where the clustering begins; `iterations` rounds of k-means move them to the picture's
    tokens. Complexity is the entropy of how the tokens spread over all centroids, between 0 and log(most); K grows with
    it from `least` to `most`, and the K centroids with the most tokens stay, in that order. In a batch those of the
    richest picture are kept; what another one does not use is masked.
    """

    def __init__(self, width: int, least: int, most: int, temperature: float = 150.0, iterations: int = 1):
        super().__init__()
        if not 1 <= least <= most:
            raise ValueError(f"least is {least} and most is {most}: the numbers of clusters must be 1 <= least <= most")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.least, self.most, self.temperature, self.iterations = least, most, temperature, iterations
        self.centroids = nn.Parameter(torch.randn(most, width))

    def complexity(self, weights: Tensor) -> Tensor:
        """0..1 for assignments [B, N, most]: [B]."""
        if self.most == 1:
            return weights.new_zeros(len(weights))
        spread = weights.mean(dim=1)
        return -(spread * spread.clamp_min(1e-12).log()).sum(dim=-1) / math.log(self.most)

    def forward(self, z: Tensor) -> Clusters:
        weights = soft_assignment(z, self.centroids.expand(len(z), -1, -1), self.temperature)
        wanted = self.least + self.complexity(weights) * (self.most - self.least)
        K = wanted.round().long().clamp(self.least, self.most)
        order = weights.sum(dim=1).argsort(dim=1, descending=True, stable=True)[:, : int(K.max())]
        centroids = self.centroids[order]
        used = torch.arange(order.shape[1], device=z.device) < K.unsqueeze(1)
        for _ in range(self.iterations):
            weights = soft_assignment(z, centroids, self.temperature, used)
            mass = weights.sum(dim=1).unsqueeze(-1)
            centroids = torch.where(mass > 1e-6, weights.mT @ z / mass.clamp_min(1e-6), centroids)
        weights = soft_assignment(z, centroids, self.temperature, used)
        apart = (weights * torch.cdist(z, centroids).square()).sum(dim=(1, 2)).mean() / z.shape[1]
        return Clusters(weights.mT @ z, weights, used, apart)


class TokenSelection(nn.Module):
    """What the paper's table 5 puts beside clusters: `most` of the tokens are kept as they are, the others dropped.

    "random" keeps those that a number made of the token itself happens to favour, so that a picture always keeps the
    same. "importance" keeps those that a learnt score favours, and passes them on in proportion to it, so that it can
    be learnt (after DynamicViT, which drops tokens in several layers; here it is done where the clusters are made).
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
    """Self-attention whose scores are multiplied by a matrix that the pooled picture predicts (Eq. 4-7).

    The paper's M is K x K, with a K that is each picture's own: here it is made for `most` clusters, from the largest
    one down, and cut to K. It is one plus the product of two thin matrices that are linear in the pooled tokens, of
    which one begins at zero, so that it begins as ordinary attention.
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
        """M [B, K, K] of the tokens s [B, K, D]."""
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
    """Cross-attention to tokens of another kind, behind a gate (Eq. 8-10). Without such tokens nothing is added.

    Eq. 10 as printed adds the gate itself, which is never below 0 and says nothing of what is attended to; here, as the
    text has it, the gate regulates what is added.
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
    """Attention, fusion with guidance, and the feed-forward layer of a transformer, on which the paper is silent."""

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
    """Patches of pictures [B, 3, H, W] as tokens [B, N, width], a linear map of their pixels (section 3.1)."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.proj(pictures).flatten(2).mT


class AdaptiVision(nn.Module):
    """Pictures [B, 3, side, side] to scores [B, classes].

    clusters: (least, most) super-tokens; None keeps all patches. strategy: "clusters", or "random" or "importance" to
    keep `most` of the patches instead. focus: whether attention is modulated. guided: the width of tokens of another
    kind [B, M, guided] that are fused, 0 for none. embed: pictures -> tokens [B, N, width], where it is not the paper's
    linear one. temperature: of the assignment, in squared distances; the paper's 150 is far above those of models
    trained here, whose pictures then all get `most` clusters, and 1 is near them.
    """

    def __init__(
        self, side: int, patch: int, width: int, depth: int, heads: int, classes: int,
        clusters: tuple[int, int] | None = (16, 64), strategy: str = "clusters", focus: bool = True, guided: int = 0,
        temperature: float = 150.0, embed: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        if side % patch:
            raise ValueError(f"side is {side}; it must be a multiple of the patch's {patch} pixels")
        tokens = (side // patch) ** 2
        if clusters is not None and not 1 <= clusters[0] <= clusters[1]:
            raise ValueError(f"clusters is {clusters}; it must be the fewest and the most, from 1 on")
        if clusters is not None and clusters[1] > tokens:
            raise ValueError(f"clusters is {clusters}; a picture has {tokens} patches, so at most as many")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}")
        if clusters is None and strategy != "clusters":
            raise ValueError(f"strategy is {strategy!r}, and clusters is None, which keeps all patches")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        most = tokens if clusters is None else clusters[1]
        self.embed = LinearEmbedding(patch, width) if embed is None else embed
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.condense: nn.Module | None = None
        if clusters is not None and strategy == "clusters":
            self.condense = DynamicTokenClustering(width, *clusters, temperature)
        elif clusters is not None:
            self.condense = TokenSelection(width, most, strategy)
        self.guide = nn.Linear(guided, width) if guided else None
        self.layers = nn.ModuleList()
        self.layers.extend(Layer(width, heads, most, focus, bool(guided)) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def features(self, pictures: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Clusters | None]:
        """(the pooled super-tokens of the last layer [B, D], the clusters)."""
        s = self.embed(pictures) + self.position
        clusters = None if self.condense is None else self.condense(s)
        used = torch.ones(s.shape[:2], dtype=torch.bool, device=s.device) if clusters is None else clusters.used
        s = s if clusters is None else clusters.tokens
        guidance = self._guidance(guidance)
        for layer in self.layers:
            s = layer(s, used, guidance)
        return pool(s, used), clusters

    def _guidance(self, guidance: Tensor | None) -> Tensor | None:
        """Guidance [B, M, guided] as wide as the tokens; without any the model does what it can."""
        if guidance is None or self.guide is None:
            return None
        embedded: Tensor = self.guide(guidance)
        return embedded

    def forward(self, pictures: Tensor, guidance: Tensor | None = None) -> Tensor:
        scores: Tensor = self.head(self.features(pictures, guidance)[0])
        return scores

    def loss(
        self, pictures: Tensor, labels: Tensor, guidance: Tensor | None = None, clustering: float = 0.01,
        alignment: float = 0.1,
    ) -> Tensor:  # fmt: skip
        """Eq. 12: cross-entropy and, by their weights, how far tokens are from clusters and pictures from guidance."""
        pooled, clusters = self.features(pictures, guidance)
        total = F.cross_entropy(self.head(pooled), labels)
        if clusters is not None:
            total = total + clustering * clusters.distance
        told = self._guidance(guidance)
        if told is not None:
            total = total + alignment * alignment_loss(pooled, told.mean(dim=1))
        return total


def pool(s: Tensor, used: Tensor) -> Tensor:
    """The mean [B, D] of the tokens s [B, K, D] that are used [B, K]."""
    weight = used.unsqueeze(-1).to(s.dtype)
    return (s * weight).sum(dim=1) / weight.sum(dim=1)


def alignment_loss(pictures: Tensor, guidance: Tensor, temperature: float = 0.1) -> Tensor:
    """Eq. 15 of pooled pictures [B, D] and what belongs to each [B, D]; the others of the batch are the negatives."""
    scores = F.normalize(pictures, dim=-1) @ F.normalize(guidance, dim=-1).mT / temperature
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
