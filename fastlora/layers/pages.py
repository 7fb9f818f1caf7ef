"""Giving back the memory of weights that are mapped from a file.

transformers maps safetensors files. A page that has been read counts as resident until the whole file is unmapped,
which is when the last tensor of the file dies: a model quantised layer by layer would hold both copies.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

_MADV_PAGEOUT = 21  # linux/mman.h; the kernel writes a changed page back before it takes it, so nothing can be lost


def release_pages(tensor: Tensor) -> None:
    """Lets the kernel take back the pages under a tensor that lies in a mapped file; they are read again on use.

    Does nothing for other memory, and where the system has no such call.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not _is_in_mapped_file(tensor.data_ptr()):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        # An old kernel refuses; the pages then stay for as long as the file is mapped.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def _is_in_mapped_file(address: int) -> bool:
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            span, _, _, _, inode, *_ = line.split(maxsplit=5)
            start, end = (int(bound, 16) for bound in span.split("-"))
            if start <= address < end:
                return inode != "0"
    return False
