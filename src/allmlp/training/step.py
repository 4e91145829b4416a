"""A training step: micro-batches, gradient, clipping, and the checks before an update."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from allmlp.errors import UserError
from allmlp.models.gelu import compile_gelu
from allmlp.models.layers import (
    ImageClassifier,
    draw_stochastic_depth,
    preprocessing_of,
    set_stochastic_depth,
)
from allmlp.runtime.device import (
    Compiler,
    ComputePolicy,
    Transfer,
    empty_cache,
    free_memory,
    keep_compiled,
    side_stream,
)
from allmlp.runtime.world import World, full_tensor, innermost_shards, no_sync
from allmlp.training.config import TrainConfig
from allmlp.training.optim import learning_rate, loss_function, sam_ascent, update
from allmlp.weights.download import cache_folder

_USABLE = 0.8  # of free memory; torch's buffers and other programs need the rest


@dataclass(frozen=True)
class StepResult:
    step: int
    loss: float  # mean over the batch of all processes
    gradient_norm: float  # before clipping
    learning_rate: float
    asked: int  # the largest answer of all processes to `Updater.asked`

    @property
    def is_finite(self) -> bool:
        """Whether the weights were updated; they are not if the loss or gradient is non-finite."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass
class Updater:
    """Updates the weights, batch by batch. On a GPU the optimizers refuse a non-finite update, and
    all after it, so that a step waits for the one before only; not with Muon."""

    model: ImageClassifier
    network: nn.Module  # the model, or the wrapper from `parallelize`
    optimizers: list[torch.optim.Optimizer]
    config: TrainConfig
    compute: ComputePolicy
    world: World
    num_steps: int  # of the whole run
    say: Callable[[str], None]
    micro_batch_size: int | None = field(default=None, init=False)  # None until chosen
    weights: dict[str, Tensor] = field(default_factory=dict, init=False)  # of `loss_function`
    refused: Tensor | None = field(default=None, init=False)  # 1 after a non-finite step, else 0

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.asked: Callable[[], int] = lambda: 0  # what the other processes must know, for a stop
        self._unread: deque[tuple[int, float, Transfer]] = deque()  # step, learning rate, figures
        self._stream = side_stream(self.compute.device)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if self.compute.device.type == "cuda" and all(group.get("fused") for group in groups):
            self.guard_on_device()
        self.forward: Callable[[Tensor], Tensor] = self.network  # to the logits
        if self.compute.compiles:
            keep_compiled(cache_folder() / "compiled" if self.world.size == 1 else None)
            compiler = Compiler(self.say)
            if self.compute.compile_gelu:
                compile_gelu(self.model, compiler)
            elif self.network is not self.model or self.world.size == 1:
                self.forward = compiler(self.network)
            else:  # the hooks that gather weights stay outside
                for part in innermost_shards(self.network):
                    part.forward = compiler(part.forward)

    def guard_on_device(self) -> None:
        """Lets fused optimizers refuse non-finite updates, so that no step has to wait for them."""
        self.refused = torch.zeros((), device=self.compute.device)
        for optimizer in self.optimizers:
            setattr(optimizer, "found_inf", self.refused)  # noqa: B010, as torch's gradient scaler

    def __call__(
        self, step: int, images: Tensor, targets: Tensor, depth: Tensor, dropout_seed: int
    ) -> list[StepResult]:
        """Updates the weights, unless loss or gradient is non-finite; returns the results that are
        known. Images are float32 (N, channels, H, W), targets (N, classes), depth (branches, N)."""
        settings = self.config.optimizer
        rate = learning_rate(settings, step, self.num_steps)
        loss = self.gradient(images, targets, depth, dropout_seed)
        if settings.sam_rho and step >= round(settings.sam_start * self.num_steps):
            with sam_ascent(self.parameters, settings.sam_rho):
                self.gradient(images, targets, depth, dropout_seed)
        # A non-finite norm makes the gradients NaN: it is checked before the update.
        norm = full_tensor(clip_grad_norm_(self.parameters, settings.clip_norm or math.inf))
        own = torch.stack((loss, norm.to(loss.dtype), loss.new_full((), self.asked())))
        rows = self.world.gather_rows(own)
        self._unread.append((step, rate, Transfer((rows,), self._stream)))
        if self.refused is not None:
            self.refused.logical_or_(~rows[:, :2].isfinite().all())
            update(self.optimizers, rate)
            return self.results(but=1)
        results = self.results()
        if results[-1].is_finite:
            update(self.optimizers, rate)
        return results

    def results(self, but: int = 0) -> list[StepResult]:
        """Waits for the results of all steps that have not been returned, but for the last ones."""
        results = []
        while len(self._unread) > but:
            step, rate, transfer = self._unread.popleft()
            rows = transfer.wait()[0].tolist()
            losses, norms, asked = zip(*rows, strict=True)
            loss, norm = sum(losses) / len(rows), norms[self.world.rank]
            results.append(StepResult(step, loss, norm, rate, int(max(asked))))
        return results

    def gradient(self, images: Tensor, targets: Tensor, depth: Tensor, dropout_seed: int) -> Tensor:
        """Stores the gradient of the mean loss; returns this process's loss. A GPU that runs out of
        memory gets smaller micro-batches from then on."""
        while True:
            size = self.micro_batch_size or len(images)
            try:
                return self._gradient(images, targets, depth, dropout_seed, size)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                half = _below(size, len(images))
                if half < 1 or self.world.size > 1:  # all processes would have to halve together
                    what = f"{size} images at once do not fit into the GPU"
                    fix = f"micro_batch_size={max(1, half)}, or a smaller model or image size"
                    raise UserError(what, where="micro_batch_size", fix=fix) from error
            empty_cache(images.device)
            self.micro_batch_size = half
            self.say(f"memory   out of memory: {half} images at once from here on")

    def _gradient(
        self,
        images: Tensor,
        targets: Tensor,
        depth: Tensor,
        dropout_seed: int,
        size: int,
        reduces: bool = True,
    ) -> Tensor:
        torch.manual_seed(dropout_seed)
        settings = self.config
        # Frozen features are computed as in evaluation, without dropped branches.
        self.model.train(settings.model.train_only == "all")
        for parameter in self.parameters:
            parameter.grad = None
        count = len(images)
        # Summed in float64, which an Apple GPU does not have.
        kind = torch.float32 if images.device.type == "mps" else torch.float64
        total = images.new_zeros((), dtype=kind)
        for start in range(0, count, size):
            part = slice(start, start + size)
            set_stochastic_depth(self.model, depth[:, part])
            with no_sync(self.network, part.stop < count or not reduces):
                with self.compute.autocast():
                    logits = self.forward(images[part])
                loss = loss_function(logits.float(), targets[part], settings.loss, **self.weights)
                loss = loss * (len(logits) / count)
                loss.backward()
            total += loss.detach()
        return total

    def choose_micro_batch(self) -> None:
        """Chooses the micro-batch size; one that is set, or of a resumed run (same bits), stays."""
        own, device = self.config.batch_size // self.world.size, self.compute.device
        chosen = self.config.micro_batch_size or self.micro_batch_size
        if chosen is None:
            chosen = -self.world.all_reduce_max(-self._fitting(own))  # minimum over processes
            if isinstance(self.network, DistributedDataParallel) and device.type == "cuda":
                chosen = self.agreed_size(own, chosen)
        size, before = min(chosen, own), self.micro_batch_size
        self.micro_batch_size = size
        if size < own and size != before:
            parts = f"{math.ceil(own / size)} micro-batches of up to {size}"
            self.say(f"memory   the {own} images of a step are split into {parts}")

    def agreed_size(self, own: int, size: int) -> int:
        """Returns the largest size up to `size` that fits on all processes, by trial: later, one
        that runs out of memory cannot ask the others."""
        while True:
            fitting = size if self._fits(own, size) else _below(size, own)
            agreed = -self.world.all_reduce_max(-fitting)
            if agreed == size:
                return size
            if agreed < 1:
                what = "one image at a time does not fit into the GPU"
                raise UserError(what, fix="A smaller model or image_size", code="memory")
            size = agreed

    def _fits(self, own: int, size: int) -> bool:
        """Whether a step's forward and backward passes fit into memory; no process waits."""
        preprocessing, device = preprocessing_of(self.model), self.compute.device
        try:
            with unchanged_buffers(self.model):
                shape = (own, preprocessing.channels, *preprocessing.image_size)
                images, *_mixed = (torch.zeros(shape, device=device) for _ in range(3))
                targets = torch.zeros(own, self.model.config.num_classes, device=device)
                depth = draw_stochastic_depth(self.model, own, torch.Generator()).to(device)
                self._gradient(images, targets, depth, 0, size, reduces=False)
            return True
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        empty_cache(device)
        return False

    def _fitting(self, own: int) -> int:
        """Returns the largest divisor of this process's images whose activations fit into memory;
        without a trial, as Linux kills processes that run out of it."""
        device, preprocessing = self.compute.device, preprocessing_of(self.model)
        free = free_memory(device)
        if free is None:
            return own
        image = torch.zeros(1, preprocessing.channels, *preprocessing.image_size, device=device)
        needed = saved_bytes(self.model, image, self.compute)
        neighbours = 1 if device.type == "cuda" else self.world.size  # share this memory
        room = _USABLE * free / neighbours
        room -= sum(parameter.nbytes for parameter in self.parameters) + own * image.nbytes
        fitting = [n for n in range(1, own + 1) if own % n == 0 and n * needed <= room]
        if not fitting:
            left = f"{max(room, 0) / 1e9:.2f} GB of memory are left"
            what = f"one image at a time takes {needed / 1e9:.2f} GB of activations, and {left}"
            raise UserError(what, fix="A smaller model, image_size or batch_size", code="memory")
        return fitting[-1]


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Restores the model's buffers, such as running means, after a trial in the block."""
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(statistics[name])


def _is_out_of_memory(error: RuntimeError) -> bool:
    words = ("MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _below(size: int, count: int) -> int:
    """Returns the largest divisor of `count` up to half of `size`, or 0: one size, one graph."""
    return next((n for n in range(size // 2, 0, -1) if count % n == 0), 0)


def saved_bytes(model: nn.Module, image: Tensor, compute: ComputePolicy) -> int:
    """Returns the bytes that an image (1, channels, H, W) takes between forward and backward: the
    difference between forward passes of two images and of one."""
    own, totals, largest = {id(parameter) for parameter in model.parameters()}, [], 0
    was_training = model.training
    model.eval()
    for images in (image, image.repeat(2, 1, 1, 1)):
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if id(tensor) not in own and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with torch.enable_grad(), hooks, compute.autocast():
            logits = model(images)  # keeps the tensors alive, so that no address is reused
        del logits
        totals.append(sum(sizes.values()))
        largest = largest or max(sizes.values(), default=0)
    model.train(was_training)
    return totals[1] - totals[0] + 2 * largest  # the backward pass also holds the largest gradient
