"""A base model without a download: byte-level Llama, trained on this interpreter's documentation.

    docstrings of the library  --ast-->  documents  --bytes-->  rows of 256  -->  5 M parameters, fp32

The base is trained once (a bit over two minutes on two cores) and kept in $XDG_CACHE_HOME/lora_kernels (else
~/.cache). It is an ordinary Hugging Face model directory. The fine-tune then adapts it to the library's
source code, which gives LoRA something real to learn: the same people and vocabulary, another language.
"""

import ast
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kernels.finetune.errors import RunError, UsageError, writing

if TYPE_CHECKING:
    from torch import Tensor

HELDOUT_TEXT = "heldout.jsonl"  # in the model directory: documentation that the base never saw
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

# Neither documentation nor source that anyone writes: tests, generated tables, other people's packages.
_SKIPPED_DIRS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "encodings",
    "lib2to3",
}
_DOCUMENTATION_FILE = "pydoc_data/topics.py"  # the language reference, as string constants
_MIN_CORPUS_BYTES = 200_000


@dataclass(frozen=True)
class BaseConfig:
    """All that decides the base's weights besides its text. Another value makes another cache entry."""

    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    max_position_embeddings: int = 1024
    seq_len: int = 256  # bytes
    batch_size: int = 8
    steps: int = 240  # x 2048 bytes
    lr: float = 4e-3  # of the hidden matrices, by Muon
    embedding_lr: float = 2e-3  # of everything else, by AdamW
    min_lr_ratio: float = 0.02
    warmup: int = 30  # steps
    weight_decay: float = 0.1
    seed: int = 1
    recipe: int = 1  # raised when the code below changes what the values above lead to


def stdlib_files() -> list[tuple[str, str]]:
    """(relative path, text) of every module of the running interpreter's standard library, sorted by path.

    Tests, generated tables and installed packages are left out, and so is a second copy of the same text.

    Raises:
        RunError: this interpreter carries no sources (a zipped or stripped standard library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    found, seen = [], set()
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_DIRS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a few files declare another encoding; they are not worth a second reader
            continue
        if text not in seen:
            seen.add(text)
            found.append((relative.as_posix(), text))
    found.sort()
    if sum(len(text) for _, text in found) < _MIN_CORPUS_BYTES:
        raise RunError(
            f"the standard library in {root} has no sources to learn from; give --model and --data"
        )
    return found


def is_heldout(name: str, one_in: int) -> bool:
    """Whether a document is held out, decided by its name alone: stable when other documents come or go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % one_in == 0


