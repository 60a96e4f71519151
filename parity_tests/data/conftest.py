"""The text that tests of token shards prepare."""

import json
from pathlib import Path

import pytest

from llama_torch.data import documents
from llama_torch.data.text_files import Text, find_files, identify

from ..support.token_shards import LINES


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Text:
    """Files of every kind, each of several pieces."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "PIECE", 500)
    monkeypatch.setattr(documents, "ROWS", 7)
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(LINES))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    table = pyarrow.table({"text": [None, *LINES, ""]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=25)
    (folder / "d.md").write_text("")
    (folder / "e.md").write_text("The end.")
    return identify(find_files([str(folder)]), "text")
