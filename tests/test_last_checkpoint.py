"""Telling whole checkpoints of a Trainer from those that it did not finish writing or deleting."""

import logging

import pytest
import torch
from models import make_model
from training import TARGETS, make_trainer

import fastlora
from fastlora.checkpoints.resume import incomplete


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(fastlora.patch(make_model("llama"), targets=TARGETS), folder, max_steps=4, save_steps=2).train()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    for file in finished.rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(finished)
            copy.parent.mkdir(exist_ok=True, parents=True)
            copy.write_bytes(file.read_bytes())
    return tmp_path


def test_the_latest_by_number(run):
    assert fastlora.last_checkpoint(run) == str(run / "checkpoint-4")
    (run / "checkpoint-4").rename(run / "checkpoint-10")
    assert "state of step 4" in incomplete(run / "checkpoint-10")


def test_nothing_to_go_on_from(tmp_path):
    assert fastlora.last_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert fastlora.last_checkpoint(tmp_path) is None


FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut off", "empty"])
def test_incomplete_is_passed_over(name, damage, run, caplog):
    file = run / "checkpoint-4" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "missing" and name == "model.safetensors":
        (file.parent / "adapter_model.safetensors").unlink()
    elif damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "cut off" else b"")
    with caplog.at_level(logging.WARNING):
        assert fastlora.last_checkpoint(run) == str(run / "checkpoint-2")
    assert name.removesuffix(".pth") in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_flipped_bit_is_found(name, run):
    file = run / "checkpoint-4" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    assert incomplete(run / "checkpoint-4") is not None


def test_weights_alone_are_taken_on_demand(run):
    for folder in (run / "checkpoint-4", run / "checkpoint-2"):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).unlink()
    assert fastlora.last_checkpoint(run) is None
    assert fastlora.last_checkpoint(run, weights_only=True) == str(run / "checkpoint-4")


def test_a_missing_shard_is_found(run):
    index = run / "checkpoint-4" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert incomplete(run / "checkpoint-4") == "model-00001-of-00002.safetensors is missing"


def test_replacing_a_checkpoint_makes_it_incomplete_until_the_trainer_is_through(run, tmp_path):
    model = fastlora.patch(make_model("llama"), targets=TARGETS)
    model.save_pretrained(run / "checkpoint-4")
    assert fastlora.last_checkpoint(run) == str(run / "checkpoint-2")
    state = tmp_path / "export" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text("{}")
    model.save_pretrained(state.parent)  # no checkpoint by its name
    assert state.exists()


def test_nothing_is_unpickled(run, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    assert fastlora.last_checkpoint(run)
