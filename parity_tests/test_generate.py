"""Sampling: the distribution, the cache, the limits, and text that is never torn."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llama_torch import generate as generation
from llama_torch.checkpoint import load_model, save_model, write_directory_files
from llama_torch.config import InputError, ModelConfig
from llama_torch.generate import generate, stop_ids, stream_text, token_probabilities
from llama_torch.model import Llama
from llama_torch.tokenizer import END_OF_TEXT_ID, gpt2

from .strategies import Array, configs, params_of
from .support import torch_forward, torch_model


def expected_probabilities(logits: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """Find the same distribution by sorting in NumPy, one candidate at a time."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")[: top_k or len(scaled)]
    weights = np.exp(scaled[order] - scaled.max())
    weights /= weights.sum()
    kept = np.zeros_like(scaled)
    mass = 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass >= top_p:
            break
        kept[token] = weight
        mass += weight
    return kept / kept.sum()


@given(
    logits=arrays(np.float32, st.integers(1, 30), elements=st.integers(-20, 20), unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 35),
    top_p=st.sampled_from([1e-6, 0.333, 0.871, 1.0]),
)
def test_token_probabilities(logits: Array, temperature: float, top_k: int, top_p: float) -> None:
    probs = token_probabilities(torch.from_numpy(logits), temperature, top_k, top_p).numpy()
    expected = expected_probabilities(logits, temperature, top_k, top_p)
    np.testing.assert_allclose(probs, expected, atol=1e-6)
    assert np.array_equal(probs > 1e-6, expected > 1e-6)
    assert probs.argmax() == logits.argmax()


def test_all_means_all_and_tiny_temperatures_are_greedy() -> None:
    logits = 3 * torch.randn(50257, generator=torch.Generator().manual_seed(0))
    assert (token_probabilities(logits, 1.0, 0, 1.0) > 0).all()
    for temperature in (1e-45, 1e-300):
        assert token_probabilities(logits, temperature, 0, 1.0)[logits.argmax()] == 1


@given(config=configs(), data=st.data())
def test_greedy_with_the_cache_equals_greedy_without(config, data: st.DataObject) -> None:
    model = torch_model(config, data.draw(params_of(config)))
    prompt = data.draw(
        st.lists(st.integers(0, config.vocab_size - 1), min_size=1, max_size=5), label="prompt"
    )
    written = list(generate(model, prompt, 6))
    assert len(written) == 6
    text = list(prompt)
    for token in written:
        logits, _, _ = torch_forward(model, np.array([text]))
        last = logits[0, -1]
        # In float64 a tie is the only excuse for another choice.
        assert last[token] == pytest.approx(last.max(), rel=1e-10, abs=1e-12)
        text.append(token)


@pytest.fixture(scope="module")
def small_model() -> Llama:
    model = Llama(ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=12))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_the_seed_decides(small_model: Llama) -> None:
    def write(seed: int) -> list[int]:
        draws = torch.Generator().manual_seed(seed)
        return list(generate(small_model, [1, 2], 8, temperature=1.0, generator=draws))

    assert write(0) == write(0) != write(1)


def test_limits(small_model: Llama) -> None:
    assert len(list(generate(small_model, [1] * 9, 100))) == 3  # the context holds 12
    assert len(list(generate(small_model, [1], 2))) == 2
    (first,) = generate(small_model, [1], 1)
    assert list(generate(small_model, [1], 5, stop={first})) == []
    for prompt, message in (
        ([], "0 tokens long"),
        ([1] * 12, "12 tokens long"),
        ([50257], "outside the vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            next(generate(small_model, prompt, 1))


@given(text=st.text())
@example(text="🙂漢é")
def test_streamed_pieces_are_whole_characters(text: str) -> None:
    """A piece comes as soon as its last byte is there, and never before."""
    encoding, ids = gpt2(), gpt2().encode_ordinary(text)
    shown, raw = "", b""
    stream = stream_text(iter(ids), encoding)
    for token in ids:
        raw += encoding.decode_single_token_bytes(token)
        complete = raw.decode("utf-8", errors="ignore")  # leaves an unfinished end out
        if complete != shown:
            shown += next(stream)
            assert shown == complete
    assert list(stream) == []


def test_half_a_character_at_the_end_is_marked() -> None:
    ids = gpt2().encode_ordinary("🙂")
    assert len(ids) > 1
    assert "".join(stream_text(iter(ids[:1]), gpt2())) == "\ufffd"
    assert list(stream_text(iter([50300]), gpt2())) == []  # a padded vocabulary's id


def test_stop_texts_are_single_tokens() -> None:
    assert stop_ids(["<|endoftext|>", "\n"], gpt2()) == {END_OF_TEXT_ID, 198}
    with pytest.raises(InputError, match="--stop 'two words' is 2 tokens"):
        stop_ids(["two words"], gpt2())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, small_model: Llama) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_directory_files(folder, small_model.config)
    save_model(folder, small_model.config, small_model.state_dict())
    return folder


def test_the_command_writes_text(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--ckpt", str(model_dir), "--prompt", "Hello world", "--max-new-tokens", "5"]
    assert generation.main(argv) == 0
    first = capsys.readouterr().out
    assert first.startswith("Hello world")
    assert len(first) > len("Hello world\n")
    assert generation.main(argv) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--ckpt": "nowhere"}, "nowhere: no such file"),
        ({"--prompt": "word " * 20}, "--prompt is 21 tokens long and the context holds 12"),
        ({"--prompt": ""}, "--prompt must not be empty"),
        ({"--temperature": "-1"}, "--temperature must be"),
        ({"--top-p": "0"}, "--top-p must be"),
        ({"--top-k": "-2"}, "--top-k must be"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens must be"),
        ({"--stop": "two words"}, "--stop 'two words'"),
        ({"--seed": "-1"}, "--seed must"),
    ],
)
def test_bad_input_is_one_line(
    model_dir: Path, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--ckpt": str(model_dir), "--prompt": "Hello"} | change
    assert generation.main([part for pair in flags.items() for part in pair]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_continues_the_same(tmp_path: Path, tied: bool) -> None:
    """Their loader, their tokenizer and their greedy search, on the directory as it is."""
    transformers = pytest.importorskip("transformers")
    model = Llama(
        ModelConfig(
            dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96, tie_embeddings=tied
        )
    )
    model.init_weights(torch.Generator().manual_seed(0))
    write_directory_files(tmp_path, model.config)
    save_model(tmp_path, model.config, model.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer("Hello world", return_tensors="pt")
    out = theirs.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=END_OF_TEXT_ID)
    prompt = inputs.input_ids[0].tolist()
    ours = list(generate(load_model(tmp_path), prompt, 64, stop={END_OF_TEXT_ID}))
    assert len(ours) == 64
    assert out[0, len(prompt) :].tolist() == ours


def test_another_tokenizer_is_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_dir, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    assert generation.main(["--ckpt", str(tmp_path / "copy"), "--prompt", "Hello"]) == 2
    assert "tokenizer.json: another encoding" in capsys.readouterr().err


def test_a_broken_model_says_so(small_model: Llama) -> None:
    model = Llama(small_model.config)
    model.load_state_dict(small_model.state_dict())
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        next(generate(model, [1], 1))
