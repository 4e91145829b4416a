"""Google's names and layout of the golden arrays -> ours."""

import re

import numpy as np
import torch

import allmlp as am


def our_name(key: str) -> str:
    key = re.sub(r"MixerBlock_(\d+)", r"blocks.\1", key).replace("/", ".")
    key = key.replace("LayerNorm_", "layer_norm_").replace("Dense_", "dense_")
    return key.replace("kernel", "weight").replace("scale", "weight")


def our_layout(key: str, value: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(value)
    if key.endswith("stem/kernel"):
        return tensor.permute(3, 2, 0, 1)
    return tensor.T if key.endswith("kernel") else tensor


def official_model(params: dict[str, np.ndarray], **sizes: int) -> am.MlpMixer:
    model = am.MlpMixer(am.MixerConfig(**sizes))
    state = {our_name(key): our_layout(key, value) for key, value in params.items()}
    model.load_state_dict(state)
    return model