def source_documents(files: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(training, held-out) texts for the fine-tune: source code; about 1 file in 20 is held out, whole."""
    train, heldout = [], []
    for name, text in files:
        if name != _DOCUMENTATION_FILE and len(text) >= 500:
            (heldout if is_heldout(name, 20) else train).append(text)
    return train, heldout


def documentation(files: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(training, held-out) texts for the base: every docstring once, and the language reference of pydoc."""
    train, heldout, seen = [], [], set()
    for name, text in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules are not ours to report
            try:
                tree = ast.parse(text)
            except SyntaxError:  # templates that only look like modules
                continue
        for doc in _docstrings(tree, name):
            if len(doc) >= 40 and doc not in seen:
                seen.add(doc)
                (heldout if is_heldout(doc, 20) else train).append(doc)
    return train, heldout


def _docstrings(tree: ast.Module, name: str) -> Iterator[str]:
    if name == _DOCUMENTATION_FILE:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value.strip()
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def byte_tokenizer():
    """A tokenizer that AutoTokenizer can load once saved: token i is byte i, 256 end-of-text, 257 padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _byte_vocabulary() -> dict[str, int]:
    """The printable stand-in of byte i, in the byte-level alphabet that `tokenizers` applies, -> i."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return {chr(byte if byte in shown else next(others)): byte for byte in range(256)}


def cache_folder() -> Path:
    """Where trained bases are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora_kernels"


def cached_base(
    files: list[tuple[str, str]],
    config: BaseConfig = BaseConfig(),
    *,
    progress: Callable[[int, int, float, float], None] = lambda step, steps, loss, tokens_per_second: None,
    say: Callable[[str], None] = print,
    check_stop: Callable[[], None] = lambda: None,
) -> Path:
    """The directory of the trained base, training it first where this interpreter has none yet.

    The directory is built aside and renamed when complete, so an interruption leaves no half model. Of
    several processes that need the same base one trains and the others wait for it.

    Args:
        files: `stdlib_files()`.
        progress: called after each training step with (step, steps, loss in nats per byte, bytes per second).
        check_stop: called often; what it raises ends the training.

    Raises:
        RunError: the cache cannot be written.
    """
    corpus = hashlib.sha256()
    for name, text in files:
        corpus.update(f"{name}\0{len(text)}\0".encode() + text.encode())
    identity = {"python": platform.python_version(), "corpus": corpus.hexdigest(), **asdict(config)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    cache = cache_folder()
    target = cache / f"stdlib-base-{key}"
    if (target / "config.json").is_file():
        return target
    advice = "free some space or set XDG_CACHE_HOME to a folder that can be written"
    with writing(cache, advice):
        cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{target.name}.lock", say, check_stop):
        if (target / "config.json").is_file():  # another process was quicker
            return target
        for stale in cache.glob(
            f".{target.name}.tmp-*"
        ):  # a killed process's; we hold the lock, so nobody uses it
            shutil.rmtree(stale, ignore_errors=True)
        with writing(cache, advice):
            building = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=cache))
        try:
            say("training the base model on the standard library's documentation (once; it is cached)")
            train, heldout = documentation(files)
            model, losses = _train(train, config, progress, check_stop)
            with writing(building, advice):
                _save(building, model, heldout, {**identity, "losses": losses})
                os.rename(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)  # gone already when it was renamed
    return target


def _save(folder: Path, model, heldout: list[str], record: dict) -> None:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in heldout)
    (folder / HELDOUT_TEXT).write_text(lines, encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):  # complete on the disk before the name says so
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _locked(path: Path, say: Callable[[str], None], check_stop: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process, however that ends."""
    import fcntl

    with writing(path, "set XDG_CACHE_HOME to a folder that can be written"):
        handle = open(path, "w")  # noqa: SIM115 - closed below, after the wait
    with handle:
        waiting = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    say("another process is training the base model: waiting for it")
                waiting = True
                check_stop()
                time.sleep(0.2)
        yield


def _blocks(documents: list[str], seq_len: int, end: int) -> "Tensor":
    """Documents in an order that their content fixes, with `end` after each, cut into [n, seq_len] int64."""
    import torch

    order = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    stream = [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() for text in order if text]
    joint = torch.tensor([end])
    tokens = torch.cat([part for text in stream for part in (text, joint)])
    return tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)


def _train(
    documents: list[str],
    config: BaseConfig,
    progress: Callable[[int, int, float, float], None],
    check_stop: Callable[[], None],
):
    """A trained LlamaForCausalLM in fp32 and the loss of each step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # fp32: on CPUs without matrix instructions bf16 is slower (measured: 6150 bytes/s fp32, 3750 bf16, two
    # cores of a Xeon with AVX-512), and the recipe must give the same model everywhere.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=258,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_attention_heads,
                max_position_embeddings=config.max_position_embeddings,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=256,
                pad_token_id=257,
                dtype="float32",
            )
        )
        blocks = _blocks(documents, config.seq_len, end=256)
        if len(blocks) < config.batch_size:
            raise UsageError(
                "the standard library's documentation is too short to train a base on; give --model"
            )
        order = torch.randperm(len(blocks))
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    optimizers = [
        # On this budget Muon (Jordan et al. 2024) is far ahead of AdamW (held-out loss measured: 1.56 after
        # 280 steps, AdamW's best 1.82 after 400); the adjustment makes AdamW's learning rates fit.
        torch.optim.Muon(
            hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=config.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peaks = [config.lr, config.embedding_lr]
    model.train()
    losses, start = [], time.perf_counter()
    for step in range(config.steps):
        check_stop()
        rows = torch.arange(step * config.batch_size, (step + 1) * config.batch_size) % len(blocks)
        batch = blocks[order[rows]]  # [batch, seq_len]
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * _schedule(step, config)
        logits = model(input_ids=batch, use_cache=False).logits  # [batch, seq_len, 258]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
        done = (step + 1) * batch.numel()
        progress(step + 1, config.steps, losses[-1], done / (time.perf_counter() - start))
    return model.eval(), losses


def _schedule(step: int, config: BaseConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
