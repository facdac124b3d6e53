"""Parquet, and the `datasets` library: files, folders, splits, and what is said where either is not there."""

from __future__ import annotations

import datetime
import json
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from surgery.compiler.diagnostics import SurgError
from surgery.runtime.data import Data, load_data
from surgery.runtime.data.reader import is_dataset
from tests.surgery.data.test_chat import CHAT, plan
from tests.tokenizer import byte_level

ROWS = [{"text": f"row {number}", "when": datetime.date(2024, 1, number + 1)} for number in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written beside the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def read(folder: Path, path: str, **data: Any) -> Data:
    block = {"path": path, "messages": None, "loss": "all", **data}
    return load_data(plan(**block), folder, byte_level())


def texts(data: Data) -> list[str]:
    return [byte_level().decode(tokens, skip_special_tokens=True) for tokens in data.train.documents.tokens]


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def test_parquet(tmp_path: Path) -> None:
    parquet(tmp_path / "rows.parquet", ROWS)
    assert texts(read(tmp_path, "rows.parquet")) == [f"row {number}" for number in range(5)]
    assert texts(read(tmp_path, "rows.parquet", text="{when}"))[0] == "2024-01-01"
    parquet(tmp_path / "chat.parquet", [{"messages": CHAT}, {"messages": CHAT[1:3]}])
    chat = read(tmp_path, "chat.parquet", messages="messages", loss="assistant")
    assert len(chat.train) == 2 and not chat.warnings


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    parquet(tmp_path / "rows.parquet", ROWS)
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(whole[:-20])
    with pytest.raises(SurgError, match=r"SURG050.*rows.parquet: not Parquet"):
        read(tmp_path, "rows.parquet")
    with pytest.raises(SurgError, match=r"(?s)SURG050.*none.parquet: there is no such file"):
        read(tmp_path, "none.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`set`: a dataset of files, two splits."""
    (tmp_path / "set").mkdir()
    for split, count in (("train", 4), ("test", 2)):
        rows = [{"text": f"{split} {number}", "messages": CHAT} for number in range(count)]
        (tmp_path / "set" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_folder_of_files(folder: Path) -> None:
    assert texts(read(folder, "set")) == [f"train {number}" for number in range(4)]
    assert texts(read(folder, "set", split="test")) == ["test 0", "test 1"]
    both = read(folder, "set", eval_split="test")
    assert len(both.train) == 4 and both.held_out is not None and len(both.held_out) == 2
    assert len(read(folder, "set", messages="messages", loss="assistant").train) == 4
    assert not list((folder / "cache").rglob("*.arrow"))  # streamed: there is no second copy of the rows


def test_a_folder_that_the_library_saved(folder: Path) -> None:
    loaded = datasets.load_dataset(str(folder / "set"))
    loaded.save_to_disk(str(folder / "saved"))
    loaded["test"].save_to_disk(str(folder / "one"))
    assert texts(read(folder, "saved", split="test")) == texts(read(folder, "one")) == ["test 0", "test 1"]


@pytest.mark.parametrize(
    ("path", "block", "words"),
    [
        ("set", {"split": "valid"}, "SURG050.*Bad split.*write `split = NAME`"),
        ("saved", {"split": "valid"}, "SURG050.*Unknown split.*write `split = NAME`"),
        ("set", {"subset": "main"}, "SURG050.*BuilderConfig.*`subset = NAME`"),
        (
            "set",
            {"text": "{texts}"},
            "SURG051.*set, split train, row 1: there is no column `texts`.*did you mean `text`",
        ),
        ("set/train.jsonl", {"split": "train"}, "SURG004.*is a file, and only a dataset has a `split`"),
        ("empty", {}, "SURG050"),
    ],
)
def test_what_is_wrong_with_a_dataset(folder: Path, path: str, block: dict[str, Any], words: str) -> None:
    (folder / "empty").mkdir()
    datasets.load_dataset(str(folder / "set")).save_to_disk(str(folder / "saved"))
    with pytest.raises(SurgError, match=f"(?s){words}"):
        read(folder, path, **block)


def test_a_dataset_of_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(SurgError, match=r"(?s)SURG050.*org/chats, split train_sft: the hub cannot be reached"):
        read(tmp_path, "org/chats", split="train_sft")
    assert before == datasets.config.HF_HUB_OFFLINE


def test_which_names_are_datasets(folder: Path) -> None:
    yes = ("set", "org/name", "org/name-v1.5", "gsm8k", "HuggingFaceH4/ultrachat_200k")
    no = ("set/train.jsonl", "rows.jsonl", "rows.parquet", "rows.txt", "data/rows.json", "./rows", "a/b/c", "~/rows")
    assert [is_dataset(name, folder) for name in yes] == [True] * len(yes)
    assert [is_dataset(name, folder) for name in no] == [False] * len(no)


@pytest.mark.parametrize(("path", "package"), [("rows.parquet", "pyarrow"), ("org/name", "datasets")])
def test_a_package_that_is_not_installed(
    path: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "rows.parquet", ROWS)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SurgError, match=rf"(?s)SURG063.*the package `{package}`.*pip install \"surg\[data\]\""):
        read(tmp_path, path)
