"""Captured steps used again, after other requests, models, weights, cache sizes and precisions.

On a GPU the graphs are CUDA's. Elsewhere recordings replace them (support/recorded_graphs.py): they
run the step again, and assert that it uses the memory that it was recorded with.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from llama_common.errors import InputError
from llama_torch.inference import cuda_graph, decoding
from llama_torch.inference.config import Decoding, SamplingConfig
from llama_torch.inference.cuda_graph import MAX_GRAPHS, GraphStep, GraphStore
from llama_torch.inference.engine import DecodeBatch, generate, generate_tokens
from llama_torch.inference.quantization import quantize
from llama_torch.inference.speculative import speculative_batch
from llama_torch.model.llama import Llama
from reference_np.config import LlamaConfig
from reference_np.tolerances import FLOOR_ROUNDINGS, UNIT_ROUNDOFF

from ..backends.torch_model import torch_model
from ..conformance.strategies import cast, random_params
from ..support import recorded_graphs

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CONFIG = LlamaConfig(16, 1, 4, 2, 8, 24, 40, max_seq_len=1024)
CACHE_MULTIPLE = cuda_graph.CACHE_MULTIPLE if ON_GPU else 32  # columns cost a CPU time
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
modes = pytest.mark.parametrize("mode", ["graph", pytest.param("kernels", marks=needs_gpu)])


@pytest.fixture(autouse=True)
def _recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, record steps where one would capture them."""
    if ON_GPU:
        return
    recorded_graphs.install(monkeypatch)
    monkeypatch.setattr(cuda_graph, "CACHE_MULTIPLE", CACHE_MULTIPLE)
    monkeypatch.setattr(decoding, "choose_mode", lambda mode, *_: mode)
    monkeypatch.setattr(DecodeBatch, "_read_ahead", lambda batch, results: results)


