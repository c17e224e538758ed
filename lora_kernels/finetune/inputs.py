"""What a run learns from: which documents each part has, and their rows once there is a tokeniser."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.finetune import stdlib_base
from lora_kernels.finetune.data import Document, Rows, read_corpus, split, text_corpus, tokenize
from lora_kernels.finetune.errors import UsageError
from lora_kernels.finetune.settings import Settings

_SAMPLE_PROMPT_TOKENS = 64
# The fine-tune of the built-in base reads half a million bytes; tokenising all of the library takes 7 s.
_SOURCE_BYTES = 2_000_000

Sources = dict[str, dict[str, str]]  # option -> what was read, and its hash


@dataclass
class Documents:
    """The parts before there is a tokeniser."""

    train: list[Document]
    heldout: list[Document]
    base_text: list[Document] | None  # None: not measured, or the built-in base's own
    sources: Sources


@dataclass
class Inputs:
    """The parts as the model takes them."""

    train: Rows
    heldout: Rows
    base_text: Rows | None
    prompt: str  # of the samples


def read_documents(settings: Settings, library: list[tuple[str, str]]) -> Documents:
    """Read --data, --eval-data and --base-text, and hold a part out.

    Args:
        library: `stdlib_base.stdlib_files()`, used where no --data is given.

    Raises:
        UsageError: a file that cannot be used, naming the option.
    """
    sources: Sources = {}

    def read(path: str, name: str):
        corpus = read_corpus(Path(path), f"--{name}")
        sources[name] = {"source": corpus.source, "sha256": corpus.sha256}
        return corpus

    heldout: list[Document] = []
    if settings.data is None:
        train_texts, heldout_texts = stdlib_base.source_documents(library)
        train_texts = _first_bytes(train_texts, _SOURCE_BYTES)
        corpus = text_corpus([*train_texts, *heldout_texts], "source code of the standard library")
        sources["data"] = {"source": corpus.source, "sha256": corpus.sha256}
        train, heldout = corpus.documents[: len(train_texts)], corpus.documents[len(train_texts) :]
    elif settings.eval_data is None:
        train, heldout = split(read(settings.data, "data"), settings.eval_fraction, settings.seed)
    else:
        train = read(settings.data, "data").documents
    if settings.eval_data is not None:
        heldout = read(settings.eval_data, "eval-data").documents
    base_text = None if settings.base_text is None else read(settings.base_text, "base-text").documents
    return Documents(train, heldout, base_text, sources)


def check_same(saved: Sources, now: Sources) -> None:
    """Refuse to resume over other data than the run was started with."""
    for name, source in saved.items():
        if now.get(name, {}).get("sha256") != source.get("sha256", ""):
            raise UsageError(
                f"argument --resume: {source.get('source')} (--{name}) is not what the run was started with; "
                f"put it back, or start a new run"
            )


def tokenize_documents(
    documents: Documents, tokenizer, model_folder: Path, settings: Settings, say: Callable[[str], None]
) -> Inputs:
    """The rows of each part, and the prompt of the samples.

    Raises:
        UsageError: a part is too short.
    """
    base_text = documents.base_text
    if base_text is None and settings.model is None:
        base_text = read_corpus(model_folder / stdlib_base.HELDOUT_TEXT, "--base-text").documents
    heldout_option = "--data" if settings.eval_data is None else "--eval-data"
    parts = (
        ("training", "--data", documents.train),
        ("held-out", heldout_option, documents.heldout),
        ("base-text", "--base-text", base_text),
    )
    rows: dict[str, Rows] = {}
    for part, option, texts in parts:
        if texts is None:
            continue
        rows[part], cut = tokenize(texts, tokenizer, settings.seq_len)
        if cut:
            say(f"note: {cut} of {len(texts)} {part} records are cut to --seq-len {settings.seq_len}")
        if len(rows[part]) == 0:
            raise UsageError(
                f"argument {option}: too short: no row with a target is left for the {part} part; "
                f"give more text, or a larger --seq-len if prompts are longer than {settings.seq_len} tokens"
            )
    train = rows["training"]
    if documents.train[0].prompt is None and len(train) == 1 and len(train[0]) < settings.seq_len:
        raise UsageError(
            f"argument --data: too short: {len(train[0])} training tokens, expected at least one row of "
            f"--seq-len {settings.seq_len}; give more text or a smaller --seq-len"
        )
    prompt = settings.sample_prompt
    if prompt is None:
        prompt = documents.heldout[0].prompt
    if prompt is None:
        first = tokenizer(documents.heldout[0].text[:2000], add_special_tokens=False)["input_ids"]
        prompt = tokenizer.decode(first[:_SAMPLE_PROMPT_TOKENS], skip_special_tokens=True)
    return Inputs(train, rows["held-out"], rows.get("base-text"), prompt)


def _first_bytes(texts: list[str], limit: int) -> list[str]:
    """The first texts, in an order that their content fixes, up to about `limit` characters."""
    chosen, total = [], 0
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if total >= limit:
            break
        chosen.append(text)
        total += len(text)
    return chosen
