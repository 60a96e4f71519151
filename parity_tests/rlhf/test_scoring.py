"""Scores of drawn answers: the oracle's, and those of the reward trainer's own evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llama_common.errors import InputError
from llama_common.files import read_json, write_json
from llama_torch.data.preferences import read_pairs
from llama_torch.model.config import ModelConfig
from llama_torch.rlhf.answers import Answer
from llama_torch.rlhf.prompts import Prompt, TokenisedPrompt, tokenise
from llama_torch.rlhf.scoring import Scorer, combined_scores, load_scorer, score_answers
from llama_torch.tokenizer.chat_template import LLAMA2_SOURCE, ChatTemplate
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.training import pair_loading
from llama_torch.training.pair_objective import PairLoss
from llama_torch.training.pair_source import pair_batch, pair_batches
from llama_torch.training.validate import measure
from reference_np.reward import combined_score

from ..support import tokenizers
from ..support.pairs import sums, write_pairs
from ..support.reward_models import oracle_scores, write_reward_model
from ..support.tokenizers import turns

pytestmark = pytest.mark.numeric

CLOSE = 1e-9
CONFIG = ModelConfig(16, 2, 4, 2, 4, 24, 520, 96, 1e-5, 10000.0, False)
OPENED = "{% if add_generation_prompt %}{{ '<|head|>' }}{% else %}END{% endif %}"
EACH = "{% for m in messages %}{{ '<|head|>' + m['content'] + '<|end|>\n' }}{% endfor %}" + OPENED
# As Phi-3's: a token behind the last message, where nothing is to be generated.
CLOSED = EACH.replace("END", "<|begin|>")
PROMPTS = [*("Count to 3", "Be", "What is the first of Emma and Nick, and which is the last?")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rewards")


@pytest.fixture(scope="module")
def policy(folder: Path) -> ChatTemplate:
    """The tokenizer and template of the model that answers."""
    tokenizers.byte_level(folder)
    return ChatTemplate(CLOSED, "policy", load_tokenizer(folder, CONFIG.vocab_size))


@pytest.fixture(scope="module")
def same(folder: Path, policy: ChatTemplate) -> Scorer:
    """A reward model with the same tokenizer and template."""
    written = write_reward_model(folder / "same", "bytes", CONFIG, 0, CLOSED)
    return load_scorer(str(written), policy, dtype=torch.float64)


def asked(policy: ChatTemplate, tags: list[bool] | None = None) -> list[TokenisedPrompt]:
    given = [
        Prompt(turns([text]), bool(tags and tags[i]), f"line {i}") for i, text in enumerate(PROMPTS)
    ]
    return tokenise(given, policy, 200, 8)


def whole_conversations(
    scorer: Scorer, prompts: list[TokenisedPrompt], texts: list[str]
) -> list[list[int]]:
    """Return the ids of conversations with their answers, as the scorer's template writes them."""
    pairs = zip(prompts, texts, strict=True)
    talks = [[*p.prompt.messages, {"role": "assistant", "content": t}] for p, t in pairs]
    return [scorer.template.encode(talk, prompts=False) for talk in talks]


def answered(policy: ChatTemplate, texts: list[str], ended: bool = True) -> list[Answer]:
    end = [policy.tokenizer.special["<|end|>"]] if ended else []
    ids = [policy.tokenizer.encode(text) + end for text in texts]
    return [Answer(i, own, [0.0] * len(own), ended) for i, own in enumerate(ids)]


def test_an_answer_is_read_as_it_was_drawn(policy: ChatTemplate, same: Scorer) -> None:
    """With what the template writes behind it, as in training: it equals the text's own score."""
    prompts, texts = asked(policy), ["1 2 3", "x", "Emma, and then Nick."]
    assert same.reads_drawn_ids
    whole = whole_conversations(same, prompts, texts)
    assert same.template.tokenizer.decode(whole[0][-2:]) == "\n"  # and <|begin|>
    answers = answered(policy, texts)
    assert [same.encode(*pair) for pair in zip(prompts, answers, strict=True)] == whole
    found = score_answers(prompts, answers, same)
    assert found.safe is None
    assert torch.equal(found.rewards, found.helpful)
    np.testing.assert_allclose(found.rewards, oracle_scores(same.model, whole), rtol=0, atol=CLOSE)
    assert found.rewards.std() > 0.1


