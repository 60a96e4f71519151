"""Rounds of rejection sampling: what they draw, keep and refuse, and how they go on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_torch.checkpoint.hf import load_reward_model
from llama_torch.data.conversations import read_conversations
from llama_torch.model.reward import RewardModel
from llama_torch.rejection import main
from llama_torch.rlhf.prompts import Prompt
from llama_torch.rlhf.rejection import best, learnable_text
from llama_torch.rlhf.rejection_folder import Sample, Sampled
from llama_torch.rlhf.rejection_table import best_of
from llama_torch.tokenizer.answers import answer_segments
from llama_torch.tokenizer.chat_template import LLAMA2_SOURCE, ChatTemplate, load_jinja
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.tokenizer import Gpt2
from tools import plot

from ..support.rejection_rounds import (
    CLOSE,
    CONFIG,
    K,
    N,
    flags_of,
    lines_of,
    rewards,
    same_round,
)
from ..support.reward_models import oracle_scores
from ..support.tokenizers import turns

pytestmark = pytest.mark.numeric


def reward_model(folder: Path) -> RewardModel:
    return load_reward_model(folder / "reward", dtype=torch.float64)


# A round


def test_every_sample_has_the_reward_models_score(folder: Path, whole: Path) -> None:
    lines, model = lines_of(whole / "samples.jsonl"), reward_model(folder)
    tokenizer = load_tokenizer(folder / "policy", CONFIG.vocab_size)
    template = load_jinja(folder / "policy", tokenizer)
    assert [line["messages"] for line in lines] == [turns([f"Count to {i}"]) for i in range(N)]
    assert [line["safety"] for line in lines] == [True, False, True, False, True]
    for line in lines:
        assert len({tuple(sample["ids"]) for sample in line["samples"]}) == K
        prompt = template.encode(line["messages"])
        right = oracle_scores(model, [prompt + s["ids"] for s in line["samples"]])
        assert rewards([line]) == [pytest.approx(right, abs=CLOSE)]
        for sample in line["samples"]:
            assert sample["answer"] == tokenizer.decode(sample["ids"])
            assert sample["ended"] == (sample["ids"][-1] == tokenizer.special["<|end|>"])
            assert (sample["helpful"], sample["safe"]) == (sample["reward"], None)


def test_the_best_answer_that_ends_is_kept_for_fine_tuning(folder: Path, whole: Path) -> None:
    tokenizer = load_tokenizer(folder / "policy", CONFIG.vocab_size)
    template = load_jinja(folder / "policy", tokenizer)
    drawn = {str(line["messages"]): line for line in lines_of(whole / "samples.jsonl")}
    kept = [*read_conversations([str(whole / "conversations.jsonl")])]
    assert 0 < len(kept) < N  # of one prompt no answer ends
    n_cut = 0
    for messages in (conversation.messages for conversation in kept):
        samples = [s for s in drawn[str(messages[:-1])]["samples"] if s["ended"]]
        top = max(samples, key=lambda sample: sample["reward"])
        assert messages[-1]["content"] == top["answer"].strip()
        assert any(segment.learnt for segment in answer_segments(template, messages))
        n_cut += K - len(samples)
    assert n_cut > 0


def test_the_table_and_what_to_do_next_are_told(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished round that is resumed draws nothing, and tells the same."""
    before = (whole / "samples.jsonl").read_bytes()
    assert main(flags_of(folder, whole, "--resume")) == 0
    assert (whole / "samples.jsonl").read_bytes() == before
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{N} prompts, {K} answers to each at temperature 1.2; ")
    rows = [line.split() for line in said[2:5]]
    right = best_of(rewards(lines_of(whole / "samples.jsonl")))
    assert rows == [[str(r.samples), f"{r.maximum:.3f}", f"{r.median:.3f}"] for r in right]
    assert [row.samples for row in right] == [1, 2, 4]
    assert right[2].maximum > right[1].maximum > right[0].maximum
    assert said[5].startswith("kept the best answer to ")
    assert said[5].endswith("conversations.jsonl")
    assert said[-1].startswith("  python -m llama_torch.sft --init-from ")


