"""What one pager promises to one caller: packing, order of use, views, counters, errors."""

import ast
import gc
import os
import threading
import time
from pathlib import Path

import pytest

import lora_kernels
from lora_kernels._paging import Pager

from .processes import run

PAGE = 1 << 16


def pages_of(pager, count, arena=0):
    return [pager.allocate(arena, pager.page_bytes - 64)[0] for _ in range(count)]


def touch(pager, page, dirty=False):
    pager.pin(page)
    pager.unpin(page, dirty)


def resident(pager):
    pager.wait()
    return {row[0] for row in pager.pages() if row[1] == "resident"}


def test_a_thousand_small_adapters_cost_no_more_than_one_large_tensor():
    pager = Pager("cpu", PAGE)
    places = [pager.allocate(7, 1000) for _ in range(1000)]
    assert len({page for page, _ in places}) == -(-1000 * 1024 // (PAGE - 64)) == pager.stats()["pages"]
    assert len(set(places)) == 1000 and all(offset % 64 == 0 and offset >= 64 for _, offset in places)


def test_arenas_never_share_a_page():
    pager = Pager("cpu", PAGE)
    first, second = pager.allocate(0, 100), pager.allocate(1, 100)
    assert first[0] != second[0]
    assert pager.allocate(0, 100) == (first[0], 192) and pager.room(0) == PAGE - 320 and pager.room(2) == 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("gpu", PAGE), "device: got 'gpu'"),
        (("cuda", PAGE), "device"),
        (("cuda:-1", PAGE), "device"),
        (("cuda:0x", PAGE), "device"),
        (("cpu", PAGE - 1), "page_bytes: got 65535"),
        (("cpu", PAGE // 2), "page_bytes"),
        (("cpu", 3 * PAGE), "page_bytes"),
        (("cpu", 0), "page_bytes"),
        (("cpu", PAGE, 0), "resident_bytes: got 0"),
        (("cpu", PAGE, -5), "resident_bytes"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        Pager(*arguments)


def test_wrong_calls_are_named_and_change_nothing():
    pager = Pager("cpu", PAGE, 2 * PAGE)
    page, offset = pager.allocate(0, 100)
    before = pager.pages(), pager.stats()
    for call, kind, text in [
        (lambda: pager.allocate(0, 0), ValueError, "bytes: got 0"),
        (lambda: pager.allocate(0, -1), ValueError, "bytes"),
        (lambda: pager.allocate(0, PAGE - 63), ValueError, "65472"),
        (lambda: pager.free(page, offset + 64), ValueError, "offset: got 128"),
        (lambda: pager.free(1, 64), ValueError, "page: got 1"),
        (lambda: pager.pin(-1), ValueError, "page: got -1"),
        (lambda: pager.pin(2**40), ValueError, "page"),
        (lambda: pager.prefetch(9), ValueError, "page"),
        (lambda: pager.write_back(9), ValueError, "page"),
        (lambda: pager.unpin(page, True), RuntimeError, "not pinned"),
        (lambda: pager.address(page), RuntimeError, "not pinned"),
        (lambda: pager.view(page), RuntimeError, "not pinned"),
        (lambda: pager.pin("0"), TypeError, "incompatible"),
    ]:
        with pytest.raises(kind, match=text):
            call()
    assert (pager.pages(), pager.stats()) == before


def test_the_least_recently_used_unpinned_page_makes_room():
    pager = Pager("cpu", PAGE, 3 * PAGE)
    a, b, c, d, e = pages_of(pager, 5)
    for page in (a, b, c):
        touch(pager, page)
    touch(pager, a)
    touch(pager, d)
    assert resident(pager) == {a, c, d}
    pager.pin(c)
    touch(pager, e)
    touch(pager, b)
    assert resident(pager) == {b, c, e}
    pager.unpin(c, False)
    pager.prefetch(c)  # a use, too
    pager.prefetch(a)
    assert resident(pager) == {a, b, c}


def test_the_same_calls_evict_the_same_pages_however_long_the_background_takes():
    def residency(pause):
        pager = Pager("cpu", PAGE, 3 * PAGE)
        pages = pages_of(pager, 7)
        for step in range(40):
            pager.prefetch(pages[(3 * step + 1) % 7])
            time.sleep(pause)
            touch(pager, pages[(5 * step) % 7], dirty=step % 2 == 0)
            pager.write_back(pages[(5 * step) % 7])
        return resident(pager)

    assert residency(0) == residency(0.001)


def test_where_every_resident_page_is_pinned_a_pin_is_a_memory_error_and_a_prefetch_nothing():
    pager = Pager("cpu", PAGE, 2 * PAGE)
    a, b, c = pages_of(pager, 3)
    pager.pin(a)
    pager.pin(b)
    pager.pin(b)
    with pytest.raises(MemoryError, match=f"page {c} .* 2 pages"):
        pager.pin(c)
    pager.prefetch(c)
    assert resident(pager) == {a, b}
    pager.unpin(b, False)
    with pytest.raises(MemoryError):
        pager.pin(c)
    pager.unpin(b, False)
    pager.pin(c)
    assert resident(pager) == {a, c}


def test_pages_that_were_never_dirtied_are_not_written_and_are_zero_again():
    pager = Pager("cpu", PAGE, 2 * PAGE)
    pages = pages_of(pager, 6)
    for _ in range(2):
        for page in pages:
            pager.pin(page)
            assert bytes(pager.view(page)) == bytes(PAGE)
            pager.unpin(page, False)
    # A frame that had something else in it is no excuse.
    pager.pin(pages[0])
    pager.view(pages[0])[:] = b"x" * PAGE
    pager.unpin(pages[0], True)
    for page in pages[1:]:
        pager.pin(page)
        assert bytes(pager.view(page)) == bytes(PAGE)
        pager.unpin(page, False)
    stats = pager.stats()
    assert stats["bytes_written"] == PAGE and stats["bytes_read"] == 0


def test_a_page_number_that_is_used_again_starts_from_zero():
    pager = Pager("cpu", PAGE, 2 * PAGE)
    pages = pages_of(pager, 4)
    for page in pages:
        pager.pin(page)
        pager.view(page)[:] = b"y" * PAGE
        pager.unpin(page, True)
    pager.free(pages[0], 64)
    pager.free(pages[3], 64)
    for expected in (pages[0], pages[3]):
        assert pager.allocate(0, PAGE - 64) == (expected, 64)
        pager.pin(expected)
        assert bytes(pager.view(expected)) == bytes(PAGE)
        pager.unpin(expected, False)


def test_write_back_makes_a_page_clean_where_it_is():
    pager = Pager("cpu", PAGE, 2 * PAGE)
    a, b, c = pages_of(pager, 3)
    touch(pager, a, dirty=True)
    pager.write_back(a)
    pager.wait()
    assert pager.pages()[a] == (a, "resident", 0, 1, False)
    assert pager.stats()["bytes_written"] == PAGE
    touch(pager, b)
    touch(pager, c)  # in the place of a: nothing to write any more
    assert resident(pager) == {b, c} and pager.stats()["bytes_written"] == PAGE
    pager.pin(b)
    pager.unpin(b, True)
    pager.pin(b)
    pager.write_back(b)  # somebody may be writing
    pager.wait()
    assert pager.pages()[b][4]


def test_without_a_budget_nothing_is_written_until_evict(tmp_path):
    pager = Pager("cpu", PAGE, directory=tmp_path)
    assert pager.resident_limit is None
    pages = pages_of(pager, 5)
    for page in pages:
        pager.pin(page)
        pager.view(page)[100] = page + 1
        pager.unpin(page, True)
        pager.write_back(page)
    pager.wait()
    assert not [
        fd for fd in os.listdir("/proc/self/fd") if str(tmp_path) in os.path.realpath(f"/proc/self/fd/{fd}")
    ]
    stats = pager.stats()
    assert stats["resident_bytes"] == 5 * PAGE and stats["host_bytes"] == stats["bytes_written"] == 0
    assert pager.evict() == 5 * PAGE
    stats = pager.stats()
    assert stats["resident_bytes"] == 0 and stats["host_bytes"] == stats["bytes_written"] == 5 * PAGE
    for page in pages:
        pager.pin(page)
        assert pager.view(page)[100] == page + 1
        pager.unpin(page, False)


def test_evict_leaves_what_is_pinned():
    pager = Pager("cpu", PAGE, 3 * PAGE)
    a, b, c = pages_of(pager, 3)
    for page in (a, b, c):
        touch(pager, page, dirty=True)
    pager.pin(b)
    assert pager.evict() == 2 * PAGE and resident(pager) == {b}
    assert pager.evict() == 0


def test_a_view_keeps_its_page_and_its_memory():
    pager = Pager("cpu", PAGE, 2 * PAGE)
    a, b, c = pages_of(pager, 3)
    pager.pin(a)
    view = pager.view(a)
    assert not view.readonly and view.nbytes == PAGE and view.format == "B"
    part = view[64:128]
    del view
    pager.unpin(a, True)
    with pytest.raises(RuntimeError):
        pager.unpin(a, True)  # the view's pin is not the caller's
    assert pager.pages()[a][2] == 1
    touch(pager, b)
    touch(pager, c)
    part[:] = b"z" * 64  # still the page
    assert pager.evict() == PAGE and resident(pager) == {a}
    with pytest.raises(RuntimeError, match="pinned"):
        pager.free(a, 64)
    part.release()
    assert pager.evict() == PAGE and resident(pager) == set()
    pager.pin(a)
    assert bytes(pager.view(a)[64:128]) == b"z" * 64


def test_a_view_outlives_its_pager():
    pager = Pager("cpu", PAGE, 2 * PAGE)
    (page,) = pages_of(pager, 1)
    pager.pin(page)
    view = pager.view(page)
    view[70] = 7
    pager.close()
    assert view[70] == 7
    view[71] = 8
    del view
    other = Pager("cpu", PAGE, 2 * PAGE)
    (page,) = pages_of(other, 1)
    other.pin(page)
    view = other.view(page)
    del other
    gc.collect()
    assert bytes(view) == bytes(PAGE)


def test_a_closed_pager_says_so():
    with Pager("cpu", PAGE, 2 * PAGE) as pager:
        (page,) = pages_of(pager, 1)
        assert not pager.closed
    assert (
        pager.closed
        and pager.page_bytes == PAGE
        and pager.device == "cpu"
        and pager.resident_limit == 2 * PAGE
    )
    pager.close()
    for call in (
        lambda: pager.room(0),
        lambda: pager.allocate(0, 1),
        lambda: pager.free(page, 64),
        lambda: pager.pin(page),
        lambda: pager.unpin(page, False),
        lambda: pager.address(page),
        lambda: pager.view(page),
        lambda: pager.prefetch(page),
        lambda: pager.write_back(page),
        pager.evict,
        pager.wait,
        pager.pages,
        pager.stats,
        pager.reset_stats,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_pagers_leave_no_descriptors_threads_or_mappings():
    run(
        """
        import gc

        def cycle():
            pager = Pager("cpu", PAGE, 2 * PAGE)
            pages = fills(pager, 5)
            pager.prefetch(pages[0])
            pager.write_back(pages[4])
            del pager

        def held():
            gc.collect()
            return (
                len(os.listdir("/proc/self/fd")),
                len(os.listdir("/proc/self/task")),
                sum(1 for _ in open("/proc/self/maps")),
            )

        for _ in range(3):
            cycle()
        before = held()
        for _ in range(50):
            cycle()
        after = held()
        assert after[:2] == before[:2] and after[2] <= before[2] + 2, (before, after)
        """
    )


def test_the_stub_and_the_docstrings_are_complete():
    stub = ast.parse((Path(lora_kernels.__file__).parent / "_paging.pyi").read_text())
    described = {
        node.name: node for cls in stub.body if getattr(cls, "name", "") == "Pager" for node in cls.body
        if isinstance(node, ast.FunctionDef)
    }  # fmt: skip
    public = {name for name in vars(Pager) if not name.startswith("_")} - {"HEADER_BYTES"}
    assert public == {name for name in described if not name.startswith("__")}
    for name in public:
        doc = getattr(Pager, name).__doc__
        assert doc and len(doc.strip()) > 10, name
        if callable(getattr(Pager, name)):
            names = [argument.arg for argument in described[name].args.args]
            signature = doc.split("\n")[0]
            assert all(argument in signature for argument in names), (name, signature)
    assert Pager.__doc__ and Pager.HEADER_BYTES == 64


def in_the_middle_of_a_write_back():
    """A pager of two large pages, of which the first is just being written: some 20 ms of it are left."""
    large = 64 << 20
    pager = Pager("cpu", large, 2 * large)
    a, b, c = pages_of(pager, 3)
    for page in (a, b):
        pager.pin(page)
        pager.view(page)[:] = b"1" * large
        pager.unpin(page, page == a)
    pager.write_back(a)
    time.sleep(0.015)
    return pager, a, c


def test_a_page_is_not_changed_while_it_is_written():
    """Otherwise the end of the writing would call clean what has been made dirty since."""
    pager, page, _ = in_the_middle_of_a_write_back()
    pager.pin(page)
    pager.view(page)[64:128] = b"2" * 64
    pager.unpin(page, True)
    pager.wait()
    assert pager.pages()[page][4]
    pager.evict()
    pager.pin(page)
    assert bytes(pager.view(page)[:129]) == b"1" * 64 + b"2" * 64 + b"1"


def test_a_page_that_is_being_written_is_evicted_when_that_is_done():
    pager, page, other = in_the_middle_of_a_write_back()
    pager.pin(other)
    assert pager.stats()["bytes_written"] == pager.page_bytes  # not written a second time
    pager.unpin(other, False)
    pager.pin(page)
    assert bytes(pager.view(page)) == b"1" * pager.page_bytes


def test_a_page_is_freed_when_its_writing_is_done():
    pager, page, _ = in_the_middle_of_a_write_back()
    pager.free(page, 64)
    assert pager.stats()["bytes_written"] == pager.page_bytes
    assert pager.allocate(0, 100)[0] == page


def test_evict_takes_back_what_is_queued_while_it_waits():
    pager, page, other = in_the_middle_of_a_write_back()
    second = 3 - page - other
    pager.pin(second)
    pager.unpin(second, True)
    given_back = []
    thread = threading.Thread(target=lambda: given_back.append(pager.evict()))
    thread.start()
    time.sleep(0.005)
    pager.write_back(second)
    thread.join()
    pager.wait()
    assert given_back == [2 * pager.page_bytes]
    assert pager.stats()["bytes_written"] == 2 * pager.page_bytes
