"""What a model holds in memory, and which kernels a layer would use."""

import torch
from torch import Tensor, nn

from lora_kernels.adapters.inject import lora_layers
from lora_kernels.backends import BACKENDS, backend_name
from lora_kernels.base_weight import BaseWeight
from lora_kernels.linear import FusedLoRALinear
from lora_kernels.nf4 import NF4Weight


def memory_report(model: nn.Module) -> dict[str, int]:
    """Bytes of a model by part; storage that is shared is counted once.

    Keys: base_weights (of the adapted layers: packed codes or dense), quantization_constants (their scales),
    adapters, merged_weights, gradients, other_parameters (embeddings, norms, layers without adapters),
    buffers, total.
    """
    report = dict.fromkeys(
        ("base_weights", "quantization_constants", "adapters", "merged_weights", "gradients"), 0
    )
    report.update(other_parameters=0, buffers=0)
    seen: set[int] = set()

    def add(part: str, tensor: Tensor | None) -> None:
        if tensor is None or (tensor.device.type != "meta" and tensor.data_ptr() in seen):
            return
        if tensor.device.type != "meta" and tensor.numel():
            seen.add(tensor.data_ptr())
        report[part] += tensor.nbytes

    for _, layer in lora_layers(model):
        add("base_weights", layer.weight)
        for constant in (layer.absmax, layer.nested_absmax, layer.offset):
            add("quantization_constants", constant)
        add("merged_weights", layer.merged_weight)
        for matrices in (layer.lora_A, layer.lora_B):
            for parameter in matrices.parameters():
                add("adapters", parameter)
    for parameter in model.parameters():
        add("other_parameters", parameter)
        if parameter.grad is not None:
            add("gradients", parameter.grad)
    for buffer in model.buffers():
        add("buffers", buffer)
    report["total"] = sum(report.values())
    return report


def explain(
    layer: FusedLoRALinear | NF4Weight | Tensor, tokens: int, dtype: torch.dtype | None = None
) -> str:
    """Which backend and kernels `lora_linear` takes for `tokens` rows of x in `dtype`, and why, as text.

    Args:
        layer: a layer, or its weight alone.
        dtype: of x. Default: the dtype the weight had before it was quantised.
    """
    weight = layer.base_weight() if isinstance(layer, FusedLoRALinear) else layer
    dtype = weight.dtype if dtype is None else dtype
    if isinstance(weight, NF4Weight):
        base, kind = weight.base_weight(), f"NF4 (blocksize {weight.blocksize})"
    else:
        base, kind = BaseWeight(weight, None, None, None, 0, *weight.shape), f"dense {weight.dtype}"
    name = backend_name(base.data.device)
    head = (
        f"lora_linear, T = {tokens}, N = {base.out_features}, K = {base.in_features}, x {dtype}, W0 {kind}\n"
        f"backend: {name} (tensors are on {base.data.device})"
    )
    return "\n".join([head, *BACKENDS[name].explain(base, tokens, dtype)])
