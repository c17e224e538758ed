"""memory_report and explain tell what is so."""

import pytest
import simt_backend
import torch
from torch import nn
from variants import variant

import lora_kernels as lk
from lora_kernels import panels
from lora_kernels.backends.cuda import CROSSOVERS, FUSED_H, GRADIENT_OF_H, CudaBackend
from lora_kernels.backends.native import CPU_ISAS
from lora_kernels.base_weight import BaseWeight


def test_memory_report_adds_up_to_the_bytes_that_are_there():
    model = nn.Sequential(nn.Embedding(11, 64), nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 32))
    lk.inject(model, ["1", "3"], r=4, quantize="nf4")
    report = lk.memory_report(model)
    n = 64 * 96 + 96 * 32
    assert report["base_weights"] == n // 2
    assert report["quantization_constants"] == sum(b + 4 + 4 for b in (64 * 96 // 64, 96 * 32 // 64))
    assert report["adapters"] == 4 * 4 * (64 + 96 + 96 + 32)
    assert report["other_parameters"] == 4 * (11 * 64 + 96 + 32 + 2 * 96)
    assert report["buffers"] == 4 * 2 * 96 + 8
    assert report["gradients"] == report["merged_weights"] == 0
    assert report["total"] == sum(v for k, v in report.items() if k != "total")
    model[1](torch.randn(2, 64)).sum().backward()
    assert lk.memory_report(model)["gradients"] == 4 * 4 * (64 + 96)
    lk.merge(model)
    assert lk.memory_report(model)["merged_weights"] == 4 * n


def test_shared_storage_counts_once():
    linear = nn.Linear(64, 64)
    model = nn.ModuleList([lk.FusedLoRALinear.from_linear(linear, r=2), linear])
    report = lk.memory_report(model)
    assert report["base_weights"] + report["other_parameters"] == 4 * (64 * 64 + 64)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_explain_names_backend_kernel_and_workspace(quantize):
    layer = lk.FusedLoRALinear(4096, 4096, r=4, quantize=quantize, dtype=torch.bfloat16)
    with variant("cpu-panels"):
        text = lk.explain(layer, tokens=2048)
    assert "T = 2048" in text and "backend: cpu" in text and "forward" in text and "backward" in text
    if quantize:
        assert "nf4_dequantize" in text and "4 panel(s) of 1024 rows" in text and "8.0 MiB" in text
    else:
        assert "dense" in text
    with variant("cpu-portable"):
        text = lk.explain(layer, tokens=1)
    megabytes = 8.7 if quantize else 33.6
    assert "C++ gemm (portable)" in text and "why:" in text and f"floor: {megabytes} MB of W0" in text
    if "avx512" in CPU_ISAS and quantize:
        with variant("cpu-avx512"):
            assert "C++ few_tokens (avx512)" in lk.explain(layer, tokens=4)
            assert "C++ gemm (avx512)" in lk.explain(layer, tokens=5)
    if "avx512bf16" in CPU_ISAS:
        with variant("cpu-avx512bf16"):
            assert "C++ gemm_bf16 (avx512bf16): blocks of up to 512 tokens" in lk.explain(layer, tokens=48)
            wide = torch.empty(14336, 4096, dtype=torch.bfloat16)
            text = lk.explain(wide, tokens=47)
            assert "C++ gemm (avx512bf16): blocks of up to 384 (backward 144) tokens" in text
    with lk.use_backend("reference"):
        assert "backend: reference" in lk.explain(layer.base_weight(), 1, torch.float32)


def test_explain_tells_the_size_of_a_gpus_panels():
    """64 MiB of a weight that is larger, all of a smaller one."""
    for n, k, count, mib in ((4096, 14336, 2, 56.0), (1024, 1024, 1, 2.0)):
        packed = torch.empty(0, dtype=torch.uint8)
        base = BaseWeight(packed, packed, packed, packed, 64, n, k)
        for line in simt_backend.backend.explain(base, 4096, torch.bfloat16)[:2]:
            assert f"{count} panel(s)" in line and f"workspace of {mib:.1f} MiB" in line, line


def test_crossovers_of_a_gpu_say_what_they_come_from_and_hold_where_they_say():
    for row in (*CROSSOVERS, FUSED_H, GRADIENT_OF_H):
        assert "not measured" in row.why or "bench/results" in row.why, row
    for op in ("lora_linear", "lora_linear_backward"):  # for every GPU and weight there is a row
        assert any(row.op == op and row.capability == 0 and row.weights == 0 for row in CROSSOVERS)
    mixed = next(row for row in CROSSOVERS if row.kernel == "lora_linear_mixed")
    special = mixed._replace(tokens=mixed.tokens + 100, capability=90, weights=1 << 20, why="special")
    backend = CudaBackend(simt_backend.backend._launchers, "forced", (special, *CROSSOVERS))
    for capability, n, holds in ((90, 1024, True), (80, 1024, False), (90, 512, False)):
        with variant(f"simt-{capability}"):
            base = lk.nf4_quantize(torch.randn(n, 1024).bfloat16()).base_weight()
            text = "\n".join(backend.explain(base, mixed.tokens + 50, torch.bfloat16))
        assert ("special" in text) == holds == ("CUDA lora_linear_mixed: one launch" in text)


def test_a_gpus_workspace_is_the_one_that_its_backend_says(monkeypatch):
    none = tuple(row._replace(tokens=0) for row in CROSSOVERS)
    backend = CudaBackend(simt_backend.backend._launchers, "forced", none, panel_bytes=16 << 10)
    base = lk.nf4_quantize(torch.randn(256, 128).bfloat16()).base_weight()  # 64 KiB in 16 bits
    x, y, h = torch.randn(5, 128).bfloat16(), torch.empty(5, 256).bfloat16(), torch.empty(5, 0).bfloat16()
    sizes, real = [], torch.empty
    monkeypatch.setattr(
        panels.torch, "empty", lambda *a, **kw: sizes.append(real(*a, **kw).nbytes) or real(*a, **kw)
    )
    backend.lora_linear(x, base, None, None, 1.0, None, 0.0, None, y, h)
    assert sizes == [16 << 10]
    assert "4 panel(s) of 64 rows" in backend.explain(base, 5, torch.bfloat16)[0]
