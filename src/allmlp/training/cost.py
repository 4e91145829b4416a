"""What training costs: operations, time and memory. Pure functions, small enough to check by hand;
only the memory of other families than the Mixer is counted by the computer, see `kept.py`.

Legend: N images, S tokens, C channels, D_S and D_C hidden units of the token-mixing and the
channel-mixing MLPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from allmlp.errors import UserError, plural
from allmlp.models.mixer_config import MixerConfig
from allmlp.training.config import TrainConfig
from allmlp.training.kept import block_matrices, is_known, kept_of_one_image

# Images a second of the line on costs: a processor, a small GPU, a large one.
_SPEEDS = (10, 100, 1000)
_UNITS = (("day", 86_400), ("h", 3600), ("min", 60), ("s", 1))


def num_images_seen(config: TrainConfig, num_images: int) -> int:
    """Returns how many images a run looks at, the same one once for each time.

    Args:
        config: of the run.
        num_images: to train on.
    """
    if config.steps is not None:
        return config.steps * config.batch_size
    assert config.epochs is not None
    return config.epochs * num_images


def planned(config: TrainConfig) -> str:
    """Returns how long a run is: "1 epoch" or "1,000 steps"."""
    if config.epochs is not None:
        return plural(config.epochs, "epoch")
    return plural(config.steps or 0, "step")


def operations(flops_per_image: int, images: int, sharpness: float = 0.0) -> int:
    """Returns the operations of a training run.

    A step takes three times the forward pass: itself, the gradient of what each layer reads, and
    that of its weights. Sharpness-aware minimisation takes the gradient twice.

    Args:
        flops_per_image: of the forward pass, a multiply-add counted as two: `config.flops`.
        images: that the run looks at, see `num_images_seen`.
        sharpness: share of the run with sharpness-aware minimisation, 0 to 1.
    """
    return round(3 * flops_per_image * images * (1.0 + sharpness))


def cost_line(flops_per_image: int, images: int, sharpness: float = 0.0) -> str:
    """Returns "1.1e16 operations; at 10 images/s 4 h, at 100 24 min, at 1,000 2 min 24 s".

    Args:
        flops_per_image, images, sharpness: as `operations` takes them.
    """
    times = [f"{speed:,} {duration(images / speed)}" for speed in _SPEEDS]
    first = times[0].replace(" ", " images/s ", 1)
    total = power(operations(flops_per_image, images, sharpness))
    return f"{total} operations; at {', at '.join([first, *times[1:]])}"


def power(number: int) -> str:
    """Returns a large number as "1.1e16"."""
    digits, _, exponent = f"{number:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def estimate(seconds_per_step: float, steps_left: int) -> str:
    """Returns how long the rest of a run takes: "3 h 20 min"."""
    return duration(seconds_per_step * steps_left)


def duration(seconds: float) -> str:
    """Returns a length of time in its two largest units: "12 min 5 s", "4 days 11 h"."""
    if seconds < 0:
        raise ValueError(f"a length of time is at least 0 s, got {seconds}")
    for at, (name, size) in enumerate(_UNITS[:-1]):
        small_name, small = _UNITS[at + 1]
        whole, rest = divmod(round(seconds / small), size // small)
        if whole:
            plural = "s" if name == "day" and whole > 1 else ""
            detail = f" {rest} {small_name}" if rest and whole < 100 else ""
            return f"{whole:,} {name}{plural}{detail}"
    return f"{round(seconds)} s"


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training takes on one process.

    Attributes:
        parameters, gradients, optimizer: of the weights; float32.
        average: the running average of the weights that is evaluated in their place.
        copies: of the weights, in bfloat16 for the products and for sharpness-aware minimisation.
        activations: of one image; None for an architecture whose count is not known here.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    copies: int
    activations: int | None

    @property
    def state(self) -> int:
        """What is there whatever the number of images."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.copies


