"""The peers: bitsandbytes' Linear4bit and torchao's NF4 under LoRA, and PEFT's LoRA on a dense layer.

All get our adapter, and bitsandbytes our weight in the same bytes (torchao has a format of its own and
quantises the same matrix itself). Adapters are in the base's dtype, which is the peers' fastest setting:
PEFT's default of float32 adapters adds casts and float32 products.
"""

import importlib
from collections import OrderedDict

from torch import Tensor, nn

from bench.shapes import SCALING
from lora_kernels.nf4 import NF4Weight


def missing(*packages: str) -> str | None:
    """Why these packages cannot be used, in one line; None where they can."""
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:  # a package that is there may still fail to load its library, in any way
            reason = " ".join(str(error).split())[:200]
            return f"{package}: not importable ({type(error).__name__}: {reason})"
    return None


def _with_lora(layer: nn.Module, lora_A: Tensor, lora_B: Tensor, p: float, loaded_in_4bit: bool) -> nn.Module:
    """The layer as PEFT wraps it, holding our A [r, K] and B [N, r]."""
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(OrderedDict(proj=layer))
    model.is_loaded_in_4bit = loaded_in_4bit  # how PEFT knows to wrap a Linear4bit
    rank = lora_A.shape[0]
    config = LoraConfig(
        r=rank, lora_alpha=SCALING * rank, lora_dropout=p, target_modules=["proj"], init_lora_weights=False
    )
    wrapped = inject_adapter_in_model(config, model).proj
    wrapped.lora_A["default"].weight = nn.Parameter(lora_A.clone())
    wrapped.lora_B["default"].weight = nn.Parameter(lora_B.clone())
    return wrapped


def bitsandbytes_peft(weight: NF4Weight, lora_A: Tensor, lora_B: Tensor, p: float) -> nn.Module:
    from lora_kernels.integrations.bitsandbytes import to_linear4bit

    return _with_lora(to_linear4bit(weight), lora_A, lora_B, p, loaded_in_4bit=True)


def dense_peft(weight: Tensor, lora_A: Tensor, lora_B: Tensor, p: float) -> nn.Module:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return _with_lora(layer, lora_A, lora_B, p, loaded_in_4bit=False)


def torchao_lora(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[nn.Module, Tensor]:
    """torchao's frozen NF4 weight with LoRA in plain PyTorch, and the matrix [N, K] that it stands for."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

    quantized = to_nf4(weight.clone(), 64, 256)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())

        def forward(self, x: Tensor) -> Tensor:
            linear = nn.functional.linear
            return linear_nf4(x, quantized) + SCALING * linear(linear(x, self.lora_A), self.lora_B)

    return Layer(), quantized.get_original_weight()


def adapter_parameters(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def versions() -> dict[str, str]:
    """bitsandbytes, peft and torchao: the version, or why it cannot be used."""
    found = {}
    for package in ("bitsandbytes", "peft", "torchao"):
        reason = missing(package)
        found[package] = (
            importlib.import_module(package).__version__
            if reason is None
            else reason.removeprefix(f"{package}: ")
        )
    return found
