"""Merging on disk what is broken, elsewhere, or killed: an error before anything is written, and nothing by halves."""

import errno
import fcntl
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import change_json, contents, make_adapter, make_base, weights
from safetensors.torch import save_file
from typer.testing import CliRunner

import fastlora
from fastlora.checkpoints.folder import MANIFEST
from fastlora.cli import app

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    base = make_base("llama", torch.float32, folder / "base")
    return base, make_adapter(base, folder / "adapter", target_modules=["q_proj", "down_proj"])


@pytest.fixture
def folders(originals, tmp_path):
    for folder in originals:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "out"


def shard(base: Path, index: int = 0) -> Path:
    return sorted(base.glob("*.safetensors"))[index]


def renamed_in_index(base: Path, name: str) -> None:
    places = json.loads((base / INDEX).read_text())["weight_map"]
    first = shard(base).name
    change_json(base / INDEX, weight_map={key: name if file == first else file for key, file in places.items()})


def escape_by_dots(base, adapter):
    (base / "inner").mkdir()
    shutil.move(shard(base), base / "inner" / "x.safetensors")
    renamed_in_index(base, "inner/../inner/x.safetensors")


def escape_by_root(base, adapter):
    renamed_in_index(base, str(shutil.copy(shard(base), base.with_name("x.safetensors"))))


def twice_in_a_header(base, adapter):
    file = shard(base)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    name, values = next((n, v) for n, v in json.loads(header).items() if n != "__metadata__")
    header = header[:-1] + b"," + json.dumps({name: values}).encode()[1:]
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def twice_in_two_files(base, adapter):
    name = next(iter(weights(base)))
    save_file({name: weights(base)[name]}, base / "again.safetensors")
    places = json.loads((base / INDEX).read_text())["weight_map"]
    change_json(base / INDEX, weight_map=places | {"again": "again.safetensors"})


def a_pickle_in_place(base, adapter):
    shard(base).write_bytes(pickle.dumps({"a": 1}))


def only_pickles(base, adapter):
    for file in (*base.glob("*.safetensors"), base / INDEX):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def rewritten_header(base, change):
    file = shard(base)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + length])
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


BROKEN = {
    "dots": (escape_by_dots, "files beside it, found 'inner/../inner/x.safetensors'"),
    "absolute": (escape_by_root, "files beside it, found '/"),
    "hidden": (lambda base, _: renamed_in_index(base, ".x.safetensors"), "files beside it"),
    "missing-shard": (lambda base, _: shard(base, 1).unlink(), "expected a safetensors file, found none"),
    "extra-shard": (
        lambda base, _: shutil.copy(shard(base), base / "model-00099-of-00099.safetensors"),
        r"found others in its folder: \['model-00099",
    ),
    "absent-tensor": (
        lambda base, _: change_json(
            base / INDEX,
            weight_map=json.loads((base / INDEX).read_text())["weight_map"] | {"model.ghost": shard(base).name},
        ),
        r"found others: \['model.ghost'\]",
    ),
    "index-no-json": (lambda base, _: (base / INDEX).write_text("{"), "expected JSON"),
    "duplicate-in-header": (twice_in_a_header, "more than one"),
    "duplicate-in-files": (twice_in_two_files, "each once"),
    "pickle": (a_pickle_in_place, "expected a whole safetensors file"),
    "pickles-only": (only_pickles, "a pickle, which can run any code and is never read"),
    "header-no-json": (lambda base, _: rewritten_header(base, lambda header: b"[" + header[1:]), "header of the safe"),
    "header-of-numbers": (
        lambda base, _: rewritten_header(base, lambda header: header.replace(b'offsets":[0', b'offsets":[-8')),
        "header of the safetensors format",
    ),
    "config-no-json": (lambda base, _: (base / "config.json").write_text("]"), "expected JSON"),
    "no-base": (lambda base, _: shutil.rmtree(base), "no folder"),
    "adapter-pickle": (
        lambda _, adapter: (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin"),
        "a pickle, which can run any code",
    ),
    "no-adapter": (lambda _, adapter: shutil.rmtree(adapter), "adapter_config.json, found none"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_inputs_write_nothing(case, folders):
    base, adapter, out = folders
    spoil, message = BROKEN[case]
    spoil(base, adapter)
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(ValueError, match=message):
        fastlora.merge_checkpoint(base, adapter, out)
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize("where", ["base", "base/deeper/out", "adapter/out", "base/../base", "link/out"])
def test_out_inside_what_is_read(where, folders):
    base, adapter, out = folders
    (out.parent / "link").symlink_to(base)
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(ValueError, match="out: expected a new folder outside of"):
        fastlora.merge_checkpoint(base, adapter, out.parent / where)
    assert sorted(out.parent.rglob("*")) == before


def test_out_that_is_taken(folders):
    base, adapter, out = folders
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="out: expected a new folder, found files"):
        fastlora.merge_checkpoint(base, adapter, out)
    assert contents(out) == {"mine.txt": b"x"}
    with pytest.raises(ValueError, match="out: expected a new folder, found the file"):
        fastlora.merge_checkpoint(base, adapter, out / "mine.txt")


def test_links_in_out_lead_nowhere(folders):
    """Neither a file that an interrupted merge seems to have finished, nor one that it seems to be writing."""
    base, adapter, out = folders
    victim = out.with_name("victim")
    victim.write_text("mine")
    out.mkdir()
    (out / f".{MANIFEST}.partial").symlink_to(victim)
    with pytest.raises(ValueError, match="found a link that leads elsewhere"):
        fastlora.merge_checkpoint(base, adapter, out)
    assert victim.read_text() == "mine"


def test_bases_whose_files_are_links(folders):
    """As the hub's cache has them."""
    base, adapter, out = folders
    fastlora.merge_checkpoint(base, adapter, out.with_name("expected"))
    linked = out.with_name("linked")
    linked.mkdir()
    for file in base.iterdir():
        (linked / file.name).symlink_to(file)
    fastlora.merge_checkpoint(linked, adapter, out)
    assert contents(out) == contents(out.with_name("expected"))
    assert not any(file.is_symlink() for file in out.iterdir())


def test_an_adapter_for_another_base(folders, caplog):
    base, adapter, out = folders
    change_json(adapter / "adapter_config.json", base_model_name_or_path="someone/another-model")
    with caplog.at_level(logging.WARNING, "fastlora"):
        fastlora.merge_checkpoint(base, adapter, out)
    assert "made for 'someone/another-model', and is merged into" in caplog.text
    caplog.clear()
    for place in ("hub/models--someone--another-model/snapshots/0a1b", "another-model"):
        shutil.copytree(base, out.with_name("hubs") / place)
        fastlora.merge_checkpoint(out.with_name("hubs") / place, adapter, out.with_name(place.replace("/", "-")))
    assert not caplog.text


def test_two_merges_at_once(folders):
    base, adapter, out = folders
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="found another process writing"):
        fastlora.merge_checkpoint(base, adapter, out)
    assert not contents(out)
    os.close(descriptor)
    fastlora.merge_checkpoint(base, adapter, out)
    assert "config.json" in contents(out)


def test_no_room(folders, monkeypatch):
    base, adapter, out = folders
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    usage = type("Usage", (), {"free": size - 1})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="expected room for") as caught:
            fastlora.merge_checkpoint(base, adapter, out)
    assert caught.value.errno == errno.ENOSPC
    assert not out.exists()
    usage.free = size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fastlora.merge_checkpoint(base, adapter, out)


