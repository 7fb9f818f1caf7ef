"""The command that the README starts with, shortened."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.quickstart.demo import BASE, Outcome
from fastlora.quickstart.text import blocks_of, read_text


def test_quickstart_does_the_main_job(tmp_path):
    result = CliRunner().invoke(app, ["quickstart", "--seconds", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for expected in ("trainable params: ", "nats per byte", "bits per byte", "merged, int8", "before", "after"):
        assert expected in result.output
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 16
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 10_000


def test_quickstart_with_own_model_and_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} squared is {i * i}." for i in range(600)))
    arguments = ["--model", str(BASE), "--text", str(text), "--seconds", "2", "--learning-rate", "0.01"]
    result = CliRunner().invoke(app, ["quickstart", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "text.txt" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no-such-file.txt"], "no-such-file.txt"),
        (["--model", "/no/such/model"], "/no/such/model"),
    ],
    ids=["text", "model"],
)
def test_quickstart_says_what_is_wrong(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["quickstart", *arguments, "--seconds", "1", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", "")
    assert "Traceback" not in result.output


def test_a_text_too_short_is_refused(tmp_path):
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="text: expected at least 5120 tokens, found 5"):
        blocks_of("short", AutoTokenizer.from_pretrained(BASE))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"after": 2.0, "reloaded": 2.0, "merged": 2.0, "merged_dense": 2.0}, "did not fall"),
        ({"reloaded": 1.5001}, "reloaded"),
        ({"merged": 1.52}, "merged in int8"),
        ({"merged_dense": 1.502}, "merged dense"),
    ],
)
def test_a_broken_promise_is_reported(change, problem):
    good = {"before": 2.0, "after": 1.5, "reloaded": 1.5, "merged": 1.501, "merged_dense": 1.5}
    assert Outcome(**good).problems() == []
    (found,) = Outcome(**good | change).problems()
    assert problem in found


def test_the_embedded_model_is_small_and_its_text_unseen():
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 1_000_000
    text = read_text(None)
    assert len(text) > 300_000
    assert "pydoc_data" in (BASE.parent / "pretrain.py").read_text()


def test_module_runs_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "fastlora.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "quickstart" in result.stdout
