"""lora_plus_groups: the parameters and rates of PEFT's LoRA+ optimizer."""

import pytest
import torch
from torch import nn

import lora_kernels as lk


def model():
    m = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    lk.inject(m, "all-linear", r=2)
    return m


def rates(groups):
    return {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_the_groups_are_those_of_peft():
    peft_optimizers = pytest.importorskip("peft.optimizers")
    m = model()
    m[3].bias.requires_grad_(True)  # no weight decay
    m[2].requires_grad_(True)  # nor in a LayerNorm
    m.append(nn.RMSNorm(4))  # decays, as DoRA's magnitudes do
    m[1].lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(torch.ones(16))})
    theirs = peft_optimizers.create_loraplus_optimizer(
        m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    ours = rates(lk.optim.lora_plus_groups(m, lr=1e-3, ratio=8.0, weight_decay=0.1))
    wanted = rates(theirs.param_groups)
    frozen = {id(p) for p in m.parameters() if not p.requires_grad}
    assert {k: v for k, v in wanted.items() if k not in frozen} == ours


def test_b_learns_ratio_times_as_fast_and_every_parameter_is_in_one_group():
    m = model()
    groups = lk.optim.lora_plus_groups(m, lr=1e-3, ratio=4, weight_decay=0.01)
    assert [(g["name"], g["lr"]) for g in groups] == [("A", 1e-3), ("B", 4e-3)]
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in m.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups)
    before = m[1].lora_B["default"].weight.clone()
    m[1](torch.randn(3, 16)).sum().backward()
    optimizer.step()
    moved = (m[1].lora_B["default"].weight - before).abs()
    torch.testing.assert_close(moved.max(), torch.tensor(4e-3), rtol=1e-3, atol=0)


def test_trained_embeddings_have_their_own_rate():
    m = model()
    m.lora_embedding_A = nn.Parameter(torch.randn(2, 10))
    groups = {g["name"]: g for g in lk.optim.lora_plus_groups(m, lr=1e-3)}
    assert groups["embedding"]["params"][0] is m.lora_embedding_A and groups["embedding"]["lr"] == 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": 1e-3, "ratio": 0.5}, "ratio is 0.5"),
    ],
)
def test_rates_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        lk.optim.lora_plus_groups(model(), **arguments)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        lk.optim.lora_plus_groups(model().requires_grad_(False), lr=1e-3)
