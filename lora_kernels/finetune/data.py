"""From a file to batches: read, hold a part out, tokenise, pack, and say which rows each step takes.

    text     the tokens of all documents, end-of-text between them, cut into rows of --seq-len;
             every token is a target
    records  {"prompt", "completion"}: one record, one row; only the completion and end-of-text are targets

Whole documents go to one side of the split, and equal documents to the same side. A plain text file is one
document: its tail is held out.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.finetune.errors import UsageError, one_line

IGNORED = -100  # a label that is no target, as in torch.nn.functional.cross_entropy
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
_FORMS = ({"text"}, {"prompt", "completion"})
_EXPECTED = "one JSON object a line with the column 'text', or the columns 'prompt' and 'completion'"


class Document(NamedTuple):
    """A text to learn from. Where there is a `prompt`, only `text`, the completion, is a target."""

    text: str
    prompt: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents and where they came from, before any tokeniser has seen them."""

    documents: list[Document]
    source: str  # for messages and metrics: a path, or what stands in for one
    sha256: str  # of the bytes read: a resumed run must see the same


class Batch(NamedTuple):
    """What one forward pass takes."""

    input_ids: Tensor  # [rows, tokens] int64, padded on the right
    labels: Tensor  # [rows, tokens] int64, IGNORED where the token is no target
    tokens: int  # without padding


class Rows:
    """Tokenised rows of different lengths in one flat tensor: a large file costs 4 bytes a token."""

    def __init__(self, tokens: Tensor, starts: Tensor, prompt_lengths: Tensor):
        self.tokens = tokens  # [total] int32
        self.starts = starts  # [rows + 1] int64
        self.prompt_lengths = prompt_lengths  # [rows] int64: leading tokens of the row that are no targets

    @classmethod
    def from_lists(cls, rows: Sequence[Tensor], prompt_lengths: Sequence[int] | None = None) -> "Rows":
        lengths = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64)
        prompts = torch.zeros(len(rows), dtype=torch.int64)
        if prompt_lengths is not None:
            prompts = torch.tensor(list(prompt_lengths), dtype=torch.int64)
        tokens = (
            torch.cat([row.to(torch.int32) for row in rows]) if rows else torch.empty(0, dtype=torch.int32)
        )
        return cls(tokens, lengths.cumsum(0), prompts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        """The tokens of one row, [length] int64."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.tokens[self.starts[index] : self.starts[index + 1]].long()

    @property
    def targets(self) -> int:
        """Tokens with a loss. The first token of a row is never one: nothing predicts it."""
        lengths = self.starts.diff()
        return int((lengths - self.prompt_lengths.clamp(min=1)).sum())

    def batch(self, indices: Sequence[int], pad_id: int) -> Batch:
        """The named rows, padded on the right to the longest. A causal model needs no attention mask for
        that: no target looks at the padding, and the padding is no target.
        """
        rows = [self[index] for index in indices]
        width = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
        for at, (index, row) in enumerate(zip(indices, rows, strict=True)):
            prompt = int(self.prompt_lengths[index])
            input_ids[at, : len(row)] = row
            labels[at, prompt : len(row)] = row[prompt:]
        return Batch(input_ids, labels, sum(len(row) for row in rows))

    def spread(self, count: int) -> list[int]:
        """At most `count` row indices, evenly spread over all rows."""
        count = min(count, len(self))
        return [at * len(self) // count for at in range(count)]


def row_order(rows: int, seed: int, start: int, count: int) -> list[int]:
    """Rows `start` ... `start + count - 1` of the endless training order: every epoch its own permutation.

    A pure function of its arguments, so the place in the data after a resume is just the step number.
    """
    order: list[int] = []
    while len(order) < count:
        epoch, at = divmod(start + len(order), rows)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        permutation = torch.randperm(rows, generator=generator)
        order += permutation[at : at + count - len(order)].tolist()
    return order


def read_corpus(path: Path, argument: str) -> Corpus:
    """Read a text or JSON-lines file; `argument` is the option that named it, for messages.

    Raises:
        UsageError: no such file, not UTF-8, empty, broken JSON or wrong columns, naming the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        what = "is a folder, expected a file" if path.is_dir() else (error.strerror or str(error)).lower()
        raise UsageError(f"argument {argument}: cannot read {path}: {what}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"argument {argument}: {path} is not UTF-8 text: "
            f"byte {raw[error.start]:#04x} at offset {error.start}"
        ) from error
    if not text.strip():
        raise UsageError(f"argument {argument}: {path} is empty")
    jsonl = path.suffix.lower() in JSONL_SUFFIXES
    documents = list(_records(text, path, argument)) if jsonl else [Document(text)]
    return Corpus(documents, str(path), hashlib.sha256(raw).hexdigest())


def text_corpus(texts: Sequence[str], source: str) -> Corpus:
    """Documents that are already in memory."""
    digest = hashlib.sha256("\0".join(texts).encode())
    return Corpus([Document(text) for text in texts], source, digest.hexdigest())


def _records(text: str, path: Path, argument: str) -> Iterator[Document]:
    form = None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"argument {argument}: {path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); expected {_EXPECTED}"
            ) from error
        except (ValueError, RecursionError) as error:  # thousands of digits or brackets
            raise UsageError(f"{where}: {one_line(error)}; expected {_EXPECTED}") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}: got a JSON {type(record).__name__}, expected {_EXPECTED}")
        found = next((columns for columns in _FORMS if columns <= record.keys()), None)
        if found is None:
            got = ", ".join(map(repr, record)) or "none"
            raise UsageError(f"{where}: got the columns {got}, expected {_EXPECTED}")
        if form is None:
            form = found
        if found != form:
            raise UsageError(f"{where}: every line must have the columns of the first one, {sorted(form)}")
        for column in sorted(found):
            if not isinstance(record[column], str):
                kind = type(record[column]).__name__
                raise UsageError(f"{where}: column {column!r} is a {kind}, expected a string")
            lone = lone_surrogate(record[column])
            if lone is not None:
                raise UsageError(
                    f"{where}: column {column!r} has \\u{lone:04x} alone, half of a character that takes two"
                )
        if "text" in found:
            if record["text"]:
                yield Document(record["text"])
        elif record["completion"]:
            yield Document(record["completion"], record["prompt"])
        else:
            raise UsageError(f"{where}: column 'completion' is empty: there is nothing to learn from it")


