"""The built-in base: its text, its tokeniser, and a cache that is whole or not there."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_kernels.finetune import stdlib_base
from lora_kernels.finetune.errors import Interrupted, RunError

from .conftest import ROOT

SMALL = stdlib_base.BaseConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    seq_len=32,
    batch_size=2,
    steps=4,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lora_kernels"


@pytest.fixture(scope="module")
def files() -> list[tuple[str, str]]:
    """A small library: 60 functions, each documented."""
    return [
        (
            f"module{i}.py",
            f'def f{i}(x):\n    """Return x to the power of {i}, for any x that can be multiplied."""\n'
            f"    return x**{i}\n" + "# a comment\n" * 50,
        )
        for i in range(60)
    ]


def test_the_running_interpreter_has_enough_text():
    files = stdlib_base.stdlib_files()
    assert files == sorted(files)
    names = [name for name, _ in files]
    assert "json/decoder.py" in names
    assert not any("test" in name.split("/") or "site-packages" in name for name in names)
    train, heldout = stdlib_base.source_documents(files)
    assert not set(train) & set(heldout)
    assert sum(map(len, heldout)) > 64 * 256 and sum(map(len, train)) > 1_000_000


def test_documentation_is_every_docstring_once(files):
    train, heldout = stdlib_base.documentation([*files, ("again.py", files[0][1]), ("broken.py", "def (")])
    assert len(train) + len(heldout) == 60
    assert len(set(train) | set(heldout)) == 60
    assert train[0].startswith("Return x to the power of 0") or heldout[0].startswith("Return x")


@pytest.mark.parametrize(
    "text", ["plain", "déjà vu\n\tπ ≈ 3\r\n", "  two  spaces , and a\u00a0third ", "\x00\x7f"]
)
def test_a_token_is_a_byte(text, tmp_path):
    from transformers import AutoTokenizer

    stdlib_base.byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)


def test_the_base_is_the_same_every_time_and_made_once(cache, files, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    said = []
    first = stdlib_base.cached_base(files, SMALL, say=said.append)
    assert len(said) == 1 and first.parent == cache
    again = stdlib_base.cached_base(files, SMALL, say=said.append)
    assert again == first and len(said) == 1
    state = torch.get_rng_state()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    second = stdlib_base.cached_base(files, SMALL, say=said.append)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert first.name == second.name
    other = stdlib_base.cached_base([*files, ("new.py", "x = 1")], SMALL, say=said.append)
    assert other.name != second.name
    lines = (first / stdlib_base.HELDOUT_TEXT).read_text().splitlines()
    assert lines and all(json.loads(line)["text"].startswith("Return x") for line in lines)


def test_an_interrupted_training_leaves_nothing_and_a_killed_one_is_cleaned_up(cache, files):
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        if steps == 3:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        stdlib_base.cached_base(files, SMALL, say=lambda text: None, check_stop=stop)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []
    code = (
        "import os, sys; from lora_kernels.finetune import stdlib_base as s; import json\n"
        "files, config = json.loads(sys.argv[1])\n"
        "s._save = lambda folder, *rest: ((folder / 'half').touch(), os.kill(os.getpid(), 9))\n"
        "s.cached_base(files, s.BaseConfig(**config), say=lambda text: None)"
    )
    argument = json.dumps([files, vars(SMALL)])
    killed = subprocess.run([sys.executable, "-c", code, argument], cwd=ROOT, env=os.environ, check=False)
    assert killed.returncode == -9
    assert any(".tmp-" in p.name for p in cache.iterdir())
    folder = stdlib_base.cached_base(files, SMALL, say=lambda text: None)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == [folder.name]


def test_two_processes_at_once_train_one_base(cache, files):
    code = (
        "import sys, time; from lora_kernels.finetune import stdlib_base as s; import json\n"
        "files, config = json.loads(sys.argv[1])\n"
        "pause = lambda *state: time.sleep(0.5)\n"
        "print(s.cached_base(files, s.BaseConfig(**config), progress=pause))"
    )
    argument = json.dumps([files, vars(SMALL)])

    def start(_):
        command = [sys.executable, "-c", code, argument]
        return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)

    with ThreadPoolExecutor(2) as pool:
        printed = sorted((done.stdout.splitlines() for done in pool.map(start, range(2))), key=len)
    assert printed[0][-1] == printed[1][-1]
    text = "\n".join(line for lines in printed for line in lines)
    assert text.count("training the base model on") == 1


def test_a_full_disk_leaves_no_half_model(cache, files, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stdlib_base, "_save", full)
    with pytest.raises(RunError, match=r"No space left on device; .*XDG_CACHE_HOME"):
        stdlib_base.cached_base(files, SMALL, say=lambda text: None)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path, files, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"cannot write .*file/lora_kernels: .*XDG_CACHE_HOME"):
        stdlib_base.cached_base(files, SMALL, say=lambda text: None)
