"""The library's logger; `FASTLORA_LOG=info` says which implementation runs, and why."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("fastlora")


def configure_from_environment() -> None:
    """Prints messages of the level in `FASTLORA_LOG` and above to stderr.

    Raises:
        ValueError: it names no level.
    """
    level = os.environ.get("FASTLORA_LOG", "")
    if not level:
        return
    levels = ("debug", "info", "warning", "error")
    if level.lower() not in levels:
        raise ValueError(f"FASTLORA_LOG: expected one of {levels}, found {level!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fastlora: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
