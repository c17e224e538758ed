"""Where the work runs: torch's current stream, the tensor's device, and inside a CUDA graph."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends.native import _C

# About 0.2 s at 2 GHz: far longer than it takes to launch what is queued behind it.
SLEEP_CYCLES = 400_000_000


def test_the_stream_symbol_is_bound():
    """Otherwise every launch would be refused: see csrc/torch_ops.cpp."""
    assert _C.cuda_stream_bound == 1


def test_the_library_was_built_for_this_device():
    major, minor = torch.cuda.get_device_capability()
    archs = [a.rstrip("a") for a in _C.cuda_archs.split(";")]
    same_major = [
        a for a in archs if not a.startswith("ptx") and int(a) // 10 == major and int(a) % 10 <= minor
    ]
    ptx = [a for a in archs if a.startswith("ptx") and int(a[3:]) <= 10 * major + minor]
    assert same_major or ptx, f"built for {_C.cuda_archs}, the device is sm_{major}{minor}"


def expected(weight, dtype):
    parts = weight.base_weight()[:4]
    return reference.nf4_dequantize(*parts, tuple(weight.shape), weight.blocksize, dtype)


def test_work_is_queued_on_the_current_stream(device):
    """On a side stream, behind a long sleep and a copy that brings the codes: right only if it waited."""
    weight = lk.nf4_quantize(torch.randn(512, 1024)).to(device)
    codes = torch.zeros_like(weight.packed)
    late = lk.NF4Weight(
        *(codes, weight.absmax, weight.nested_absmax, weight.offset),
        *(weight.shape, weight.blocksize, weight.dtype),
    )
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late.dequantize()  # loading a kernel and allocating memory may wait for the device
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        codes.copy_(weight.packed)
        out = late.dequantize()
        returned_early = not side.query()
    side.synchronize()
    assert returned_early, "the call waited for the device"
    assert torch.equal(out, weight.dequantize())


def test_a_stream_does_not_wait_for_the_default_one(device):
    """The other way round: while the default stream sleeps, work on a side stream gets done."""
    weight = lk.nf4_quantize(torch.randn(512, 1024)).to(device)
    wanted, side = weight.dequantize(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        weight.dequantize()  # the memory of the next call on this stream
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    asleep = torch.cuda.Event()
    asleep.record()
    with torch.cuda.stream(side):
        out = weight.dequantize()
    side.synchronize()
    assert not asleep.query(), "the side stream waited for the default stream"
    assert torch.equal(out, wanted)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)
def test_the_tensors_device_counts_and_not_the_current_one():
    weight = lk.nf4_quantize(torch.randn(64, 512))
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        out = weight.to(other).dequantize()
        y = lk.lora_linear(torch.ones(3, 512, device=other), weight.to(other))
        assert torch.cuda.current_device() == 0
    assert out.device == other and y.device == other
    assert torch.equal(out.cpu(), expected(weight, out.dtype))


def captured(function):
    """The graph of one call, and its result; warmed up on a side stream first, as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_captured_dequantize_reads_the_codes_of_the_replay(dtype, device):
    first, second = (lk.nf4_quantize(torch.randn(96, 333), double_quant=False).to(device) for _ in range(2))
    graph, out = captured(lambda: first.dequantize(dtype))
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, first.dequantize(dtype))
    first.packed.copy_(second.packed)
    first.absmax.copy_(second.absmax)
    graph.replay()
    assert torch.equal(out, second.dequantize(dtype))


def test_a_captured_training_step_computes_with_the_inputs_of_the_replay(device):
    n, k, r = 1100, 1030, 8
    weight = lk.nf4_quantize(torch.randn(n, k, device=device) * k**-0.5)
    x, A, B = (torch.randn(*s, device=device, requires_grad=True) for s in ((40, k), (r, k), (n, r)))
    dy, rng = torch.randn(40, n, device=device), lk.dropout_rng(device)

    def step():
        y = lk.lora_linear(x, weight, A, B, scaling=0.1, dropout_p=0.2, rng=rng)
        return (y.detach(), *torch.autograd.grad(y, (x, A, B), dy))

    graph, results = captured(step)
    for _ in range(2):
        with torch.no_grad():
            for tensor in (x, A, B, dy):
                tensor.normal_()
            rng.copy_(lk.dropout_rng(device))
        for out in results:
            out.fill_(float("nan"))
        graph.replay()
        for out, want in zip(results, step(), strict=True):
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-3)


def test_a_replayed_graph_draws_fresh_masks(device):
    """rng is a tensor that torch's generator fills, so each replay has a mask of its own."""
    t, k, p = 64, 128, 0.5
    weight = lk.nf4_quantize(torch.zeros(k, k, device=device))
    x, eye = torch.ones(t, k, device=device), torch.eye(k, device=device)
    graph, y = captured(lambda: lk.lora_linear(x, weight, eye, eye, scaling=1 - p, dropout_p=p))
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(y.clone())
    for mask in masks:
        assert bool(((mask - mask.round()).abs() < 1e-5).all())
        assert abs(float(mask.mean()) - (1 - p)) < 0.05  # 8192 draws: nine standard deviations
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
