"""Writing text: the command, the Python interface, and transformers on the same directories."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_torch import SamplingConfig, generate, load
from llama_torch.checkpoint.hf import load_model, save_model, write_directory_files
from llama_torch.common.errors import InputError
from llama_torch.inference import engine
from llama_torch.inference.text_model import TextModel
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama

from ..backends.torch_model import write_model
from ..support.tokenizers import byte_level


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=24)
    write_model(folder, config)
    return folder


def run(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    assert generate.main(["--ckpt", str(folder), "--max-new-tokens", "5", *flags]) == 0
    return capsys.readouterr().out


def test_the_command_writes_text(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(capsys, model_dir, "--prompt", "Hello world")
    assert first.startswith("Hello world")
    assert len(first) > len("Hello world\n")
    assert run(capsys, model_dir, "--prompt", "Hello world") == first
    assert run(capsys, model_dir, "--prompt", "Hello world", "--seed", "1") != first


def test_several_prompts_are_what_each_is_alone(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["Hello world, and more", "The", "1 2 3"]
    out = run(capsys, model_dir, "--json", "--logprobs", "1", "--prompt", *prompts)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert run(capsys, model_dir, "--prompt", prompt, "--seed", str(i)) == (
            f"{prompt}{row['text']}\n"
        )
        assert len(row["token_ids"]) == len(row["logprobs"]) == len(row["likeliest"]) == 5
        assert all(
            logprob <= best[0][1]
            for logprob, best in zip(row["logprobs"], row["likeliest"], strict=True)
        )
    shown = run(capsys, model_dir, "--logprobs", "2", "--prompt", "The")
    assert shown.splitlines()[-2].startswith("  ")


def test_a_draft_changes_nothing(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(capsys, model_dir, "--prompt", "Hello world")
    flags = ("--draft", str(model_dir), "--guesses", "3")
    assert run(capsys, model_dir, "--prompt", "Hello world", *flags) == plain
    both = ("--ckpt", str(model_dir), "--prompt", "one", "two")
    assert generate.main([*both, *flags]) == 2
    assert "one prompt at a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--decoding", "kernels"), "--decoding kernels needs a GPU"),
        (("--decoding", "graph"), "--decoding graph needs a GPU"),
        (("--decoding", "numpy", "--dtype", "bfloat16"), "in float32 or float64"),
        (("--guesses", "0"), "guesses"),
        (("--draft", "nowhere"), "nowhere"),
    ],
)
def test_a_way_that_cannot_be_is_refused(
    flags: tuple[str, ...], says: str, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "GPU" in says and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert generate.main(["--ckpt", str(model_dir), "--prompt", "a", *flags]) == 2
    found = capsys.readouterr()
    assert says in found.err
    assert found.out == ""


@pytest.mark.parametrize(
    "wrong", [{"decoding": "fast"}, {"guesses": 2.5}, {"guesses": "4"}, {"quantize": "int3"}]
)
def test_a_wrong_argument_is_named(wrong: dict[str, Any], model_dir: Path) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        load(model_dir, **wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_writes_much_the_same(dtype: str, model_dir: Path) -> None:
    plain, int8 = load(model_dir, dtype=dtype), load(model_dir, dtype=dtype, quantize="int8")
    tokens = torch.tensor([[464, 2134, 13]])
    logits = [model.model(tokens)[0].float() for model in (plain, int8)]
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < 0.05
    assert len(int8.generate("The", max_new_tokens=4).tokens) == 4


def test_why_it_ends(model_dir: Path) -> None:
    model = load(model_dir)
    greedy = {"temperature": 0.0, "max_new_tokens": 6}
    whole = model.generate("The", **greedy)
    assert (len(whole.tokens), whole.finish_reason) == (6, "length")
    assert len(model.generate("The", temperature=0.0).tokens) == 23  # the context holds 24
    third = model.tokenizer.decode([whole.tokens[2].id])
    cut = model.generate("The", stop=(third,), **greedy)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(third)]
    held = model.generate("The", stop=(whole.text[-1] + "?",), **greedy)
    assert held.text == whole.text  # what might have become a stop text is given out at the end
    by_token = model.generate("The", stop_tokens=(third,), **greedy)
    assert by_token.finish_reason == "stop"
    assert by_token.text == model.tokenizer.decode(token.id for token in by_token.tokens[:-1])
    model.end_ids = {whole.tokens[1].id}
    ended = model.generate("The", **greedy)
    assert ended.finish_reason == "stop"
    assert ended.tokens[-1].id == whole.tokens[1].id
    assert model.generate("The", ignore_eos=True, **greedy).text == whole.text
    assert "".join(model.stream("The", ignore_eos=True, **greedy)) == whole.text
    assert model.generate_batch([], SamplingConfig()) == []


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> dict[bool, TextModel]:
    """The model alone, and with itself as a draft."""
    return {False: load(model_dir), True: load(model_dir, draft=model_dir, guesses=3)}


@pytest.mark.parametrize("limit", ["max_new_tokens", "the context"])
@pytest.mark.parametrize("stop", ["a text", "a text's end", "a token", "an end token"])
@pytest.mark.parametrize("draft", [False, True])
def test_a_stop_at_the_last_token_allowed_is_a_stop(
    loaded: dict[bool, TextModel],
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    stop: str,
    draft: bool,
) -> None:
    """Alone and in a batch, streamed or not; one token fewer, and it is the length that ends it."""
    model = loaded[draft]
    prompt, n = ("The", 6) if limit == "max_new_tokens" else ("The" * 18, 6)
    assert limit == "max_new_tokens" or len(model.encode(prompt)) + n == 24
    settings = {"max_new_tokens": n if limit == "max_new_tokens" else 100, "temperature": 1.0}
    for seed in range(100):  # until the last token is letters that do not stand before it
        settings["seed"] = seed
        whole = model.generate(prompt, **settings, ignore_eos=True)
        *_, last = (model.tokenizer.decode([token.id]) for token in whole.tokens)
        if last.strip().isalpha() and last.isascii() and whole.text.count(last) == 1:
            break
    assert (len(whole.tokens), whole.finish_reason) == (n, "length")
    assert whole.text.endswith(last)
    if stop == "an end token":
        monkeypatch.setattr(model, "end_ids", {whole.tokens[-1].id})
    else:
        text = whole.text[-len(last) - 2 :] if stop == "a text's end" else last
        settings["stop_tokens" if stop == "a token" else "stop"] = (text,)
    shown = whole.text[: -len(last) - 2 * (stop == "a text's end")]
    found = [model.generate(prompt, **settings)]
    if not draft:
        each = [SamplingConfig(**settings), SamplingConfig(max_new_tokens=9, ignore_eos=True)]
        found += [model.generate_batch([prompt, "a b"], rows)[0] for rows in (each[:1] * 2, each)]
    for completion in found:
        assert [token.id for token in completion.tokens] == [token.id for token in whole.tokens]
        assert (completion.text, completion.finish_reason) == (shown, "stop")
    assert "".join(model.stream(prompt, **settings)) == shown
    if limit == "max_new_tokens":
        shorter = model.generate(prompt, **settings | {"max_new_tokens": n - 1})
        assert shorter.finish_reason == "length"
        assert shorter.text == whole.text[: -len(last)]


def test_rows_that_end_at_different_times(model_dir: Path) -> None:
    """Each with its own settings, stop text and length: what it is alone, token for token."""
    model = load(model_dir)
    prompts = ["Hello world, and more", "The", "1 2 3", "a"]
    each = [
        SamplingConfig(max_new_tokens=7, temperature=0.0, logprobs=1),
        SamplingConfig(max_new_tokens=2, seed=3),
        SamplingConfig(max_new_tokens=9, repetition_penalty=1.5, seed=4),
        SamplingConfig(max_new_tokens=9, temperature=0.0),
    ]
    text = model.generate_batch(prompts, each)[3].text
    each[3] = SamplingConfig(max_new_tokens=9, temperature=0.0, stop=(text[3:5],))
    together = model.generate_batch(prompts, each, prefill_chunk=2)
    for prompt, settings, completion in zip(prompts, each, together, strict=True):
        (alone,) = model.generate_batch([prompt], [settings])
        assert (completion.text, completion.finish_reason) == (alone.text, alone.finish_reason)
        assert [token.id for token in completion.tokens] == [token.id for token in alone.tokens]
    assert [len(completion.tokens) for completion in together[:3]] == [7, 2, 9]
    assert together[3].finish_reason == "stop"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate("\ud800"), "the prompt is not valid text"),
        (lambda m: m.generate("a", stop=5), "--stop must be texts"),
        (lambda m: m.generate("a", top_k=2.5), "--top-k must be of type int"),
        (lambda m: m.generate("a", temperature="1"), "--temperature must be of type float"),
        (lambda m: m.generate_batch(["a"], []), "1 prompts and 0 settings"),
        (lambda m: m.generate_batch(["a"], SamplingConfig(), 0), "--prefill-chunk must be"),
        (lambda m: m.chat("hi"), "has no chat template"),
        (lambda m: load(m.ckpt, dtype="int8"), "dtype 'int8' is not one of"),
        (lambda m: load(m.ckpt, device="tpu"), "device 'tpu' is not one of"),
    ],
)
def test_the_interface_says_what_is_wrong(model_dir: Path, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(load(model_dir))


def test_one_stop_text_may_stand_alone() -> None:
    assert SamplingConfig(stop="END").stop == ("END",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--top-k": "9" * 30}, "--top-k must be below"),
        ({"--max-new-tokens": "9" * 400}, "--max-new-tokens must be"),
        ({"--prefill-chunk": "9" * 30}, "--prefill-chunk must be"),
        ({"--repetition-penalty": "1e-320"}, "--repetition-penalty must lie"),
        ({"--ckpt": "nowhere"}, "nowhere: no such file"),
        ({"--prompt": "word " * 30}, "the prompt is 31 tokens long and the context holds 24"),
        ({"--prompt": ""}, "--prompt must not be empty"),
        ({"--temperature": "-1"}, "--temperature must be"),
        ({"--top-p": "0"}, "--top-p must be"),
        ({"--top-k": "-2"}, "--top-k must be"),
        ({"--min-p": "2"}, "--min-p must be"),
        ({"--repetition-penalty": "0"}, "--repetition-penalty must lie"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens must be"),
        ({"--prefill-chunk": "0"}, "--prefill-chunk must be"),
        ({"--stop": ""}, "--stop must not be empty"),
        ({"--stop-tokens": "<|nope|>"}, "--stop-tokens '<|nope|>' is 6 tokens"),
        ({"--seed": "-1"}, "--seed must"),
    ],
)
def test_bad_input_is_one_line(
    model_dir: Path, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--ckpt": str(model_dir), "--prompt": "Hello"} | change
    assert generate.main([part for pair in flags.items() for part in pair]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


LLAMA3 = {
    "rope_type": "llama3",
    "rope_factor": 8.0,
    "rope_original_max_seq_len": 64,
    "rope_theta": 5e5,
}
SHAPES = {
    "multi-head": {"n_kv_heads": 4, "tie_embeddings": False},
    "grouped": {"n_kv_heads": 2, "tie_embeddings": False},
    "tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "linear": {"rope_type": "linear", "rope_factor": 4.0},
    "llama3": LLAMA3,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_continues_the_same(tmp_path: Path, shape: str) -> None:
    """Their loader, tokenizer and greedy search, ours, and the directory as either wrote it."""
    transformers = pytest.importorskip("transformers")
    ours, theirs, sharded = (tmp_path / name for name in ("ours", "theirs", "sharded"))
    ours.mkdir()
    shapes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, **SHAPES[shape]}
    config = ModelConfig(**shapes, vocab_size=500, max_seq_len=160)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # larger, so that no two logits are close and no token repeats itself
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if "proj" in name or "lm_head" in name else 1)
    write_directory_files(ours, config)
    save_model(ours, config, model.state_dict())
    byte_level(ours)
    peer = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype="float32")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(ours)
    for folder, size in ((theirs, {}), (sharded, {"max_shard_size": "40KB"})):
        peer.save_pretrained(folder, **size)
        tokenizer.save_pretrained(folder)
    assert (sharded / "model.safetensors.index.json").is_file()
    inputs = tokenizer("Hello world, hello", return_tensors="pt", return_token_type_ids=False)
    greedy = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    expected = peer.generate(**inputs, **greedy)[0].tolist()
    for folder in (ours, theirs, sharded):
        loaded = load(folder)
        assert loaded.model.config == config
        prompt = loaded.encode("Hello world, hello")
        settings = SamplingConfig(max_new_tokens=64, temperature=0.0)
        written = list(engine.generate(loaded.model, prompt, settings))
        assert prompt + written == expected
        assert len(set(written)) > 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_precision_loads_what_transformers_saved(tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=40,
        )
    ).to(getattr(torch, dtype))
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float64)
    for name, parameter in peer.state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter.double())


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    config = ModelConfig(16, 1, 2, 1, 8, 24, 40)
    write_directory_files(tmp_path, config)
    index: dict[str, Any] = {
        "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors: no such file"):
        load(tmp_path)