def test_tokens_that_no_encoding_gives_and_answers_that_were_cut(
    policy: ChatTemplate, same: Scorer
) -> None:
    """Letter by letter, and without an end: the score is read at the last token drawn."""
    [prompt, *_] = asked(policy)
    letters = [id_ for letter in "the" for id_ in policy.tokenizer.encode(letter)]
    assert letters != policy.tokenizer.encode("the")
    answer = Answer(0, letters, [0.0] * 3, False)
    assert same.encode(prompt, answer) == prompt.ids + letters
    [right] = oracle_scores(same.model, [prompt.ids + letters])
    assert score_answers([prompt], [answer], same).rewards.item() == pytest.approx(right, abs=CLOSE)


@pytest.mark.parametrize("batch_tokens", [1, 60, 10**6])
def test_padding_and_order_change_nothing(
    policy: ChatTemplate, same: Scorer, batch_tokens: int
) -> None:
    rows = [list(range(5, 5 + n)) for n in (3, 40, 1, 17, 40, 9)]
    found = same.score(rows, batch_tokens)
    np.testing.assert_allclose(found, oracle_scores(same.model, rows), rtol=0, atol=CLOSE)


def test_the_reward_trainers_evaluation_agrees(
    policy: ChatTemplate, same: Scorer, tmp_path: Path
) -> None:
    """Loss, gap and accuracy of pairs are those of their answers' scores here."""
    pairs = [*read_pairs([write_pairs(tmp_path / "a.jsonl", sums())])]
    batches = pair_batches(pair_loading.tokenise(pairs, policy, CONFIG.max_seq_len), 5)
    expected = measure(same.model, batches, pair_batch, objective=PairLoss())
    sides = []
    for of in (lambda pair: pair.chosen, lambda pair: pair.rejected):
        prompts = tokenise([Prompt(of(pair)[:-1], False, "") for pair in pairs], policy, 96, 1)
        answers = answered(policy, [of(pair)[-1]["content"] for pair in pairs])
        sides.append(score_answers(prompts, answers, same).rewards)
    gaps = sides[0] - sides[1]
    assert gaps.mean().item() == pytest.approx(expected.values["gap"], abs=CLOSE)
    assert (gaps > 0).double().mean().item() == expected.values["accuracy"]
    loss = torch.nn.functional.softplus(-gaps).mean().item()
    assert loss == pytest.approx(expected.loss, abs=CLOSE)


def test_another_tokenizer_reads_the_text(policy: ChatTemplate, folder: Path) -> None:
    written = write_reward_model(folder / "pieces", "pieces", CONFIG)
    scorer = load_scorer(str(written), policy, dtype=torch.float64)
    assert not scorer.reads_drawn_ids
    prompts, texts = asked(policy), ["1 2 3", "x", "Emma"]
    rows = whole_conversations(scorer, prompts, texts)
    found = score_answers(prompts, answered(policy, texts), scorer).rewards
    np.testing.assert_allclose(found, oracle_scores(scorer.model, rows), rtol=0, atol=CLOSE)
    scorer.require_room(prompts, 10**6)  # not known before
    with pytest.raises(InputError, match=r"pieces: line 0 with its answer takes 208 tokens and"):
        score_answers(prompts[:1], answered(policy, ["word " * 60])[:1], scorer)