def make_model(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    return torch_model(config, cast(random_params(config, seed), np.float64)).to(DEVICE)


STORES: dict[Llama, GraphStore] = {}  # of the test that runs


@pytest.fixture(autouse=True)
def _no_stores_of_other_tests() -> Iterator[None]:
    yield
    STORES.clear()


def store_of(model: Llama) -> GraphStore:
    return STORES.setdefault(model, GraphStore(model))


def batch_of(model: Llama, prompts: Sequence[Sequence[int]], mode: Decoding) -> DecodeBatch:
    settings = [GREEDY] * len(prompts)
    return DecodeBatch(model, prompts, settings, decoding=mode, graphs=store_of(model))


def greedy(model: Llama, prompt: Sequence[int], n_new: int, mode: Decoding) -> list[int]:
    settings = dataclasses.replace(GREEDY, max_new_tokens=n_new)
    return list(generate(model, prompt, settings, decoding=mode, graphs=store_of(model)))


def require_the_eager_tokens(model: Llama, prompt: Sequence[int], n_new: int, mode: Decoding):
    assert greedy(model, prompt, n_new, mode) == greedy(model, prompt, n_new, "eager")


def steps_of(model: Llama) -> list[GraphStep]:
    return list(store_of(model).steps.values())


@modes
def test_two_requests_at_a_time_do_not_share_a_step(mode: Decoding) -> None:
    model, prompts = make_model(), ([1, 2, 3], [7, 8, 9, 10])
    expected = [greedy(model, prompt, 12, "eager") for prompt in prompts]
    greedy(model, prompts[0], 12, mode)  # so that the store holds a step for one of them
    pair = [batch_of(model, [prompt], mode) for prompt in prompts]
    for batch in pair:
        batch.prefill()
    found: list[list[int]] = [[], []]
    for _ in range(12):
        for batch, row in zip(pair, found, strict=True):
            row += [token.id for token in batch.sample()]
            batch.decode_one_token()
    for batch in pair:
        batch.close()
    assert found == expected


@modes
def test_two_models_alternate(mode: Decoding) -> None:
    pair = make_model(0), make_model(1)
    for n_new in (5, 12, 7):
        for model in pair:
            require_the_eager_tokens(model, [3, 1, 4], n_new, mode)
    assert all(len(steps_of(model)) == 1 for model in pair)


@modes
@pytest.mark.parametrize(
    "n_columns", [CACHE_MULTIPLE - 1, CACHE_MULTIPLE, CACHE_MULTIPLE + 1, 2 * CACHE_MULTIPLE]
)
def test_a_request_may_fill_its_cache_to_the_last_column(mode: Decoding, n_columns: int) -> None:
    model, prompt = make_model(), [1, 2, 3]
    require_the_eager_tokens(model, prompt, n_columns - len(prompt), mode)
    assert steps_of(model)[0].cache.size == -(-n_columns // CACHE_MULTIPLE) * CACHE_MULTIPLE


@modes
def test_a_larger_cache_is_captured_anew_and_the_least_recent_step_dropped(mode: Decoding) -> None:
    model, prompt = make_model(), [1, 2, 3]
    for rounds, kept in ((1, [1]), (2, [1, 2]), (1, [2, 1]), (2, [1, 2]), (3, [2, 3]), (1, [3, 1])):
        require_the_eager_tokens(model, prompt, rounds * CACHE_MULTIPLE - 9, mode)
        assert len(kept) <= MAX_GRAPHS
        assert [step.cache.size for step in steps_of(model)] == [n * CACHE_MULTIPLE for n in kept]


@modes
def test_more_and_fewer_rows_have_steps_of_their_own(mode: Decoding) -> None:
    model, prompt = make_model(), [1, 2, 3]
    expected = greedy(model, prompt, 12, "eager")
    for n_rows in (1, 2, 1, 3):
        found = [[] for _ in range(n_rows)]
        for token in generate_tokens(batch_of(model, [prompt] * n_rows, mode)):
            found[token.prompt].append(token.id)
        assert found == [expected] * n_rows


@modes
def test_padding_of_an_earlier_request_is_not_kept(mode: Decoding) -> None:
    """Batches of equal and of unequal lengths in turn: each row has the tokens it has alone."""
    model = make_model()
    for lengths in ((4, 4), (4, 1), (2, 6), (4, 4)):
        prompts = [list(range(i + 1, i + 1 + n)) for i, n in enumerate(lengths)]
        found: tuple[list[int], ...] = ([], [])
        for token in generate_tokens(batch_of(model, prompts, mode)):
            found[token.prompt].append(token.id)
        assert list(found) == [greedy(model, prompt, 12, "eager") for prompt in prompts]
    assert len(steps_of(model)) == 1


@modes
@pytest.mark.parametrize("int8", [False, True])
def test_weights_changed_in_place_are_read(mode: Decoding, int8: bool) -> None:
    """The same step is used again; norms too, of which the int8 kernels have a copy."""
    model, other = make_model(0), make_model(1)
    model, other = (quantize(model, "int8"), quantize(other, "int8")) if int8 else (model, other)
    require_the_eager_tokens(model, [5, 6], 12, mode)
    (step,) = steps_of(model)
    with torch.no_grad():
        for mine, theirs in zip(tensors_of(model), tensors_of(other), strict=True):
            mine.copy_(theirs)
    require_the_eager_tokens(model, [5, 6], 12, mode)
    assert steps_of(model) == [step]


@modes
def test_weights_that_were_replaced_are_not_read_again(mode: Decoding) -> None:
    model, other = make_model(0), make_model(1)
    require_the_eager_tokens(model, [5, 6], 12, mode)
    kept = [weight.data for weight in model.parameters()]  # so that nothing else gets their memory
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data
    require_the_eager_tokens(model, [5, 6], 12, mode)
    assert len(kept) == len(list(model.parameters()))


@modes
def test_a_step_serves_one_precision(mode: Decoding) -> None:
    """The same memory, read as float16 and then as bfloat16."""
    model = make_model().half()
    greedy(model, [5, 6], 12, mode)
    for weight in model.parameters():
        halves = weight.data.clone()
        weight.data = weight.data.view(torch.bfloat16).copy_(halves)
    eager, captured = (batch_of(model, [[5, 6]], each) for each in ("eager", mode))
    eager.prefill()
    captured.prefill()
    for _ in range(3):
        ids = [token.id for token in eager.sample()]
        eager.decode_one_token()
        with torch.inference_mode():
            logits_BV = captured.step.decode(torch.tensor(ids, device=DEVICE))
        wrong = (logits_BV.float() - eager.logits_BV.float()).norm()
        assert wrong <= FLOOR_ROUNDINGS * UNIT_ROUNDOFF["bfloat16"] * eager.logits_BV.float().norm()


def test_a_step_of_several_tokens_does_not_serve_a_plain_request() -> None:
    model, draft, prompt = make_model(0), make_model(1), [5, 6, 7]
    expected = greedy(model, prompt, 12, "eager")
    for _ in range(2):
        graphs = store_of(model)
        batch = speculative_batch(model, draft, prompt, GREEDY, decoding="graph", graphs=graphs)
        assert [token.id for token in generate_tokens(batch)] == expected
        assert greedy(model, prompt, 12, "graph") == expected


@modes
def test_nan_of_a_broken_model_does_not_stay_in_the_cache(mode: Decoding) -> None:
    """A masked NaN is multiplied by zero, and stays NaN."""
    model = make_model()
    broken = model.model.layers[0].self_attn.v_proj.weight
    right = broken.detach().clone()
    with torch.no_grad():
        broken.fill_(torch.nan)
        with pytest.raises(InputError, match="not finite"):
            greedy(model, [1, 2, 3, 4, 5, 6, 7], 12, mode)
        broken.copy_(right)
    require_the_eager_tokens(model, [1, 2], 12, mode)
    assert len(steps_of(model)) == 1


@needs_gpu
@modes
def test_what_memory_held_before_does_not_matter(mode: Decoding) -> None:
    """All memory that the allocator reuses is NaN."""
    sizes = [1 << power for power in range(9, 27) for _ in range(32 if power < 20 else 4)]
    poison = [torch.full((n // 8,), torch.nan, dtype=torch.float64, device=DEVICE) for n in sizes]
    del poison
    require_the_eager_tokens(make_model(), [1, 2, 3], 12, mode)


@needs_gpu
@modes
def test_tokens_are_read_after_their_copy(mode: Decoding) -> None:
    """With a GPU kept busy, tokens read before the copy has ended would be wrong."""
    model, found = make_model(), []
    batch = batch_of(model, [[1, 2, 3]], mode)
    batch.prefill()
    for _ in range(12):
        torch.cuda._sleep(20_000_000)  # cycles
        found += [token.id for token in batch.sample()]
        batch.decode_one_token()
    assert found == greedy(model, [1, 2, 3], 12, "eager")


def tensors_of(model: Llama) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_a_model_keeps_nothing_of_its_graphs() -> None:
    """Captured steps belong to the store: generating leaves the model's attributes as they were."""
    model = make_model()
    before = dict(vars(model))
    greedy(model, [1], 12, "graph")
    assert vars(model) == before
    assert len(steps_of(model)) == 1


def test_without_a_store_every_request_has_a_step_of_its_own() -> None:
    model, found = make_model(), []
    for _ in range(2):
        batch = DecodeBatch(model, [[1, 2, 3]], [GREEDY], decoding="graph")
        found.append((batch.step, [token.id for token in generate_tokens(batch)]))
    assert found[0][0] is not found[1][0]
    assert [ids for _, ids in found] == [greedy(model, [1, 2, 3], 12, "eager")] * 2
