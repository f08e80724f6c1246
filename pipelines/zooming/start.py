"""The start of the process: imports of large packages, and the GPU's driver."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread


@contextmanager
def large_imports(*, driver: bool = True) -> Iterator[None]:
    """Import torch inside: nothing is collected meanwhile, and never what was imported; a GPU's driver starts.

    The collector would look through all of torch's objects several times during the import and again at the end of the
    process, which adds tenths of a second to both.

    Args:
        driver: whether to start it.
    """
    if driver:
        Thread(target=start_driver).start()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def start_driver() -> None:
    """Start CUDA's driver and the first GPU's primary context, which PyTorch then finds; does nothing without a GPU.

    PyTorch itself does so only after its import.
    """
    with suppress(OSError, AttributeError):  # no driver
        driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
