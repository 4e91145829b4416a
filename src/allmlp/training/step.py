"""One update of the weights: micro-batches, the gradient, clipping, and what is checked before.

Legend: N images of this process's share of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allmlp.errors import UserError
from allmlp.models.layers import ImageClassifier, set_stochastic_depth
from allmlp.runtime.device import ComputePolicy, free_memory, keep_compiled
from allmlp.runtime.world import World, no_sync
from allmlp.training.config import TrainConfig
from allmlp.training.cost import largest_micro_batch
from allmlp.training.losses import loss_function
from allmlp.training.optimizer import clip, update
from allmlp.training.schedule import learning_rate
from allmlp.training.sharpness import sharpest_point, sharpness_at
from allmlp.weights.download import cache_folder

_USABLE = 0.8  # of the free memory; torch's own buffers and other programs need some


@dataclass(frozen=True)
class StepResult:
    """What a step found.

    Attributes:
        loss: mean over the batch, of all processes.
        gradient_norm: before clipping.
        learning_rate: of this step.
    """

    loss: float
    gradient_norm: float
    learning_rate: float


class DivergedError(UserError):
    """A run that had to stop because its loss or gradient is not finite."""


class NotFiniteError(ArithmeticError):
    """The loss or the gradient is not finite; the weights are as they were."""

    def __init__(self, result: StepResult) -> None:
        self.result = result
        super().__init__(f"loss {result.loss}, gradient norm {result.gradient_norm}")


class Updater:
    """Moves the weights of one model.

    Args:
        model: whose parameters move.
        network: how it is called: the model itself, shared out (`parallelize`), or compiled.
        optimizers: over the parameters, see `build_optimizers`.
        config, compute, world: of the run.
        num_steps: of the whole run.
        say: tells the user a line.
    """

    def __init__(
        self,
        model: ImageClassifier,
        network: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        config: TrainConfig,
        compute: ComputePolicy,
        world: World,
        num_steps: int,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.network, self.optimizers = model, network, optimizers
        self.config, self.compute, self.world = config, compute, world
        self.num_steps, self.say = num_steps, say
        self.micro_batch_size = config.batch_size // world.size
        self.compiled = None
        if compute.compile:
            keep_compiled(cache_folder() / "compiled")
            self.compiled = torch.compile(network)
        self.parameters = [each for each in model.parameters() if each.requires_grad]

    def choose_micro_batch(self, before: int | None) -> None:
        """Settles how many images pass through the model at once.

        Args:
            before: what the run used before it was stopped; unless the settings name a number,
                gradients are added up in the same parts, so that it goes on with the same bits.
                None: a new choice.

        Raises:
            UserError: not even one image fits into memory.
        """
        share = self.config.batch_size // self.world.size
        chosen = self.config.micro_batch_size or before
        if chosen is None:
            chosen = -self.world.all_reduce_max(
                -self._what_fits(share)
            )  # the smallest of all processes
        if chosen > share:
            self.say(f"note     micro_batch_size {chosen} is more than a process's {share} images")
        self.micro_batch_size = min(chosen, share)
        if self.micro_batch_size < share:
            parts = math.ceil(share / self.micro_batch_size)
            each = f"{self.micro_batch_size} images"
            self.say(f"memory   a step's {share} images go through the model in {parts} x {each}")

    def _what_fits(self, share: int) -> int:
        free = free_memory(self.compute.device)
        if free is None:
            return share
        gradients = sum(each.nbytes for each in self.parameters)
        available = round(_USABLE * free / self._neighbours()) - gradients
        half = self.compute.precision == "bfloat16"
        return largest_micro_batch(self.model.config, share, available, bfloat16=half) or share

    def _neighbours(self) -> int:
        """Processes that share this one's memory."""
        return 1 if self.compute.device.type == "cuda" else self.world.size

    def __call__(
        self, step: int, images: Tensor, targets: Tensor, kept: Tensor, dropout_seed: int
    ) -> StepResult:
        """Moves the weights by one batch.

        Args:
            step: from 0.
            images: float32 (N, channels, H, W), of this process.
            targets: float32 (N, classes).
            kept: (branches, N), see `draw_stochastic_depth`.
            dropout_seed: of this step on this process.

        Raises:
            NotFiniteError: the loss or the gradient is not finite.
        """
        settings = self.config.optimizer
        rate = learning_rate(settings, step, self.num_steps)
        radius = sharpness_at(settings, step, self.num_steps)
        loss = self.gradient(images, targets, kept, dropout_seed)
        if radius:
            with sharpest_point(self.parameters, radius):
                self.gradient(images, targets, kept, dropout_seed)
        norm = clip(self.parameters, settings.clip_norm or math.inf)
        # The step's one wait for a GPU: nothing may move before both are known to be finite.
        local, length = torch.stack((loss, norm.double())).tolist()
        result = StepResult(self.world.all_reduce_mean(local), length, rate)
        if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
            raise NotFiniteError(result)
        update(self.optimizers, rate)
        return result

    def gradient(self, images: Tensor, targets: Tensor, kept: Tensor, dropout_seed: int) -> Tensor:
        """Puts the gradient of the mean loss into the parameters; returns this process's loss.

        It is a scalar, float64, which a GPU may still be computing.

        Raises:
            UserError: the GPU's memory is too small, and parts half as large would not be either,
                or other processes would have to take them too.
        """
        while True:
            try:
                return self._gradient(images, targets, kept, dropout_seed)
            except torch.OutOfMemoryError as error:
                half = self.micro_batch_size // 2
                if half < 1 or self.world.size > 1:
                    what = f"{self.micro_batch_size} images at once do not fit into the GPU"
                    fix = f"--set micro_batch_size={max(1, half)}, or a smaller model or image size"
                    raise UserError(what, where="micro_batch_size", fix=fix) from error
            torch.cuda.empty_cache()
            self.micro_batch_size = half
            self.say(f"memory   too little for more: {half} images at once from here on")

    def _gradient(self, images: Tensor, targets: Tensor, kept: Tensor, dropout_seed: int) -> Tensor:
        torch.manual_seed(dropout_seed)
        # Frozen features are those of evaluation, without dropped branches.
        self.model.train(self.config.model.trained == "all")
        for each in self.parameters:
            each.grad = None
        count, total = len(images), images.new_zeros((), dtype=torch.float64)
        for start in range(0, count, self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            set_stochastic_depth(self.model, kept[:, part])
            is_last = part.stop >= count
            with no_sync(self.network, not is_last):
                with self.compute.autocast():
                    logits = self.predict(images[part])
                loss = loss_function(
                    logits.float(), targets[part], self.config.loss, self.config.label_smoothing
                )
                loss = loss * (len(logits) / count)
                loss.backward()
            total += loss.detach()
        return total

    def predict(self, images: Tensor) -> Tensor:
        """Returns the logits (N, classes), compiled where that works."""
        if self.compiled is None:
            return self.network(images)
        try:
            return self.compiled(images)
        except RuntimeError as error:
            # By name: importing the compiler for its exceptions takes as long as importing torch.
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            self.compiled = None
            first = str(error).strip().splitlines()[0][:200]
            self.say(f"note     not compiled after all: {first}")
            return self.network(images)
