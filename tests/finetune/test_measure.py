"""The memory that is reported is the memory that is allocated."""

import torch
from torch import nn

from lora_kernels.finetune.data import Batch
from lora_kernels.finetune.measure import full_finetuning, pass_memory, tensor_bytes


class Logits:
    def __init__(self, logits):
        self.logits = logits


class OneBuffer(nn.Module):
    """Holds one tensor of `elements` float32 from forward to backward."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements = elements
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, use_cache):
        held = torch.ones(self.elements) * self.scale  # the ones are kept for the gradient of scale
        rows, tokens = input_ids.shape
        return Logits(held.exp().sum().expand(rows, tokens, 4) * 1.0)


def test_the_peak_of_a_pass_is_what_it_holds_at_once():
    labels = torch.zeros(1, 3, dtype=torch.int64)
    batch, device = Batch(labels, labels, 3), torch.device("cpu")
    small, large = (pass_memory(OneBuffer(n), batch, device)[0] for n in (10_000, 1_010_000))
    # Forward: ones, their product with scale, its exponential; backward: at most one more at a time.
    assert 3 * 4_000_000 <= large - small <= 4 * 4_000_000
    model = OneBuffer(10)
    assert pass_memory(model, batch, device)[1] == 4  # the gradient of one scalar
    assert model.scale.grad is None


def test_shared_storage_counts_once():
    a = torch.zeros(100)
    assert tensor_bytes([a, a[:50], a.view(10, 10), torch.zeros(3)]) == 412


def test_full_finetuning_is_weights_gradients_and_two_moments():
    full = full_finetuning(parameters=1000, buffers=8, itemsize=2, activations=5)
    assert full["base_weights"] == 2008 and full["gradients"] == 2000 and full["optimizer_state"] == 4000
