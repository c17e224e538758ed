"""Every primitive of ptx.cuh and ptx_sm90.cuh on this device against its host twin: the same program text,
the same inputs, the same bytes; sums of products up to their order."""

import numpy as np
import pytest
import torch
import twins

SEEDS = 3


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The programs for this device, and for the stand-in."""
    folder = tmp_path_factory.mktemp("twins")
    return twins.build_cuda(folder, torch.cuda.get_device_capability()), twins.build_simt(folder)


@pytest.mark.parametrize("case", twins.CASES, ids=lambda case: case.name)
def test_an_instruction_does_what_its_twin_does(libraries, case, seed):
    arch = twins.twins_arch(torch.cuda.get_device_capability())
    needed = 90 if case.program in ("wgmma_ss", "wgmma_rs", "pipeline") else case.arch
    if arch < needed or (
        needed == 90 and case.program in ("wgmma_ss", "wgmma_rs", "pipeline") and arch != 90
    ):
        pytest.skip(f"{case.program} does not exist on this device")
    on_device, simt = libraries
    for i in range(SEEDS):
        arrays = case.arrays(np.random.default_rng(seed + i))
        twin = twins.run(simt, case, arrays, seed=seed + i)
        device = twins.run(on_device, case, arrays)
        twins.check_agrees(case, arrays, twin, device)
