"""What `fastlora train` says of settings and data that are for its user to mend: the place, one line, exit code 2."""

import json
import os
import re
import subprocess
import sys

import pytest
from test_train_command import CONFIG, pairs, train, write_rows

from fastlora.quickstart.demo import BASE
from fastlora.training.settings import read_settings


@pytest.fixture
def write(tmp_path):
    """Makes a file of settings with one text in place of another, beside a file of data."""

    def make(old="", new="", rows=None, data=None):
        file = tmp_path / "rows.jsonl"
        if data is not None:
            file.write_bytes(data)
        else:
            write_rows(file, pairs() if rows is None else rows)
        text = CONFIG.format(model=BASE, data=file, out=tmp_path / "out")
        assert old in text
        (tmp_path / "config.yaml").write_text(text.replace(old, new, 1) if old else text)
        return tmp_path / "config.yaml"

    return make


def assert_refused(result, message):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    error = " ".join(result.stderr.split())
    assert error.startswith("error: ")
    assert re.search(message, error), error


SETTINGS = {
    "typo": ("  learning_rate", "  learnin_rate", r"config\.yaml, line 12: no setting is called "
             r"'training\.learnin_rate'; did you mean 'learning_rate'\?"),
    "typo of a section": ("lora:", "lroa:", r"line 6: no setting is called 'lroa'; did you mean 'lora'\?"),
    "wrong type": ("r: 4", "r: four", r"line 7: lora\.r: .*valid integer.*found 'four'"),
    "wrong choice": ("quantize: int8", "quantize: int9", r"line 8: lora\.quantize: .*'int8'.*found 'int9'"),
    "out of range": ("batch_size: 4", "batch_size: 0", r"line 11: training\.batch_size: .*greater than or equal to 1"),
    "twice": ("  r: 4", "  r: 4\n  r: 5", r"line 8: expected each setting once, found 'r' again"),
    "no YAML": ("lora:", "lora: [", r"config\.yaml, line \d+: expected YAML"),
    "missing": ("out:", "# out:", r"config\.yaml: expected the setting 'out', found none"),
    "missing in a section": ("  train:", "  # train:", r"line 2: expected the setting 'data\.train', found none"),
    "an unknown target": ("r: 4", "r: 4\n  targets: [q_prjo]", r"q_prjo"),
    "more than the model takes": ("  eval_share: 0.25", "  max_length: 99999",
                                  r"data\.max_length: expected at most \d+, the model's, found 99999"),
    "nothing held out": ("0.25", "0.01", r"data\.eval_share: expected a share that leaves rows on both sides"),
    "no such model": (f"model: {BASE}", "model: /no/such/model", r"/no/such/model"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings(old, new, message, write):
    assert_refused(train(write(old, new), "--dry-run"), message)


def test_all_wrong_settings_are_named_at_once(write):
    file = write("  r: 4", "  rank: 4\n  alpha: big")
    with pytest.raises(ValueError, match=r"(?s)'lora\.rank'.*lora\.alpha"):
        read_settings(file)


def test_checkpoints_of_another_program(write, tmp_path):
    config = write()
    assert train(config, "training.max_steps=3").exit_code == 0
    (tmp_path / "out" / "fastlora-train.json").unlink()
    assert_refused(train(config), "out: expected checkpoints of this command, found those of another")


OVERRIDES = {
    "typo": ("training.epoch=3", r"argument training\.epoch=3: no setting .*did you mean 'epochs'\?"),
    "no value": ("training.epochs", r"expected a setting of the form training\.epochs=3"),
    "no YAML": ("lora.r=[", r"argument 'lora\.r=\[': expected a YAML value"),
}


@pytest.mark.parametrize(("override", "message"), OVERRIDES.values(), ids=OVERRIDES)
def test_overrides(override, message, write):
    assert_refused(train(write(), override), message)


def test_no_file_at_all():
    assert_refused(train(), "CONFIG: expected a YAML file of settings")


def test_no_such_file(tmp_path):
    assert_refused(train(tmp_path / "none.yaml"), r"none\.yaml")


GOOD = b'{"prompt": "a", "completion": "b"}\n'
DATA = {
    "empty": (b"", r"rows\.jsonl: expected rows, found none"),
    "blank lines": (b"\n\n", r"rows\.jsonl: expected rows, found none"),
    "cut off": (GOOD + b'\n{"prompt": "a", "compl', r"rows\.jsonl, line 3: expected a JSON object"),
    "no object": (GOOD + b"[1]\n", r"line 2: expected a JSON object, found list"),
    "no UTF-8": (b'{"prompt": "\xff"}', r"rows\.jsonl: expected UTF-8, found byte 12"),
    "missing column": (b'{"frage": "a", "antwort": "b"}', r"line 1: expected the columns .*prompt and completion.*"
                       r"found frage and antwort; name them"),
    "missing later": (GOOD + b'{"prompt": "a"}', r"line 2: expected the column 'completion', found prompt"),
    "no text": (GOOD + b'{"prompt": "a", "completion": 3}', r"line 2: expected text in 'completion', found int"),
    "no messages": (b'{"messages": "hello"}', r"line 1: expected in 'messages' a list of messages"),
    "no template": (b'{"messages": [{"role": "assistant", "content": "a"}]}', r"line 1: expected a tokenizer with a "
                    r"chat template"),
    "too long": (GOOD + json.dumps({"prompt": "a" * 300, "completion": "b"}).encode(),
                 r"line 2: expected at most 64 tokens, found 302; set data\.too_long"),
    "nothing to learn": (b'{"text": ""}', r"expected rows with something to learn"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), DATA.values(), ids=DATA)
def test_data(data, message, write):
    assert_refused(train(write("  eval_share: 0.25\n", "  max_length: 64\n", data=data)), message)


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.txt"])
def test_no_such_data(name, write):
    assert_refused(train(write("rows.jsonl", name)), name)


def test_out_under_a_file(write, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(train(write(), f"out={tmp_path / 'file' / 'out'}"), "out: expected a folder that can be written to")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_without_permission(write, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(train(write(), f"out={tmp_path / 'locked' / 'out'}"), "out: expected a folder .* Permission denied")


def test_out_that_no_user_may_write_to(write):
    assert_refused(train(write(), "out=/proc/fastlora"), "out: expected a folder that can be written to")


def test_without_the_datasets_library(write, tmp_path):
    """JSONL needs it not; another format says what to install."""
    file = write()
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    code = "import sys; sys.modules['datasets'] = None; from fastlora.cli import app; app()"

    def call(*arguments):
        command = [sys.executable, "-c", code, "train", str(file), "--dry-run", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    assert call().returncode == 0
    refused = call(f"data.train={tmp_path / 'rows.csv'}", "data.eval_share=0")
    assert refused.returncode == 2
    assert "pip install datasets" in refused.stderr
    assert "Traceback" not in refused.stderr