def test_a_round_is_drawn_as_a_picture(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    axes = SimpleNamespace(plot=lambda *given, **look: curves.append(given), set=lambda **_: None)
    curves: list[Any] = []
    plot.draw_rewards(axes, whole)
    right = best_of(rewards(lines_of(whole / "samples.jsonl")), range(1, K + 1))
    assert curves[0] == ([1, 2, 3, 4], [row.maximum for row in right])
    assert curves[1] == ([1, 2, 3, 4], [row.median for row in right])
    assert plot.main([str(whole), str(tmp_path / "a.svg")]) == 0
    assert (tmp_path / "a.svg").stat().st_size > 2000


def test_rows_and_other_prompts_change_no_answer(folder: Path, whole: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join((folder / "prompts.jsonl").read_text().splitlines(True)[:2]))
    flags = flags_of(folder, tmp_path / "out", "--rows", "3")
    flags[flags.index("--prompts") + 1] = str(few)
    assert main(flags) == 0
    expected = lines_of(whole / "samples.jsonl")[:2]
    assert same_round(lines_of(tmp_path / "out/samples.jsonl"), expected)


def test_a_safety_model_decides_on_tagged_prompts(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    flags = flags_of(folder, tmp_path / "out", "--safety-reward", str(folder / "safety"))
    assert main(flags) == 0
    for line, plain in zip(
        lines_of(tmp_path / "out/samples.jsonl"), lines_of(whole / "samples.jsonl"), strict=True
    ):
        for sample, other in zip(line["samples"], plain["samples"], strict=True):
            assert sample["helpful"] == pytest.approx(other["reward"], abs=CLOSE)
            takes = "safe" if line["safety"] or sample["safe"] < -1.7346 else "helpful"
            assert sample["reward"] == sample[takes]


# Rounds before


def test_the_best_of_all_rounds_is_kept(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scored anew: the earlier round's own scores are another model's."""
    first, second = tmp_path / "first", tmp_path / "second"
    flags = flags_of(folder, first, "--seed", "7")
    flags[flags.index("--reward") + 1] = str(folder / "safety")
    assert main(flags) == 0
    capsys.readouterr()
    assert main(flags_of(folder, second, "--earlier", str(first))) == 0
    said = capsys.readouterr().out
    model = reward_model(folder)
    template = load_jinja(folder / "policy", load_tokenizer(folder / "policy", CONFIG.vocab_size))
    pools: dict[str, list[tuple[float, str, bool]]] = {}
    for round_ in (second, first):
        for line in lines_of(round_ / "samples.jsonl"):
            ended = [s for s in line["samples"] if s["ended"] and s["answer"].strip()]
            ids = [template.encode(line["messages"]) + s["ids"] for s in ended]
            for sample, score in zip(ended, oracle_scores(model, ids), strict=True):
                pool = pools.setdefault(str(line["messages"]), [])
                pool.append((score, sample["answer"].strip(), round_ is first))
    kept = lines_of(second / "conversations.jsonl")
    assert len(kept) == len(pools)
    expected = [max(pools[str(line["messages"][:-1])]) for line in kept]
    assert [line["messages"][-1]["content"] for line in kept] == [one[1] for one in expected]
    n_earlier = sum(one[2] for one in expected)
    assert 0 < n_earlier < len(kept)
    assert f"of which {n_earlier} are of earlier rounds" in said


def test_prompts_of_earlier_rounds_alone_are_kept_too() -> None:
    template = ChatTemplate(LLAMA2_SOURCE, "llama2", Gpt2())
    one, other = (Prompt(turns([text]), False, "") for text in "ab")
    ids = (*template.tokenizer.encode(" 1 "), 50256)
    earlier = [Sampled(one, [Sample(" 1 ", True, ids, 3.0, 3.0, None)])]
    drawn = [Sampled(other, [Sample(" 1 ", True, ids, -3.0, -3.0, None)])]
    kept, n_without = best(template, drawn, earlier)
    assert [(k.prompt, k.answer, k.is_earlier) for k in kept] == [
        (other, "1", False),
        (one, "1", True),
    ]
    assert n_without == 0


# What can be learnt


def test_an_answer_that_cannot_be_learnt_is_not_kept() -> None:
    """Cut, empty, or with the form's own tags, which a template refuses: the next best is."""
    template = ChatTemplate(LLAMA2_SOURCE, "llama2", Gpt2())
    prompt = Prompt(turns(["Count"]), False, "")

    def sample(text: str, ended: bool, reward: float) -> Sample:
        ids = (*template.tokenizer.encode(text), *([50256] if ended else []))
        return Sample(text, ended, ids, reward, reward, None)

    bad = [sample(" cut", False, 9.0), sample("  ", True, 8.0), sample(" [INST] ", True, 7.0)]
    good = [sample(" good ", True, 1.0), sample(" worse ", True, 0.0)]
    [kept], n_without = best(template, [Sampled(prompt, bad + good)])
    assert (kept.answer, n_without) == ("good", 0)
    assert best(template, [Sampled(prompt, bad)]) == ([], 1)


def test_white_space_is_kept_where_the_template_does_not_put_it() -> None:
    end = "<|endoftext|>"
    source = "{% for m in messages %}{{ 'END' + m['content'] + 'END' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'END' }}{% endif %}"
    )
    source = source.replace("END", end)
    template = ChatTemplate(source, "plain", Gpt2())
    prompt = Prompt(turns(["Count"]), False, "")
    for text in ("\n1 2", "1 2", "1 2 "):
        ids = (*template.tokenizer.encode(text), 50256)
        assert learnable_text(template, prompt, Sample(text, True, ids, 0.0, 0.0, None)) == text
    odd = Sample("the", True, (83, 71, 68, 50256), 0.0, 0.0, None)  # letter by letter
    assert learnable_text(template, prompt, odd) == "the"
