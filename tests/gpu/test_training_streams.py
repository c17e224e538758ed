"""What only a device shows of a training step: other streams, CUDA graphs, launches that nobody waits for."""

import pytest
import torch
from numerics import LIMIT, relative_error
from problems import BatchedCase, Case

from lora_kernels.backends.cuda import CROSSOVERS

# T, N, K, r: each route forward and backward; of panels the LoRA term before the product, and in it.
SIZES = (
    *((4, 520, 1024, 16), (40, 520, 1024, 16), (300, 520, 1024, 40)),
    *((600, 520, 1024, 16), (600, 1056, 512, 16)),
)
ALL_FUSED = min(row.tokens for row in CROSSOVERS[1:])


def assert_same(results, wanted, t):
    """The same bits; but torch's GEMM, behind ALL_FUSED tokens, promises them on one stream only."""
    for out, want in zip(results, wanted, strict=True):
        if t <= ALL_FUSED:
            assert torch.equal(out, want)
        else:
            assert relative_error(out, want.double()) <= LIMIT[want.dtype]


@pytest.mark.parametrize("t, n, k, r", SIZES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_second_stream_gives_the_same_bits(t, n, k, r, p, device):
    """While the first is busy with the same step: neither counters nor workspaces are shared."""
    case = Case(device, t, n, k, r, torch.bfloat16, p=p)
    wanted = case.computed()
    torch.cuda.synchronize()
    side, results = torch.cuda.Stream(), []
    for _ in range(10):
        results.append(case.computed())
        with torch.cuda.stream(side):
            results.append(case.computed())
    torch.cuda.synchronize()
    for got in results:
        assert_same(got, wanted, t)


@pytest.mark.parametrize("t, n, k, r", SIZES)
def test_a_hundred_steps_in_a_row_give_the_same_bits(t, n, k, r, device):
    """Whatever block comes last at a counter; nothing is waited for in between."""
    case = Case(device, t, n + 36, k, r, torch.bfloat16, p=0.1)
    wanted = case.computed()
    for got in [case.computed() for _ in range(100)]:
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def captured(function):
    """The graph of one call, and its results; warmed up on a side stream first, as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("t, n, k, r", SIZES)
def test_a_captured_step_computes_with_the_inputs_and_masks_of_the_replay(t, n, k, r, device):
    """lora_shrink's second stream is forked and joined inside the capture."""
    case = Case(device, t, n, k, r, torch.bfloat16, p=0.1)
    graph, results = captured(case.computed)
    for _ in range(3):
        for tensor in (case.x, case.dy, case.A, case.B):
            tensor.normal_()
        case.rng.random_(2**62)
        for out in results:
            out.fill_(float("nan"))
        graph.replay()
        assert_same(results, case.computed(), t)


def test_a_captured_batched_step_sorts_the_rows_of_the_replay(device):
    case = BatchedCase(device, 200, 320, 512, [16, 3, 40, 8], torch.bfloat16, p=0.1)

    def flat():
        y, dx, dbias, dA, dB = case.computed()
        return [y, dx, dbias, *dA, *dB]

    graph, results = captured(flat)
    for _ in range(3):
        case.index.random_(5).sub_(1)
        case.x.normal_()
        graph.replay()
        for out, want in zip(results, flat(), strict=True):
            assert torch.equal(out, want)
