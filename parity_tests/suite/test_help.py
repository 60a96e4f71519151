"""Every command answers --help, --help-all and a wrong command line on one screen or one line."""

import dataclasses
import importlib
import re
from typing import Any

import pytest

from llama_common import cli, help_text
from llama_common.errors import InputError
from llama_common.flags import Flag, flags_of
from llama_common.settings import Setting, check_settings
from llama_parity.comparison.config import CompareConfig
from llama_parity.convert import ConvertConfig
from llama_parity.random_checkpoint import ShapeConfig
from llama_torch.chat import ChatConfig
from llama_torch.config import TrainConfig
from llama_torch.evaluate import EvaluateConfig
from llama_torch.export import ExportConfig
from llama_torch.finetuning_config import RewardConfig, SftConfig
from llama_torch.gatt import GattConfig
from llama_torch.generate import GenerateConfig
from llama_torch.ppo_config import PpoConfig
from llama_torch.prepare import PrepareConfig
from llama_torch.rlhf.rejection_config import RejectionConfig
from tools.attention_plot import AttentionConfig
from tools.bench import BenchConfig
from tools.benchmarks.scaling_config import ScalingConfig
from tools.chain import ChainConfig
from tools.instruction_turns import TurnsConfig
from tools.learning import LearningConfig
from tools.plot import PlotConfig
from tools.rank_pairs import RankConfig
from tools.right_answers import AnswersConfig
from tools.tasks import TasksConfig

CONFIGS: list[Any] = [
    *(
        TrainConfig,
        SftConfig,
        RewardConfig,
        PpoConfig,
        RejectionConfig,
        GenerateConfig,
        ChatConfig,
        EvaluateConfig,
        PrepareConfig,
        ExportConfig,
        GattConfig,
    ),
    *(CompareConfig, ConvertConfig, BenchConfig, LearningConfig, PlotConfig, ShapeConfig),
    *(ScalingConfig, TasksConfig, AnswersConfig, RankConfig, TurnsConfig, AttentionConfig),
    ChainConfig,
]
FLAGS = [(config, flag) for config in CONFIGS for flag in flags_of(config)]
LINES, COLUMNS = 30, 80

for_each_command = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


