// The Python module lora_kernels._paging. No logic: arguments, docstrings, exceptions, and the GIL, which is
// released around every call, since each may wait for the pager's lock. Stub: lora_kernels/_paging.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <exception>
#include <filesystem>
#include <optional>

#include "errors.h"
#include "pager.h"

namespace py = pybind11;

namespace lk::paging {
namespace {

// pybind11's gil_scoped_release takes the GIL back in a destructor, which may not throw; CPython before 3.14
// ends a thread that asks for the GIL when the interpreter is finishing by unwinding its stack, and that
// would be std::terminate. Here the unwinding may pass.
template <class F>
auto without_gil(F&& f) {
  std::exception_ptr error;
  std::optional<decltype(f())> result;
  PyThreadState* state = PyEval_SaveThread();
  try {
    result.emplace(f());
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
  return std::move(*result);
}

// Of a member that returns something, or nothing (then None).
template <class R, class... Args>
auto call(R (Pager::*member)(Args...)) {
  return [member](Pager& pager, Args... args) {
    if constexpr (std::is_void_v<R>) {
      without_gil([&] { return (pager.*member)(args...), true; });
    } else {
      return without_gil([&] { return (pager.*member)(args...); });
    }
  };
}

// What a memoryview of a page refers to: it keeps the pager, the memory and one pin of the page.
class PageView {
 public:
  PageView(std::shared_ptr<Pager> pager, int page)
      : pager_(std::move(pager)), page_(page), frame_(pager_->add_view(page)) {}
  ~PageView() {
    if (frame_) pager_->drop_view(page_);
  }
  PageView(const PageView&) = delete;
  PageView& operator=(const PageView&) = delete;

  py::buffer_info buffer() const {
    return {reinterpret_cast<std::uint8_t*>(frame_->address()),
            static_cast<py::ssize_t>(pager_->page_bytes())};
  }

 private:
  std::shared_ptr<Pager> pager_;
  int page_;
  std::shared_ptr<Frame> frame_;
};

void set_os_error(int number, const char* message) {
  // OSError(number, message) picks the subclass, e.g. PermissionError.
  const py::object error =
      py::reinterpret_steal<py::object>(PyObject_CallFunction(PyExc_OSError, "is", number, message));
  if (error) PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

}  // namespace
}  // namespace lk::paging

PYBIND11_MODULE(_paging, m) {
  using namespace lk::paging;

  m.doc() =
      "The page allocator of the paged optimizers: pages of fixed size, a bounded number of them resident, "
      "the others\n"
      "on the host (CUDA) or in a file (CPU). csrc/paging/pager.h says how it works.";

  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const IoError& error) {
      set_os_error(error.number(), error.what());
    }
  });

  py::class_<PageView>(m, "_PageView", py::buffer_protocol(), "What a memoryview of a page refers to.")
      .def_buffer(&PageView::buffer);

  py::class_<Pager, std::shared_ptr<Pager>> pager(m, "Pager", R"doc(
Pages of `page_bytes` bytes on `device`, of which at most `resident_bytes` are resident.

    page    | header 64 B | allocation | allocation | ... |     offsets are multiples of 64

device          "cpu", or "cuda:N"
page_bytes      a power of two >= 65536
resident_bytes  the budget, rounded up to whole pages, at least two; None: everything may be resident
directory       of the CPU's backing file, which has no name; None: TMPDIR, else /tmp. Without a budget there
                is no file, until evict() needs one.

A page is usable between pin() and unpin(). All methods may be called by any thread. Every method raises
RuntimeError when the pager is closed and in a child after a fork, and ValueError for a page that does not
exist. A read or write that failed raises OSError with its errno; the page keeps its state, and a later
attempt can succeed. A background failure is raised once, by the next pin() of the page it concerns, wait(),
or evict() where writing fails again.)doc");

  pager
      .def(py::init([](const std::string& device, std::int64_t page_bytes,
                       std::optional<std::int64_t> resident_bytes,
                       std::optional<std::filesystem::path> directory) {
             std::optional<std::string> folder;
             if (directory) folder = directory->string();
             return without_gil([&] { return Pager::make(device, page_bytes, resident_bytes, folder); });
           }),
           py::arg("device"), py::arg("page_bytes"), py::arg("resident_bytes") = py::none(),
           py::arg("directory") = py::none())
      .def("room", call(&Pager::room), py::arg("arena"),
           "Bytes left in the page that this arena is filling; 0 where none is open.")
      .def("allocate", call(&Pager::allocate), py::arg("arena"), py::arg("bytes"), R"doc(
Zeroed memory of `bytes` bytes: (page, offset), the offset a multiple of 64.

It goes into the arena's open page where it fits, else into a new one; arenas never share a page. Raises
ValueError where bytes is not from 1 to page_bytes - 64; OSError (disk full) or MemoryError (pinned host
memory) where the backing store has no room for another page.)doc")
      .def("free", call(&Pager::free), py::arg("page"), py::arg("offset"), R"doc(
Gives back an allocation; with the last one of a page also the page, its memory and its place in the backing
store.

Raises ValueError where nothing is allocated there, RuntimeError where the page would go and is pinned.)doc")
      .def("pin", call(&Pager::pin), py::arg("page"), py::arg("stream") = 0, R"doc(
Makes a page resident and keeps it there; pins are counted.

Where the budget is full, the least recently used unpinned page makes room, written out first if it is
dirty. Blocks until the page is usable; on CUDA the host does not wait: work enqueued on `stream` after this
does. Raises MemoryError where every resident page is pinned or the system has no memory, OSError where a
page cannot be read or written.)doc")
      .def("unpin", call(&Pager::unpin), py::arg("page"), py::arg("dirty"), py::arg("stream") = 0, R"doc(
Ends a pin; `dirty`: the page was written. Without it what was written may be lost.

On CUDA nothing copies, evicts or frees the page before what `stream` holds now is done. Raises RuntimeError
where the page is not pinned.)doc")
      .def("address", call(&Pager::address), py::arg("page"),
           "The address of a pinned page; RuntimeError where it is not pinned.")
      .def(
          "view",
          [](const std::shared_ptr<Pager>& self, std::int64_t page) {
            auto* view = without_gil([&] { return new PageView(self, page); });
            return py::memoryview(py::cast(view, py::return_value_policy::take_ownership));
          },
          py::arg("page"), R"doc(
A writable memoryview of a pinned page of a CPU's pager, header included; RuntimeError otherwise.

It holds a pin of its own until it and everything made from it (arrays, tensors) is gone, so it never shows
another page's memory; after close() it keeps the memory alive. Whether the page is dirty is said by unpin()
alone.)doc")
      .def("prefetch", call(&Pager::prefetch), py::arg("page"), R"doc(
Begins to make a page resident in the background, in the place of the least recently used unpinned one if
need be.

Counts as a use of the page. Does nothing where no room can be made.)doc")
      .def("write_back", call(&Pager::write_back), py::arg("page"), R"doc(
Begins to write an unpinned dirty page in the background; then it is clean, and evicted without a wait.

Does nothing where the page is pinned (its holder may be writing) and where there is no budget (nothing
needs room). On a CPU, pinning the page before the writing has begun cancels it.)doc")
      .def("evict", call(&Pager::evict), R"doc(
Everything unpinned leaves the resident memory, written out where dirty; returns the bytes given back to the
system.

A page that cannot be written stays, the others leave, and the first such error is raised.)doc")
      .def("wait", call(&Pager::wait),
           "Blocks until the background work is done; raises the first error of it.")
      .def(
          "pages",
          [](Pager& self) {
            py::list rows;
            for (const PageInfo& p : without_gil([&] { return self.pages(); })) {
              rows.append(py::make_tuple(p.number, p.state, p.pins, p.references, p.dirty));
            }
            return rows;
          },
          R"doc(
[(page, state, pins, references, dirty)] by page; state is "resident", "host" or "in flight".

Pins include those of views; references are allocations.)doc")
      .def(
          "stats",
          [](Pager& self) {
            const Stats s = without_gil([&] { return self.stats(); });
            py::dict d;
            d["resident_bytes"] = s.resident_bytes;
            d["peak_resident_bytes"] = s.peak_resident_bytes;
            d["host_bytes"] = s.host_bytes;
            d["pages"] = s.pages;
            d["pinned"] = s.pinned;
            d["faults"] = s.faults;
            d["evictions"] = s.evictions;
            d["bytes_read"] = s.bytes_read;
            d["bytes_written"] = s.bytes_written;
            d["stalled_s"] = s.stalled_s;
            return d;
          },
          R"doc(
Numbers since the pager was made or reset_stats().

resident_bytes, peak_resident_bytes   of the pages' memory, those in flight included
host_bytes       for which the backing store has room
pages, pinned    how many there are now
faults           pins that had to bring their page in (what a prefetch brought is none)
evictions        pages that have left the resident memory
bytes_read, bytes_written             from and to the backing store
stalled_s        for which pin(), evict() and wait() blocked, and (CUDA) streams waited for copies)doc")
      .def("reset_stats", call(&Pager::reset_stats), "Counts from zero; the peak from what is resident now.")
      .def_property_readonly("resident_limit", &Pager::resident_limit, "The budget in bytes, or None.")
      .def_property_readonly("page_bytes", &Pager::page_bytes, "The size of a page.")
      .def_property_readonly("device", &Pager::device, "\"cpu\" or \"cuda:N\".")
      .def_property_readonly("closed", call(&Pager::closed), "Whether close() has been called.")
      .def("close", call(&Pager::close),
           "Gives everything back, without writing. Views keep their memory; kernels on pages that are still "
           "pinned "
           "lose it. Does nothing the second time.")
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](Pager& self, const py::args&) { without_gil([&] { return self.close(), true; }); });
  pager.attr("HEADER_BYTES") = py::int_(kHeaderBytes);
}
