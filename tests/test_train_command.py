"""`fastlora train`: from a file of settings and rows to an adapter, and on from where it ended."""

import json

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from training import assert_same
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fastlora
from fastlora.cli import app
from fastlora.quickstart.demo import BASE
from fastlora.training.data import read_rows
from fastlora.training.sequences import IGNORED, Collator, length_of, make_sequences
from fastlora.training.settings import Data, Settings, read_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

CONFIG = """\
model: {model}
data:
  train: {data}
  eval_share: 0.25
out: {out}
lora:
  r: 4
  quantize: int8
training:
  max_steps: 6
  batch_size: 4
  learning_rate: 1e-2
  log_every: 1
  save_every: 3
  eval_every: 3
"""
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pairs(count=16):
    return [{"prompt": f"{i} squared is ", "completion": f"{i * i}."} for i in range(count)]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def config(tmp_path):
    write_rows(tmp_path / "rows.jsonl", pairs())
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(model=BASE, data=tmp_path / "rows.jsonl", out=tmp_path / "out"))
    return file


def train(*arguments):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_trains_and_writes_an_adapter_that_peft_reads(config, tmp_path):
    result = train(config)
    assert result.exit_code == 0, result.output
    for expected in ("12 sequences", "4 held out", "starts anew", "step 6 of 6: loss", "eval loss", "written"):
        assert expected in result.output
    out = tmp_path / "out"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), out / "adapter")
    assert model.peft_config["default"].r == 4
    assert AutoTokenizer.from_pretrained(out / "adapter")
    log = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]


def test_goes_on_to_what_a_straight_run_gives(config, tmp_path):
    assert train(config, f"out={tmp_path / 'straight'}").exit_code == 0
    assert train(config, "training.max_steps=3", "training.schedule=constant").exit_code == 0
    straight = tmp_path / "constant"
    assert train(config, f"out={straight}", "training.schedule=constant").exit_code == 0
    result = train(config, "training.schedule=constant")
    assert f"goes on from {tmp_path / 'out' / 'checkpoint-3'}" in result.output
    name = "adapter/adapter_model.safetensors"
    assert_same(load_file(tmp_path / "out" / name), load_file(straight / name))


def test_a_finished_run_is_not_trained_on(config, tmp_path):
    assert train(config).exit_code == 0
    adapter = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    before = load_file(adapter)
    adapter.unlink()
    result = train(config)
    assert "holds the whole run already: 6 steps" in result.output
    assert_same(load_file(adapter), before)


def test_steps_are_counted_as_the_trainer_counts_them(config, tmp_path):
    longer = ["training.max_steps=null", "training.epochs=1.5", "training.batch_size=2", "training.accumulation=4"]
    result = train(config, *longer)
    assert "3 steps of 8 sequences" in result.output
    assert "step 3 of 3: loss" in result.output
    assert "3 steps" in train(config, *longer).output


def test_dry_run_trains_nothing(config, tmp_path):
    result = train(config, "--dry-run")
    assert result.exit_code == 0, result.output
    for expected in ("LlamaForCausalLM in float32", "rank 4", "6 steps of 4 sequences", "starts anew"):
        assert expected in result.output
    assert not list((tmp_path / "out").iterdir())


def test_only_the_named_settings_may_change(config, tmp_path):
    assert train(config).exit_code == 0
    result = train(config, "lora.r=8")
    assert result.exit_code == 2
    assert "lora.r was 4 and is 8" in result.output
    result = train(config, "resume=false")
    assert result.exit_code == 2
    assert "expected no checkpoints where resume is false" in result.output


def test_lists_every_setting_as_yaml():
    listed = yaml.safe_load(train("--settings").output.replace(": ...", ": given"))
    listed["data"]["columns"] = {}
    settings = Settings.model_validate(listed)
    expected = Settings(model="given", data=Data(train="given"), out="given")
    assert settings == expected


def test_overrides_are_yaml(config):
    settings = read_settings(config, ["lora.targets=[q_proj, v_proj]", "training.learning_rate=3e-4", "dtype=bfloat16"])
    assert settings.lora.targets == ["q_proj", "v_proj"]
    assert settings.training.learning_rate == 3e-4
    assert settings.lora.quantize == "int8"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def sequences(rows, tokenizer, tmp_path, length=64, **settings):
    data = Data(train=str(write_rows(tmp_path / "rows.jsonl", rows)), **settings)
    return make_sequences(read_rows(data)[0], tokenizer, data, length)


