"""The fake CUDA driver (fake_cuda.cpp), from Python."""

import ctypes
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
NO_LIMIT = 2**62


def build(folder: Path) -> Path:
    library = folder / "libfake_cuda.so"
    cxx = os.environ.get("CXX", "g++").split()
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
    subprocess.run([*cxx, *options, SOURCE, "-o", library], check=True)
    return library


class FakeCuda:
    """Two devices; streams are handles (0: the legacy default stream), kernels read or fill device memory."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self.api = api = ctypes.CDLL(str(library))
        size, address, handle = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p
        api.fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
        api.fake_limits.argtypes = [size, size, ctypes.c_int]
        api.fake_violations.argtypes = [ctypes.c_char_p, size]
        api.fake_stream.restype = handle
        api.fake_end_stream.argtypes = [handle]
        api.fake_synchronize.argtypes = [handle]
        api.fake_write.argtypes = [handle, address, ctypes.c_char_p, size, ctypes.c_int]
        api.fake_read.argtypes = [handle, ctypes.c_void_p, address, size, ctypes.c_int]

    def limits(self, device: int = NO_LIMIT, pinned: int = NO_LIMIT, delay_us: int = 0) -> None:
        """Bytes of device and of pinned memory, and how long each copy takes at least."""
        self.api.fake_limits(device, pinned, delay_us)

    def fail(self, function: str, nth: int = 1, result: int = 700) -> None:
        self.api.fake_fail(function.encode(), nth, result)

    def stream(self) -> int:
        return self.api.fake_stream()

    def end_stream(self, stream: int) -> None:
        self.api.fake_end_stream(stream)

    def synchronize(self, stream: int) -> None:
        self.api.fake_synchronize(stream)

    def write(self, stream: int, address: int, data: bytes, delay_us: int = 0) -> None:
        self.api.fake_write(stream, address, data, len(data), delay_us)

    def read(self, stream: int, address: int, size: int, delay_us: int = 0) -> bytes:
        to = ctypes.create_string_buffer(size)
        self.api.fake_read(stream, to, address, size, delay_us)
        self.synchronize(stream)
        return to.raw

    def live(self) -> dict[str, int]:
        found = (ctypes.c_int * 6)()
        self.api.fake_live(found)
        return dict(zip(["device", "pinned", "streams", "events", "contexts", "current"], found, strict=True))

    def violations(self) -> str:
        """What the user of the driver did wrong since the last call: "" is what is hoped for."""
        text = ctypes.create_string_buffer(200)
        count = self.api.fake_violations(text, 200)
        return f"{count} times, first: {text.value.decode()}" if count else ""
