"""The vision transformer of Dosovitskiy et al. (2021), section 3.1, with timm's parameter names.

An image becomes T = 1 + (H / patch)(W / patch) tokens, a class token and one for each patch; blocks of
attention and MLP follow, and the class token is classified. The two products of attention are modules of
their own (``blocks.0.attn.qk`` and ``.av``), so that an assignment can name them like any layer.

Letters: N images, H x W pixels, T tokens, D features, h heads; M x K x N the product.

Chapter: 05, "What happens to a network?"
"""

import torch
from torch import Tensor, nn

from axmoe_lite.layers import Matmul


class PatchEmbedding(nn.Module):
    """Cuts an image into patches and maps each to D features: [N, 3, H, W] to [N, (H / patch)(W / patch), D]."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(D / h)) V with both products visible; [N, T, D] to [N, T, D].

    The paper's equations (5) to (8). The scale goes to Q before the product, as in timm.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qk = Matmul()
        self.av = Matmul()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # The 3 D outputs are q, k, v in turn, each with one head after another: [N, h, T, D / h] apiece.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.qk(q * self.scale, k.transpose(-2, -1)).softmax(-1)
        return self.proj(self.av(weights, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around a GELU; [N, T, D] to [N, T, D] through ``hidden`` features."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to what it got; [N, T, D] to [N, T, D]."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = _norm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = _norm(dim)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer: [N, 3, image_size, image_size] to class scores [N, classes].

    Weights start as truncated normals of standard deviation 0.02, biases at zero.

    Args:
        dim: D, features of a token.
        depth: number of blocks.
        heads: h, attention heads; must divide ``dim``.
        classes: number of classes.
        image_size: H = W, pixels.
        patch: side of a patch in pixels; must divide ``image_size``.
        mlp_ratio: hidden features of the MLP for each of ``dim``.

    Raises:
        ValueError: for a number below 1, or one that does not divide what it should.

    >>> tiny = ViT(dim=12, depth=2, heads=3, classes=10, image_size=8, patch=4)
    >>> tiny(torch.zeros(5, 3, 8, 8)).shape, tiny.pos_embed.shape  # T = 1 + 2 * 2
    (torch.Size([5, 10]), torch.Size([1, 5, 12]))
    >>> [name for name, m in tiny.named_modules() if isinstance(m, Matmul)]
    ['blocks.0.attn.qk', 'blocks.0.attn.av', 'blocks.1.attn.qk', 'blocks.1.attn.av']
    """

    def __init__(
        self, *, dim: int, depth: int, heads: int, classes: int, image_size: int, patch: int, mlp_ratio: int = 4
    ) -> None:
        super().__init__()
        _check(
            dim=dim, depth=depth, heads=heads, classes=classes, image_size=image_size, patch=patch, mlp_ratio=mlp_ratio
        )
        self.image_size = image_size
        self.patch_embed = PatchEmbedding(patch, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio * dim) for _ in range(depth)))
        self.norm = _norm(dim)
        self.head = nn.Linear(dim, classes)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"This ViT was given images of {list(x.shape[1:])} and has positions for"
                f" [3, {self.image_size}, {self.image_size}] only. Resize them, or build it with their image_size."
            )
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def _norm(dim: int) -> nn.LayerNorm:
    # timm's epsilon, not torch's 1e-5, so that timm's weights give timm's outputs.
    return nn.LayerNorm(dim, eps=1e-6)


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; a ViT needs at least 1.")
    for part, whole in (("patch", "image_size"), ("heads", "dim")):
        if sizes[whole] % sizes[part]:
            options = [n for n in range(1, sizes[whole] + 1) if sizes[whole] % n == 0]
            near = min(options, key=lambda n: abs(n - sizes[part]))
            raise ValueError(
                f"{part} = {sizes[part]} does not divide {whole} = {sizes[whole]}; the nearest that does is {near}."
            )
