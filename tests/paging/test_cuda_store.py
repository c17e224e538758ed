"""The CUDA store on the fake driver: order on the device, limits, failing calls, nothing left behind."""

import shutil
import time

import pytest

from lora_kernels import _paging
from lora_kernels._paging import Pager

from .fake import FakeCuda

PAGE = 1 << 16
INVALID = 700  # any error but "out of memory"


@pytest.fixture
def streams(fake_cuda):
    made = [fake_cuda.stream() for _ in range(3)]
    yield made
    for stream in made:
        fake_cuda.end_stream(stream)


def pages_of(pager, count):
    return [pager.allocate(0, pager.page_bytes - 64)[0] for _ in range(count)]


def fill(fake_cuda, pager, page, value, stream=0, delay_us=0):
    pager.pin(page, stream)
    fake_cuda.write(stream, pager.address(page), bytes([value]) * PAGE, delay_us)
    pager.unpin(page, True, stream)


def value_of(fake_cuda, pager, page, stream=0):
    pager.pin(page, stream)
    found = set(fake_cuda.read(stream, pager.address(page), PAGE))
    pager.unpin(page, False, stream)
    assert len(found) == 1, found
    return found.pop()


def test_the_host_waits_for_nothing_and_the_device_for_everything(fake_cuda, streams):
    """Kernels and copies of 100 ms each: the calls return at once, and every byte is right in the end."""
    with Pager("cuda:0", PAGE, 2 * PAGE) as pager:
        pages = pages_of(pager, 4)
        fake_cuda.limits(delay_us=100_000)
        begin = time.perf_counter()
        for turn, page in enumerate(pages):
            fill(fake_cuda, pager, page, page + 1, streams[turn % 3], delay_us=100_000)
            pager.write_back(page)
        pager.prefetch(pages[0])
        assert time.perf_counter() - begin < 0.4  # the device needs 0.8 s for this
        assert pager.pages()[0][1] == "in flight"
        pager.wait()
        assert [row[1] for row in pager.pages()] == ["resident", "host", "host", "resident"]
        fake_cuda.limits(delay_us=100)
        assert [value_of(fake_cuda, pager, page, streams[0]) for page in pages] == [1, 2, 3, 4]


@pytest.mark.parametrize("then", ["evict", "write_back", "handover", "free", "close", "pin elsewhere"])
def test_nothing_overtakes_a_kernel_that_unpin_has_seen(fake_cuda, streams, then):
    pager = Pager("cuda:0", PAGE, 2 * PAGE)
    a, b, c = pages_of(pager, 3)
    fill(fake_cuda, pager, b, 2)
    fill(fake_cuda, pager, a, 1, streams[0], delay_us=50_000)
    if then == "evict":
        assert pager.evict() == 2 * PAGE
    elif then == "write_back":
        pager.write_back(a)
    elif then == "handover":
        fill(fake_cuda, pager, c, 3, streams[1])
        fill(fake_cuda, pager, b, 4, streams[1])
        assert value_of(fake_cuda, pager, c) == 3
    elif then == "free":
        pager.free(a, 64)
    elif then == "close":
        pager.close()
    else:
        fill(fake_cuda, pager, a, 5, streams[1])
        assert value_of(fake_cuda, pager, a, streams[2]) == 5
    if then in ("evict", "write_back", "handover"):
        assert value_of(fake_cuda, pager, a, streams[2]) == 1
    pager.close()
    assert fake_cuda.violations() == ""


def test_a_clean_page_is_not_freed_or_overwritten_under_a_kernel_that_reads_it(fake_cuda, streams):
    """Nothing has to be written, so nothing but the event of unpin() holds it."""
    pager = Pager("cuda:0", PAGE, 2 * PAGE)
    a, b, c = pages_of(pager, 3)
    for page in (a, b, c):
        fill(fake_cuda, pager, page, page + 1)
    pager.evict()
    for last in ("handover", "evict"):
        for page in (a, b):
            pager.pin(page, streams[page])
            fake_cuda.write(streams[page], pager.address(page), bytes([page + 1]) * PAGE, delay_us=30_000)
            pager.unpin(page, False, streams[page])
        if last == "handover":
            assert value_of(fake_cuda, pager, c) == 3
        else:
            assert pager.evict() == 2 * PAGE
        assert fake_cuda.violations() == ""
    pager.close()


