"""Threads, forks and the end of the interpreter."""

from .processes import run


def test_threads_that_share_pages_never_see_each_others_bytes():
    """Eight threads, twenty pages, a budget of eight; per page a lock of the test's own and a counter."""
    run(
        """
        import random

        pager = Pager("cpu", PAGE, 8 * PAGE)
        pages = [pager.allocate(0, PAGE - 64)[0] for _ in range(20)]
        locks = {page: threading.Lock() for page in pages}
        counts = dict.fromkeys(pages, 0)
        failures = []

        def work(seed):
            draw = random.Random(seed)
            try:
                for _ in range(300):
                    page = draw.choice(pages)
                    kind = draw.random()
                    if kind < 0.5:
                        with locks[page]:
                            pager.pin(page)
                            view = pager.view(page)
                            expected = bytes([counts[page] % 256]) * 1000
                            for at in (64, 30000, PAGE - 1000):
                                assert view[at : at + 1000] == expected, (page, at)
                            dirty = draw.random() < 0.6
                            if dirty:
                                counts[page] += 1
                                view[64:] = bytes([counts[page] % 256]) * (PAGE - 64)
                            view.release()
                            pager.unpin(page, dirty)
                    elif kind < 0.7:
                        pager.prefetch(page)
                    elif kind < 0.9:
                        pager.write_back(page)
                    elif kind < 0.92:
                        pager.evict()
                    elif kind < 0.94:
                        pager.wait()
                    else:
                        own = pager.allocate(seed + 1, 1000)
                        assert pager.stats()["resident_bytes"] <= 8 * PAGE
                        pager.free(*own)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert all(holds(pager, page, counts[page] % 256) for page in pages if counts[page])
        stats = pager.stats()
        assert stats["pages"] == 20 and stats["pinned"] == 0 and stats["peak_resident_bytes"] <= 8 * PAGE
        """
    )


def test_close_while_threads_use_the_pager_ends_them_with_a_clear_error():
    run(
        """
        for _ in range(20):
            pager = Pager("cpu", PAGE, 4 * PAGE)
            pages = fills(pager, 12)
            messages = []

            def work():
                try:
                    while True:
                        for page in pages:
                            pager.prefetch(pages[(page + 3) % 12])
                            fill(pager, page, 3)
                            pager.write_back(page)
                except (RuntimeError, MemoryError) as error:
                    messages.append(str(error))

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(0.01)
            pager.close()
            for thread in threads:
                thread.join()
            assert len(messages) == 3 and all("closed" in m or "pinned" in m for m in messages), messages
        """
    )


def test_a_child_after_fork_is_told_and_does_no_harm():
    """Forked while other threads hold the lock, read and write: the child must neither hang nor disturb."""
    run(
        """
        import gc
        pager = Pager("cpu", PAGE, 3 * PAGE)
        pages = fills(pager, 8)
        pager.pin(0)
        view = pager.view(0)
        stop = threading.Event()

        def hammer():
            while not stop.is_set():
                for page in pages[1:]:
                    pager.prefetch(pages[1 + page % 7])
                    assert holds(pager, page, page + 1)

        thread = threading.Thread(target=hammer)
        thread.start()
        for attempt in range(30):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                ok = False
                try:
                    for call in (lambda: pager.pin(1), pager.stats, pager.wait, pager.evict, pager.close,
                                 lambda: pager.allocate(0, 1), lambda: pager.closed):
                        assert "fork" in str(error_of(call, RuntimeError))
                    own = Pager("cpu", PAGE, 2 * PAGE)
                    assert holds(own, fills(own, 5)[0], 1)
                    assert bytes(view[64:66]) == bytes([1, 1])
                    if attempt % 2:
                        globals().pop("view").release()
                    globals().pop("pager", None)
                    call = None
                    gc.collect()
                    ok = True
                finally:
                    os._exit(0 if ok else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop.set()
        thread.join()
        view.release()
        pager.unpin(0, False)
        assert all(holds(pager, page, page + 1) for page in pages)
        """
    )


def test_a_child_that_ends_like_any_program_does_not_hang():
    run(
        """
        pager = Pager("cpu", PAGE, 3 * PAGE)
        pages = fills(pager, 8)
        pager.write_back(7)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            sys.exit(0)  # finalises the interpreter, with the pager still referred to
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all(holds(pager, page, page + 1) for page in pages)
        """
    )


def test_the_interpreter_can_end_while_daemon_threads_use_a_pager():
    for _ in range(10):
        run(
            """
            pager = Pager("cpu", PAGE, 3 * PAGE)
            pages = fills(pager, 8)

            def hammer(first):
                while True:
                    for page in pages[first:]:
                        pager.prefetch(page)
                        fill(pager, page, 9)
                        pager.write_back(page)

            for first in range(2):
                threading.Thread(target=hammer, args=(first,), daemon=True).start()
            time.sleep(0.02)
            """,
            timeout=30,
        )
