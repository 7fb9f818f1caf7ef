"""Which of a Trainer's checkpoints are whole.

A Trainer writes a checkpoint file by file under its final name, `trainer_state.json` last. Killed in between, or while
it deletes an old one, it leaves a folder that looks like a checkpoint: it may end a later run with an error, or start
it without the optimizer's state and not say so.
"""

from __future__ import annotations

import json
import re
import zipfile
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..log import logger

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json")


def last_checkpoint(folder: str | PathLike[str], *, weights_only: bool = False) -> str | None:
    """The latest whole checkpoint in a Trainer's output folder; those that are not are logged and passed over.

        trainer.train(resume_from_checkpoint=fastlora.last_checkpoint("out"))

    starts where the last run ended, however it ended, or at the beginning where there is nothing yet. Every file is
    read and compared with its checksums or its length; none is unpickled. Known are the folders that a Trainer writes
    in one process or under DDP.

    Args:
        folder: the `output_dir` of the Trainer; it need not exist.
        weights_only: also take checkpoints without the state of optimizer, schedule and random generators, which
            `save_only_model=True` leaves out. A run that goes on from one is not the run that wrote it.

    Returns:
        The checkpoint's path, or None.
    """
    for checkpoint in reversed(_checkpoints(Path(folder))):
        problem = incomplete(checkpoint, weights_only=weights_only)
        if problem is None:
            return str(checkpoint)
        logger.warning("%s: passed over, as %s", checkpoint, problem)
    return None


def incomplete(checkpoint: str | PathLike[str], *, weights_only: bool = False) -> str | None:
    """What a Trainer's checkpoint lacks to go on from, in words; None for one that is whole."""
    checkpoint = Path(checkpoint)
    problem = _state_problem(checkpoint)
    if problem is None and not weights_only:
        problem = next((f"{name} is missing" for name in _NEEDED if not any(checkpoint.glob(name))), None)
    if problem is None and not any((checkpoint / name).is_file() for name in _WEIGHTS):
        problem = f"there is no {_WEIGHTS[0]}"
    files = sorted(checkpoint.iterdir()) if problem is None else []
    return problem or next((found for file in files if (found := _file_problem(file)) is not None), None)


def invalidate(checkpoint: Path) -> None:
    """Makes a whole checkpoint of a Trainer count as incomplete, before its files are replaced one by one."""
    if _NAME.fullmatch(checkpoint.name):
        (checkpoint / STATE_FILE).unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named like checkpoints, by step."""
    if not folder.is_dir():
        return []
    steps = {
        int(match[1]): path for path in folder.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps)]


def _state_problem(checkpoint: Path) -> str | None:
    file = checkpoint / STATE_FILE
    if not file.is_file():
        return f"{STATE_FILE}, which is written last, is missing"
    try:
        step = json.loads(file.read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError):
        return f"{STATE_FILE} is cut off"
    expected = _NAME.fullmatch(checkpoint.name)
    return f"it is the state of step {step}" if expected and step != int(expected[1]) else None


def _file_problem(file: Path) -> str | None:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):  # compares the header with the file's length
                return None
        if file.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(file) as archive:
                return None if archive.testzip() is None else f"{file.name} is damaged"
        if file.name.endswith(".index.json"):
            shards = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
            return next((f"{name} is missing" for name in sorted(shards) if not (file.parent / name).is_file()), None)
    except (SafetensorError, zipfile.BadZipFile, ValueError, KeyError):
        return f"{file.name} is cut off"
    return None
