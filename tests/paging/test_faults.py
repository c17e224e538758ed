"""What goes wrong outside: full disks, bad files, refused memory. One clear error, and nothing is lost.

The faults are the system's own: /dev/full and /proc/self/mem in the place of the backing file, resource
limits, a file that is cut or changed behind the pager's back.
"""

import os
import subprocess

import pytest

from .processes import run, start


def test_a_full_disk_is_one_error_and_nothing_is_lost(tmp_path):
    run(
        """
        pager = Pager("cpu", PAGE, 4 * PAGE, sys.argv[1])
        pages = fills(pager, 10)
        file = backing_file()
        saved = os.dup(file)
        os.dup2(os.open("/dev/full", os.O_RDWR), file)
        before = pager.pages()
        new = pages[0]  # on the host: a dirty page would have to leave
        error = error_of(lambda: pager.pin(new))
        assert error.errno == errno.ENOSPC and "page 6 " in str(error) and sys.argv[1] in str(error), error
        assert pager.pages() == before
        assert all(holds(pager, page, page + 1) for page in pages[6:])

        # In the background: told once, by whoever asks next.
        pager.write_back(7)
        assert error_of(pager.wait).errno == errno.ENOSPC
        pager.wait()
        for patience in range(1, 50):  # a pin that comes before the writing has begun cancels it
            pager.write_back(8)
            time.sleep(0.01 * patience)
            try:
                pager.pin(8)
                pager.unpin(8, False)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
        else:
            raise AssertionError("no error")
        pager.pin(8)
        pager.unpin(8, False)
        # A prefetch that could not make room: the error is that of the page that could not leave.
        pager.prefetch(new)
        while pager.pages()[new][1] != "host":
            time.sleep(0.01)
        assert error_of(lambda: pager.pin(6)).errno == errno.ENOSPC
        pager.wait()
        # Everything must leave, nothing can: one error, and all of it stays, dirty.
        assert error_of(pager.evict).errno == errno.ENOSPC
        assert [row[4] for row in pager.pages()[6:]] == [True] * 4
        assert pager.stats()["resident_bytes"] == 4 * PAGE

        os.dup2(saved, file)
        assert pager.evict() == 4 * PAGE
        assert all(holds(pager, page, page + 1) for page in pages)
        pager.wait()
        """,
        tmp_path,
    )


def test_a_limit_on_file_sizes_stops_new_pages_not_the_old_ones(tmp_path):
    run(
        """
        pager = Pager("cpu", PAGE, 2 * PAGE, sys.argv[1])
        pages = fills(pager, 5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(backing_file()).st_size, resource.RLIM_INFINITY))
        while True:
            try:
                pages += fills(pager, 1)
            except OSError as error:
                assert error.errno == errno.EFBIG and "cannot be given room" in str(error), error
                break
        assert pager.stats()["pages"] == len(pages) == 16 << 20 >> 16
        assert pager.room(0) == 0 and pager.stats()["host_bytes"] == len(pages) * PAGE
        assert all(holds(pager, page, page + 1) for page in pages[:20])
        # Writes beyond a limit that has come down since: partly possible, then EFBIG.
        fill(pager, 9, 77)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9 * PAGE + 5000, resource.RLIM_INFINITY))
        assert error_of(pager.evict).errno == errno.EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        pager.evict()
        assert holds(pager, 9, 77)
        assert pager.allocate(0, 1)[0] == len(pages)
        """,
        tmp_path,
    )