def test_new_pages_are_zero(fake_cuda):
    with Pager("cuda:0", PAGE, 2 * PAGE) as pager:  # the fake driver's memory is not
        pages = pages_of(pager, 4)
        assert [value_of(fake_cuda, pager, page) for page in pages * 2] == [0] * 8
        assert pager.stats()["bytes_written"] == 0


def test_the_time_that_streams_wait_is_counted(fake_cuda, streams):
    with Pager("cuda:0", PAGE, 2 * PAGE) as pager:
        pages = pages_of(pager, 3)
        for page in pages:
            fill(fake_cuda, pager, page, 1)
        pager.evict()
        pager.reset_stats()
        fake_cuda.limits(delay_us=50_000)
        pager.pin(pages[0], streams[0])
        pager.unpin(pages[0], False, streams[0])
        fake_cuda.synchronize(streams[0])
        assert 0.04 < pager.stats()["stalled_s"] < 1
        pager.reset_stats()
        pager.pin(pages[0], streams[0])
        pager.unpin(pages[0], False, streams[0])
        assert pager.stats()["stalled_s"] < 0.04


def test_where_device_memory_is_refused_unpinned_pages_make_room(fake_cuda):
    fake_cuda.limits(device=3 * PAGE)
    with Pager("cuda:0", PAGE) as pager:
        pages = pages_of(pager, 5)
        for page in pages[:3]:
            pager.pin(page)
        with pytest.raises(MemoryError, match="no memory .* beside 3 pages"):
            pager.pin(pages[3])
        pager.prefetch(pages[3])  # no room can be made
        pager.wait()
        assert pager.stats()["resident_bytes"] == 3 * PAGE
        for page in pages[:3]:
            fake_cuda.write(0, pager.address(page), bytes([page + 1]) * PAGE)
            pager.unpin(page, True)
        assert [value_of(fake_cuda, pager, page) for page in [*pages[3:], *pages[:3]]] == [0, 0, 1, 2, 3]
        assert pager.stats()["peak_resident_bytes"] == 3 * PAGE


def test_pinned_memory_that_is_exhausted_is_an_error_when_the_page_is_allocated(fake_cuda):
    fake_cuda.limits(pinned=3 * PAGE)
    with Pager("cuda:0", PAGE, 2 * PAGE) as pager:
        pages = pages_of(pager, 3)
        for page in pages:
            fill(fake_cuda, pager, page, page + 1)
        with pytest.raises(MemoryError, match="pinned host memory for page 3, beside 3 pages"):
            pager.allocate(0, PAGE - 64)
        assert pager.stats()["pages"] == 3
        assert [value_of(fake_cuda, pager, page) for page in pages] == [1, 2, 3]
        pager.free(pages[1], 64)
        assert pager.allocate(0, PAGE - 64)[0] == pages[1] and value_of(fake_cuda, pager, pages[1]) == 0


def test_pinned_memory_that_is_exhausted_in_evict_loses_nothing(fake_cuda):
    fake_cuda.limits(pinned=2 * PAGE)
    with Pager("cuda:0", PAGE) as pager:
        pages = pages_of(pager, 4)
        for page in pages:
            fill(fake_cuda, pager, page, page + 1)
        with pytest.raises(MemoryError, match="pinned host memory"):
            pager.evict()
        assert [(row[1], row[4]) for row in pager.pages()] == [("host", False)] * 2 + [("resident", True)] * 2
        assert [value_of(fake_cuda, pager, page) for page in pages] == [1, 2, 3, 4]
        fake_cuda.limits()
        assert pager.evict() == 4 * PAGE
        assert [value_of(fake_cuda, pager, page) for page in pages] == [1, 2, 3, 4]


def test_a_failed_copy_in_the_background_is_told_once_and_the_page_stays_dirty(fake_cuda):
    with Pager("cuda:0", PAGE, 2 * PAGE) as pager:
        pages = pages_of(pager, 3)
        fill(fake_cuda, pager, pages[0], 1)
        fake_cuda.fail("cuMemcpyDtoHAsync")
        pager.write_back(pages[0])
        with pytest.raises(
            OSError, match="page 0 cannot be copied to the host: cuMemcpyDtoHAsync: CUDA_ERROR_FAKE"
        ):
            pager.wait()
        pager.wait()
        assert pager.pages()[0][4]
        # What evict() cannot prove to have arrived on the host stays on the device.
        fake_cuda.fail("cuEventSynchronize")
        with pytest.raises(OSError, match="copy"):
            pager.evict()
        assert pager.pages()[0][1] != "host" and pager.pages()[0][4]
        assert pager.evict() == PAGE
        fake_cuda.fail("cuMemcpyHtoDAsync")
        pager.prefetch(pages[0])
        with pytest.raises(OSError, match="page 0 cannot be copied to the device"):
            pager.pin(pages[0])
        assert value_of(fake_cuda, pager, pages[0]) == 1


