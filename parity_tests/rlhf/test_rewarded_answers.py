"""What a reward model gives a model's greedy answers, beside the share of them that is right."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_torch import SamplingConfig, load
from llama_torch.checkpoint.hf import load_reward_model
from llama_torch.tokenizer.chat_template import load_jinja
from llama_torch.tokenizer.loading import load_tokenizer
from tools import right_answers

from ..support.rejection_rounds import CONFIG
from ..support.reward_models import write_reward_model


@pytest.mark.parametrize("template", ["", "llama2"])
def test_the_mean_reward_is_of_the_conversations_with_their_answers(
    folder: Path, tmp_path: Path, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the reward model's own template writes them, whatever the answers were drawn with."""
    asked = [[{"role": "user", "content": f"Count to {i}"}] for i in range(3)]
    about = {"answer": "1", "content": "1", "kind": "counting", "form": "", "turn": 1}
    prompts = tmp_path / "prompts.jsonl"
    lines = (json.dumps({"messages": messages} | about) + "\n" for messages in asked)
    prompts.write_text("".join(lines))
    flags = [str(folder / "policy"), str(prompts), "--max-new-tokens", "4", "--json"]
    flags += ["--template", template, "--reward", str(folder / "reward")]
    assert right_answers.main(flags) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert found["number"] == 3
    model = load_reward_model(folder / "reward")
    own = load_jinja(folder / "reward", load_tokenizer(folder / "reward", CONFIG.vocab_size))
    policy = load(folder / "policy", template=template)
    settings = SamplingConfig(max_new_tokens=4, temperature=0)
    scores = []
    for messages, answer in zip(asked, policy.chat_batch(asked, settings), strict=True):
        said = {"role": "assistant", "content": answer.text}
        ids = own.encode([*messages, said], prompts=False)
        hidden_BTD, _ = model(torch.tensor([ids]), project=False)
        scores.append((hidden_BTD[0, -1] @ model.head_weight[0]).item())
    assert found["reward"] == pytest.approx(statistics.fmean(scores), rel=1e-4, abs=1e-5)


def test_a_conversation_beyond_the_reward_models_context_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reward_model(tmp_path / "short", "bytes", replace(CONFIG, max_seq_len=8), 3)
    prompts = tmp_path / "prompts.jsonl"
    about = {"answer": "1", "content": "1", "kind": "counting", "form": "", "turn": 1}
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "1"}]} | about))
    flags = [str(folder / "policy"), str(prompts), "--max-new-tokens", "12"]
    assert right_answers.main([*flags, "--reward", str(tmp_path / "short")]) == 2
    assert "its context holds 8 tokens, and the longest conversation has" in capsys.readouterr().err
