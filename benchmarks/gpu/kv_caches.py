"""KV caches of realistic shapes, in the layouts that vLLM 0.31 to 0.33 hand to a connector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import torch

Caches: TypeAlias = dict[str, Any]
"""By layer: a tensor, or a list of them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's KV on one rank: `content` numbers of two bytes for each head and token, K and V together."""

    layers: int
    heads: int
    tokens: int
    content: int

    @property
    def page_bytes(self) -> int:
        """A block of one layer."""
        return self.heads * self.tokens * self.content * 2

    @property
    def row_bytes(self) -> int:
        """A block of all layers."""
        return self.layers * self.page_bytes


DEEP: Final = Shape(layers=48, heads=8, tokens=16, content=2 * 128)
SMALL: Final = Shape(layers=3, heads=2, tokens=4, content=8)


def _names(shape: Shape) -> list[str]:
    return [f"model.layers.{number}.self_attn.attn" for number in range(shape.layers)]


def in_order(order: str, shape: Shape, blocks: int, device: torch.device) -> Caches:
    """One allocation for all layers; `order` names its dimensions, L, B, H, N (tokens) and C, from outer to inner."""
    sizes = {"L": shape.layers, "B": blocks, "H": shape.heads, "N": shape.tokens, "C": shape.content}
    raw = torch.empty([sizes[name] for name in order], dtype=torch.bfloat16, device=device)
    logical = raw.permute([order.index(name) for name in "LBHNC"])
    return dict(zip(_names(shape), logical, strict=True))


def _apart(shape: Shape, blocks: int, device: torch.device) -> Caches:
    size = (blocks, shape.heads, shape.tokens, shape.content)
    return {name: torch.empty(size, dtype=torch.bfloat16, device=device) for name in _names(shape)}


def _kernel_blocks(shape: Shape, blocks: int, device: torch.device) -> Caches:
    """A block of the manager is four of the kernel's."""
    size = (shape.layers, blocks * 4, shape.heads, shape.tokens // 4, shape.content)
    return dict(zip(_names(shape), torch.empty(size, dtype=torch.bfloat16, device=device), strict=True))


def _fp8(shape: Shape, blocks: int, device: torch.device) -> Caches:
    size = (shape.layers, blocks, shape.heads, shape.tokens, shape.content)
    return dict(zip(_names(shape), torch.empty(size, dtype=torch.uint8, device=device), strict=True))


def _mla(shape: Shape, blocks: int, device: torch.device) -> Caches:
    """One latent vector for each token: 512 numbers and 64 of the rotary part."""
    size = (shape.layers, blocks, shape.tokens, 576 if shape is DEEP else shape.content)
    return dict(zip(_names(shape), torch.empty(size, dtype=torch.bfloat16, device=device), strict=True))


def _padded_mamba(shape: Shape, blocks: int, device: torch.device) -> Caches:
    """Two states of a layer in one page, which is padded to the page of an attention layer."""
    conv, ssm = shape.page_bytes // 8, shape.page_bytes // 2

    def states() -> list[torch.Tensor]:
        page = torch.empty((blocks, shape.page_bytes), dtype=torch.uint8, device=device)
        return [
            page[:, :conv].view(torch.bfloat16).view(blocks, 4, -1),
            page[:, conv : conv + ssm].view(torch.float32).view(blocks, 2, -1),
        ]

    return {name: states() for name in _names(shape)}


LAYOUTS: Final[dict[str, Callable[[Shape, int, torch.device], Caches]]] = {
    **{order: partial(in_order, order) for order in ("LBNHC", "LBHNC", "BLHNC", "LHBNC")},
    "layers apart": _apart,
    "kernel blocks": _kernel_blocks,
    "FP8": _fp8,
    "MLA": _mla,
    "padded Mamba": _padded_mamba,
}