def test_another_template_reads_the_text(policy: ChatTemplate, folder: Path) -> None:
    source = EACH.replace("END", "")
    written = write_reward_model(folder / "other", "bytes", CONFIG, 0, source)
    scorer = load_scorer(str(written), policy, dtype=torch.float64)
    [prompt, *_], [answer] = asked(policy), answered(policy, ["1 2 3"])
    assert scorer.encode(prompt, answer) != prompt.ids + answer.ids
    assert scorer.encode(prompt, answer)[:-1] == prompt.ids + answer.ids  # and a line break


def test_a_reward_model_without_a_template_has_the_policys_or_is_refused(
    policy: ChatTemplate, folder: Path
) -> None:
    written = write_reward_model(folder / "bare", "bytes", CONFIG)
    settings = written / "tokenizer_config.json"
    write_json(settings, read_json(settings) | {"chat_template": None})
    assert load_scorer(str(written), policy, dtype=torch.float64).reads_drawn_ids
    gpt2 = ModelConfig(8, 1, 2, 1, 4, 8, 50257, 96, 1e-5, 10000.0, False)
    bare = write_reward_model(folder / "gpt2", "gpt2", gpt2)
    with pytest.raises(InputError, match=r"--safety-reward .*gpt2: has another tokenizer than the"):
        load_scorer(str(bare), policy, "--safety-reward")


def test_ids_beyond_the_reward_models_vocabulary_are_no_text(
    policy: ChatTemplate, same: Scorer
) -> None:
    """A padded vocabulary has ids that no tokenizer knows; a model may draw one."""
    [prompt, *_], [answer] = asked(policy), answered(policy, ["1 2"])
    odd = answer._replace(ids=[*answer.ids[:-1], CONFIG.vocab_size, answer.ids[-1]])
    assert same.encode(prompt, odd) == same.encode(prompt, answer)


def test_what_cannot_be_read_is_refused_before_answers_are_drawn(
    policy: ChatTemplate, same: Scorer, folder: Path
) -> None:
    prompts = asked(policy)
    longest = max(len(prompt.ids) for prompt in prompts)
    room = CONFIG.max_seq_len - longest - 2  # of the template's tokens behind an answer
    same.require_room(prompts, room)
    with pytest.raises(
        InputError, match=r"--reward .*same: line 2 with its answer takes 97 tokens"
    ):
        same.require_room(prompts, room + 1)
    with pytest.raises(InputError, match="is no reward model|no such file"):
        load_scorer(str(folder / "none"), policy)


def test_two_models_are_joined_as_the_oracle_joins_them(
    policy: ChatTemplate, same: Scorer, folder: Path
) -> None:
    written = write_reward_model(folder / "safety", "bytes", CONFIG, 5, CLOSED)
    safety = load_scorer(str(written), policy, dtype=torch.float64)
    prompts, answers = asked(policy, [True, False, False]), answered(policy, ["1", "2", "3"])
    found = score_answers(prompts, answers, same, safety)
    assert found.safe is not None
    tags = np.array([True, False, False])
    right = combined_score(found.helpful.numpy(), found.safe.numpy(), tags)
    assert found.rewards.tolist() == right.tolist()
    assert found.rewards[0] == found.safe[0] != found.helpful[0]


def test_the_combined_score_is_the_oracles() -> None:
    rng = np.random.default_rng(1)
    helpful, safe, tagged = rng.normal(size=500), 3 * rng.normal(size=500), rng.random(500) < 0.3
    given = (torch.from_numpy(x) for x in (helpful, safe, tagged))
    assert combined_scores(*given).tolist() == combined_score(helpful, safe, tagged).tolist()


def test_llama_2s_form_has_nothing_behind_the_end(folder: Path, policy: ChatTemplate) -> None:
    gpt2 = ModelConfig(8, 1, 2, 1, 4, 8, 50257, 96, 1e-5, 10000.0, False)
    written = write_reward_model(folder / "llama2", "gpt2", gpt2, 0, LLAMA2_SOURCE)
    scorer = load_scorer(str(written), policy)
    assert scorer._tail(scorer.template.tokenizer.special["<|endoftext|>"]) == []
    assert not scorer.reads_drawn_ids
