"""The command as a user runs it, and what it leaves behind."""

import json
from pathlib import Path

import pytest
import torch

from lora_kernels.finetune import cli, run
from lora_kernels.finetune.report import samples

from .conftest import run_process, write_jsonl


@pytest.fixture
def finished(arguments, tmp_path):
    done = run_process(arguments)
    assert done.returncode == 0, done.stderr
    return done, tmp_path / "out"


def test_the_command_trains_reports_and_checks(finished, text_file, tiny_model):
    done, out = finished
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
        "loss.png",
    }
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((out / "metrics.json").read_text())
    heldout = metrics["evaluation"]["heldout"]
    assert heldout["after"] < heldout["before"] - 0.2
    assert len(metrics["losses"]) == 8 and metrics["losses"][-1] < metrics["losses"][0]
    assert list(heldout["by_step"]) == ["0", "3", "6", "8"]
    assert metrics["checks"]["passed"] and metrics["checks"]["adapter_effect"] > 0.01
    assert metrics["config"]["data"] == str(text_file)
    parameters = metrics["parameters"]
    # q, o: 64 x 64; k, v: 32 x 64; gate, up: 128 x 64; down: 64 x 128; each r·(N + K), in 2 layers
    assert parameters["trainable"] == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192) and parameters["layers"] == 14
    memory = metrics["memory"]["measured"]
    assert memory["adapters"] == memory["gradients"] == 4 * parameters["trainable"]
    assert memory["optimizer_state"] == 2 * (64 << 10)  # a page for A, one for B
    assert memory["activations_peak"] > 2 * 32 * 258 * 4  # the logits alone
    for phrase in (
        "logits identical, bit for bit",
        "relative error",
        "full fine-tuning, computed",
        "the base's own text: not measured",
        "trainable",
        "on disk",
        "continued before",
    ):
        assert phrase in done.stdout, phrase
    assert "step 8/8, loss" in done.stderr and "tokens/s" in done.stderr and "left" in done.stderr
    assert "\r" not in done.stderr


def test_peft_reads_the_adapter_and_computes_the_same(finished, tiny_model, text_file):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    import lora_kernels as lk

    _, out = finished
    ids = torch.tensor([list(text_file.read_bytes()[:64])])
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out).eval()
    ours = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    lk.load_adapter(ours, out)
    with torch.no_grad():
        a, b = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
        base = theirs.get_base_model()
        with theirs.disable_adapter():
            alone = base(input_ids=ids).logits
    assert (a - b).norm() <= 1e-5 * a.norm()
    assert (a - alone).norm() > 1e-2 * a.norm()


def test_output_that_cannot_show_a_character_is_no_reason_to_fail(arguments):
    done = run_process(arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "reload check" in done.stdout and done.stdout.isascii()


def test_a_sample_sends_no_commands_to_the_terminal():
    assert "\x1b" not in samples("a\x1b[2J", "\r", "b\nc") and "│ c" in samples("a", "b", "b\nc")


def test_records_base_text_and_half_precision(arguments, tmp_path, tiny_model):
    records = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(60)]
    data = write_jsonl(tmp_path / "sums.jsonl", records)
    base_text = tmp_path / "base.txt"
    base_text.write_text("the base once read this text\n" * 20)
    for dtype in ("bfloat16", "float16"):
        out = tmp_path / dtype
        more = (
            f"--data {data} --base-text {base_text} --dtype {dtype} --output {out} --gradient-checkpointing"
        )
        done = cli.main([*arguments, *more.split()])
        assert done == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["evaluation"]["base_text"]["rows"] > 1
        assert metrics["losses"][-1] < metrics["losses"][0]


def test_epochs_are_passes_over_the_training_rows(arguments, tmp_path):
    at = arguments.index("--steps")
    assert cli.main([*arguments[:at], *arguments[at + 2 :], "--epochs", "0.2"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    training_tokens = int(0.95 * Path(metrics["config"]["data"]).stat().st_size)
    assert abs(metrics["steps"] - 0.2 * training_tokens / 64) <= 1


@pytest.mark.parametrize("what", ["reload_identical", "merge_error", "unmerge_identical"])
def test_a_failed_check_fails_the_run_and_keeps_the_checkpoint(
    arguments, tmp_path, capsys, monkeypatch, what
):
    verify = run.verify

    def failing(*args):
        result = verify(*args)
        setattr(result, what, 1.0 if what == "merge_error" else False)
        return result

    monkeypatch.setattr(run, "verify", failing)
    assert cli.main(arguments) == 1
    assert "error: a check failed" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    assert not json.loads((tmp_path / "out" / "metrics.json").read_text())["checks"]["passed"]


def test_an_adapter_file_that_lost_a_bit_is_noticed(arguments, capsys, monkeypatch):
    """The reload check compares bits, so the smallest difference fails it."""
    import lora_kernels as lk

    load = lk.load_adapter

    def load_adapter(model, *args, **kwargs):
        names = load(model, *args, **kwargs)
        with torch.no_grad():
            weight = model.get_submodule(names[0]).lora_A["default"].weight
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0)) * 1.01
        return names

    monkeypatch.setattr(lk, "load_adapter", load_adapter)
    assert cli.main(arguments) == 1
    assert "logits DIFFER" in capsys.readouterr().out
