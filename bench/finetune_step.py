"""One whole fine-tune step of a 100 M-parameter Llama: lora_kernels against bitsandbytes + PEFT, interleaved.

    python -m bench.finetune_step [--steps N] [--results FOLDER]

Two copies of one random model in bf16, all of their linear layers in NF4 with the same bytes, LoRA r = 16 of
the same start on all of them, AdamW, the same batches. Prints the median time of a step of each, their ratio
within a step, and the losses, which agree up to the rounding of bf16.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_kernels as lk
from bench import machine, peers
from bench.shapes import LORA_ALPHA, RANK
from lora_kernels.adapters.inject import lora_layers
from lora_kernels.integrations.bitsandbytes import to_linear4bit

HIDDEN, LAYERS, INTERMEDIATE, VOCABULARY = 768, 14, 2048, 260
BATCH, TOKENS = 2, 256


def base_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def ours(model: nn.Module) -> nn.Module:
    lk.inject(model, "all-linear", r=RANK, lora_alpha=LORA_ALPHA, quantize="nf4")
    return model


def theirs(model: nn.Module, start: nn.Module) -> nn.Module:
    """The model with the NF4 bytes and the adapters of `start`, as bitsandbytes and PEFT hold them."""
    from peft import LoraConfig, get_peft_model

    adapted = dict(lora_layers(start))
    for name, layer in adapted.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], to_linear4bit(layer.base_weight()))
    model.is_loaded_in_4bit = True
    config = LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=list(adapted))
    wrapped = get_peft_model(model, config)
    for name, layer in adapted.items():
        target = wrapped.base_model.model.get_submodule(name)
        for matrix in ("lora_A", "lora_B"):
            parameter = getattr(target, matrix)["default"].weight
            with torch.no_grad():
                parameter.copy_(getattr(layer, matrix)["default"].weight)
    return wrapped


class Stepper:
    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Tensor) -> None:
        start = time.perf_counter()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Times a fine-tune step against bitsandbytes + PEFT.")
    parser.add_argument("--steps", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    reason = peers.missing("bitsandbytes", "peft", "transformers")
    if reason is not None:
        print(f"bench.finetune_step: error: {reason}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    model = base_model()
    parameters = sum(p.numel() for p in model.parameters())
    first = ours(copy.deepcopy(model))
    steppers = {"lora_kernels": Stepper(first), "bitsandbytes + PEFT": Stepper(theirs(model, first))}
    for _ in range(arguments.steps + 1):  # the first warms up
        batch = torch.randint(VOCABULARY, (BATCH, TOKENS))
        for stepper in steppers.values():
            stepper.step(batch)
    a, b = (steppers[name] for name in steppers)
    ratio = statistics.median(y / x for x, y in zip(a.seconds[1:], b.seconds[1:], strict=True))
    about = machine.describe_cpu() | {"peers": peers.versions()}
    lines = [
        f"# A fine-tune step, {parameters / 1e6:.0f} M parameters, {BATCH} x {TOKENS} tokens: "
        f"{about['cpu']}, {about['threads']} thread(s)",
        "",
        f"{time.strftime('%Y-%m-%d %H:%M')}, commit {about['commit']}, torch {about['torch']}, kernels "
        f"{about['cpu_isa']}, allocator {about['allocator']}.",
        "",
        "| | median s | losses |",
        "|---|---:|---|",
    ]
    for name, stepper in steppers.items():
        losses = " ".join(f"{loss:.4f}" for loss in stepper.losses)
        lines.append(f"| {name} | {statistics.median(stepper.seconds[1:]):.3f} | {losses} |")
    largest = max(abs(x - y) / y for x, y in zip(a.losses, b.losses, strict=True))
    lines += ["", f"{ratio:.2f}x faster; largest relative difference of the losses {largest:.1e}."]
    text = "\n".join(lines) + "\n"
    folder = arguments.results.resolve() / machine.slug()
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y-%m-%d_%H%M%S_finetune_step")
    record = {key: {"seconds": s.seconds, "losses": s.losses} for key, s in steppers.items()}
    (folder / f"{name}.json").write_text(json.dumps({"machine": about, **record}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
