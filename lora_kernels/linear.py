"""FusedLoRALinear: a frozen linear layer, dense or NF4, with LoRA adapters, in place of nn.Linear."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import functional
from lora_kernels.nf4 import NF4Weight, nf4_quantize

_NF4_BUFFERS = ("absmax", "nested_absmax", "offset")


@dataclass(frozen=True)
class LoRASpec:
    """What defines one adapter of a layer besides its matrices; the names are PEFT's."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r is {self.r!r}, expected an integer >= 1")
        for name in ("lora_alpha", "lora_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}, expected a number")
        if not math.isfinite(self.lora_alpha):
            raise ValueError(f"lora_alpha is {self.lora_alpha}, expected a finite number")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, expected 0 <= p < 1")

    @property
    def scaling(self) -> float:
        """s = lora_alpha / r; lora_alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class FusedLoRALinear(nn.Module):
    """y = x·W0ᵀ + s·(dropout(x)·Aᵀ)·Bᵀ + bias with W0 frozen, dense or NF4, and any number of named adapters.

    One adapter is active at a time (`set_adapter`; None: the base alone). Its matrices are
    `lora_A[name].weight` [r, K] and `lora_B[name].weight` [N, r], the names PEFT uses. Parameters `weight`
    and `bias` are frozen.

    Args:
        in_features: K.
        out_features: N.
        r: rank, >= 1; None: no adapter yet, `add_adapter` adds one.
        lora_alpha: s = lora_alpha / r. Default: 2·r.
        lora_dropout: probability of dropping an input of the adapter while training, 0 <= p < 1.
        use_rslora: s = lora_alpha / sqrt(r).
        init_lora_weights: True: A Kaiming-uniform (a = √5) and B zero, so the layer starts equal to its base;
            "gaussian": A normal with standard deviation 1/r and B zero; False: both as nn.Linear starts, for
            tests.
        bias: whether the layer has a bias.
        quantize: "nf4" stores W0 in 4 bits; None keeps it dense.
        blocksize, double_quant: of the NF4 weight.
        dtype: of W0 and the bias.
        adapter_dtype: of A and B. Default: float32 where dtype is float16 or bfloat16, as PEFT does; else
            dtype.
        adapter_name: name of the first adapter.

    Shapes: x [..., K] -> y [..., N], in x's dtype.

    The state dict has the layout of bitsandbytes' Linear4bit for an NF4 base (`weight`, `weight.absmax`,
    ...), of nn.Linear for a dense one, and PEFT's names for the adapters; merging does not change it.
    Conversions such as `.to(torch.bfloat16)` cast dense weights and adapters and leave NF4 codes and scales
    as they are; a weight merged afterwards has the new dtype.

    Raises:
        ValueError: a bad r, lora_alpha, lora_dropout, quantize, blocksize, or adapter name.

    Source: Hu et al. 2021 (LoRA), section 4; Dettmers et al. 2023 (QLoRA), section 3.
    """

    absmax: Tensor | None
    nested_absmax: Tensor | None
    offset: Tensor | None
    merged_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int | None = 16,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        bias: bool = True,
        quantize: str | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        adapter_name: str = "default",
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_base(base.weight.detach(), base.bias, quantize, blocksize, double_quant)
        if r is not None:
            self.add_adapter(
                adapter_name,
                r,
                lora_alpha,
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                init_lora_weights=init_lora_weights,
                dtype=adapter_dtype,
            )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int | None = 16,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        quantize: str | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
        adapter_dtype: torch.dtype | None = None,
        adapter_name: str = "default",
        quantize_device: torch.device | str | None = None,
    ) -> "FusedLoRALinear":
        """The same layer around the weight and bias of an nn.Linear, or of bitsandbytes' Linear4bit (nf4).

        A dense weight is shared, not copied, when it is not quantised; the packed bytes of a Linear4bit
        always are (`quantize`, `blocksize` and `double_quant` then are what it has). The given layer is not
        changed.

        quantize_device: where the weight is quantised, if not where it is: a GPU does it faster, and with one
        layer at a time never holds a dense model. The bytes are the same, and lie where the weight does.

        Raises:
            TypeError: another kind of layer.
            ValueError: a Linear4bit that is not nf4 or not quantised yet; and as the constructor does.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        weight = getattr(linear, "weight", None)
        if isinstance(linear, nn.Linear) and hasattr(weight, "quant_state"):  # bitsandbytes' Linear4bit
            layer._set_nf4(NF4Weight.from_params4bit(weight), linear.bias)
        elif isinstance(linear, nn.Linear) and type(weight) is nn.Parameter:
            layer._set_base(weight.detach(), linear.bias, quantize, blocksize, double_quant, quantize_device)
        else:  # another layer, or a quantised one whose weight is a tensor subclass
            kind = f" with a weight of type {type(weight).__name__}" if isinstance(linear, nn.Linear) else ""
            raise TypeError(
                f"from_linear: got a {type(linear).__name__}{kind}, "
                "expected nn.Linear or bitsandbytes' Linear4bit"
            )
        if r is not None:
            layer.add_adapter(
                adapter_name,
                r,
                lora_alpha,
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                init_lora_weights=init_lora_weights,
                dtype=adapter_dtype,
            )
        return layer.train(linear.training)

    # ---- the frozen base -----------------------------------------------------------------------------------

    def _set_base(
        self,
        weight: Tensor,
        bias: Tensor | None,
        quantize: str | None,
        blocksize: int,
        double_quant: bool,
        quantize_device: torch.device | str | None = None,
    ) -> None:
        if quantize not in (None, "nf4"):
            raise ValueError(f"quantize is {quantize!r}, expected 'nf4' or None")
        if quantize == "nf4":
            there = weight if quantize_device is None else weight.to(quantize_device)
            self._set_nf4(nf4_quantize(there, blocksize, double_quant).to(weight.device), bias)
            return
        if weight.dim() != 2 or not weight.is_floating_point():
            raise TypeError(
                f"the weight is {weight.dtype} {tuple(weight.shape)}, expected a float matrix [N, K]"
            )
        self._set_shape(weight.shape, weight.dtype, None, bias)
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name in _NF4_BUFFERS:
            self.register_buffer(name, None, persistent=False)

    def _set_nf4(self, weight: NF4Weight, bias: Tensor | None) -> None:
        self._set_shape(weight.shape, weight.dtype, weight.blocksize, bias)
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        for name in _NF4_BUFFERS:
            self.register_buffer(name, getattr(weight, name), persistent=False)

    def _set_shape(
        self, shape: torch.Size, dtype: torch.dtype, blocksize: int | None, bias: Tensor | None
    ) -> None:
        self.out_features, self.in_features = shape
        self.blocksize = blocksize  # None = dense
        self._dtype_before_nf4 = None if blocksize is None else dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.adapter_specs: dict[str, LoRASpec] = {}
        self.active_adapter: str | None = None
        self.merged_adapter: str | None = None
        self.register_buffer("merged_weight", None, persistent=False)

    @property
    def quantize(self) -> str | None:
        return None if self.blocksize is None else "nf4"

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of a dense W0, or what an NF4 one had before it was quantised; merging returns it.

        Casts (`.to(torch.bfloat16)`) change it, though not the codes.
        """
        return self.weight.dtype if self._dtype_before_nf4 is None else self._dtype_before_nf4

    def base_weight(self) -> Tensor | NF4Weight:
        """W0 [N, K] as `lora_linear` takes it: an NF4Weight sharing the layer's tensors, or the dense one."""
        if self.blocksize is None:
            return self.weight
        shape = (self.out_features, self.in_features)
        return NF4Weight(
            *(self.weight, self.absmax, self.nested_absmax, self.offset),
            *(shape, self.blocksize, self.base_dtype),
            check_scales=False,
        )

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W0 [N, K] as a dense tensor: the weight itself where it is dense and of that dtype already."""
        base = self.base_weight()
        dtype = self.base_dtype if dtype is None else dtype
        if isinstance(base, NF4Weight):  # its values are float32 products: float64 adds nothing to them
            return base.dequantize(torch.float32 if dtype == torch.float64 else dtype).to(dtype)
        return base.detach().to(dtype)

    # ---- adapters ------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        r: int,
        lora_alpha: float | None = None,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Adds an adapter, on the base's device; the first one becomes active. Arguments as in the class."""
        if name in self.adapter_specs:
            raise ValueError(f"adapter {name!r} exists already; delete_adapter({name!r}) first")
        if not isinstance(name, str) or not name or "." in name or hasattr(self.lora_A, name):
            raise ValueError(
                f"adapter name is {name!r}, expected a non-empty string without dots that is no attribute of "
                "torch.nn.ModuleDict"
            )
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights is {init_lora_weights!r}, expected True, False or 'gaussian'"
            )
        spec = LoRASpec(r, 2 * r if lora_alpha is None else lora_alpha, lora_dropout, use_rslora)
        if dtype is None:
            half = self.base_dtype in (torch.float16, torch.bfloat16)
            dtype = torch.float32 if half else self.base_dtype
        if not dtype.is_floating_point:
            raise TypeError(f"adapter_dtype is {dtype}, expected a floating-point dtype")
        placed: dict[str, Any] = {"bias": False, "device": self.weight.device, "dtype": dtype}
        lora_A = nn.Linear(self.in_features, r, **placed)  # starts Kaiming-uniform with a = sqrt(5)
        lora_B = nn.Linear(r, self.out_features, **placed)
        if init_lora_weights == "gaussian":
            nn.init.normal_(lora_A.weight, std=1 / r)
        if init_lora_weights is not False:
            nn.init.zeros_(lora_B.weight)
        self.lora_A[name], self.lora_B[name] = lora_A, lora_B
        self.adapter_specs[name] = spec
        if self.active_adapter is None and len(self.adapter_specs) == 1:
            self.active_adapter = name

    def set_adapter(self, name: str | None) -> None:
        """Makes one adapter active; None: the base alone. Not while an adapter is merged."""
        if name is not None:
            self._check_adapter(name)
        if self.merged:
            raise RuntimeError(f"adapter {self.merged_adapter!r} is merged; unmerge() first")
        self.active_adapter = name

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter; if it was the active one, none is."""
        self._check_adapter(name)
        if self.merged_adapter == name:
            raise RuntimeError(f"adapter {name!r} is merged; unmerge() first")
        del self.lora_A[name], self.lora_B[name], self.adapter_specs[name]
        if self.active_adapter == name:
            self.active_adapter = None

    def _check_adapter(self, name: str) -> None:
        if name not in self.adapter_specs:
            known = ", ".join(map(repr, self.adapter_specs)) or "none"
            raise ValueError(f"there is no adapter {name!r}; there are: {known}")

    @property
    def scaling(self) -> dict[str, float]:
        return {name: spec.scaling for name, spec in self.adapter_specs.items()}

    # ---- merging -------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        return self.merged_adapter is not None

    def delta_weight(self, adapter_name: str | None = None) -> Tensor:
        """s·B·A [N, K] of an adapter (default: the active one), in float32."""
        name = self.active_adapter if adapter_name is None else adapter_name
        if name is None:
            raise ValueError("no adapter is active; name one")
        self._check_adapter(name)
        A, B = self.lora_A[name].weight.detach().float(), self.lora_B[name].weight.detach().float()
        return (B @ A).mul_(self.adapter_specs[name].scaling)

    def merge(self) -> None:
        """Makes forward one product with W = T(W0 + s·B·A): a float32 sum, rounded once to the base's dtype.

        W is dense also over an NF4 base (4 bits cannot hold a small change). W0 stays beside it, so that
        `unmerge` gives back the exact bytes; `lora_kernels.merge_and_unload` returns a model without the
        copy.
        """
        if self.merged:
            raise RuntimeError(f"adapter {self.merged_adapter!r} is merged already")
        if self.active_adapter is None:
            raise RuntimeError("no adapter is active, so there is nothing to merge")
        with torch.no_grad():
            merged = self.dequantized_weight(torch.float32) + self.delta_weight()
        self.merged_weight, self.merged_adapter = merged.to(self.base_dtype), self.active_adapter

    def unmerge(self) -> None:
        """Undoes `merge`: the base has the exact bytes it had."""
        if not self.merged:
            raise RuntimeError("no adapter is merged")
        self.merged_weight, self.merged_adapter = None, None

    # ---- forward, state, conversion ------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        name = self.active_adapter
        if self.merged_weight is not None:
            return nn.functional.linear(x, self.merged_weight, self.bias)
        if name is None:
            return functional.lora_linear(x, self.base_weight(), bias=self.bias)
        spec = self.adapter_specs[name]
        return functional.lora_linear(
            x,
            self.base_weight(),
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            scaling=spec.scaling,
            bias=self.bias,
            dropout_p=spec.lora_dropout if self.training else 0.0,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedLoRALinear":
        # Casting a module (.half(), .to(dtype)) must move codes and scales but never round them.
        before = {name: self._buffers[name] for name in _NF4_BUFFERS}
        codes = self.weight.data
        if self._dtype_before_nf4 is not None:  # what merging returns follows, as a dense weight would
            as_cast = fn(torch.empty(0, dtype=self._dtype_before_nf4, device=codes.device))
            self._dtype_before_nf4 = as_cast.dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = self._buffers[name]
            if tensor is not None and now.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(now.device)
        if self.blocksize is not None and self.weight.dtype != codes.dtype:
            self.weight = nn.Parameter(codes.to(self.weight.device), requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.blocksize is not None and self.weight.device.type != "meta":
            tensors = self.base_weight().state_dict(prefix + "weight")
            tensors.pop(prefix + "weight")  # written above
            destination.update(tensors)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        if self.merged:  # the merged weight would go on being that of the old base and adapter
            error_msgs.append(f"{key}: adapter {self.merged_adapter!r} is merged here; unmerge() first")
            return
        own: Mapping[str, Tensor] = state_dict
        extra = {k for k in state_dict if k.startswith(key + ".")}
        if self.blocksize is not None:
            # The base is read here, all keys together or not at all; nn.Module handles what remains.
            own = {k: v for k, v in state_dict.items() if k != key and k not in extra}
            self._load_nf4(state_dict, prefix, local_metadata, missing_keys, error_msgs)
        lost = len(missing_keys)
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.blocksize is not None:
            missing_keys[lost:] = [k for k in missing_keys[lost:] if k != key]
            known = set(NF4Weight.state_keys(key, double_quant=self.nested_absmax is not None))
            unexpected_keys.extend(sorted(extra - known))
        elif extra:
            error_msgs.append(f"{key}: the state dict holds an NF4 weight, but this layer's is dense")

    def _load_nf4(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        expected = NF4Weight.state_keys(key, double_quant=self.nested_absmax is not None)
        absent = [k for k in expected if k not in state_dict]
        if absent:
            dense = key in state_dict and state_dict[key].is_floating_point()
            if dense:
                error_msgs.append(
                    f"{key}: the state dict holds a dense {state_dict[key].dtype} weight, but this layer's "
                    "is NF4; load it into nn.Linear and convert with FusedLoRALinear.from_linear"
                )
            else:
                missing_keys.extend(absent)
            return
        try:
            loaded = NF4Weight.from_state_dict(state_dict, key)
        except (ValueError, TypeError, KeyError) as error:
            error_msgs.append(str(error.args[0]))
            return
        got = (tuple(loaded.shape), loaded.blocksize, loaded.double_quant)
        want = ((self.out_features, self.in_features), self.blocksize, self.nested_absmax is not None)
        if got != want:
            error_msgs.append(f"{key}: got (shape, blocksize, double_quant) = {got}, this layer has {want}")
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        if assign:
            self.weight = nn.Parameter(loaded.packed, requires_grad=False)
            # A dense weight would take over the dtype too, and go with the bias that comes with it.
            bias = state_dict.get(prefix + "bias")
            self._dtype_before_nf4 = loaded.dtype if bias is None else bias.dtype
        else:
            self.weight.data.copy_(loaded.packed)
        for name in _NF4_BUFFERS:
            buffer, value = self._buffers[name], getattr(loaded, name)
            if assign:
                self._buffers[name] = value
            elif buffer is not None:
                buffer.copy_(value)

    def extra_repr(self) -> str:
        base = "dense" if self.blocksize is None else f"nf4, blocksize={self.blocksize}"
        ranks = ", ".join(f"{name}: r={spec.r}" for name, spec in self.adapter_specs.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, base={base}, adapters={{{ranks}}}, "
            f"active={self.active_adapter!r}, merged={self.merged}"
        )
