"""The proof at the end: the files reproduce the trained model bit for bit, and merging keeps its outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.finetune.data import Rows

# ‖merged - unmerged‖ / ‖unmerged‖ of the logits. Merging rounds W0 + s·B·A once to the model's dtype and
# multiplies in another order: about one rounding (2^-24, 2^-11, 2^-8) a layer, which grows with depth. The
# limits leave a factor of 10 to 100 above what models of 6 to 32 layers show; a wrong scale or a lost layer
# is far outside (the adapter itself moves the logits by tens of percent, which is printed beside).
MERGE_LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass
class Verification:
    """What was checked, and how it came out."""

    rows: int  # held-out rows compared
    reload_identical: bool
    reload_max_difference: float  # of the logits; 0.0 when identical
    merge_error: float  # ‖merged - unmerged‖ / ‖unmerged‖
    merge_limit: float
    adapter_effect: float  # ‖adapted - base alone‖ / ‖adapted‖: what the merge check can see
    unmerge_identical: bool

    @property
    def passed(self) -> bool:
        return self.reload_identical and self.unmerge_identical and self.merge_error <= self.merge_limit


@torch.no_grad()
def logits_of(model: nn.Module, rows: Rows, indices: list[int], device: torch.device) -> list[Tensor]:
    """The logits of each row, [tokens, vocabulary], on the CPU."""
    model.eval()
    return [model(input_ids=rows[at][None].to(device), use_cache=False).logits[0].cpu() for at in indices]


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """‖got - expected‖ / ‖expected‖ over all rows, in float64."""
    difference = sum(
        float((g.double() - e.double()).square().sum()) for g, e in zip(got, expected, strict=True)
    )
    norm = sum(float(e.double().square().sum()) for e in expected)
    return (difference / norm) ** 0.5


def verify(
    trained: list[Tensor],
    load_base: Callable[[], nn.Module],
    adapter: Path,
    quantize: str | None,
    rows: Rows,
    indices: list[int],
    device: torch.device,
) -> Verification:
    """Load the adapter from its files into a fresh base, compare with the trained model, merge, compare
    again.

    Args:
        trained: logits of the model as it was trained, `logits_of(model, rows, indices, device)`.
        load_base: loads the base from its files once more, on the CPU.
        adapter: folder of the adapter's files.
        quantize: as in training.
    """
    fresh = load_base()
    lk.load_adapter(fresh, adapter, quantize=quantize)
    fresh.to(device)
    reloaded = logits_of(fresh, rows, indices, device)
    identical = all(torch.equal(a, b) for a, b in zip(reloaded, trained, strict=True))
    furthest = max(
        float((a.double() - b.double()).abs().max()) for a, b in zip(reloaded, trained, strict=True)
    )
    lk.merge(fresh)
    merged = logits_of(fresh, rows, indices, device)
    lk.unmerge(fresh)
    again = logits_of(fresh, rows, indices, device)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
    base = logits_of(fresh, rows, indices, device)
    return Verification(
        rows=len(indices),
        reload_identical=identical,
        reload_max_difference=furthest,
        merge_error=relative_error(merged, reloaded),
        merge_limit=MERGE_LIMITS[next(iter(merged)).dtype],
        adapter_effect=relative_error(base, reloaded),
        unmerge_identical=all(torch.equal(a, b) for a, b in zip(again, reloaded, strict=True)),
    )