def test_a_full_file_system_refuses_the_page_when_it_is_allocated(tmp_path):
    out = run(
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None) or libc.mount(
            b"none", sys.argv[1].encode(), b"tmpfs", 0, b"size=1m"
        ):
            print("not permitted")
            sys.exit()
        pager = Pager("cpu", PAGE, 2 * PAGE, sys.argv[1])
        pages = fills(pager, 16)
        error = error_of(lambda: pager.allocate(0, PAGE - 64))
        assert error.errno == errno.ENOSPC and sys.argv[1] in str(error), error
        assert all(holds(pager, page, page + 1) for page in pages)
        pager.free(pages[3], 64)
        assert pager.allocate(0, PAGE - 64) == (3, 64)
        assert holds(pager, 3, 0)
        """,
        tmp_path,
    )
    if out:
        pytest.skip("mounting a tmpfs is not permitted here")


def test_a_truncated_or_altered_file_is_an_error_that_names_it_and_never_wrong_numbers(tmp_path):
    run(
        """
        pager = Pager("cpu", PAGE, 2 * PAGE, sys.argv[1])
        pages = fills(pager, 6)
        pager.evict()
        other = os.open(f"/proc/self/fd/{backing_file()}", os.O_RDWR)
        size = os.fstat(other).st_size
        good = os.pread(other, 6 * PAGE, 0)

        def broken(page, *words):
            for attempt in range(2):  # each attempt is told, none counts as a pin
                error = error_of(lambda: pager.pin(page))
                assert error.errno == errno.EIO, error
                for word in (f"page {page} ", sys.argv[1], *words):
                    assert word in str(error), (word, error)
            assert pager.pages()[page][1:3] == ("host", 0)
            assert pager.stats()["resident_bytes"] <= 2 * PAGE

        os.ftruncate(other, 4 * PAGE + 100)
        broken(4, "truncated", f"ends at byte {4 * PAGE + 100}")
        broken(5, "truncated", f"ends at byte {5 * PAGE}")
        assert holds(pager, 3, 4)
        # In the background: once from wait() or the pin, then from the pin's own reading.
        pager.prefetch(4)
        assert "truncated" in str(error_of(pager.wait))
        pager.wait()
        broken(4, "truncated")
        os.ftruncate(other, size)
        broken(4, "altered", "checksum")

        for byte in (0, 64, 12345, PAGE - 1):
            os.pwrite(other, bytes([good[2 * PAGE + byte] ^ 16]), 2 * PAGE + byte)
            broken(2, "altered", "checksum")
            os.pwrite(other, good[2 * PAGE + byte :][:1], 2 * PAGE + byte)
        assert holds(pager, 2, 3)

        # Yesterday's page, whole and well, is no better.
        fill(pager, 1, 99)
        pager.evict()
        os.pwrite(other, good[PAGE : 2 * PAGE], PAGE)
        broken(1, "altered")
        os.pwrite(other, good[: 6 * PAGE], 0)
        assert all(holds(pager, page, page + 1) for page in (0, 2, 3, 4, 5))
        """,
        tmp_path,
    )


def test_a_file_that_cannot_be_read_is_an_error_and_can_be_read_later(tmp_path):
    run(
        """
        pager = Pager("cpu", PAGE, 2 * PAGE, sys.argv[1])
        pages = fills(pager, 4)
        pager.evict()
        file = backing_file()
        saved = os.dup(file)
        os.dup2(os.open("/proc/self/mem", os.O_RDWR), file)  # nothing is mapped at address 0: EIO
        error = error_of(lambda: pager.pin(0))
        assert error.errno == errno.EIO and "page 0 " in str(error) and "read from" in str(error), error
        os.dup2(saved, file)
        assert all(holds(pager, page, page + 1) for page in pages)
        """,
        tmp_path,
    )


def test_where_the_system_refuses_memory_other_pages_make_room(tmp_path):
    run(
        """
        pager = Pager("cpu", 1 << 22, None, sys.argv[1])
        pages = [pager.allocate(0, 5)[0]]
        for _ in range(63):
            pages.append(pager.allocate(0, pager.page_bytes - 128)[0])
        used = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), resource.RLIM_INFINITY))
        pinned = []
        try:
            for page in pages:
                pager.pin(page)
                pinned.append(page)
                pager.view(page)[100] = page + 1
        except MemoryError as error:
            assert "no memory" in str(error) and f"page {page} " in str(error), error
        assert 2 <= len(pinned) < 12, pinned
        for page in pinned:
            pager.unpin(page, True)
        for page in pages[len(pinned) :]:
            pager.pin(page)
            pager.view(page)[100] = page + 1
            pager.unpin(page, True)
        for page in pages:
            pager.pin(page)
            assert pager.view(page)[100] == page + 1
            pager.unpin(page, False)
        """,
        tmp_path,
    )


def test_two_processes_share_a_directory_and_leave_nothing_in_it(tmp_path):
    program = """
        pager = Pager("cpu", PAGE, 2 * PAGE, sys.argv[1])
        base = int(sys.argv[2])
        pages = [pager.allocate(0, PAGE - 64)[0] for _ in range(12)]
        print("ready", flush=True)
        sys.stdin.readline()
        for round in range(5):
            for page in pages:
                fill(pager, page, base + page + round)
            assert all(holds(pager, page, base + page + round) for page in pages)
        print("done", flush=True)
        time.sleep(60)
    """
    children = [start(program, tmp_path, base) for base in (0, 100)]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n", child.stderr.read()
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in children:
            assert child.stdout.readline() == "done\n", child.stderr.read()
        assert os.listdir(tmp_path) == []
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert os.listdir(tmp_path) == []


def test_kill_minus_9_in_the_middle_of_writing_leaves_no_file(tmp_path):
    program = """
        pager = Pager("cpu", PAGE, 2 * PAGE, sys.argv[1])
        pages = fills(pager, 8)
        print("ready", flush=True)
        while True:
            for page in pages:
                fill(pager, page, 5)
                pager.write_back(page)
    """
    child = start(program, tmp_path)
    try:
        assert child.stdout.readline() == "ready\n", child.stderr.read()
    finally:
        child.kill()
        child.communicate()
    assert os.listdir(tmp_path) == []


def test_without_a_directory_that_can_be_written_there_is_no_pager(tmp_path):
    missing = tmp_path / "missing"
    from lora_kernels._paging import Pager

    with pytest.raises(FileNotFoundError, match="missing"):
        Pager("cpu", 1 << 16, 1 << 20, missing)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="backing file"):
        Pager("cpu", 1 << 16, 1 << 20, tmp_path / "file")
    # Without a budget nothing is written, until evict() has to.
    with Pager("cpu", 1 << 16, None, missing) as pager:
        page, _ = pager.allocate(0, 100)
        pager.pin(page)
        pager.unpin(page, True)
        with pytest.raises(FileNotFoundError):
            pager.evict()
        missing.mkdir()
        assert pager.evict() == 1 << 16


def test_the_directory_is_tmpdir_if_none_is_named(tmp_path):
    out = run(
        """
        pager = Pager("cpu", PAGE, 2 * PAGE)
        print(os.readlink(f"/proc/self/fd/{backing_file()}"))
        """,
        TMPDIR=str(tmp_path),
    )
    assert out.startswith(f"{tmp_path}/"), out


def file_system(path):
    return subprocess.run(
        ["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("direct", [True, False])
def test_memory_stays_within_the_budget_and_the_page_cache_with_it(tmp_path, direct):
    """64 MiB of pages over a budget of 4: resident memory, its peak, the file's part of the page cache."""
    if file_system(tmp_path) == "tmpfs":
        pytest.skip("the folder is on a tmpfs, which is the page cache")
    out = run(
        """
        import ctypes, fcntl
        MB = 1 << 20
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

        def cached():
            size = os.fstat(backing_file()).st_size
            at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, backing_file(), 0)
            marks = ctypes.create_string_buffer(size // mmap.PAGESIZE)
            assert libc.mincore(at, size, marks) == 0
            libc.munmap(at, size)
            return sum(mark & 1 for mark in marks.raw) * mmap.PAGESIZE

        pattern = bytes(range(256)) * (MB // 256)
        cached_most = 0
        before = status("VmRSS")
        pager = Pager("cpu", MB, 4 * MB, sys.argv[1])
        pages = [pager.allocate(0, MB - 64)[0] for _ in range(64)]
        o_direct = fcntl.fcntl(backing_file(), fcntl.F_GETFL) & os.O_DIRECT
        if sys.argv[2] == "False":
            # A write that is cut inside a block ends O_DIRECT, as on a file system that has none.
            pager.pin(pages[0])
            pager.unpin(pages[0], True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
            assert error_of(pager.evict).errno == errno.EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert not fcntl.fcntl(backing_file(), fcntl.F_GETFL) & os.O_DIRECT
        elif not o_direct:
            print("no O_DIRECT")
            sys.exit()
        for round in range(2):
            for page in pages:
                pager.prefetch(pages[(page + 1) % 64])
                pager.pin(page)
                assert pager.view(page)[MB - 256 :] == (pattern[:256] if round else bytes(256))
                pager.view(page)[:] = pattern
                pager.unpin(page, True)
                pager.write_back(page)
                cached_most = max(cached_most, cached() if page % 8 == 7 else 0)
        # One page more for the interpreter's own growth.
        assert status("VmHWM") - before <= 5 * MB, (status("VmHWM") - before) / MB
        assert cached_most <= (10 * MB if sys.argv[2] == "False" else 0), cached_most / MB
        assert pager.stats()["peak_resident_bytes"] == 4 * MB
        assert pager.stats()["bytes_read"] >= 60 * MB
        """,
        tmp_path,
        direct,
    )
    if out:
        pytest.skip("the file system has no O_DIRECT")


