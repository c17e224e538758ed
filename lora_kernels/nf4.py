"""NF4 weights: quantise, dequantise, and the state-dict format of bitsandbytes, byte for byte."""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_kernels import checks, ops, reference  # noqa: F401 - ops defines them
from lora_kernels.base_weight import BaseWeight

_QUANT_STATE = "quant_state.bitsandbytes__nf4"
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,  # of a layer that was cast by .double(): nothing is quantised from it
}


class NF4Weight:
    """A matrix W [N, K] in 4-bit NormalFloat, in blocks of `blocksize` with double-quantised scales.

    W = codebook[code] · absmax[block], and absmax = dynamic_map[code] · nested_absmax + offset. At blocksize
    64 that is 4.127 bits a weight (4.5 without double quantisation). Not a tensor: make one with
    `nf4_quantize`, use it in `lora_linear` or `FusedLoRALinear`, get the matrix back with `dequantize`.

    Attributes:
        packed: uint8 [ceil(N·K/2), 1]; the even element is in the high nibble.
        absmax: [ceil(N·K/blocksize)], uint8 (double-quantised) or float32.
        nested_absmax: float32 [ceil(blocks/256)], or None.
        offset: float32 [], or None.
        shape: torch.Size([N, K]).
        blocksize: weights to a scale: a power of two from 32 to 4096.
        dtype: what the weight was before, and what `dequantize()` returns.

    Raises:
        ValueError: a scale is a NaN or an infinity. Looked for in CPU tensors alone, where it costs little,
            and not where `check_scales` is False: for whoever makes one at every call of the same tensors.

    Source: Dettmers et al. 2023 (QLoRA), section 3.
    """

    __slots__ = ("absmax", "blocksize", "dtype", "nested_absmax", "offset", "packed", "shape")

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        shape: tuple[int, int],
        blocksize: int,
        dtype: torch.dtype,
        check_scales: bool = True,
    ) -> None:
        self.packed, self.absmax, self.nested_absmax, self.offset = packed, absmax, nested_absmax, offset
        self.shape, self.blocksize, self.dtype = torch.Size(shape), blocksize, dtype
        if check_scales and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
            self._check_scales("weight", ("cpu",))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in a fixed order, without those that this weight lacks."""
        named = {
            "packed": self.packed,
            "absmax": self.absmax,
            "nested_absmax": self.nested_absmax,
            "offset": self.offset,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def base_weight(self) -> BaseWeight:
        return BaseWeight(
            self.packed, self.absmax, self.nested_absmax, self.offset, self.blocksize, *self.shape
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [N, K] in `dtype` (default: the dtype it had before): one rounding of the float32 product."""
        return torch.ops.lora_kernels.nf4_dequantize(
            *self.base_weight()[:5], tuple(self.shape), self.dtype if dtype is None else dtype
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "NF4Weight":
        """The same weight on `device`; itself where it is there already. Codes have no dtype to change."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"NF4Weight.to: got dtype {device}, expected a device; use dequantize(dtype)")
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in self.tensors().items()}
        if all(moved[name] is t for name, t in self.tensors().items()):
            return self
        return NF4Weight(
            moved["packed"],
            moved["absmax"],
            moved.get("nested_absmax"),
            moved.get("offset"),
            self.shape,
            self.blocksize,
            self.dtype,
            check_scales=False,
        )

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The keys and bytes that bitsandbytes' Linear4bit writes: `weight`, `weight.absmax`, ..."""
        state = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        device = self.device
        tensors = {prefix: self.packed, f"{prefix}.absmax": self.absmax}
        tensors[f"{prefix}.quant_map"] = reference.codebook(device)
        if self.double_quant:
            tensors[f"{prefix}.nested_absmax"] = self.nested_absmax
            tensors[f"{prefix}.nested_quant_map"] = reference.dynamic_map(device)
            state["nested_blocksize"] = reference.NESTED_BLOCKSIZE
            state["nested_dtype"] = "float32"
            state["nested_offset"] = self.offset.item()  # a double writes every fp32 value exactly
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"{prefix}.{_QUANT_STATE}"] = text.clone()
        return tensors

    @staticmethod
    def state_keys(prefix: str = "weight", double_quant: bool = True) -> list[str]:
        """The keys `state_dict` has."""
        names = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if double_quant else [])]
        return [prefix, *(f"{prefix}.{name}" for name in names), f"{prefix}.{_QUANT_STATE}"]

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], prefix: str = "weight") -> "NF4Weight":
        """Reads what `state_dict` or bitsandbytes' Linear4bit wrote under `prefix`.

        Raises:
            KeyError: a key is missing; it is named.
            ValueError: a tensor or the quant_state does not fit the format; key and value are named.
        """

        def get(name: str) -> Tensor:
            key = f"{prefix}.{name}" if name else prefix
            if key not in state_dict:
                raise KeyError(f"NF4 weight: key {key!r} is missing")
            return state_dict[key]

        key = f"{prefix}.{_QUANT_STATE}"
        text = get(_QUANT_STATE)
        try:
            state = json.loads(bytes(text.cpu().to(torch.uint8).tolist()))
            quant_type, dtype_name = str(state["quant_type"]), str(state["dtype"])
            shape, blocksize = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
            nested_offset = float(state["nested_offset"]) if "nested_offset" in state else None
            nested_blocksize = state.get("nested_blocksize")
        except KeyError as error:
            raise ValueError(f"{key}: the entry {error} is missing") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{key}: not the JSON that describes an NF4 weight ({error})") from error
        if quant_type != "nf4":
            raise ValueError(f"{key}: quant_type is {quant_type!r}, expected 'nf4'")
        if len(shape) != 2 or min(shape) < 0 or dtype_name not in _DTYPES:
            raise ValueError(
                f"{key}: got shape {shape} and dtype {dtype_name!r}, expected two sizes and one of "
                f"{', '.join(_DTYPES)}"
            )
        _check_map(f"{prefix}.quant_map", get("quant_map"), reference.codebook())
        nested_absmax = offset = None
        if nested_offset is not None:
            if nested_blocksize != reference.NESTED_BLOCKSIZE:
                raise ValueError(
                    f"{key}: nested_blocksize is {nested_blocksize}, expected {reference.NESTED_BLOCKSIZE}"
                )
            nested_absmax = get("nested_absmax")
            _check_map(f"{prefix}.nested_quant_map", get("nested_quant_map"), reference.dynamic_map())
            # Explicitly float32: the default dtype may be another one while a model is being loaded.
            offset = torch.tensor(nested_offset, dtype=torch.float32, device=get("").device)
        packed = get("")
        if packed.dtype != torch.uint8:  # bitsandbytes' quant_storage: the same bytes under another dtype
            packed = packed.contiguous().view(torch.uint8)
        weight = cls(
            packed.reshape(-1, 1), get("absmax"), nested_absmax, offset, shape, blocksize, _DTYPES[dtype_name]
        )
        weight.check(prefix)
        return weight

    @classmethod
    def from_params4bit(cls, params: Tensor) -> "NF4Weight":
        """The NF4Weight that shares the tensors of a bitsandbytes Params4bit, which is not changed.

        Raises:
            ValueError: it is not quantised yet (bitsandbytes does that when it is moved), is not nf4, has
                another size of nested blocks, or bitsandbytes has repacked it for its CPU kernel.
        """
        state = getattr(params, "quant_state", None)
        if state is None:
            raise ValueError(
                "the Params4bit is not quantised yet: bitsandbytes quantises when the layer is moved, as by "
                "layer.to('cpu')"
            )
        if state.quant_type != "nf4":
            raise ValueError(f"the Params4bit has quant_type {state.quant_type!r}, expected 'nf4'")
        if getattr(state, "packing_format_for_cpu", False):
            # Its inverse gives the codes back, but not the scales.
            raise ValueError(
                "the Params4bit was repacked by a forward in eval mode on a CPU with AVX512-BF16, which "
                "rounded its scales to bfloat16: convert the layer before its first forward in eval mode, or "
                "load its weights again"
            )
        nested_absmax = offset = None
        if state.nested:
            nested_blocksize = state.state2.blocksize
            if nested_blocksize != reference.NESTED_BLOCKSIZE:
                raise ValueError(
                    f"the Params4bit has nested_blocksize {nested_blocksize}, "
                    f"expected {reference.NESTED_BLOCKSIZE}"
                )
            nested_absmax, offset = state.state2.absmax, state.offset.float().reshape(())
        packed = params.detach()
        if packed.dtype != torch.uint8:  # quant_storage: the same bytes under another dtype
            packed = packed.contiguous().view(torch.uint8)
        shape, blocksize, dtype = tuple(state.shape), state.blocksize, state.dtype
        weight = cls(packed.reshape(-1, 1), state.absmax, nested_absmax, offset, shape, blocksize, dtype)
        weight.check("Params4bit")
        return weight

    def check(self, name: str = "weight") -> None:
        """Raises ValueError or TypeError, naming the part, where the tensors do not make an NF4 weight."""
        checks.check_nf4(self.base_weight(), "NF4 weight", name, separator=".")
        self._check_scales(name, ("cpu", "cuda"))

    def _check_scales(self, name: str, devices: tuple[str, ...]) -> None:
        for part, tensor in self.tensors().items():
            if tensor.dtype != torch.float32 or tensor.device.type not in devices:
                continue
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"NF4 weight: {name}.{part} holds a NaN or an infinity")

    def __repr__(self) -> str:
        return (
            f"NF4Weight(shape={tuple(self.shape)}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, nbytes={self.nbytes})"
        )

    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in self.__slots__}

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _check_map(key: str, got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape or not torch.equal(got.cpu().float(), expected):
        raise ValueError(f"{key}: not the map of the format; this weight was written with another codebook")


def nf4_quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantises a matrix to NF4.

    Each block of `blocksize` consecutive elements (row-major; blocks straddle rows where K % blocksize != 0)
    is divided by its largest magnitude and each element replaced by the nearest of 16 codes. With
    `double_quant` the scales themselves are stored in 8 bits, in blocks of 256. The codes and float32 scales
    are the same bytes as bitsandbytes' and the same on every backend; the 8-bit scales are each the true
    nearest (README, "NF4").

    Args:
        weight: [N, K], float32, float16 or bfloat16, any strides.
        blocksize: 32, 64, ..., 4096.

    Raises:
        ValueError: a NaN or infinity in the weight, a bad blocksize, not two dimensions.
        TypeError: another dtype, or no tensor.

    Source: Dettmers et al. 2023 (QLoRA), section 3.
    """
    checks.check_tensor("nf4_quantize", "weight", weight)
    packed, absmax, nested_absmax, offset = torch.ops.lora_kernels.nf4_quantize(
        weight.detach(), blocksize, double_quant
    )
    if not double_quant:
        nested_absmax = offset = None
    parts = (packed, absmax, nested_absmax, offset)
    return NF4Weight(*parts, tuple(weight.shape), blocksize, weight.dtype, check_scales=False)


def nf4_bytes(numel: int, blocksize: int = 64, double_quant: bool = True) -> int:
    """Bytes that `numel` weights take in NF4, scales included."""
    blocks = math.ceil(numel / blocksize)
    scales = blocks + 4 * math.ceil(blocks / reference.NESTED_BLOCKSIZE) + 4 if double_quant else 4 * blocks
    return math.ceil(numel / 2) + scales