def shown(config: Any, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.parse(config, [flag])
    assert not ended.value.code
    return capsys.readouterr().out


@for_each_command
def test_help_fits_a_screen(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(config, "--help", capsys)
    assert text == shown(config, "-h", capsys)
    lines = text.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert ("--help-all shows" in text) == hasattr(config, "basic")


@for_each_command
def test_the_usage_is_what_a_user_types(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    usage = " ".join(shown(config, "--help", capsys).partition("\n\n")[0].split()) + " "
    found = re.match(r"usage: python (?:-m (llama_torch\.\w+)|(tools/\w+)\.py) ", usage)
    assert found
    module = found[1] or found[2].replace("/", ".")
    assert callable(importlib.import_module(module).main)
    for flag in flags_of(config):
        assert (flag.word in usage) == (flag.default is dataclasses.MISSING)


@for_each_command
def test_all_flags_are_told_with_their_defaults(
    config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = re.split(r"\n  (?=\S)", shown(config, "--help-all", capsys))[1:]
    hidden = getattr(config, "hidden", "").split()
    flags = [flag for flag in flags_of(config) if flag.name not in hidden]
    assert len(entries) == len(flags) > 1
    for flag, entry in zip(flags, entries, strict=True):
        plain = " ".join(entry.split())
        words = plain.replace("[no-]", "").split()
        assert words[0] == flag.word
        told = re.search(r"\((?:required|default: [^()]+(?:\(.*\))?)\)", plain)
        assert told, plain
        assert len(plain) > len(flag.word) + len(told[0]) + 10, f"{flag.word} is not described"
        for choice in flag.choices:
            assert choice in plain


@for_each_command
def test_basic_flags_are_flags_of_the_command(config: Any) -> None:
    names = getattr(config, "basic", "").split()
    assert set(names) <= {flag.name for flag in flags_of(config)}
    assert len(names) == len(set(names)) <= 16


@for_each_command
def test_flags_that_a_command_refuses_are_told_nowhere(
    config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    names = getattr(config, "hidden", "").split()
    flags = {flag.name: flag for flag in flags_of(config)}
    assert set(names) <= flags.keys() - set(getattr(config, "basic", "").split())
    text = shown(config, "--help-all", capsys).replace("[no-]", "")
    entries = {entry.split()[0] for entry in re.split(r"\n  (?=\S)", text)[1:]}
    assert not {flags[name].word for name in names} & entries
    assert bool(names) == (config in (SftConfig, RewardConfig, PpoConfig))


def test_the_defaults_told_are_those_of_the_settings_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--max-new-tokens N Maximum number of new tokens (default: 512)" in " ".join(
        shown(ChatConfig, "--help", capsys).split()
    )
    monkeypatch.setattr(help_text, "WIDTHS", (200, 200))
    settings = {"lr": Setting(0.125, "a file")}
    with pytest.raises(SystemExit):
        cli.parse(TrainConfig, ["--help"], settings)
    assert re.search(r"--lr X +Peak learning rate.*\(default: 0\.125\)", capsys.readouterr().out)


@pytest.mark.parametrize("config", [SftConfig, RewardConfig])
def test_the_context_told_is_the_one_that_fine_tuning_takes(
    config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the longest that a model's own context is cut to, not the default of a new model."""
    text = " ".join(shown(config, "--help-all", capsys).split())
    found = re.search(r"--max-seq-len N .*?\(default: (\d+)\)", text)
    assert found
    assert int(found[1]) == config.longest_window == 4096


# Words that are no flags


def complaint(config: Any, *argv: str) -> str:
    with pytest.raises(InputError) as raised:
        cli.parse(config, argv)
    message = str(raised.value)
    assert "\n" not in message
    assert message.endswith("see --help")
    return message


def misspelt(flag: Flag) -> list[str]:
    """Return the flag without its last letter, with one doubled, and with two exchanged."""
    word = flag.word
    found = [word[:-1], word[:4] + word[3:], f"{word[:-2]}{word[-1]}{word[-2]}"]
    return [wrong for wrong in found if wrong != word]


@pytest.mark.parametrize(
    ("config", "flag"),
    [(config, flag) for config, flag in FLAGS if len(flag.word) > 6 and not flag.metavar],
    ids=lambda value: value.word if isinstance(value, Flag) else value.__name__,
)
def test_a_misspelt_flag_is_answered_with_the_nearest(config: Any, flag: Flag) -> None:
    words = {known.word for known in flags_of(config)}
    for wrong in misspelt(flag):
        if wrong in words:
            continue
        message = complaint(config, wrong, "4")
        assert message.startswith(f"{wrong} 4: no such flag; did you mean ")
        assert flag.word in re.findall(r"--[\w-]+", message.partition("mean")[2])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--batchsize 4", "--batchsize 4: no such flag; did you mean --batch-size? see --help"),
        ("--step 4", "--step 4: no such flag; did you mean --steps? see --help"),
        ("--batch_sizes=4", "--batch_sizes=4: no such flag; did you mean --batch-size?"),
        ("-steps 4", "-steps 4: no such flag; did you mean --steps?"),
        ("\N{EM DASH}steps 4", "\N{EM DASH}steps 4: no such flag; did you mean --steps?"),
        ("--learning-rate 4", "did you mean --lr?"),
        ("--layers 4", "did you mean --n-layers?"),
        ("--Steps 4", "did you mean --steps?"),
        ("--no-keep-bset", "--no-keep-bset: no such flag; did you mean --no-keep-best?"),
        ("--qqqq", "--qqqq: no such flag; see --help"),
        ("--sample-prompt -qq", "a value that begins with a dash is written --sample-prompt=-qq"),
        ("--steps 4 5", "5: belongs to no flag"),
        ("--resume yes", "yes: --resume takes no value; give it alone, or --no-resume"),
        ("--resume=yes", "yes: --resume takes no value; give it alone, or --no-resume"),
        ("--steps four", "--steps must be a whole number, got 'four'"),
        ("--lr fast", "--lr must be a number, got 'fast'"),
        ("--weights a", "--weights must be numbers, got 'a'"),
        ("--steps", "--steps: its value is missing"),
        ("--device cude", "--device cude: not one of auto, cpu, cuda; did you mean cuda?"),
        ("--compile maybe", "--compile maybe: not one of auto, yes, no; see --help"),
        ("--q" + "x" * 5000, "x: no such flag; see --help"),
    ],
)
def test_a_wrong_word_is_one_line(argv: str, said: str) -> None:
    assert said in complaint(TrainConfig, *argv.split(" "))


@for_each_command
def test_what_is_required_is_named(config: Any) -> None:
    required = [flag.word for flag in flags_of(config) if flag.default is dataclasses.MISSING]
    if required:
        assert complaint(config) == f"{' and '.join(required)}: required; see --help"


def test_values_may_look_like_flags_where_they_are_told_apart() -> None:
    config = cli.parse(GenerateConfig, ["--ckpt", "a", "--prompt=--steps", "--logprobs", "-1"])
    assert config.prompt == ("--steps",)
    assert cli.parse(ConvertConfig, ["--", "-a", "--b"]).dst == "--b"
    assert cli.parse(TrainConfig, ["--keep_best", "--no_keep_best"]).keep_best is False
    assert cli.parse(CompareConfig, ["a", "--json", "-"]).json == "-"
    spoken = ("\N{EM DASH}Hello", "\N{EN DASH} Yes, he said", "-- x")
    assert cli.parse(GenerateConfig, ["--ckpt", "a", "--prompt", *spoken]).prompt == spoken


@pytest.mark.parametrize("flag", ["--init-from", "--init_from"])
def test_flags_that_are_read_first_may_have_underscores(flag: str) -> None:
    assert cli.early_flags([flag, "a"], TrainConfig).init_from == "a"
    assert cli.early_flags([f"{flag}=a"], TrainConfig).init_from == "a"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"batchsize": 4}, "unknown setting batchsize; did you mean batch_size? see --help-all"),
        ({"optim": {"learning_rate": 4}}, "unknown setting learning_rate; did you mean lr?"),
        ({"device": "cude"}, "got 'cude'; did you mean cuda? correct it"),
        ({"q" * 5000: 4}, "qqq; see --help-all for the names"),
        ({"device": "q" * 5000}, "...; correct it"),
        ({"device": 5}, "got 5; correct it"),
    ],
)
def test_a_misspelt_key_or_choice_of_a_file_is_answered_with_the_nearest(
    table: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as raised:
        check_settings(table, TrainConfig, "a.toml")
    assert said in str(raised.value)
