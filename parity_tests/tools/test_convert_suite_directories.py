"""Directories that the conformance suite gives to ports, through this project's own converter."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_parity.conversion.gguf_file import GgufFile
from llama_torch import load
from llama_torch.checkpoint.hf import load_model
from reference_np.config import LlamaConfig
from reference_np.naming import LM_HEAD

from ..conformance.architectures import configs, seeds
from ..conformance.directories import forms, write_directory
from ..conformance.strategies import random_params
from .commands import run_convert

pytest.importorskip("gguf")
TOKEN_IDS = ("bos_token_id", "eos_token_id")


@given(config=configs(), seed=seeds, data=st.data())
def test_a_directory_of_the_suite_goes_to_gguf_and_back(
    tmp_path_factory: pytest.TempPathFactory, config: LlamaConfig, seed: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "a").mkdir()
    form = data.draw(forms(config))
    stored = write_directory(folder / "a", config, random_params(config, seed), form)
    told = json.loads((folder / "a" / "config.json").read_text())
    special = load(folder / "a").tokenizer.special
    assert {told[key] for key in TOKEN_IDS} <= {*special.values()}
    run_convert(folder / "a", folder / "b.gguf")
    metadata = GgufFile(folder / "b.gguf").metadata
    assert [metadata[f"tokenizer.ggml.{key}"] for key in TOKEN_IDS] == [told[k] for k in TOKEN_IDS]
    run_convert(folder / "b.gguf", folder / "c")
    found = json.loads((folder / "c" / "config.json").read_text())
    assert LlamaConfig.from_hf(found) == config
    assert found["dtype"] == form.stored
    assert [found[key] for key in TOKEN_IDS] == [told[key] for key in TOKEN_IDS]
    loaded = load_model(folder / "c").state_dict()
    assert loaded.keys() - {LM_HEAD} == stored.keys() - {LM_HEAD}
    for name, value in stored.items():
        np.testing.assert_array_equal(loaded[name].double().numpy(), value)