# Merges in children, each killed after another time, most while it writes; the parent has imported what takes time.
KILLED = """
import os, random, signal, sys, time
import torch
import fastlora
torch.set_num_threads(1)
base, adapter, out = sys.argv[1:]
fastlora.merge_checkpoint(base, adapter, out)

def child(target):
    pid = os.fork()
    if not pid:
        fastlora.merge_checkpoint(base, adapter, target)
        os._exit(0)
    return pid

start = time.perf_counter()
os.waitpid(child(out + "-timed"), 0)
took, generator, killed = time.perf_counter() - start, random.Random(7), 0
for attempt in range(50):
    pid = child(f"{out}-{attempt}")
    time.sleep(generator.random() * took)
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
print(killed)
"""


def check_readable(folder: Path, expected: dict[str, bytes]) -> None:
    """Whatever has its name is whole, and nothing that a reader needs is there without all the rest."""
    whole = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
    assert all(data == expected[name] for name, data in whole.items())
    assert "config.json" not in whole or whole == expected
    assert INDEX not in whole or {name for name in expected if name.endswith(".safetensors")} <= whole.keys()


def test_fifty_kills(folders):
    base, adapter, out = folders
    command = [sys.executable, "-c", KILLED, *map(str, (base, adapter, out))]
    killed = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    expected, stages = contents(out), set()
    for attempt in range(50):
        left = out.with_name(f"out-{attempt}")
        left.mkdir(exist_ok=True)
        stages.add(len(contents(left)))
        check_readable(left, expected)
        if contents(left) != expected:
            fastlora.merge_checkpoint(base, adapter, left)
        assert contents(left) == expected
    assert killed >= 25
    assert len(stages) >= 4


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["merge", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_the_command_with_several_adapters(folders):
    base, adapter, out = folders
    other = shutil.copytree(adapter, adapter.with_name("other=0"))
    assert run(base, f"{adapter}=0.25", out, "--adapter", other) == (0, f"merged into {out}\n")
    fastlora.merge_checkpoint(base, {adapter: 0.25, other: 1}, out.with_name("expected"))
    assert contents(out) == contents(out.with_name("expected"))


def test_what_the_command_refuses(folders):
    base, adapter, out = folders
    cases = {
        (base, f"{adapter}=half", out): "expected FOLDER=WEIGHT with a number",
        (base, adapter, out, "--adapter", adapter): "expected different folders",
        (base, adapter, base): "out: expected a new folder outside of",
        (base.with_name("nowhere"), adapter, out): "found no folder",
        (base, adapter, out, "--device", "nowhere"): "device: expected one of this machine",
    }
    for arguments, message in cases.items():
        code, output = run(*arguments)
        assert code == 2
        assert message in output
    assert not out.exists()
