"""Every bad input ends in one line, the right exit status, and no trace on the disk."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_kernels.finetune import cli
from lora_kernels.finetune.settings import Settings

from .conftest import run_process, write_jsonl


def refused(arguments: list[str], capsys, message: str, status: int = 2) -> None:
    """The command prints nothing but one line that matches `message`."""
    assert cli.main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("lora_kernels finetune: error: ") and re.search(message, last), err
    assert "Traceback" not in err
    if status == 2:
        announced = ("model ", "        ", "data ", "output ", "note: ")
        assert [line for line in err.splitlines()[:-1] if not line.startswith(announced)] == []


def changed(arguments: list[str], **options: object) -> list[str]:
    """The arguments with some options replaced, added, or (None) left out."""
    result = list(arguments)
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if flag in result:
            at = result.index(flag)
            del result[at : at + 2]
        if value is not None:
            result += [flag, str(value)]
    return result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"--r: got 0, expected an integer of at least 1"),
        ({"r": "x"}, r"--r: invalid int value: 'x'"),
        ({"lora_alpha": -1}, r"--lora-alpha: got -1.0"),
        ({"lora_dropout": 1}, r"--lora-dropout: got 1.0"),
        ({"lr": -1e-3}, r"--lr: got -0.001, expected a number above 0"),
        ({"lr": "nan"}, r"--lr: got nan"),
        ({"lora_plus_ratio": 0.5}, r"--lora-plus-ratio: got 0.5"),
        ({"warmup_ratio": 1}, r"--warmup-ratio: got 1.0"),
        ({"optim": "sgd"}, r"--optim: invalid choice: 'sgd' \(choose from '?adamw'?, '?paged_adamw'?, "),
        ({"optim": "paged_lion", "optim_resident_mb": 0}, r"--optim-resident-mb: got 0.0, expected a number"),
        ({"optim_resident_mb": 1}, r"--optim-resident-mb: not together with --optim adamw"),
        ({"steps": 0}, r"--steps: got 0"),
        ({"epochs": 1}, r"--epochs: not together with --steps"),
        ({"steps": None, "epochs": -1}, r"--epochs: got -1.0"),
        ({"seq_len": 2}, r"--seq-len: got 2"),
        ({"seq_len": 129}, r"--seq-len: got 129, expected at most 128"),
        ({"batch_size": 0}, r"--batch-size: got 0"),
        ({"seed": -1}, r"--seed: got -1"),
        ({"quantize": "int4"}, r"--quantize: invalid choice: 'int4'"),
        ({"dtype": "float8"}, r"--dtype: invalid choice: 'float8'"),
        ({"device": "tpu"}, r"--device: got tpu, expected auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, r"--device: got cuda:, expected"),
        ({"target_modules": "c_attn"}, r"--target-modules: got 'c_attn': .*matches no linear layer.*q_proj"),
        ({"target_modules": ".*\\.nothing"}, r"--target-modules: .*matches no linear layer"),
        ({"target_modules": "(q_proj"}, r"--target-modules: .*not a regular expression"),
        ({"data": "/nowhere/data.txt"}, r"--data: no such file: /nowhere/data.txt"),
        ({"eval_data": "/nowhere/e"}, r"--eval-data: no such file"),
        ({"model": "/nowhere/model"}, r"--model: no such folder: /nowhere/model"),
        ({"no_such_option": 1}, r"unrecognized arguments: --no-such-option"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(arguments, tmp_path, capsys, options, message):
    refused(changed(arguments, **options), capsys, message)
    assert not (tmp_path / "out").exists()


def test_bad_data_is_refused_in_one_line(arguments, tmp_path, capsys):
    path = tmp_path / "d"
    path.write_text("")
    refused(changed(arguments, data=path), capsys, "--data: .*is empty")
    path.write_text("too short\n")
    refused(changed(arguments, data=path), capsys, "--data: .*too short")
    path.write_text("a few words\n" * 3)
    refused(changed(arguments, data=path), capsys, "--data: too short: .*at least one row of --seq-len 32")
    refused(changed(arguments, data=tmp_path), capsys, "--data: is a folder")
    records = write_jsonl(tmp_path / "d.jsonl", [{"texts": "a"}])
    refused(changed(arguments, data=records), capsys, "line 1: got the columns 'texts'")
    records = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": "p" * 99, "completion": str(i)} for i in range(9)]
    )
    refused(changed(arguments, data=records), capsys, "no row with a target is left for the training part")
    assert not (tmp_path / "out").exists()


def test_a_bad_model_folder_is_refused_in_one_line(arguments, tiny_model, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(changed(arguments, model=empty), capsys, "--model: .*has no config.json")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    refused(changed(arguments, model=broken), capsys, "--model: .*cannot be loaded")
    (broken / "model.safetensors").unlink()
    refused(changed(arguments, model=broken), capsys, "--model: .*cannot be loaded")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text("{")
    refused(changed(arguments, model=broken), capsys, "--model: ")
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    refused(changed(arguments, model=broken), capsys, "--model: ")
    for path in broken.glob("tokenizer*"):
        path.unlink()
    shutil.copy(tiny_model / "config.json", broken)
    shutil.copy(tiny_model / "model.safetensors", broken)
    refused(changed(arguments, model=broken), capsys, "--model: .*tokenizer")
    assert not (tmp_path / "out").exists()


SURROGATE = '{"text": "\\ud800 and more"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SURROGATE, r"line 3: column 'text' has \\ud800 alone"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 3: .*5000 digits"),
        ('{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 3: .*recursion"),
    ],
    ids=["half a character", "an endless integer", "endless brackets"],
)
def test_json_that_python_cannot_take_is_refused_in_one_line(arguments, tmp_path, capsys, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"text": "record {i}"}}\n' for i in range(2)) + line + "\n")
    refused(changed(arguments, data=path), capsys, f"--data: .*{message}")
    refused(changed(arguments, sample_prompt="\udcff"), capsys, "--sample-prompt: got bytes that")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", -1),
        ("num_attention_heads", 0),
        ("num_attention_heads", 5),
        ("vocab_size", None),
        ("dtype", "float99"),
        ("rope_scaling", 5),
        ("pad_token_id", 99_999),
    ],
)
def test_a_config_with_an_impossible_value_is_refused_in_one_line(
    arguments, tiny_model, tmp_path, capsys, entry, value
):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, entry: value}))
    refused(changed(arguments, model=broken), capsys, "--model: .*(no usable config.json|cannot be loaded)")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_and_weights_with_a_nan_are_refused(
    arguments, tiny_model, tmp_path, capsys
):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_model)
    config.vocab_size, config.eos_token_id, config.pad_token_id = 100, None, None
    small = tmp_path / "small"
    shutil.copytree(tiny_model, small)
    LlamaForCausalLM(config).save_pretrained(small)
    refused(changed(arguments, model=small), capsys, "--model: .*gives token 256, but .* for 0 to 99")
    broken, model = tmp_path / "broken", LlamaForCausalLM.from_pretrained(tiny_model)
    shutil.copytree(tiny_model, broken)
    for layer in ("mlp.up_proj", "input_layernorm"):
        weight = model.get_submodule(f"model.layers.1.{layer}").weight
        with torch.no_grad():
            before = weight.clone()
            weight.view(-1)[3] = float("nan")
            model.save_pretrained(broken)
            weight.copy_(before)
        capsys.readouterr()
        refused(changed(arguments, model=broken), capsys, f"--model: .*a NaN or .*{layer}.weight does")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_linear_layer_is_refused(arguments, tmp_path, capsys):
    """GPT-2 has Conv1D layers, and one nn.Linear: its output head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from lora_kernels.finetune.stdlib_base import byte_tokenizer

    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    capsys.readouterr()
    refused(changed(arguments, model=tmp_path / "gpt2"), capsys, "--target-modules: .*no nn.Linear")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_other_content_is_left_alone(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    refused(arguments, capsys, r"--output: .* is not empty \(thesis.tex\)")
    refused([*arguments, "--overwrite"], capsys, r"--output: .* is not empty \(thesis.tex\)")
    part = out / ".thesis.tex.123.part"  # not one of ours
    part.touch()
    refused(arguments, capsys, r"--output: .* is not empty")
    assert {p.name for p in out.iterdir()} == {"thesis.tex", part.name}
    part.unlink()
    refused(changed(arguments, output=out / "thesis.tex"), capsys, "--output: .*is a file")
    refused(changed(arguments, output=out / "thesis.tex" / "x"), capsys, "--output: cannot write in")
    refused(["--resume", "--output", str(out)], capsys, "--resume: nothing to resume")
    refused(["--resume"], capsys, "--resume: needs the --output")
    (out / "checkpoint.pt").write_bytes(b"damaged")
    refused(["--resume", "--output", str(out)], capsys, "--resume: .*cannot be read")


def test_a_folder_that_cannot_be_made_leaves_no_parents_behind(arguments, tmp_path, capsys, monkeypatch):
    touch = Path.touch

    def readonly(self, *args, **kwargs):
        if self.name == ".writable":
            raise PermissionError(13, "Permission denied")
        return touch(self, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", readonly)
    output = tmp_path / "a" / "b"
    refused(changed(arguments, output=output), capsys, "--output: cannot write in .*Permission denied")
    assert not (tmp_path / "a").exists()


def test_a_missing_package_is_named(arguments, capsys, monkeypatch, tmp_path):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    refused(arguments, capsys, r"package transformers is not installed; pip install", status=1)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_the_run(arguments, capsys, monkeypatch):
    from lora_kernels.finetune import training

    target_loss = training.target_loss

    def broken(model, batch, device):
        loss, targets = target_loss(model, batch, device)
        return (loss * float("nan"), targets) if model.training else (loss, targets)

    monkeypatch.setattr(training, "target_loss", broken)
    refused(arguments, capsys, "the loss is nan at step 1; a lower --lr may help", status=1)


def test_a_bug_keeps_its_traceback(arguments, monkeypatch):
    from lora_kernels.finetune import run

    monkeypatch.setattr(run, "evaluate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(arguments)


def test_help_explains_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    text = re.sub(r"\s+", "", shown)  # lines are also broken at hyphens
    for name, default in vars(Settings()).items():
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"^  {flag} ?", shown, re.M), flag
        if default is not None and not isinstance(default, bool):
            assert f"(default:{default})" in text, flag
    assert "example:" in shown and "exit status:" in shown


def test_a_bad_argument_costs_no_import_of_transformers():
    done = run_process(["--r", "0"], before="sys.modules['transformers'] = None")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "--r: got 0" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there_is_refused(arguments, capsys):
    for name in ("cuda", "cuda:3"):
        refused(changed(arguments, device=name), capsys, rf"--device: got {name}, .*sees no CUDA device")


def test_a_device_that_exists_needs_kernels_and_an_index(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(changed(arguments, device="cuda:2"), capsys, r"got cuda:2, expected an index below 2")
    from lora_kernels.finetune import models

    monkeypatch.setattr(models.native, "_C", SimpleNamespace(cuda_archs=""))
    refused(changed(arguments, device="cuda"), capsys, r"built without CUDA")
    assert models.device_of(Settings(device="auto")).type == "cpu"
