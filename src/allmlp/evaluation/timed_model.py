"""A model as `sweep` times it: an inference or a training step on random images.

A training step is the forward pass, softmax cross-entropy, the backward pass and a step of AdamW at
the rate 0: all its operations are done, and no weight moves. What it changes beside weights (the
running averages of batch norms, modes, gradients) is put back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from allmlp.errors import UserError
from allmlp.evaluation.memory import peak_growth
from allmlp.models.inference import Inference, evaluating
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import free_memory, step_threads, threads_for

Mode = Literal["inference", "training"]


class TimedModel:
    """One model on its device, with the batch that it is timed on.

    Args:
        model: on the device; `close` leaves it as it was.
        mode: of the step.
        precision: of the products, "float32" or "bfloat16".
        compile: whether torch.compile is used.

    Raises:
        UserError: a training step of a model without a head, or without trained parameters.
    """

    def __init__(
        self, model: ImageClassifier, mode: Mode, precision: str, *, compile: bool
    ) -> None:
        self.model, self.mode, self.precision = model, mode, precision
        self.device = next(model.parameters()).device
        self.trained = [each for each in model.parameters() if each.requires_grad]
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        self._was_training = model.training
        self._buffers = [(each, each.clone()) for each in model.buffers()]
        self._gradients = [each.grad for each in self.trained]
        self._woken: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        if mode == "training":
            if not model.config.num_classes or not self.trained:
                lacks = "parameters that are trained" if model.config.num_classes else "a head"
                what = f"a training step needs {lacks}, and this model has none"
                raise UserError(what, where=model.config.summary(), fix="--mode inference")
            self._wake_head()
            self._optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.1, fused=True)
        model.train(mode == "training")
        self._network: Any = torch.compile(model, dynamic=False) if compile else model
        # What the verbs predict and evaluate compute with.
        inference = mode == "inference" and not compile
        self._ready = Inference(model, precision) if inference else None

    def prepare(self, batch_size: int) -> None:
        """Draws so many random images and labels."""
        self.images = self.labels = None
        config, random = self.model.config, torch.Generator(self.device).manual_seed(0)
        size = (batch_size, config.in_channels, *config.image_size)
        self.images = torch.randn(size, generator=random, device=self.device)
        if self.mode == "training":
            self.labels = torch.randint(
                config.num_classes, (batch_size,), generator=random, device=self.device
            )

    def run(self, times: int) -> None:
        """Computes so many steps, and returns when the device is done with them."""
        assert self.images is not None
        with step_threads(self.device, self._operations(len(self.images))):
            for _ in range(times):
                if self.mode == "training":
                    self._train()
                else:
                    self._infer()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _operations(self, batch_size: int) -> int:
        passes = 3 if self.mode == "training" else 1  # itself and two gradients
        return passes * self.model.config.flops * batch_size

    def threads(self, batch_size: int) -> int:
        """Returns the processor threads that compute a step of so many images."""
        return threads_for(self._operations(batch_size))

    def growth(self) -> int | None:
        """Runs one step and returns by how many bytes memory rose; None where that is unknown."""
        self._drop_gradients()
        return peak_growth(lambda: self.run(1), self.device)

    def free_memory(self) -> int | None:
        """Returns how many bytes can still be had on the device; None where that is not known.

        On a GPU what torch keeps for itself is given back first.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return free_memory(self.device)

    def release(self) -> None:
        """Forgets the batch and the gradients."""
        self.images = self.labels = None
        self._drop_gradients()

    def state_bytes(self) -> int:
        """Returns the bytes of what is there between steps: weights, buffers, the optimizer's.

        In inference the kernels are kept a second time, packed or, in bfloat16, by autocast.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                tensors += [each for each in state.values() if isinstance(each, Tensor)]
        total = sum(each.nbytes for each in tensors)
        half, packed = self.precision == "bfloat16", self._ready is not None and self._ready.packed
        if self.mode == "inference" and (half or packed):
            width = 2 if half else 4
            total += sum(width * each.numel() for each in self.model.parameters() if each.dim() > 1)
        return total

    def batch_bytes(self, batch_size: int) -> int:
        """Returns the bytes of a batch of so many images."""
        config = self.model.config
        return 4 * batch_size * config.in_channels * config.image_size[0] * config.image_size[1]

    def close(self) -> None:
        """Puts back what was changed: mode, buffers, gradients, a head that was all zeros."""
        self.release()
        self._optimizer = self._ready = None
        with torch.no_grad():
            for weight in self._woken:
                weight.zero_()
            for buffer, before in self._buffers:
                buffer.copy_(before)
        for parameter, gradient in zip(self.trained, self._gradients, strict=True):
            parameter.grad = gradient
        self.model.train(self._was_training)

    @torch.no_grad()
    def _infer(self) -> None:
        # Within an outer context of the caller's, around all steps, weights are cast only once.
        if self._ready is not None:
            assert self.images is not None
            self._ready.logits(self.images)
            return
        half = self.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            self._network(self.images)

    def _train(self) -> None:
        assert self._optimizer is not None
        assert self.labels is not None
        self._drop_gradients()
        half = self.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            logits = self._network(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        self._optimizer.step()

    def _drop_gradients(self) -> None:
        for each in self.trained:
            each.grad = None

    @torch.no_grad()
    def _wake_head(self) -> None:
        """Gives kernels that are all zeros small values: through them no gradient would come back.

        With zeros for gradients a GPU draws less power and is faster than it is in training.
        """
        random = torch.Generator().manual_seed(0)
        for each in self.trained:
            if each.dim() > 1 and not each.any():
                each.copy_(0.02 * torch.randn(each.shape, generator=random))
                self._woken.append(each)


@torch.no_grad()
def count_flops(model: ImageClassifier) -> int:
    """Returns the operations of one image as torch counts them while it computes them.

    Products of matrices and convolutions; a multiply-add counts as two.
    """
    device = next(model.parameters()).device
    image = torch.zeros(1, model.config.in_channels, *model.config.image_size, device=device)
    with (
        evaluating(model),
        torch.autocast(device.type, enabled=False),
        FlopCounterMode(display=False) as counter,
    ):
        model(image)
    return counter.get_total_flops()