def lone_surrogate(text: str) -> int | None:
    """The code of a UTF-16 surrogate in a string, which no tokenizer takes, if there is one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ord(text[error.start])
    return None


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents: about `fraction` held out, at least one; equal ones on the same side.

    A single plain text is cut in two instead, at the last line break before its final `fraction`.

    Raises:
        UsageError: fewer than two different documents, or a text too short to cut.
    """
    documents = corpus.documents
    if len(documents) == 1 and documents[0].prompt is None:
        text = documents[0].text
        cut = len(text) - max(1, round(len(text) * fraction))
        cut = text.rfind("\n", 0, cut) + 1 or cut
        if not text[:cut].strip() or not text[cut:].strip():
            raise UsageError(
                f"argument --data: {corpus.source} is too short to hold a part out of it for evaluation"
            )
        return [Document(text[:cut])], [Document(text[cut:])]
    distinct = list(dict.fromkeys(documents))
    if len(distinct) < 2:
        raise UsageError(
            f"argument --data: {corpus.source} has {len(distinct)} different records, expected 2 or more: "
            f"one is held out for evaluation (or give --eval-data)"
        )
    count = min(len(distinct) - 1, max(1, round(len(distinct) * fraction)))
    chosen = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    heldout = {distinct[index] for index in chosen}
    return [d for d in documents if d not in heldout], [d for d in documents if d in heldout]


def tokenize(documents: Sequence[Document], tokenizer, seq_len: int) -> tuple[Rows, int]:
    """Rows of at most `seq_len` tokens, and how many records had to be cut or left out to fit.

    Every document begins as the tokeniser begins a text (a begin-of-text token, for those that have one) and
    ends with the end-of-text token, so that the model also learns to stop.
    """
    if documents and documents[0].prompt is not None:
        return _record_rows(documents, tokenizer, seq_len)
    start, end = _frame(tokenizer)
    encoded = (
        tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"] if documents else []
    )
    parts = [torch.tensor(start + ids + end, dtype=torch.int32) for ids in encoded]
    stream = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
    rows = [row for row in stream.split(seq_len) if len(row) > 1]  # one token alone predicts nothing
    return Rows.from_lists(rows), 0


def _record_rows(documents: Sequence[Document], tokenizer, seq_len: int) -> tuple[Rows, int]:
    start, end = _frame(tokenizer)
    prompts = tokenizer([d.prompt for d in documents], add_special_tokens=False)["input_ids"]
    completions = tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
    rows, lengths, shortened = [], [], 0
    for prompt, completion in zip(prompts, completions, strict=True):
        prefix = start + prompt
        row = prefix + completion + end
        shortened += len(row) > seq_len
        if len(prefix) < min(len(row), seq_len) and len(row) > 1:  # else no target is left
            rows.append(torch.tensor(row[:seq_len], dtype=torch.int32))
            lengths.append(len(prefix))
    return Rows.from_lists(rows, lengths), shortened


def _frame(tokenizer) -> tuple[list[int], list[int]]:
    """The tokens around a document: begin-of-text where this tokeniser adds one, and end-of-text."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = [token for token in tokenizer("")["input_ids"] if token == begin]
    return start, [] if end is None else [end]
