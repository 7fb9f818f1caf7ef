"""One merge on disk: `python bench/merge_once.py BASE ADAPTER OUT` prints its seconds, and how far memory rose and to.

All in bytes. A process of its own, so that nobody's freed memory is left for it. It ends with the files on the disk.
"""

from __future__ import annotations

import os
import sys
import time

from peak import peak_bytes, settle

import fastlora

before = settle()
start = time.perf_counter()
fastlora.merge_checkpoint(*sys.argv[1:], device="cpu")
os.sync()
print(time.perf_counter() - start, peak_bytes() - before, peak_bytes())
