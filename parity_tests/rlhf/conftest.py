"""A round of rejection sampling by small models, for the tests of what it draws and keeps."""

import json
from pathlib import Path

import pytest

from llama_torch.rejection import main

from ..support.rejection_rounds import CONFIG, N, flags_of
from ..support.reward_models import write_policy, write_reward_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rejection")
    write_policy(made / "policy", "bytes", CONFIG)
    for seed, name in enumerate(("reward", "safety"), 3):
        write_reward_model(made / name, "bytes", CONFIG, seed)
    records = [{"prompt": f"Count to {i}", "safety": i % 2 == 0} for i in range(N)]
    (made / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return made


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    assert main(flags_of(folder, folder / "whole")) == 0
    return folder / "whole"