def test_memory_and_disk_space_are_really_given_back(tmp_path):
    run(
        """
        MB = 1 << 20

        def near(value, expected):
            assert abs(value - expected) < MB, (value, expected)

        def touch(page):
            pager.pin(page)
            view = pager.view(page)
            for at in range(0, MB, 4096):
                view[at] = 1
            view.release()
            pager.unpin(page, True)

        empty = status("VmRSS")
        pager = Pager("cpu", MB, 32 * MB, sys.argv[1])
        pages = [pager.allocate(0, MB - 64)[0] for _ in range(32)]
        for page in pages:
            touch(page)
        near(status("VmRSS") - empty, 32 * MB)
        disk = lambda: os.fstat(backing_file()).st_blocks * 512
        assert disk() >= 32 * MB
        for page in pages[:8]:  # holes
            pager.free(page, 64)
        near(status("VmRSS") - empty, 24 * MB)
        near(disk(), 24 * MB)
        for page in pages[24:]:  # the end
            pager.free(page, 64)
        near(status("VmRSS") - empty, 16 * MB)
        near(disk(), 16 * MB)
        assert os.fstat(backing_file()).st_size == 24 * MB
        assert pager.evict() == 16 * MB
        near(status("VmRSS") - empty, 0)
        for page in pages[8:24]:
            touch(page)
        pager.close()
        near(status("VmRSS") - empty, 0)
        assert backing_file() is None
        """,
        tmp_path,
    )
