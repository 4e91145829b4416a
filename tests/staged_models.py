"""What the tests of CycleMLP and Vision Permutator share: small ones, and the golden recipe.

The golden logits were computed by the authors' codes (ShoufaChen/CycleMLP at 4e062a0,
Andrew-Qibin/VisionPermutator at 2cab2ce) in float64, from weights that numpy draws.
"""

from typing import Any

import numpy as np
import torch

import allmlp as am

# A few pixels, a few channels, all of the parts; image sizes that go with them.
SMALL_CYCLE: dict[str, Any] = {"depths": (1, 2), "dims": (9, 12), "mlp_ratios": (4, 2)}
SMALL_PERMUTATOR: dict[str, Any] = {
    "patch_size": 2,
    "depths": (1, 2),
    "dims": (8, 12),
    "mlp_ratios": (3, 2),
    "segments": (4, 2),
    "downsamples": (True,),
}


def small_cycle(num_classes: int = 5, image_size: Any = 16, **changes: Any) -> am.ImageClassifier:
    """With a stem of 16 / 4 = 4 positions a side and random numbers everywhere."""
    torch.manual_seed(0)
    overrides = {**SMALL_CYCLE, **changes}
    return enliven(am.create_model("cycle_mlp_b1", image_size, num_classes, **overrides))


def small_permutator(
    num_classes: int = 5, image_size: Any = 8, **changes: Any
) -> am.ImageClassifier:
    """With 8 / 2 = 4 positions a side and random numbers everywhere."""
    torch.manual_seed(0)
    overrides = {**SMALL_PERMUTATOR, **changes}
    return enliven(am.create_model("vip_s7", image_size, num_classes, **overrides))


def enliven(model: am.ImageClassifier) -> am.ImageClassifier:
    """Fills the parameters so that every part of the network is heard in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, spread)
    return model


def check_golden(name: str, first: list[float], total: float, size: float, largest: int) -> None:
    """Compares the logits of a golden image with the authors' code's, to 1e-5; the i-th of the
    sorted names has weights of numpy's seed i."""
    model = am.create_model(name).eval()
    tensors = model.state_dict()
    keys = sorted(key for key in tensors if not key.endswith(".offset"))
    for seed, key in enumerate(keys):
        shape = tuple(tensors[key].shape)
        drawn = np.random.RandomState(seed).standard_normal(shape)
        if len(shape) > 1:
            drawn = drawn / np.sqrt(drawn.size / shape[0])
        else:
            is_scale = "norm" in key and key.endswith("weight")
            drawn = 0.1 * drawn + (1.0 if is_scale else 0.0)
        tensors[key] = torch.from_numpy(drawn.astype(np.float32))
    model.load_state_dict(tensors)
    drawn = np.random.RandomState(1234).standard_normal((1, 3, 224, 224))
    with torch.no_grad():
        logits = model(torch.from_numpy(drawn.astype(np.float32)))[0].double()
    assert (logits[:4] - torch.tensor(first, dtype=torch.float64)).abs().max() <= 1e-5
    assert abs(logits.abs().mean().item() - size) <= 1e-5
    assert abs(logits.sum().item() - total) <= 1e-4  # of a thousand numbers
    assert int(logits.argmax()) == largest
