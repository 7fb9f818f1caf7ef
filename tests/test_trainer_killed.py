"""Training that is killed: every checkpoint left is whole or told apart, and the resumed run equals a straight one."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from killed_training import STEPS, train
from safetensors.torch import load_file
from training import assert_same

import fastlora
from fastlora.checkpoints.resume import incomplete


@pytest.fixture(scope="module")
def context():
    """Processes forked off one that has the libraries imported and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_training"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server does not get the path otherwise
        process = context.Process(target=os.getpid)
        process.start()
        process.join()
    return context


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train(tmp_path_factory.mktemp("straight"))


def run(context, folder, **options):
    process = context.Process(target=train, args=(folder,), kwargs=options)
    process.start()
    return process


def check_all(folder):
    """The checkpoints in a folder by whether they are whole; those load."""
    problems = {path: incomplete(path) for path in folder.glob("checkpoint-*")}
    for path, problem in problems.items():
        if problem is None:
            assert all(torch.isfinite(tensor).all() for tensor in load_file(path / "model.safetensors").values())
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(path / name, weights_only=True)
    return problems


def assert_ends_like(folder, straight):
    assert_same(train(folder), straight)
    assert fastlora.last_checkpoint(folder) == str(folder / f"checkpoint-{STEPS}")


def test_killed_at_any_change_of_its_folder(context, straight, tmp_path):
    """Among others while it writes a checkpoint and while it deletes an old one."""
    found, changes, step = [], 1, 11
    while True:
        folder = tmp_path / str(changes)
        process = run(context, folder, changes_to_live=changes)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        found += check_all(folder).values()
        assert_ends_like(folder, straight)
        shutil.rmtree(folder)
        changes += step
    assert None in found, "expected whole checkpoints among those left"
    assert set(found) - {None}, "expected incomplete checkpoints among those left"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_killed_again_and_again_at_random(how, context, straight, tmp_path):
    moments, killed = random.Random(int(how)), 0
    while killed < 4 and fastlora.last_checkpoint(tmp_path) != str(tmp_path / f"checkpoint-{STEPS}"):
        started = context.Event()
        process = run(context, tmp_path, started=started)
        assert started.wait(60)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode in (0, -how)
        killed += process.exitcode == -how
        check_all(tmp_path)
    assert killed > 1
    assert_ends_like(tmp_path, straight)
