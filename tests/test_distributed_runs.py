"""Runs of many processes as people start them, one of which is killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import received, run_in_two, two_processes
from safetensors.torch import load_file
from training_loop import train

SCRIPT = Path(__file__).with_name("training_loop.py")
STEPS = 6
LAUNCHERS = {
    "torchrun": (["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "fsdp2"),
    "accelerate": (["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                    "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
                    "--main_process_port", "0"], "accelerate"),
}  # fmt: skip


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder and the losses of an undisturbed run by engine, each run once."""
    runs = {}

    def run(engine):
        if engine not in runs:
            folder = tmp_path_factory.mktemp(engine)
            runs[engine] = folder, run_in_two(train, engine, str(folder), STEPS)
        return runs[engine]

    return run


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_killed_process_ends_the_run_and_nothing_is_lost(tmp_path, straight, engine):
    start = time.monotonic()
    with two_processes(train, engine, str(tmp_path), STEPS, 3) as ends:
        assert received(1, ends[1]) == (None, "it died")
        died = time.monotonic()
        result, error = received(0, ends[0], limit=60)
    print(f"{engine}: died after {died - start:.1f} s, the other process ended {time.monotonic() - died:.1f} s later")
    assert result is None
    assert "Error" in error.splitlines()[-1]
    folder, losses = straight(engine)
    assert run_in_two(train, engine, str(tmp_path), STEPS) == losses
    assert losses[0] != losses[1]
    expected = weights(folder)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(tmp_path, straight, launcher):
    """A script that they start computes what the same function does in the processes of this file."""
    command, engine = LAUNCHERS[launcher]
    command = [sys.executable, "-m", *command, str(SCRIPT), engine, str(tmp_path), str(STEPS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [json.loads((tmp_path / f"losses-{rank}.json").read_text()) for rank in range(2)]
    folder, expected = straight("ddp" if engine == "accelerate" else engine)
    assert losses == expected
    assert weights(tmp_path).keys() == weights(folder).keys()
