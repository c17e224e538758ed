import pytest

from .fake import FakeCuda, build


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory):
    return FakeCuda(build(tmp_path_factory.mktemp("fake_cuda")))


@pytest.fixture
def fake_cuda(fake_driver, monkeypatch):
    """The driver of every CUDA pager of this test; nothing may be left of them at its end."""
    monkeypatch.setenv("LORA_KERNELS_CUDA_DRIVER", str(fake_driver.path))
    fake_driver.limits()
    yield fake_driver
    fake_driver.limits()
    assert fake_driver.violations() == ""
    assert set(fake_driver.live().values()) == {0}, fake_driver.live()
