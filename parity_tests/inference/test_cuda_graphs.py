"""Captured steps met again: other requests, models, weights, sizes and precisions between them.

On a GPU the graphs are CUDA's. Elsewhere a recording stands in for one: it runs the step again, and
insists on the very memory that it was recorded with, which is all that a graph knows.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llama_torch.common.errors import InputError
from llama_torch.inference import cuda_graph, engine
from llama_torch.inference.config import Decoding, SamplingConfig
from llama_torch.inference.cuda_graph import KEPT, GraphStep
from llama_torch.inference.engine import Batch, generate, run
from llama_torch.inference.quantization import quantize
from llama_torch.inference.speculative import Speculative
from llama_torch.model.llama import Llama
from reference_np.config import LlamaConfig
from reference_np.tolerances import FLOOR_ROUNDINGS, UNIT_ROUNDOFF

from ..backends.torch_model import torch_model
from ..conformance.strategies import cast, random_params

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CONFIG = LlamaConfig(16, 1, 4, 2, 8, 24, 40, max_seq_len=1024)
ROUND = cuda_graph.ROUND if ON_GPU else 32  # columns cost a CPU time
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
ways = pytest.mark.parametrize("way", ["graph", pytest.param("kernels", marks=needs_gpu)])


class Recording:
    """Stands in for torch.cuda.CUDAGraph."""

    recorded: "Recording | None" = None  # the one that is being captured

    def keep(self, step: GraphStep, run: Callable[[GraphStep], torch.Tensor]) -> torch.Tensor:
        """Remember what to run and the memory that it read and wrote."""
        self.step, self.run, self.memory = step, run, memory_of(step)
        return run(step).clone()

    def replay(self) -> None:
        """Run it again, on the same memory."""
        assert memory_of(self.step) == self.memory, "a graph is replayed on other memory"
        self.step.logits.copy_(self.run(self.step))


def memory_of(step: GraphStep) -> list[tuple[int, torch.dtype, torch.Size]]:
    model, cache = step.model, step.cache
    own = step.token, step.position, step.column, step.columns, step.pads, step.allowed
    tensors = (*model.parameters(), *model.buffers(), cache.keys, cache.values, *own)
    return [(x.data_ptr(), x.dtype, x.shape) for x in tensors]


@pytest.fixture(autouse=True)
def _recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, record steps where one would capture them."""
    if ON_GPU:
        return

    @contextmanager
    def graph(recording: Recording) -> Iterator[None]:
        Recording.recorded = recording
        yield
        Recording.recorded = None

    def stream() -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def run_or_record(step: GraphStep) -> torch.Tensor:
        return Recording.recorded.keep(step, once) if Recording.recorded else once(step)

    once = GraphStep._run
    monkeypatch.setattr(cuda_graph, "ROUND", ROUND)
    monkeypatch.setattr(GraphStep, "_run", run_or_record)
    for name, stub in (("graph", graph), ("CUDAGraph", Recording), ("Stream", stream)):
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(engine, "choose_way", lambda way, *_: way)
    monkeypatch.setattr(Batch, "_read_ahead", lambda batch, results: results.tolist())


