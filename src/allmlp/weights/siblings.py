"""The authors' files of CycleMLP and of the Vision Permutator: which names, which architecture.

Both share a skeleton, whose names and shapes are ours too (`models/staged.py`):

    patch_embed.proj.{weight,bias}
    network.{n}.{b}.{norm1,norm2}.{weight,bias}          n a stage, b a block
    network.{n}.{b}.attn.{mlp_c.weight,proj.*,reweight.fc1.*,reweight.fc2.*}
    network.{n}.{b}.attn.{sfc_h,sfc_w}.{weight,bias,offset}            CycleMLP
    network.{n}.{b}.attn.{mlp_h,mlp_w}.weight                          Vision Permutator
    network.{n}.{b}.mlp.{fc1,fc2}.{weight,bias}
    network.{n}.proj.{weight,bias}                       a convolution between two stages
    norm.{weight,bias}   head.{weight,bias}

Sources: ShoufaChen/CycleMLP (cycle_mlp.py), Andrew-Qibin/VisionPermutator (models/vip.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from allmlp.errors import UserError
from allmlp.models.cycle_mlp import CycleMLPConfig
from allmlp.models.vision_permutator import VisionPermutatorConfig

Shapes = dict[str, tuple[int, ...]]
Size = tuple[int, int]

_SHARED = (
    r"patch_embed\.proj|norm|head|network\.\d+\.proj|network\.\d+\.\d+\.(?:norm[12]|"
    r"attn\.(?:mlp_c|proj|reweight\.fc[12])|mlp\.fc[12])"
)
_CYCLE = re.compile(rf"(?:{_SHARED}|network\.\d+\.\d+\.attn\.sfc_[hw])\.(?:weight|bias|offset)")
_PERMUTATOR = re.compile(rf"(?:{_SHARED}|network\.\d+\.\d+\.attn\.mlp_[hw])\.(?:weight|bias)")


def is_cycle_mlp(name: str) -> bool:
    """Says whether a name is one of CycleMLP's."""
    return bool(_CYCLE.fullmatch(name))


def is_permutator(name: str) -> bool:
    """Says whether a name is one of the Vision Permutator's."""
    return bool(_PERMUTATOR.fullmatch(name))


def infer_cycle_mlp(shapes: Shapes, path: Path, image_size: Size | None) -> CycleMLPConfig:
    """Returns the architecture of a file with CycleMLP's names.

    Args:
        shapes: of its tensors.
        path: for messages.
        image_size: (H, W) that somebody wrote beside the file; else 224 pixels.

    Raises:
        UserError: a tensor that is needed is missing, or the shapes make no CycleMLP.
    """
    kernel = _shape(shapes, "patch_embed.proj.weight", 4, path)[2]
    if kernel != CycleMLPConfig.stem_kernel:
        what = f"the stem's window is {kernel} pixels wide, and the file does not say its stride"
        raise UserError(what, where=path, fix="Give it with the config.json that we write")
    fields, _ = _skeleton(shapes, path, "CycleMLP")
    try:
        return CycleMLPConfig(image_size=image_size or (224, 224), **fields)
    except ValueError as error:
        raise UserError(f"no CycleMLP: {error}", where=path) from error


def infer_permutator(shapes: Shapes, path: Path, image_size: Size | None) -> VisionPermutatorConfig:
    """Returns the architecture of a file with the Vision Permutator's names.

    Segments cannot be told from the shapes: they are taken to be as many as the grid has rows, as
    the authors' code wants it.

    Args:
        shapes: of its tensors.
        path: for messages.
        image_size: (H, W) that somebody wrote beside the file; else 224 pixels.

    Raises:
        UserError: a tensor that is needed is missing, or the shapes make no Vision Permutator.
    """
    fields, stages = _skeleton(shapes, path, "Vision Permutator")
    patch = _shape(shapes, "patch_embed.proj.weight", 4, path)[2]
    downsamples = tuple(f"network.{first + 1}.proj.weight" in shapes for first in stages[:-1])
    size = image_size or (224, 224)
    rows, segments = size[0] // patch, []
    for stage, dim in enumerate(fields["dims"]):
        if stage and downsamples[stage - 1]:
            rows //= 2
        side = _shape(shapes, f"network.{stages[stage]}.0.attn.mlp_h.weight", 2, path)[0]
        if side != dim or rows < 1:
            raise UserError(
                f"the height is mixed by {side}x{side} weights at {dim} channels: the file does "
                "not say into how many segments these are cut",
                where=path,
                fix="Give it with the config.json that we write",
            )
        segments.append(rows)
    try:
        return VisionPermutatorConfig(
            image_size=size,
            patch_size=patch,
            segments=tuple(segments),
            downsamples=downsamples,
            **fields,
        )
    except ValueError as error:
        raise UserError(f"no Vision Permutator: {error}", where=path) from error


def _shape(shapes: Shapes, name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    found = shapes.get(name)
    if found is None:
        raise UserError(f"{name} is missing", where=path, fix="Is it the right file?")
    if len(found) != dimensions or 0 in found:
        what = f"{name} has the shape {found}, {dimensions} axes are expected"
        raise UserError(what, where=path)
    return found


def _skeleton(shapes: Shapes, path: Path, title: str) -> tuple[dict, list[int]]:
    """Returns the fields that both families have, and the index of each stage in `network`."""
    blocks: dict[int, set[int]] = {}
    for name in shapes:
        if found := re.match(r"network\.(\d{1,6})\.(\d{1,6})\.", name):
            blocks.setdefault(int(found[1]), set()).add(int(found[2]))
    stages = sorted(blocks)
    if not stages:
        raise UserError(f"no {title}: the file has no blocks (network.0.0.*)", where=path)
    depths = [max(blocks[stage]) + 1 for stage in stages]
    if sum(depths) > len(shapes):  # check_shapes names what is missing of a likely number
        what = f"block {max(depths) - 1:,} is there, but the file has {len(shapes):,} tensors only"
        raise UserError(what, where=path)
    dims, ratios = [], []
    for stage in stages:
        hidden, dim = _shape(shapes, f"network.{stage}.0.mlp.fc1.weight", 2, path)
        if hidden % dim:
            what = f"no {title}: {hidden} hidden units are no multiple of {dim} channels"
            raise UserError(what, where=path)
        dims.append(dim)
        ratios.append(hidden // dim)
    has_head = "head.weight" in shapes or "head.bias" in shapes
    fields = {
        "depths": tuple(depths),
        "dims": tuple(dims),
        "mlp_ratios": tuple(ratios),
        "in_channels": _shape(shapes, "patch_embed.proj.weight", 4, path)[1],
        "num_classes": _shape(shapes, "head.weight", 2, path)[0] if has_head else 0,
    }
    return fields, stages
