"""Hugging Face models and Trainer: the layer is a plain module in them."""

import pytest
import torch

import lora_kernels as lk

transformers = pytest.importorskip("transformers")


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def adapted(**options):
    model = llama()
    lk.inject(model, r=4, lora_alpha=16, quantize="nf4", **options)
    return model


def step(model, ids):
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_training_lowers_the_loss_and_moves_only_the_adapters():
    model, ids = adapted(), torch.randint(64, (4, 24))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(lk.optim.lora_plus_groups(model, lr=1e-2, ratio=2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(step(model, ids)[0])
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1  # random tokens: all there is to learn is learnt by heart
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model, ids = adapted(lora_dropout=0.3), torch.randint(64, (2, 16))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    model.train()
    torch.manual_seed(1)
    loss, grads = step(model, ids)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(1)
    again, recomputed = step(model, ids)
    assert loss == again and grads.keys() == recomputed.keys()
    assert all(torch.equal(grads[n], recomputed[n]) for n in grads)


def test_generate_works_and_uses_the_adapter():
    model, ids = adapted().eval(), torch.randint(64, (2, 5))
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert plain.shape == (2, 11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert not torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plain)


def test_the_adapter_survives_a_file(tmp_path):
    model, ids = adapted(), torch.randint(64, (2, 9))
    base = llama().state_dict()
    fresh, model = llama(), llama()
    fresh.load_state_dict(base), model.load_state_dict(base)
    lk.inject(model, r=4, quantize="nf4")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    lk.save_adapter(model, tmp_path)
    lk.load_adapter(fresh, tmp_path, quantize="nf4")
    assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)


def test_hf_trainer_trains_it(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = adapted(lora_dropout=0.1), torch.randint(64, (16, 12))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
