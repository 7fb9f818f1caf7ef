"""One merge on disk: `python bench/merge_once.py WHAT BASE ADAPTER OUT` prints its seconds and how far memory rose.

WHAT is "merge_checkpoint", or a format that `export_checkpoint` writes. Prints the rise and the peak in bytes. A
process of its own, so that nobody's freed memory is left for it; it ends with the files on the disk.
"""

from __future__ import annotations

import os
import sys
import time

from peak import peak_bytes, settle

import fastlora

what, *paths = sys.argv[1:]
before = settle()
start = time.perf_counter()
if what == "merge_checkpoint":
    fastlora.merge_checkpoint(*paths, device="cpu")
else:
    fastlora.export_checkpoint(*paths, to=what)
os.sync()
print(time.perf_counter() - start, peak_bytes() - before, peak_bytes())
