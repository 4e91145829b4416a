"""A Mixer in Flax after the paper's description (section 2, equation 1), to be timed under XLA.

Exact GELU and the weights of timm's names, as on the other sides of benchmarks/inference.py.

Shapes: N batch, S tokens, C channels, P patch side, H W pixels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Mlp(nn.Module):
    """Two dense layers on the last axis."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.hidden, name="fc1")(x), approximate=False)
        return nn.Dense(x.shape[-1], name="fc2")(y)


class Block(nn.Module):
    """Token mixing, channel mixing, each with a skip."""

    tokens_dim: int
    channels_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (N, S, C)
        y = jnp.swapaxes(nn.LayerNorm(epsilon=1e-6, name="norm1")(x), 1, 2)
        x = x + jnp.swapaxes(Mlp(self.tokens_dim, name="mlp_tokens")(y), 1, 2)
        y = nn.LayerNorm(epsilon=1e-6, name="norm2")(x)
        return x + Mlp(self.channels_dim, name="mlp_channels")(y)


class Mixer(nn.Module):
    """Images (N, H, W, channels) -> logits."""

    patch: int
    dim: int
    blocks: int
    tokens_dim: int
    channels_dim: int
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        side = (self.patch, self.patch)
        x = nn.Conv(self.dim, side, strides=side, padding="VALID", name="stem")(images)
        x = x.reshape(x.shape[0], -1, self.dim)
        for index in range(self.blocks):
            x = Block(self.tokens_dim, self.channels_dim, name=f"block_{index}")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x).mean(axis=1)
        return nn.Dense(self.classes, name="head")(x)


def from_timm(arrays: Any, blocks: int) -> dict[str, Any]:
    """Returns the variables from arrays by timm's names.

    Args:
        arrays: a mapping, kernels as torch has them: (outputs, inputs), (outputs, channels, P, P).
        blocks: of the Mixer.
    """

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}

    def mlp(name: str) -> dict[str, Any]:
        return {layer: dense(f"{name}.{layer}") for layer in ("fc1", "fc2")}

    kernel = arrays["stem.proj.weight"].transpose(2, 3, 1, 0)  # (P, P, channels, C)
    params: dict[str, Any] = {"stem": {"kernel": kernel, "bias": arrays["stem.proj.bias"]}}
    for index in range(blocks):
        own = f"blocks.{index}"
        params[f"block_{index}"] = {
            **{name: norm(f"{own}.{name}") for name in ("norm1", "norm2")},
            **{name: mlp(f"{own}.{name}") for name in ("mlp_tokens", "mlp_channels")},
        }
    return {"params": {**params, "norm": norm("norm"), "head": dense("head")}}