def learnt(sequence, tokenizer):
    """The text that has labels."""
    return tokenizer.decode([label for label in sequence["labels"] if label != IGNORED])


def test_the_completion_is_learnt(tokenizer, tmp_path):
    (found,) = sequences([{"prompt": "one plus one is ", "completion": "two"}], tokenizer, tmp_path)
    assert tokenizer.decode(found["input_ids"]) == "one plus one is two</s>"
    assert learnt(found, tokenizer) == "two</s>"


def test_an_instruction_with_its_input(tokenizer, tmp_path):
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    (found,) = sequences([row], tokenizer, tmp_path)
    assert tokenizer.decode(found["input_ids"]) == "Add.\n1 1\n2</s>"


def test_columns_by_other_names(tokenizer, tmp_path):
    row = {"frage": "eins?", "antwort": "zwei"}
    (found,) = sequences([row], tokenizer, tmp_path, columns={"prompt": "frage", "completion": "antwort"})
    assert learnt(found, tokenizer) == "zwei</s>"


def test_the_assistants_messages_are_learnt(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    talk = [("user", "hi"), ("assistant", "ho"), ("user", "and"), ("assistant", "so")]
    (found,) = sequences([{"messages": [{"role": r, "content": c} for r, c in talk]}], tokenizer, tmp_path)
    assert tokenizer.decode(found["input_ids"]) == "<user>hi\n<assistant>ho\n<user>and\n<assistant>so\n"
    assert learnt(found, tokenizer) == "ho\nso\n"


def test_packing_joins_everything_once(tokenizer, tmp_path):
    apart = sequences(pairs(), tokenizer, tmp_path)
    packed = sequences(pairs(), tokenizer, tmp_path, packing=True, length=32)
    assert {len(row["input_ids"]) for row in packed[:-1]} == {32}
    for name in ("input_ids", "labels"):
        assert [t for row in packed for t in row[name]] == [t for row in apart for t in row[name]]


def test_a_text_is_cut_into_sequences(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("abc" * 50)
    data = Data(train=str(tmp_path / "text.txt"))
    found = make_sequences(read_rows(data)[0], tokenizer, data, 60)
    assert [len(row["input_ids"]) for row in found] == [60, 60, 31]
    assert all(row["labels"] == row["input_ids"] for row in found)


@pytest.mark.parametrize(("how", "lengths"), [("cut", [24, 20]), ("drop", [20])])
def test_too_long_rows(how, lengths, tokenizer, tmp_path):
    rows = [{"text": "x" * 40}, {"text": "y" * 19}]
    assert [len(row["labels"]) for row in sequences(rows, tokenizer, tmp_path, 24, too_long=how)] == lengths


def test_the_held_out_rows_are_always_the_same(tmp_path):
    data = Data(train=str(write_rows(tmp_path / "rows.jsonl", pairs())), eval_share=0.25)
    rows, held_out = read_rows(data)
    assert (rows, held_out) == read_rows(data)
    assert len(held_out) == 4
    assert not {row.place for row in rows} & {row.place for row in held_out}


def test_csv_by_the_datasets_library(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\none,two\n")
    (row,) = read_rows(Data(train=str(tmp_path / "rows.csv")))[0]
    assert (row.prompt, row.completion) == ("one", "two")


def test_batches_are_padded_where_nothing_is_learnt_or_seen():
    batch = Collator(7)([{"input_ids": [1, 2], "labels": [IGNORED, 2]}, {"input_ids": [3], "labels": [3]}])
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 2], [3, 7]]))
    assert torch.equal(batch["labels"], torch.tensor([[IGNORED, 2], [3, IGNORED]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1], [1, 0]]))


def test_the_length_is_the_models_where_that_is_less():
    assert length_of(Data(train="x"), 256) == 256
    assert length_of(Data(train="x"), None) == 1024
    assert length_of(Data(train="x", max_length=8), 256) == 8


def test_the_adapter_of_a_checkpoint_is_the_final_one(config, tmp_path):
    assert train(config, "training.max_steps=3").exit_code == 0
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = fastlora.load(base, tmp_path / "out" / "checkpoint-3")
    again = fastlora.load(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "out" / "adapter")
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
