"""Tokenizers of the three kinds, for every test here."""

from pathlib import Path
from typing import Any

import pytest

from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.tokenizer import Tokenizer

from ..support.tokenizers import KINDS

VOCAB = 50257


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(folder, VOCAB) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    load = transformers.PreTrainedTokenizerFast.from_pretrained
    return {kind: load(folders[kind]) for kind in ("gpt2", "bytes", "spaced")}