CALLS = [
    "cuMemAlloc",
    "cuMemHostAlloc",
    "cuMemcpyHtoDAsync",
    "cuMemcpyDtoHAsync",
    "cuMemsetD8Async",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventRecord",
    "cuStreamCreate",
    "cuDevicePrimaryCtxRetain",
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("budget", [None, 2 * PAGE])
def test_any_call_of_the_driver_may_fail_once_and_the_next_attempt_succeeds(fake_cuda, streams, call, budget):
    fake_cuda.limits(delay_us=200)
    failures = 0

    def again(attempt):
        nonlocal failures
        try:
            return attempt()
        except OSError as error:
            assert "CUDA_ERROR_FAKE" in str(error)
            failures += 1
            return attempt()

    def background(attempt):
        attempt()
        again(pager.wait)

    for nth in range(1, 9):
        fake_cuda.fail(call, nth, INVALID)
        pager = again(lambda: Pager("cuda:0", PAGE, budget))
        pages = [again(lambda: pager.allocate(0, PAGE - 64))[0] for _ in range(4)]  # noqa: B023
        for turn in range(2):
            for page in pages:
                stream = streams[(page + turn) % 3]
                background(lambda: pager.prefetch(page))  # noqa: B023
                again(lambda: pager.pin(page, stream))  # noqa: B023
                fake_cuda.write(stream, pager.address(page), bytes([page + turn + 1]) * PAGE)
                again(lambda: pager.unpin(page, True, stream))  # noqa: B023
                background(lambda: pager.write_back(page))  # noqa: B023
            again(pager.evict)
        fake_cuda.fail(call, 10**9)
        assert [value_of(fake_cuda, pager, page) for page in pages] == [2, 3, 4, 5]
        pager.close()
        assert fake_cuda.violations() == ""
    # Without a budget fewer calls are made, but each is made.
    assert failures >= 1


def test_a_pager_that_cannot_be_made_leaves_nothing(fake_cuda):
    for nth in (1, 2):
        fake_cuda.fail("cuStreamCreate", nth)
        with pytest.raises(OSError, match="cuStreamCreate: CUDA_ERROR_FAKE"):
            Pager("cuda:0", PAGE)
        assert set(fake_cuda.live().values()) == {0}
    with pytest.raises(ValueError, match="device: got 'cuda:2'; there are 2"):
        Pager("cuda:2", PAGE)


def test_pages_on_a_device_have_no_view(fake_cuda):
    with Pager("cuda:1", PAGE) as pager:
        assert pager.device == "cuda:1"
        (page,) = pages_of(pager, 1)
        pager.pin(page)
        with pytest.raises(RuntimeError, match="cuda:1 have no view"):
            pager.view(page)


def test_everything_is_given_back_when_the_last_reference_goes(fake_cuda):
    pager = Pager("cuda:0", PAGE, 2 * PAGE)
    for page in pages_of(pager, 4):
        fill(fake_cuda, pager, page, 1, delay_us=1000)
    assert fake_cuda.live()["device"] == 2 and fake_cuda.live()["pinned"] == 4
    pager.free(0, 64)
    pager.free(3, 64)
    assert fake_cuda.live()["device"] == 1 and fake_cuda.live()["pinned"] == 2
    del pager  # the fixture looks at what is left


def test_without_a_usable_driver_the_error_says_what_is_missing(fake_driver, monkeypatch, tmp_path):
    variable = "LORA_KERNELS_CUDA_DRIVER"
    monkeypatch.setenv(variable, str(tmp_path / "none.so"))
    with pytest.raises(RuntimeError, match="no CUDA driver: .*none.so"):
        Pager("cuda:0", PAGE)
    monkeypatch.setenv(variable, _paging.__file__)
    with pytest.raises(RuntimeError, match="too old: it has no cuInit"):
        Pager("cuda:0", PAGE)
    copy = tmp_path / "libcopy.so"
    shutil.copy(fake_driver.path, copy)
    FakeCuda(copy).fail("cuInit", 1, 100)
    monkeypatch.setenv(variable, str(copy))
    with pytest.raises(RuntimeError, match="does not start: CUDA_ERROR_FAKE"):
        Pager("cuda:0", PAGE)
    Pager("cuda:0", PAGE).close()
