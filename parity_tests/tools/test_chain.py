"""The chain from a base model to a chat model: its commands, their order, and its measures."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_common import cli
from llama_torch.config import TrainConfig
from llama_torch.finetuning_config import RewardConfig, SftConfig
from tools import chain
from tools.synthetic import progress
from tools.synthetic.progress import Measured
from tools.synthetic.stages import COMMANDS, stages, tasks_words
from tools.tasks import TasksConfig


def configs() -> dict[str, Any]:
    """Return each command's config by the module or script that is run."""
    # Late: these name what imports torch.
    from llama_torch.gatt import GattConfig
    from llama_torch.ppo_config import PpoConfig
    from llama_torch.rlhf.rejection_config import RejectionConfig

    of_modules = {
        "train": TrainConfig,
        "sft": SftConfig,
        "reward": RewardConfig,
        "rejection": RejectionConfig,
        "ppo": PpoConfig,
        "gatt": GattConfig,
    }
    return {f"llama_torch.{name}": config for name, config in of_modules.items()}


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_every_stage_is_a_command_that_its_program_takes(device: str) -> None:
    for stage in stages("some folder", 3, device):
        python, flag, module, *flags = stage.words
        assert (python, flag) == ("python", "-m")
        config = cli.parse(configs()[module], flags)
        assert config.out == f"some folder/3/{stage.name}"
        assert config.seed == 3
        assert config.device == device


def test_the_page_has_the_commands_as_they_are_run() -> None:
    page = (chain.ROOT / "docs" / "chat-model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    typed = [words for words in map(shlex.split, lines) if "chain/0" in " ".join(words)]
    wanted = [list(stage.words) for stage in stages("chain", 0)]
    assert typed[: len(wanted)] == wanted
    assert tasks_words("chain") in [shlex.split(line) for line in lines]


def test_each_stage_begins_from_what_others_made_before() -> None:
    made = {"chain/tasks"}
    for stage in stages("chain", 0):
        read = [word for word in stage.words[:-1] if word.startswith("chain/")]
        for path in read:
            assert any(path == one or path.startswith(f"{one}/") for one in made), path
        made.add(stage.words[-1])


def test_shown_commands_are_those_that_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two seeds; a chain that is continued runs what is not recorded, and no more."""
    folder = tmp_path / "chain"
    assert chain.main([str(folder), "--seeds", "2", "--show"]) == 0
    shown = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    ran: list[list[str]] = []

    def run(words: list[str], **_: Any) -> Any:
        out = subprocess.CompletedProcess(words, 0)
        if "--json" in words:
            turns = {"lasting": {"turns": 2.5}}
            shares = [{"right": 0.5, "reward": 1.0}]
            out.stdout = json.dumps(turns if "instruction_turns" in words[1] else shares)
            return out
        ran.append([w.replace(f"{chain.ROOT}/", "") for w in ["python", *words[1:]]])
        made = Path(words[2] if "tasks.py" in words[1] else words[-1])
        made.mkdir(parents=True)
        out.returncode = 3 if made.name == "ppo" and fails else 0
        return out

    ran_by = SimpleNamespace(run=run, PIPE=subprocess.PIPE)
    monkeypatch.setattr(chain, "subprocess", ran_by)
    fails = True
    assert chain.main([str(folder), "--seeds", "2"]) == 2
    assert "ended with exit code 3: python -m llama_torch.ppo" in capsys.readouterr().err
    assert (folder / "0" / "ppo").exists()
    stopped, fails = len(ran) - 1, False
    assert chain.main([str(folder), "--seeds", "2"]) == 0
    assert "ppo is not whole, and is made again" in capsys.readouterr().out
    assert ran[:stopped] + ran[stopped + 1 :] == shown
    recorded = progress.read(folder / chain.RECORD)
    assert [(one.seed, one.stage) for one in recorded] == [
        (seed, name) for seed in range(2) for name in COMMANDS
    ]
    assert {one.stage: one.right for one in recorded}["gatt"] == 0.5
    assert (folder / chain.PICTURE).read_text().startswith("<?xml")


def test_the_table_has_means_and_standard_errors() -> None:
    found = [
        *(Measured(0, "base", 10.0), Measured(1, "base", 20.0)),
        *(Measured(0, "sft", 1.0, 0.5, None, 2.0), Measured(1, "sft", 1.0, 0.7, None, 2.0)),
        Measured(0, "ppo", 2.0, 0.25, 1.5, 3.0),
    ]
    assert progress.table(found).splitlines()[2:] == [
        "| base | 2 |  |  |  | 15 |",
        "| sft | 2 | 60.0% ± 10.0% |  | 2.00 | 1 |",
        "| ppo | 1 | 25.0% | 1.50 | 3.00 | 2 |",
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--until", "nothing"], "--until nothing: choose one of base, sft"),
        (["--seeds", "0"], "--seeds must lie between 1 and 100, got 0"),
    ],
)
def test_wrong_flags_are_refused(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chain.main([str(tmp_path / "chain"), *flags]) == 2
    assert says in capsys.readouterr().err


def test_another_folder_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert chain.main([str(tmp_path / "mine")]) == 2
    assert "is no folder of a chain; name a new one" in capsys.readouterr().err
    assert not list((tmp_path / "mine").iterdir())
    assert TasksConfig(str(tmp_path)).turns == 3
