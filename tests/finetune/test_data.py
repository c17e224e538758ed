"""Reading, splitting, tokenising, packing and ordering."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.finetune.data import (
    IGNORED,
    Corpus,
    Document,
    Rows,
    read_corpus,
    row_order,
    split,
    tokenize,
)
from lora_kernels.finetune.errors import UsageError
from lora_kernels.finetune.stdlib_base import byte_tokenizer

from .conftest import write_jsonl

END = 256


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def corpus(*texts: str) -> Corpus:
    return Corpus([Document(text) for text in texts], "memory", "")


@given(
    rows=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 100),
    count=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_row_order_does_not_depend_on_how_it_is_cut_into_steps(rows, seed, start, count):
    whole = row_order(rows, seed, start, count)
    assert whole == [row_order(rows, seed, start + i, 1)[0] for i in range(count)]


def test_every_epoch_visits_every_row_once_in_a_new_order():
    order = row_order(17, seed=3, start=0, count=51)
    epochs = [order[at : at + 17] for at in (0, 17, 34)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != row_order(17, seed=4, start=0, count=51)


@given(texts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_no_text_is_on_both_sides_of_the_split_even_if_it_occurs_twice(texts, seed):
    if len(set(texts)) < 2:
        with pytest.raises(UsageError, match="different records"):
            split(corpus(*texts), 0.2, seed)
        return
    train, heldout = split(corpus(*texts), 0.2, seed)
    assert train and heldout
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(Document(t) for t in texts)


def test_a_plain_text_is_cut_at_a_line_and_its_tail_held_out():
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (heldout,) = split(corpus(text), 0.1, seed=0)
    assert train.text + heldout.text == text
    assert train.text.endswith("\n") and 0.05 * len(text) < len(heldout.text) < 0.15 * len(text)


def test_packed_text_is_the_documents_with_an_end_after_each(tokenizer):
    texts = ["alpha beta", "γδ", "x" * 50]
    rows, cut = tokenize([Document(t) for t in texts], tokenizer, seq_len=16)
    stream = [token for i in range(len(rows)) for token in rows[i].tolist()]
    expected = [token for text in texts for token in [*text.encode(), END]]
    assert stream == expected and cut == 0
    assert all(len(rows[i]) == 16 for i in range(len(rows) - 1))
    assert rows.targets == len(expected) - len(rows)


def test_only_the_completion_and_the_end_are_targets(tokenizer):
    records = [Document("yes", prompt="is it? "), Document("no, never", prompt="")]
    rows, cut = tokenize(records, tokenizer, seq_len=64)
    batch = rows.batch([0, 1], pad_id=257)
    assert cut == 0 and batch.tokens == 11 + 10
    labels = batch.labels.tolist()
    assert labels[0] == [IGNORED] * 7 + [*b"yes", END]
    assert labels[1] == [*b"no, never", END, IGNORED]
    assert batch.input_ids.tolist()[1] == [*b"no, never", END, 257]
    # The first token of a row has a label, but no prediction: it does not count.
    assert rows.targets == 4 + 9 == int((batch.labels[:, 1:] != IGNORED).sum())


def test_a_long_record_is_cut_and_one_without_a_target_left_out(tokenizer):
    records = [Document("c" * 20, prompt="p" * 4), Document("c", prompt="p" * 20), Document("c", prompt="p")]
    rows, cut = tokenize(records, tokenizer, seq_len=8)
    assert cut == 2 and len(rows) == 2
    assert rows[0].tolist() == [*b"ppppcccc"] and rows[1].tolist() == [*b"pc", END]


def test_evaluation_rows_are_spread_over_all_rows():
    rows = Rows.from_lists([torch.arange(3) for _ in range(10)])
    assert rows.spread(4) == [0, 2, 5, 7]
    assert rows.spread(99) == list(range(10))


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_both_forms_of_records_are_read(tmp_path, suffix):
    path = write_jsonl(tmp_path / f"a{suffix}", [{"text": "one", "id": 1}, {"text": "two"}])
    assert read_corpus(path, "--data").documents == [Document("one"), Document("two")]
    path = write_jsonl(tmp_path / f"b{suffix}", [{"prompt": "p", "completion": "c"}])
    assert read_corpus(path, "--data").documents == [Document("c", prompt="p")]


def test_a_text_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffdéjà\r\nvu\n".encode())
    assert read_corpus(path, "--data").documents == [Document("déjà\r\nvu\n")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', '{"text": '], "line 2: not JSON"),
        (['{"content": "a"}'], "line 1: got the columns 'content'"),
        (['{"prompt": "a"}'], "line 1: got the columns 'prompt'"),
        (['["a"]'], "line 1: got a JSON list"),
        (['{"text": 5}'], "line 1: column 'text' is a int, expected a string"),
        (['{"text": "a"}', "", '{"prompt": "a", "completion": "b"}'], "line 3: every line must have"),
        (['{"prompt": "a", "completion": ""}'], "line 1: column 'completion' is empty"),
    ],
)
def test_broken_records_are_named_by_their_line(tmp_path, lines, message):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=message) as caught:
        read_corpus(path, "--data")
    assert str(caught.value).startswith("argument --data: ") and "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_corpus(tmp_path / "none", "--data")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(UsageError, match="is empty"):
        read_corpus(tmp_path / "empty", "--data")
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8 text: byte 0xff at offset 3"):
        read_corpus(tmp_path / "binary", "--data")
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}]))
    with pytest.raises(UsageError, match="got a JSON list"):
        read_corpus(tmp_path / "list.json", "--data")