def make_model(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    return torch_model(config, cast(random_params(config, seed), np.float64)).to(DEVICE)


def greedy(model: Llama, prompt: Sequence[int], n_new: int, way: Decoding) -> list[int]:
    settings = dataclasses.replace(GREEDY, max_new_tokens=n_new)
    return list(generate(model, prompt, settings, decoding=way))


def require_the_eager_tokens(model: Llama, prompt: Sequence[int], n_new: int, way: Decoding):
    assert greedy(model, prompt, n_new, way) == greedy(model, prompt, n_new, "eager")


def steps_of(model: Llama) -> list[GraphStep]:
    return list(model.__dict__["_graph_steps"].values())


@ways
def test_two_requests_at_a_time_do_not_share_a_step(way: Decoding) -> None:
    model, prompts = make_model(), ([1, 2, 3], [7, 8, 9, 10])
    expected = [greedy(model, prompt, 12, "eager") for prompt in prompts]
    greedy(model, prompts[0], 12, way)  # so that the store holds a step for one of them
    pair = [Batch(model, [prompt], [GREEDY], decoding=way) for prompt in prompts]
    found: list[list[int]] = [[], []]
    for _ in range(12):
        for batch, row in zip(pair, found, strict=True):
            row += [token.id for token in batch.choose()]
            batch.advance()
    for batch in pair:
        batch.close()
    assert found == expected


@ways
def test_two_models_alternate(way: Decoding) -> None:
    pair = make_model(0), make_model(1)
    for n_new in (5, 12, 7):
        for model in pair:
            require_the_eager_tokens(model, [3, 1, 4], n_new, way)
    assert all(len(steps_of(model)) == 1 for model in pair)


@ways
@pytest.mark.parametrize("n_columns", [ROUND - 1, ROUND, ROUND + 1, 2 * ROUND])
def test_a_request_may_fill_its_room_to_the_last_column(way: Decoding, n_columns: int) -> None:
    model, prompt = make_model(), [1, 2, 3]
    require_the_eager_tokens(model, prompt, n_columns - len(prompt), way)
    assert steps_of(model)[0].cache.size == -(-n_columns // ROUND) * ROUND


@ways
def test_room_grows_and_the_least_recent_step_is_dropped(way: Decoding) -> None:
    model, prompt = make_model(), [1, 2, 3]
    for rounds, kept in ((1, [1]), (2, [1, 2]), (1, [2, 1]), (2, [1, 2]), (3, [2, 3]), (1, [3, 1])):
        require_the_eager_tokens(model, prompt, rounds * ROUND - 9, way)
        assert len(kept) <= KEPT
        assert [step.cache.size for step in steps_of(model)] == [n * ROUND for n in kept]


@ways
def test_more_and_fewer_rows_have_steps_of_their_own(way: Decoding) -> None:
    model, prompt = make_model(), [1, 2, 3]
    expected = greedy(model, prompt, 12, "eager")
    for n_rows in (1, 2, 1, 3):
        found = [[] for _ in range(n_rows)]
        same = Batch(model, [prompt] * n_rows, [GREEDY] * n_rows, decoding=way)
        for token in run(same, lambda token: False):
            found[token.row].append(token.id)
        assert found == [expected] * n_rows


@ways
def test_padding_is_the_present_requests(way: Decoding) -> None:
    """Rows of equal length, of unequal, the other way round: each row as if alone."""
    model = make_model()
    for lengths in ((4, 4), (4, 1), (2, 6), (4, 4)):
        prompts = [list(range(i + 1, i + 1 + n)) for i, n in enumerate(lengths)]
        found: tuple[list[int], ...] = ([], [])
        for token in run(Batch(model, prompts, [GREEDY] * 2, decoding=way), lambda token: False):
            found[token.row].append(token.id)
        assert list(found) == [greedy(model, prompt, 12, "eager") for prompt in prompts]
    assert len(steps_of(model)) == 1


@ways
@pytest.mark.parametrize("int8", [False, True])
def test_weights_changed_in_place_are_those_that_count(way: Decoding, int8: bool) -> None:
    """The step is met again; norms too, of which the int8 kernels keep a copy."""
    model, other = make_model(0), make_model(1)
    model, other = (quantize(model), quantize(other)) if int8 else (model, other)
    require_the_eager_tokens(model, [5, 6], 12, way)
    (step,) = steps_of(model)
    with torch.no_grad():
        for mine, theirs in zip(tensors_of(model), tensors_of(other), strict=True):
            mine.copy_(theirs)
    require_the_eager_tokens(model, [5, 6], 12, way)
    assert steps_of(model) == [step]


@ways
def test_weights_that_were_replaced_are_not_read_again(way: Decoding) -> None:
    model, other = make_model(0), make_model(1)
    require_the_eager_tokens(model, [5, 6], 12, way)
    kept = [weight.data for weight in model.parameters()]  # so that nothing else gets their memory
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data
    require_the_eager_tokens(model, [5, 6], 12, way)
    assert len(kept) == len(list(model.parameters()))


@ways
def test_a_step_serves_one_precision(way: Decoding) -> None:
    """The same memory, read as float16 and then as bfloat16."""
    model = make_model().half()
    greedy(model, [5, 6], 12, way)
    for weight in model.parameters():
        halves = weight.data.clone()
        weight.data = weight.data.view(torch.bfloat16).copy_(halves)
    eager, captured = (Batch(model, [[5, 6]], [GREEDY], decoding=w) for w in ("eager", way))
    for _ in range(3):
        ids = [token.id for token in eager.choose()]
        eager.advance()
        with torch.inference_mode():
            captured._run(torch.tensor(ids, device=DEVICE))
        wrong = (captured.logits_BV.float() - eager.logits_BV.float()).norm()
        assert wrong <= FLOOR_ROUNDINGS * UNIT_ROUNDOFF["bfloat16"] * eager.logits_BV.float().norm()


def test_a_step_of_several_tokens_is_not_taken_for_one_of_one() -> None:
    model, draft, prompt = make_model(0), make_model(1), [5, 6, 7]
    expected = greedy(model, prompt, 12, "eager")
    for _ in range(2):
        guessing = Speculative(model, draft, prompt, GREEDY, decoding="graph")
        assert [token.id for token in run(guessing, lambda token: False)] == expected
        assert greedy(model, prompt, 12, "graph") == expected


@ways
def test_a_broken_models_numbers_do_not_stay_in_the_room(way: Decoding) -> None:
    """NaN that a mask hides is multiplied by zero, and stays NaN."""
    model = make_model()
    broken = model.model.layers[0].self_attn.v_proj.weight
    right = broken.detach().clone()
    with torch.no_grad():
        broken.fill_(torch.nan)
        with pytest.raises(InputError, match="not finite"):
            greedy(model, [1, 2, 3, 4, 5, 6, 7], 12, way)
        broken.copy_(right)
    require_the_eager_tokens(model, [1, 2], 12, way)
    assert len(steps_of(model)) == 1


@needs_gpu
@ways
def test_what_memory_held_before_does_not_matter(way: Decoding) -> None:
    """All memory that the allocator can hand out holds NaN."""
    sizes = [1 << power for power in range(9, 27) for _ in range(32 if power < 20 else 4)]
    poison = [torch.full((n // 8,), torch.nan, dtype=torch.float64, device=DEVICE) for n in sizes]
    del poison
    require_the_eager_tokens(make_model(), [1, 2, 3], 12, way)


@needs_gpu
@ways
def test_tokens_are_read_after_their_copy(way: Decoding) -> None:
    """Behind a GPU that has something else to do, reading ahead of it would show."""
    model, found = make_model(), []
    batch = Batch(model, [[1, 2, 3]], [GREEDY], decoding=way)
    for _ in range(12):
        torch.cuda._sleep(20_000_000)  # cycles
        found += [token.id for token in batch.choose()]
        batch.advance()
    assert found == greedy(model, [1, 2, 3], 12, "eager")


def tensors_of(model: Llama) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_the_store_is_the_one_that_decoding_keeps() -> None:
    """What ``steps_of`` reads."""
    model = make_model()
    greedy(model, [1], 12, "graph")
    assert steps_of(model) == list(cuda_graph._store(model).values())
