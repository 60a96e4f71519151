"""Train in the processes of torchrun, on a mesh of data, sharded data and tensor parallelism.

DistributedDataParallel where every process holds the whole model, else FSDP2 (``fully_shard``),
on top of ``parallelize_module`` with --tp. In a single process every operation here is the
identity.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llama_common.errors import InputError

from ..config import ParallelConfig
from ..model.config import ModelConfig
from ..model.llama import Block, Llama
from ..model.masks import Mask
from .job import TIMEOUT

if TYPE_CHECKING:  # torch's modules for shards take 1 s, and are imported where there are shards
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"


class Parallel:
    """A process's rank and mesh in the job, and its collective operations."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        # This process's data-parallel rank, and their number: each has its share of the windows.
        self.data_rank, self.data_size = 0, 1
        self.mesh: DeviceMesh | None = None
        self.replica: DistributedDataParallel | None = None
        self._head_reductions: list[tuple[Any, Tensor, Tensor]] = []
        self._control_group: Any = None

    @classmethod
    def from_config(cls, config: ParallelConfig, device: torch.device) -> "Parallel":
        """Build the device mesh of ``config`` over the job's processes, or of one process.

        ``check_parallel_layout`` has refused numbers of processes that do not fit.
        """
        self = cls()
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.data_size = self.world // config.tp
        fsdp = config.fsdp or self.data_size
        if self.world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            shape = self.data_size // fsdp, fsdp, config.tp
            self.mesh = init_device_mesh(
                device.type, shape, mesh_dim_names=(REPLICATE, SHARD, TENSOR)
            )
            self.data_rank = self.rank // config.tp  # the mesh is in row-major order
        return self

    def control_group(self) -> Any:
        """Return the gloo group of all processes for asynchronous saves, made at the first call."""
        if self._control_group is None:
            self._control_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return self._control_group

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which prints and writes for the job."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.mesh is not None and max(self.mesh.shape[1:]) > 1

    @property
    def tensor_mesh(self) -> "DeviceMesh | None":
        """The processes of --tp that share every product, or None."""
        return self.mesh[TENSOR] if self.mesh is not None and self.mesh.shape[2] > 1 else None

    def reshard(self, model: Llama) -> None:
        """Reshard the parameters after a forward pass without a backward pass."""
        if self.is_sharded:
            _as_sharded(model).reshard()

    def build_sharded(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        generator: torch.Generator,
        fill: Callable[[nn.Module, str], None] | None = None,
        model_class: type[Llama] = Llama,
    ) -> Llama:
        """Return a sharded model with the initial weights that one process would draw.

        With ``fill``, they are those that it writes into a part of the model, given with its name;
        the model's new parts are drawn.
        Each part is initialised in full, then sharded, so that a process holds its shards and at
        most one whole block, and of the embedding and the head what --tp leaves it. The shards are
        float32; with ``dtype`` bfloat16 parameters are gathered and computed in bfloat16, and
        gradients are reduced in float32.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        from .tensor_parallel import shard_part

        assert self.mesh is not None
        with torch.device("meta"):
            model = model_class(config)
        names_of = {module: name for name, module in model.named_modules()}
        policy = MixedPrecisionPolicy()
        if dtype == torch.bfloat16:
            # The rotary tables, inputs of a block, are float32 and must remain so.
            policy = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        # torch warns that a block's keys and values are views; nothing writes to them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        names = (REPLICATE, SHARD) if self.mesh.shape[0] > 1 else SHARD
        for part in model.parts():
            part.to_empty(device="cpu")
            if fill and part not in model.new_parts():
                fill(part, names_of[part])
            else:
                model.init_part(part, generator)
            if self.tensor_mesh is not None:
                shard_part(part, self.tensor_mesh)
            if isinstance(part, Block):
                fully_shard(part, mesh=self.mesh[names], mp_policy=policy)
        fully_shard(model, mesh=self.mesh[names], mp_policy=policy)
        return model

    def wrap_ddp(self, model: Llama) -> None:
        """Wrap an unsharded model in DistributedDataParallel, which averages its gradients."""
        if self.data_size > 1 and not self.is_sharded:
            self.replica = DistributedDataParallel(model.model, gradient_as_bucket_view=True)
            if model.head_weight.dtype == torch.bfloat16:
                self.replica.register_comm_hook(self.data_size, _mean_in_float32)

    @contextmanager
    def micro_batch(self, model: Llama, sync_grads: bool) -> Iterator[None]:
        """Run a forward and backward pass, and reduce gradients if ``sync_grads``."""
        if self.is_sharded:
            _as_sharded(model).set_requires_gradient_sync(sync_grads)
        replica = None if sync_grads else self.replica
        with nullcontext() if replica is None else replica.no_sync():
            yield
        while self._head_reductions:
            work, grad, wide = self._head_reductions.pop(0)
            work.wait()
            grad.copy_(wide)

    def forward_hidden(
        self,
        model: Llama,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        *,
        sync_grads: bool = False,
    ) -> Tensor:
        """Return the last hidden states [B, T, D], after the final norm, by the wrapped model.

        Arguments are Llama.forward's. With ``sync_grads`` the backward pass reduces gradients.
        """
        if self.tensor_mesh is not None:
            from .tensor_parallel import forward_hidden

            return forward_hidden(model, self.tensor_mesh, tokens, positions, mask)
        if self.is_sharded:
            hidden, _ = model(tokens, positions=positions, mask=mask, project=False)
            return hidden
        decoder = self.replica if self.replica is not None else model.model
        hidden, _ = decoder(tokens, positions=positions, mask=mask)
        if sync_grads and self.replica is not None and (heads := own_heads(model)):
            # Their gradients are complete before the blocks' backward pass begins.
            hidden.register_hook(lambda _: self._reduce_heads(heads))
        return hidden

    def _reduce_heads(self, heads: Iterable[Tensor]) -> None:
        for head in heads:
            grad = head.grad
            assert grad is not None
            wide = grad.float() if grad.dtype == torch.bfloat16 else grad
            wide /= self.data_size
            self._head_reductions.append((dist.all_reduce(wide, async_op=True), grad, wide))

    def all_reduce_mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, in place, by its mean over the data-parallel ranks."""
        if self.data_size == 1:
            return
        assert self.mesh is not None
        # Ranks of a tensor-parallel group hold the same values: the mean over all is theirs too.
        works = []
        for tensor in tensors:
            tensor /= self.world
            works.append(dist.all_reduce(tensor, async_op=True))
        for work in works:
            work.wait()

    def all_reduce_sum(self, *numbers: int) -> list[int]:
        """Return each number's sum over the data-parallel ranks, without waiting for a GPU."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers)
        dist.all_reduce(total)
        return [number // (self.world // self.data_size) for number in total.tolist()]

    def all_reduce_max(self, number: int) -> int:
        """Return the maximum of a number over all processes."""
        if self.world == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def all_equal(self, number: int) -> bool:
        """Return whether all processes have the same number."""
        return self.all_reduce_max(number) == -self.all_reduce_max(-number)

    def barrier(self) -> None:
        """Wait for every process."""
        self.all_reduce_sum(0)

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor, in place, by its sum over the data-parallel ranks; return it."""
        if self.data_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world // self.data_size
        return tensor

    @contextmanager
    def errors_on_main_only(self) -> Iterator[None]:
        """Raise an InputError met by all processes on the main one; the others exit with code 2."""
        try:
            yield
        except InputError:
            if self.is_main_process:
                raise
            raise SystemExit(2) from None

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body on the main process, then on the others, which find the files it wrote."""
        if not self.is_main_process:
            self.barrier()
        yield
        if self.is_main_process:
            self.barrier()


def own_heads(model: Llama) -> list[Tensor]:
    """Return the parameters behind the decoder: heads that are not its embedding."""
    decoder = {id(parameter) for parameter in model.model.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in decoder]


def _mean_in_float32(world: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of bfloat16 gradients over processes; rounded once, when it is summed."""
    grads = bucket.buffer()
    wide = grads.float().div_(world)
    summed = dist.all_reduce(wide, async_op=True).get_future()
    return summed.then(lambda done: grads.copy_(done.value()[0]))


def _as_sharded(model: Llama) -> "FSDPModule":
    """Return a model that ``Parallel.build_sharded`` has sharded, as the FSDPModule that it is."""
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(model, FSDPModule)
    return model
