"""Memory by part: what is really allocated, beside what full fine-tuning of the same model would take."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.finetune.data import Batch
from lora_kernels.finetune.training import target_loss


@dataclass
class Memory:
    """Bytes by part. `full` is computed, not measured: None where nothing is known."""

    measured: dict[str, int]
    full: dict[str, int]


PARTS = {
    "base_weights": "base weights",
    "quantization_constants": "their scales (NF4)",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations_peak": "activations, peak",
}


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of storage behind the tensors; storage that several share is counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def pass_memory(model: nn.Module, batch: Batch, device: torch.device) -> tuple[int, int]:
    """(activations, gradients) of one forward and backward pass, bytes, measured.

    Activations are the most that the pass holds at once beyond weights and gradients.

    On a GPU from the allocator's own peak counter; on a CPU every allocation and release of a pass is
    recorded and the running sum's maximum taken. Gradients are allocated by a pass before, so they are not
    in it. Leaves no gradients behind.
    """
    model.train()
    _pass(model, batch, device)
    gradients = tensor_bytes(p.grad for p in model.parameters() if p.grad is not None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _pass(model, batch, device)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            _pass(model, batch, device)
        peak = _peak_of(profile)
    model.zero_grad(set_to_none=True)
    return peak, gradients


def _pass(model: nn.Module, batch: Batch, device: torch.device) -> None:
    loss, targets = target_loss(model, batch, device)
    (loss / targets).backward()


def _peak_of(profile: torch.autograd.profiler.profile) -> int:
    """Maximum of the running sum of all allocations and releases that the profiler saw, in order of time."""
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak


def measured_memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradients: int, activations: int
) -> Memory:
    """Collect the parts of a model that has been trained for at least one step.

    Args:
        gradients, activations: `pass_memory` of the same model.
    """
    report = lk.memory_report(model)
    weights = report["base_weights"] + report["other_parameters"] + report["buffers"]
    if isinstance(optimizer, lk.optim.PagedOptimizer):
        state_bytes = int(optimizer.stats()["peak_resident_bytes"])
    else:
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        state_bytes = tensor_bytes(state)
    measured = {
        "base_weights": weights,
        "quantization_constants": report["quantization_constants"],
        "adapters": report["adapters"],
        "gradients": gradients,
        "optimizer_state": state_bytes,
        "activations_peak": activations,
    }
    return Memory(measured, {})


def full_finetuning(parameters: int, buffers: int, itemsize: int, activations: int) -> dict[str, int]:
    """Bytes that full fine-tuning with AdamW takes, computed.

    Weights and gradients in the model's dtype and two moments a parameter in the same dtype, as
    torch.optim.AdamW keeps them; no float32 master copy. Its activations are at least those of the frozen
    model, since every layer must also keep its input for the weight's gradient; they are put equal here.

    Args:
        parameters: number of parameters of the model, without adapters.
        buffers: bytes of the model's buffers.
        itemsize: bytes of one parameter.
    """
    return {
        "base_weights": parameters * itemsize + buffers,
        "quantization_constants": 0,
        "adapters": 0,
        "gradients": parameters * itemsize,
        "optimizer_state": 2 * parameters * itemsize,
        "activations_peak": activations,
    }


def peak_rss() -> int:
    """Most resident memory this process ever had, bytes; everything is in it, PyTorch's own libraries too."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
