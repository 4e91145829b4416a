"""The architecture of an MLP-Mixer: its fields, and what they cost in closed formulas."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from allmlp.models.layers import check_config, check_divisible, is_integer

TOKEN_MIXING = ("shared", "untied", "grouped", "views")


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The architecture of an MLP-Mixer (Table 1 of the paper).

    Args:
        image_size: (H, W) in pixels, one number for a square; the patch must divide both.
        patch_size: P, side of a patch in pixels.
        hidden_dim: C, channels of a token.
        num_blocks: mixer layers; each has a token-mixing and a channel-mixing MLP.
        tokens_mlp_dim: D_S, hidden units of the token-mixing MLPs.
        channels_mlp_dim: D_C, hidden units of the channel-mixing MLPs.
        num_classes: outputs of the head; 0 leaves the head out: the model returns its features.
        in_channels: channels of the input images.
        dropout: probability after each of the two dense layers of every MLP.
        stochastic_depth: s, probability of dropping the last MLP; it rises linearly from 0 at the
            first of the 2 * num_blocks MLPs (appendix B).
        gelu: "tanh" as Google's weights were trained, "exact" for weights trained in timm.
        token_mixing: which weights mix the tokens (appendix A.1, `mixer_variants.py`): one MLP for
            all channels ("shared"), one per channel ("untied"), one that sees `token_groups`
            neighbouring channels at once ("grouped"), or that many learned views of all channels
            ("views").
        token_groups: G, for "grouped" and "views"; it divides hidden_dim.
        pyramid: (block, S') pairs: the token mixing of these blocks, counted from 0, reduces the
            tokens to S', and all later blocks work on that many.

    Raises:
        ValueError: the patch does not divide the image, or a value is out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int
    hidden_dim: int
    num_blocks: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    num_classes: int = 1000
    in_channels: int = 3
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    gelu: Literal["tanh", "exact"] = "tanh"
    token_mixing: Literal["shared", "untied", "grouped", "views"] = "shared"
    token_groups: int = 1
    pyramid: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        sizes = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
        check_config(self, *sizes)
        if self.gelu not in ("tanh", "exact"):
            raise ValueError(f"gelu must be 'tanh' or 'exact', got {self.gelu!r}")
        check_divisible(self.image_size, self.patch_size, f"the patch size {self.patch_size}")
        self._check_variant()

    def _check_variant(self) -> None:
        if self.token_mixing not in TOKEN_MIXING:
            known = ", ".join(TOKEN_MIXING)
            raise ValueError(f"token_mixing must be one of {known}, got {self.token_mixing!r}")
        groups = self.token_groups
        if not is_integer(groups) or self.hidden_dim % groups:
            what = f"token_groups must divide hidden_dim, {self.hidden_dim}"
            raise ValueError(f"{what}, got {groups!r}")
        if groups > 1 and self.token_mixing not in ("grouped", "views"):
            what = f"token_groups={groups} has no effect with token_mixing={self.token_mixing!r}"
            raise ValueError(f"{what}; it is for 'grouped' and 'views'")
        try:
            steps = tuple((block, fewer) for block, fewer in self.pyramid)
        except (TypeError, ValueError):
            steps = ((-1, -1),)
        is_list = isinstance(self.pyramid, tuple | list)
        if not is_list or not all(is_integer(number, 0) for step in steps for number in step):
            what = "pyramid must be pairs of a block and its tokens, as [[4, 49]]"
            raise ValueError(f"{what}, got {self.pyramid!r}")
        last_block, tokens = -1, self.num_tokens
        for block, fewer in steps:
            if not last_block < block < self.num_blocks:
                what = f"the blocks of a pyramid rise from 0 to {self.num_blocks - 1}"
                raise ValueError(f"{what}, got {self.pyramid!r}")
            if not 1 <= fewer < tokens:
                what = f"block {block} of the pyramid must bring {tokens} tokens down to fewer"
                raise ValueError(f"{what}, got {fewer}")
            last_block, tokens = block, fewer
        object.__setattr__(self, "pyramid", steps)

    @property
    def is_plain(self) -> bool:
        """Whether this is the paper's Mixer and not a variant of appendix A.1."""
        return self.token_mixing == "shared" and not self.pyramid

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row: (H / P, W / P)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """S = HW / P^2, the length of the token sequence."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens before each block and, at last, those before the head: num_blocks + 1."""
        steps, counts = dict(self.pyramid), [self.num_tokens]
        for block in range(self.num_blocks):
            counts.append(steps.get(block, counts[-1]))
        return tuple(counts)

    @property
    def flops(self) -> int:
        """Operations of one image, a multiply-add counted as two.

        Biases, GELU and LayerNorm, together below one per cent, are left out, as is usual.
        """
        dim = self.hidden_dim
        total = self.num_tokens * self.in_channels * self.patch_size**2 * dim
        for before, after in itertools.pairwise(self.tokens):
            total += dim * (before + after) * self.tokens_mlp_dim
            total += 2 * after * dim * self.channels_mlp_dim
            total += before * dim**2 if self.token_mixing == "views" else 0
            total += dim * before * after if after < before else 0
        return 2 * (total + dim * self.num_classes)

    @property
    def widest(self) -> int:
        """Values of one image's largest activation, a hidden layer of the first block."""
        return max(self.hidden_dim * self.tokens_mlp_dim, self.num_tokens * self.channels_mlp_dim)

    @property
    def num_parameters(self) -> int:
        """Trained values (Table 1), also of the variants."""
        dim = self.hidden_dim
        total = (self.in_channels * self.patch_size**2 + 1) * dim + 2 * dim
        for before, after in itertools.pairwise(self.tokens):
            inside, outside = before * self.token_groups, after * self.token_groups
            mixing = (inside + 1) * self.tokens_mlp_dim + (self.tokens_mlp_dim + 1) * outside
            total += mixing * (dim if self.token_mixing == "untied" else 1)
            total += (dim + 1) * self.channels_mlp_dim + (self.channels_mlp_dim + 1) * dim
            total += 4 * dim  # two LayerNorms
            total += dim**2 if self.token_mixing == "views" else 0
            total += before * after if after < before else 0
        return total + ((dim + 1) * self.num_classes if self.num_classes else 0)

    @property
    def variant(self) -> str:
        """The variant of appendix A.1 in words; "" for the paper's own Mixer."""
        words = {
            "shared": [],
            "untied": ["untied token mixing"],
            "grouped": [f"channels in groups of {self.token_groups}"],
            "views": [f"{self.token_groups} learned views"],
        }[self.token_mixing]
        if self.pyramid:
            words = [*words, "pyramid " + " > ".join(map(str, dict.fromkeys(self.tokens)))]
        return ", ".join(words)

    def summary(self) -> str:
        """Returns the shape in a few words: "12 layers, patch 16, 768 channels"."""
        shape = f"{self.num_blocks} layers, patch {self.patch_size}, {self.hidden_dim} channels"
        return f"{shape}, {self.variant}" if self.variant else shape
