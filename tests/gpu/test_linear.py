"""FusedLoRALinear on the device: its bytes survive the journey, and it trains as on the CPU."""

import copy

import pytest
import torch

import lora_kernels as lk


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_journey_to_the_device_and_back_changes_no_byte(quantize, dtype, device):
    layer = lk.FusedLoRALinear(91, 70, r=5, quantize=quantize, dtype=dtype)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    before = state_of(layer)
    layer.to(device)
    assert all(tensor.is_cuda for tensor in (*layer.parameters(), *layer.buffers()))
    on_device = state_of(layer)
    layer.to("cpu")
    after = state_of(layer)
    assert before.keys() == on_device.keys() == after.keys()
    for name, tensor in before.items():
        for other in (on_device[name].cpu(), after[name]):
            assert other.dtype == tensor.dtype and torch.equal(other, tensor), name


def test_quantising_on_the_device_gives_the_cpus_bytes_where_the_weight_is(device):
    linear = torch.nn.Linear(333, 96)
    here, there = (
        lk.FusedLoRALinear.from_linear(linear, r=4, quantize="nf4", quantize_device=where)
        for where in (None, device)
    )
    for name in ("weight", "absmax", "nested_absmax", "offset"):
        tensor, other = getattr(here, name), getattr(there, name)
        assert other.device.type == "cpu" and torch.equal(other, tensor), name


def test_a_checkpoint_of_the_device_loads_on_the_cpu(device):
    there = lk.FusedLoRALinear(128, 96, r=4, quantize="nf4").to(device)
    here = lk.FusedLoRALinear(128, 96, r=4, quantize="nf4")
    here.load_state_dict(there.state_dict())
    for name, tensor in there.state_dict().items():
        assert torch.equal(tensor.cpu(), here.state_dict()[name].cpu()), name


def test_merging_on_the_device_gives_the_cpus_weight_and_is_undone_exactly(device):
    layer = lk.FusedLoRALinear(128, 96, r=4, quantize="nf4", dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    there = copy.deepcopy(layer).to(device)
    before = state_of(there)
    layer.merge()
    there.merge()
    torch.testing.assert_close(there.merged_weight.cpu(), layer.merged_weight, rtol=2**-7, atol=1e-6)
    there.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in there.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_few_training_steps_equal_the_cpus(dropout, device, monkeypatch):
    """Two layers, AdamW, five steps, the same masks on both: losses and adapters agree to fp32 accuracy."""
    masks = {}

    def replayed_rng(place):
        """The masks that the CPU run draws, in their order, for the run on the device too."""
        step = masks.setdefault("drawn", [])
        at = masks["at"] = masks.get("at", -1) + 1
        if at == len(step):
            step.append(torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64))
        return step[at].to(place)

    monkeypatch.setattr(lk.functional, "dropout_rng", replayed_rng)
    options = {"r": 8, "lora_dropout": dropout, "quantize": "nf4"}
    model = torch.nn.Sequential(
        lk.FusedLoRALinear(96, 160, **options), torch.nn.GELU(), lk.FusedLoRALinear(160, 32, **options)
    )
    batches = [(torch.randn(24, 96), torch.randn(24, 32)) for _ in range(5)]
    runs = []
    for place in (torch.device("cpu"), device):
        masks["at"] = -1
        copied = copy.deepcopy(model).to(place)
        trained = [p for p in copied.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
        for x, target in batches:
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(copied(x.to(place)), target.to(place))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((torch.tensor(losses), [p.detach().cpu() for p in trained]))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-4, atol=1e-5)
    assert len(runs[0][1]) == 4
    for here, there in zip(runs[0][1], runs[1][1], strict=True):
        # AdamW divides by the gradient's size: near zero, a rounding decides the sign of a step of lr.
        assert float((here - there).norm() / here.norm()) < 1e-2
