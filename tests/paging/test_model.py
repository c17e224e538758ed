"""Random calls against a plain dictionary of what every allocation holds, and a model of the page table.

Patient machines wait for the background after every call: then residency, LRU order and every counter are
known exactly. The others do not, and only contents and the budget are.
"""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lora_kernels._paging import Pager

PAGE = 1 << 16
HEADER = Pager.HEADER_BYTES


class Model:
    """What there is to know about a page."""

    def __init__(self, arena):
        self.arena = arena
        self.filled = HEADER
        self.content = {}  # offset -> bytes
        self.pins = 0
        self.written = False  # since the last unpin(dirty=True)
        self.resident = self.dirty = self.stored = False
        self.used = 0


class PagerMachine(RuleBasedStateMachine):
    patient = True

    def make(self, budget):
        return Pager("cpu", PAGE, budget)

    def read(self, number, offset, size):
        return bytes(self.pager.view(number)[offset : offset + size])

    def write(self, number, offset, data):
        self.pager.view(number)[offset : offset + len(data)] = data

    def pin_stream(self, number, choice):
        return 0

    @initialize(budget=st.sampled_from([None, 1, 2 * PAGE, 3 * PAGE - 1, 5 * PAGE]))
    def begin(self, budget):
        self.limit = None if budget is None else max(2, -(-budget // PAGE))
        self.pager = self.make(budget)
        assert self.pager.resident_limit == (None if budget is None else self.limit * PAGE)
        self.model = {}
        self.open = {}
        self.clock = 0
        self.count = dict.fromkeys(["faults", "evictions", "bytes_read", "bytes_written"], 0)
        self.peak = 0

    # The model of residency.

    def touch(self, page):
        self.clock += 1
        page.used = self.clock

    def save(self, page):
        if page.dirty:
            self.count["bytes_written"] += PAGE
            page.dirty, page.stored = False, True

    def leave(self, page):
        self.save(page)
        page.resident = False
        self.count["evictions"] += 1

    def arrive(self, page):
        """Whether room can be made, and then the page is resident."""
        resident = [p for p in self.model.values() if p.resident]
        if len(resident) == self.limit:
            unpinned = [p for p in resident if p.pins == 0]
            if not unpinned:
                return False
            self.leave(min(unpinned, key=lambda p: p.used))
        page.resident = True
        self.peak = max(self.peak, sum(p.resident for p in self.model.values()))
        self.count["bytes_read"] += PAGE if page.stored else 0
        return True

    # The calls.

    @rule(arena=st.integers(-1, 2), size=st.sampled_from([1, 64, 1000, 20000, PAGE // 2, PAGE - HEADER]))
    def allocate(self, arena, size):
        number = self.open.get(arena)
        room = PAGE - self.model[number].filled if number is not None else 0
        assert self.pager.room(arena) == room
        if size > room:
            number = next(n for n in range(len(self.model) + 1) if n not in self.model)
            self.model[number] = Model(arena)
            self.open[arena] = number
        page = self.model[number]
        assert self.pager.allocate(arena, size) == (number, page.filled)
        page.content[page.filled] = bytes(size)
        page.filled += -(-size // 64) * 64

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        number = data.draw(st.sampled_from(sorted(self.model)))
        page = self.model[number]
        offset = data.draw(st.sampled_from(sorted(page.content)))
        if len(page.content) == 1 and page.pins:
            with pytest.raises(RuntimeError, match="pinned"):
                self.pager.free(number, offset)
            return
        self.pager.free(number, offset)
        del page.content[offset]
        if not page.content:
            del self.model[number]
            if self.open.get(page.arena) == number:
                del self.open[page.arena]
        with pytest.raises(ValueError):
            self.pager.free(number, offset)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), stream=st.integers(0, 2))
    def pin(self, data, stream):
        number = data.draw(st.sampled_from(sorted(self.model)))
        page = self.model[number]
        pinned = sum(p.pins > 0 for p in self.model.values())
        if page.pins == 0 and pinned == self.limit:
            with pytest.raises(MemoryError, match="pinned"):
                self.pager.pin(number, self.pin_stream(number, stream))
            return
        if not page.resident and self.arrive(page):
            self.count["faults"] += 1
        self.pager.pin(number, self.pin_stream(number, stream))
        page.pins += 1
        self.touch(page)
        assert self.read(number, 0, HEADER) == bytes(HEADER)
        for offset, content in page.content.items():
            assert self.read(number, offset, len(content)) == content

    @precondition(lambda self: any(p.pins for p in self.model.values()))
    @rule(data=st.data(), value=st.integers(0, 255))
    def fill(self, data, value):
        number = data.draw(st.sampled_from(sorted(n for n, p in self.model.items() if p.pins)))
        page = self.model[number]
        offset = data.draw(st.sampled_from(sorted(page.content)))
        size = len(page.content[offset])
        content = (bytes([value, value ^ number & 255]) * size)[:size]
        self.write(number, offset, content)
        page.content[offset] = content
        page.written = True

    @precondition(lambda self: self.model)
    @rule(data=st.data(), needlessly=st.booleans())
    def unpin(self, data, needlessly):
        number = data.draw(st.sampled_from(sorted(self.model)))
        page = self.model[number]
        if page.pins == 0:
            for call in (self.pager.address, self.pager.view, lambda n: self.pager.unpin(n, False)):
                with pytest.raises(RuntimeError):
                    call(number)
            return
        dirty = page.written or needlessly
        self.pager.unpin(number, dirty, self.pin_stream(number, 0))
        page.pins -= 1
        page.written = False
        page.dirty |= dirty

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def prefetch(self, data):
        number = data.draw(st.sampled_from(sorted(self.model)))
        page = self.model[number]
        self.pager.prefetch(number)
        if (page.resident and page.pins == 0) or (not page.resident and self.arrive(page)):
            self.touch(page)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def write_back(self, data):
        number = data.draw(st.sampled_from(sorted(self.model)))
        page = self.model[number]
        self.pager.write_back(number)
        if self.limit is not None and page.resident and page.pins == 0:
            self.save(page)

    @rule()
    def evict(self):
        leaving = [p for p in self.model.values() if p.resident and p.pins == 0]
        for page in leaving:
            self.leave(page)
        given_back = self.pager.evict()
        if self.patient:
            assert given_back == len(leaving) * PAGE

    @rule()
    def wait(self):
        self.pager.wait()

    @rule()
    def reset(self):
        if self.patient:
            self.pager.wait()
            self.pager.reset_stats()
            self.count = dict.fromkeys(self.count, 0)
            self.peak = sum(p.resident for p in self.model.values())

    @invariant()
    def agrees(self):
        if not hasattr(self, "pager"):
            return
        if self.patient:
            self.pager.wait()
        stats = self.pager.stats()
        rows = self.pager.pages()
        assert [(r[0], r[2], r[3]) for r in rows] == [
            (n, p.pins, len(p.content)) for n, p in sorted(self.model.items())
        ]
        assert stats["pages"] == len(self.model) and stats["pinned"] == sum(
            p.pins > 0 for p in self.model.values()
        )
        if self.limit is not None:
            assert stats["resident_bytes"] <= stats["peak_resident_bytes"] <= self.limit * PAGE
            assert stats["host_bytes"] == len(self.model) * PAGE
        if self.patient:
            assert [(r[0], r[1], r[4]) for r in rows] == [
                (n, "resident" if p.resident else "host", p.dirty) for n, p in sorted(self.model.items())
            ]
            assert stats["resident_bytes"] == PAGE * sum(p.resident for p in self.model.values())
            assert stats["peak_resident_bytes"] == PAGE * self.peak
            assert {key: stats[key] for key in self.count} == self.count

    def teardown(self):
        if hasattr(self, "pager"):
            self.pager.close()


class HastyMachine(PagerMachine):
    patient = False

    def arrive(self, page):
        return True

    def leave(self, page):
        page.resident = False


def check(machine, examples):
    quiet = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=quiet)


@pytest.mark.parametrize("machine", [PagerMachine, HastyMachine])
def test_every_sequence_of_calls_agrees_with_a_dictionary(machine):
    check(machine, 80)


@pytest.mark.parametrize("patient", [True, False])
def test_every_sequence_of_calls_agrees_with_a_dictionary_on_cuda(fake_cuda, patient):
    """Kernels on three streams, none waited for but by the driver's queues; a missing wait is a violation."""
    streams = [0, fake_cuda.stream(), fake_cuda.stream()]

    class CudaMachine(PagerMachine if patient else HastyMachine):
        def make(self, budget):
            self.stream_of = {}
            fake_cuda.limits(delay_us=30)
            return Pager("cuda:1", PAGE, budget)

        def pin_stream(self, number, choice):
            # Streams that use one page at the same time have to see to that themselves: here they do not.
            if self.model[number].pins == 0:
                self.stream_of[number] = streams[choice]
            return self.stream_of[number]

        def read(self, number, offset, size):
            return fake_cuda.read(self.stream_of[number], self.pager.address(number) + offset, size)

        def write(self, number, offset, data):
            fake_cuda.write(self.stream_of[number], self.pager.address(number) + offset, data, delay_us=100)

        def teardown(self):
            # close() while a page is pinned does not wait for what its holder has enqueued.
            for stream in streams:
                fake_cuda.synchronize(stream)
            super().teardown()
            assert fake_cuda.violations() == ""

    check(CudaMachine, 25)
    for stream in streams[1:]:
        fake_cuda.end_stream(stream)