def training_memory(
    config: object,
    num_parameters: int,
    settings: TrainConfig,
    *,
    bfloat16: bool = False,
    num_processes: int = 1,
) -> TrainingMemory:
    """Returns an estimate of the memory of a run, without what torch itself and the data take.

    With `sharding="full"` the parts are spread over the processes; the weights of the one or two
    layers that are at work, which are whole then, are not counted.

    Args:
        config: of the model.
        num_parameters: of the model, as `count_parameters` counts.
        settings: of the run.
        bfloat16: whether products are computed in it.
        num_processes: that share the batch.
    """
    optimizer, size = settings.optimizer, 4 * num_parameters
    parts = num_processes if settings.sharding == "full" else 1
    if optimizer.name == "sgd":
        moments = size if optimizer.beta1 else 0
    elif optimizer.name == "muon":  # no second moment for the matrices that it makes orthogonal
        moments = 2 * size - 4 * _block_matrices(config)
    else:
        moments = 2 * size
    return TrainingMemory(
        parameters=size // parts,
        gradients=size // parts,
        optimizer=moments // parts,
        average=size // parts if optimizer.average else 0,
        copies=(2 * num_parameters if bfloat16 else 0)
        + (size // parts if optimizer.sharpness else 0),
        activations=activation_bytes(config, bfloat16=bfloat16),
    )


def _block_matrices(config: object) -> int:
    """The weights of the blocks' dense layers; 0 where the architecture is not known."""
    if not isinstance(config, MixerConfig) or not config.is_plain:
        return block_matrices(config) if is_known(config) else 0
    tokens = 2 * config.num_tokens * config.tokens_mlp_dim
    return config.num_blocks * (tokens + 2 * config.hidden_dim * config.channels_mlp_dim)


def activation_bytes(config: object, *, bfloat16: bool = False) -> int | None:
    """Returns the bytes that autograd keeps of one image from the forward to the backward pass.

    Of a mixer block, `models/mixer.py`, from top to bottom, once for token mixing (D = C x D_S) and
    once for channel mixing (D = S x D_C):

        layer_norm      its input, S x C, and 2 numbers a token, float32 always
        dense_0         its input, S x C
        gelu            its input, D
        dense_1         its input, D
        dropout         where there is any, a mask for each of its two outputs, D and S x C

    What is added to the residual stream is not kept. Around the blocks: the image, the input of the
    last LayerNorm, the features, and logits and targets. Measured without torch.compile, which
    computes some of it again rather than keep it, and so needs less. Of other families the same is
    counted by `kept_of_one_image`.

    Args:
        config: of the model.
        bfloat16: whether the dense layers compute in it; LayerNorm and the residual stream do not.

    Returns:
        None for an architecture that is not known here.
    """
    if not isinstance(config, MixerConfig) or not config.is_plain:
        return kept_of_one_image(config, bfloat16)[0] if is_known(config) else None
    width = 2 if bfloat16 else 4
    tokens, dim = config.num_tokens, config.hidden_dim
    stream = tokens * dim
    layer_norm = 4 * (stream + 2 * tokens)
    hidden = dim * config.tokens_mlp_dim + tokens * config.channels_mlp_dim
    block = 2 * layer_norm + width * (2 * stream + 2 * hidden)
    if config.dropout:
        block += width * (hidden + 2 * stream)
    around = layer_norm + width * (_pixels(config) + dim) + 2 * 4 * config.num_classes
    return config.num_blocks * block + around


def _pixels(config: Any) -> int:
    return config.in_channels * config.image_size[0] * config.image_size[1]


def largest_micro_batch(
    config: Any, batch: int, available_bytes: int, *, bfloat16: bool = False
) -> int | None:
    """Returns how many images a process can pass through the model at once.

    The largest number that divides its share of the batch into equal parts and whose activations
    fit, beside the share's pixels and the gradients of one layer. A margin for torch's own
    buffers is the caller's to leave.

    Args:
        config: of the model.
        batch: images of a step on this process.
        available_bytes: free memory, less what of `TrainingMemory.state` is not there yet.
        bfloat16: whether the dense layers compute in it.

    Returns:
        None for an architecture whose activations are not known here.

    Raises:
        UserError: not even one image fits.
    """
    kept = activation_bytes(config, bfloat16=bfloat16)
    if kept is None:
        return None
    if isinstance(config, MixerConfig) and config.is_plain:
        tokens, dim = config.num_tokens, config.hidden_dim
        hidden = max(dim * config.tokens_mlp_dim, tokens * config.channels_mlp_dim)
        each = kept + 2 * (2 if bfloat16 else 4) * hidden + 2 * 4 * tokens * dim
    else:
        each = kept + 4 * kept_of_one_image(config, bfloat16)[1]
    room = available_bytes - batch * 4 * _pixels(config)
    fitting = [number for number in range(1, batch + 1) if batch % number == 0]
    fitting = [number for number in fitting if number * each <= room]
    if not fitting:
        need = (batch * 4 * _pixels(config) + each) / 1e9
        raise UserError(
            f"to train on one image at a time takes {need:.2f} GB beside the weights and the "
            f"optimizer's state, and {max(available_bytes, 0) / 1e9:.2f} GB are left",
            where=f"{config.summary()}, {config.image_size[0]}x{config.image_size[1]} pixels",
            fix="A smaller --model, --image-size or --batch-size"
            + ("" if bfloat16 else ", or --precision bfloat16"),
        )
    return fitting[-1]
