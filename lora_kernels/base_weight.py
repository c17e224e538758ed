"""The frozen weight W0 as ops and backends pass it: dense, or the tensors of an NF4 weight."""

from typing import NamedTuple

from torch import Tensor


class BaseWeight(NamedTuple):
    data: Tensor  # dense [N, K], or the packed codes, uint8 [ceil(N*K / 2), 1]
    absmax: Tensor | None  # None = dense; else [ceil(N*K / blocksize)] fp32, or uint8 when nested
    nested_absmax: Tensor | None  # fp32 [ceil(blocks / 256)]
    offset: Tensor | None  # fp32 []
    blocksize: int
    out_features: int  # N
    in_features: int  # K

    @property
    def quantized(self) -> bool:
        return self.absmax is not None
