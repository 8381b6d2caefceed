"""The optimizer step: DeepSpeed's ZeRO 1, 2 and 3 behind one small interface. The only module that imports deepspeed.

One code path serves every stage, precision and device:

    for micro_batch in mine:
        cross_entropy, _ = engine(**micro_batch)
        engine.backward(cross_entropy / num_loss_tokens_of_the_step, last=micro_batch is mine[-1])
    norm = engine.step(learning_rate)

Gradients are added up over micro-batches and ranks, in fp32. Every rank takes part in every step with at least one
micro-batch, and under ZeRO 2 and 3 all with equally many: they communicate in each backward pass.

deepspeed is imported by the first function that needs it, for it picks its device when it is imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from sft_api.run import ExitCode, ResolvedOptimizer, RunError
from sft_api.spec import OptimizerState
from sft_trainer.state import Piece, StateSource

BUCKET_ELEMENTS = 100_000_000
"""Gradients are reduced in buckets of so many elements: 400 MB in fp32, ample for the bandwidth of any network."""


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """deepspeed prints its memory and its milestones; stdout is for events. What goes wrong it raises or logs."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def load_deepspeed(device: torch.device) -> Any:
    """deepspeed, told which kind of device it is for, and silent on stdout."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Without it deepspeed takes the number of NUMA nodes for the number of ranks.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with contextlib.redirect_stdout(sys.stderr):  # the logger keeps the stream it finds at import
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
        handler.setLevel(logging.WARNING)
    logger.setLevel(logging.WARNING)
    return deepspeed


JOIN_PATIENCE = timedelta(minutes=10)
"""How long the ranks of other machines may start later: pulling the image, fetching the model. torch tries twice."""


def init_distributed(device: torch.device, timeout: timedelta) -> tuple[int, int, int]:
    """Join the gang described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; collective.

    `timeout` bounds every collective that follows. Returns (rank, world, local rank).
    """
    deepspeed = load_deepspeed(device)
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cpu":
        # An operation for inference on shared memory, which deepspeed would compile here and now: minutes, or a crash
        # where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(local_rank)
    backend = "gloo" if device.type == "cpu" else "nccl"
    store, rank, world = next(rendezvous("env://", timeout=JOIN_PATIENCE))
    bound = device if device.type == "cuda" and world > 1 else None  # as deepspeed would
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound)
    with silenced():
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return dist.get_rank(), dist.get_world_size(), local_rank


@dataclass(frozen=True)
class Fragment:
    """Where this rank's slice of a parameter lies: `count` elements from `offset` in one of its flat fp32 masters."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    flat: Tensor
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        return flat.detach().view(-1).narrow(0, self.offset, self.count)


class Engine:
    """A module in training under ZeRO, with AdamW and fp32 masters.

    `module`'s parameters are in fp32 or bf16 and equal on every rank. With `bf16`, weights and activations are in bf16;
    the masters then start from the parameters as given (from fp32 parameters unrounded, which costs each rank their
    fp32 copy until the engine stands), and the weights from their rounding. Without it all parameters must be in fp32.

    `prefix` is what wrappers put before the names of the model's parameters; pieces and state dicts go without it.

    Weight decay acts on matrices (two dimensions or more, embeddings included) and never on norms and biases. The
    recipes of the paper have none.

    `skipped` says whether the last step was refused because its gradient was not finite: weights and state are then
    as before the step, on every rank, and the norm returned is infinite.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        stage: int,
        bf16: bool,
        optimizer: ResolvedOptimizer,
        device: torch.device,
        timeout: timedelta,
        prefix: str = "",
    ):
        assert stage in (1, 2, 3), stage
        assert bf16 or all(parameter.dtype == torch.float32 for parameter in module.parameters())
        assert all(name.startswith(prefix) for name, _ in module.named_parameters())
        deepspeed = load_deepspeed(device)
        self._prefix = prefix
        self._zero3 = stage == 3
        self._averaged_over = dist.get_world_size() if self._zero3 else 1
        self._gathered = deepspeed.zero.GatheredParameters
        self.skipped = False
        unrounded = {name: p.data for name, p in module.named_parameters() if p.dtype == torch.float32} if bf16 else {}
        adam = torch.optim.AdamW(parameter_groups(module), lr=0.0, fused=device.type == "cuda")
        count = sum(parameter.numel() for parameter in module.parameters())
        with silenced():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=adam,
                config=deepspeed_config(stage, bf16, optimizer.max_grad_norm, count, device),
                dist_init_required=False,
            )
        self._zero = self._engine.optimizer
        self._adam: torch.optim.AdamW = self._zero.optimizer
        # deepspeed works in a group of its own, which it leaves with the backend's time-out.
        dist.set_timeout(timeout, self._zero.dp_process_group)
        self._fragments = list(self._find_fragments())
        for fragment in self._fragments:
            self._ensure_moments(fragment.flat)
        self._start_masters_from(unrounded)
        self._set_hyperparameters(optimizer)

    @property
    def module(self) -> nn.Module:
        return self._engine.module  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **batch: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*args, **batch)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes inside have no gradient and no dropout. Under ZeRO 3 every rank makes equally many."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this micro-batch. `last`: this rank's last one of the step."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._averaged_over, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """One optimizer step; collective. Returns the global norm of the gradient before clipping."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self.skipped = bool(self._zero.overflow)
        return float(self._engine.get_global_grad_norm())

    def configure(self, optimizer: ResolvedOptimizer) -> None:
        """Take over the settings of a new phase. With `state: Reset` Adam starts afresh: no moments, no steps."""
        self._set_hyperparameters(optimizer)
        if optimizer.state is OptimizerState.RESET:
            for fragment in self._fragments:
                for tensor in self._adam.state[fragment.flat].values():
                    tensor.zero_()

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns, as views of the live state; no collective."""
        for fragment in self._fragments:
            state = self._adam.state[fragment.flat]
            yield Piece(
                name=fragment.name,
                shape=fragment.shape,
                start=fragment.start,
                tensors={
                    "master": fragment.view(fragment.flat),
                    "exp_avg": fragment.view(state["exp_avg"]),
                    "exp_avg_sq": fragment.view(state["exp_avg_sq"]),
                },
                step=int(state["step"]),
            )

    @torch.no_grad()
    def restore(self, source: StateSource) -> None:
        """Take over a state that was saved under any stage and number of ranks, bit for bit; collective.

        Written in place: ZeRO 1 and 2 hold views of these tensors.
        """
        for fragment, piece in zip(self._fragments, self.pieces(), strict=True):
            for key, view in piece.tensors.items():
                values = source.read(piece.name, key, piece.start, piece.start + piece.count)
                view.copy_(torch.from_numpy(np.require(values, np.float32, "W")))
            self._adam.state[fragment.flat]["step"].fill_(source.adam_step(piece.name))
        self._weights_from_masters()

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights on the CPU, parameters in bf16, on rank 0; empty on the others; collective.

        Tied weights appear once, under the first of their names; persistent buffers keep their type. No more than one
        parameter at a time is gathered.
        """
        first = dist.get_rank() == 0
        weights: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with self._gathered([parameter], enabled=self._zero3):
                if first:
                    weights[self._short(name)] = parameter.detach().to("cpu", torch.bfloat16, copy=True)
        if first:
            weights |= {self._short(name): buffer.detach().cpu() for name, buffer in self._persistent_buffers()}
        return weights

    def destroy(self) -> None:
        """Let go of the module, its hooks and the state; the engine is of no use afterwards."""
        with silenced():
            self._engine.destroy()
        self._fragments.clear()
        self._adam.state.clear()

    def _short(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self.module.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    yield name, buffer

    def _find_fragments(self) -> Iterator[Fragment]:
        """This rank's slices, in the order of the module's parameters. Facts of deepspeed 0.19, held by a test."""
        rank = dist.get_rank()
        parameter: Any  # deepspeed hangs its own attributes on parameters
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._zero3:
                group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = rank * size
                count = min(size, parameter.ds_numel - start)  # the last ranks' partitions may be padding
                shape, flat = tuple(parameter.ds_shape), self._zero.fp32_partitioned_groups_flat[group]
            elif (mapping := parameter._hp_mapping) is not None:
                start, count = mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel
                offset = mapping.hp_fragment_address.start
                shape = tuple(parameter.shape)
                flat = self._adam.param_groups[mapping.param_group_index]["params"][0]
            else:
                continue
            if count > 0:
                yield Fragment(self._short(name), shape, start, count, flat, offset)

    def _ensure_moments(self, flat: Tensor) -> None:
        """Adam's state from the start on, so that memory is asked for now and a checkpoint of step 0 is whole."""
        state = self._adam.state[flat]
        if "exp_avg" not in state:
            where = flat.device if self._adam.defaults["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)

    @torch.no_grad()
    def _start_masters_from(self, unrounded: dict[str, Tensor]) -> None:
        given = {self._short(name): tensor for name, tensor in unrounded.items()}
        for piece in self.pieces():
            if piece.name in given:
                whole = given[piece.name].view(-1)
                piece.tensors["master"].copy_(whole[piece.start : piece.start + piece.count])

    def _set_hyperparameters(self, optimizer: ResolvedOptimizer) -> None:
        for group in self._adam.param_groups:
            group["betas"], group["eps"] = optimizer.betas, optimizer.eps
            group["weight_decay"] = optimizer.weight_decay if group["decays"] else 0.0
        self._zero.clip_grad = optimizer.max_grad_norm

    def _weights_from_masters(self) -> None:
        """Cast every rank's masters into the weights and gather them; collective."""
        if not self._zero3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters for torch's optimizers: those that weight decay acts on, and norms and biases."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() > 1]
    vectors = [parameter for parameter in trainable if parameter.dim() <= 1]
    groups = [{"params": matrices, "decays": True}, {"params": vectors, "decays": False}]
    return [group for group in groups if group["params"]]


def deepspeed_config(
    stage: int, bf16: bool, max_grad_norm: float, elements: int, device: torch.device
) -> dict[str, Any]:
    """What deepspeed is told. Micro-batch size and accumulation steps are required, and used for nothing here."""
    bucket = min(BUCKET_ELEMENTS, elements)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # Each gradient joins its fp32 sum as soon as it is there, and its bf16 form is freed.
        "bf16": {"enabled": bf16, "immediate_grad_update": bf16},
        # Both are needed: the first for the sum over micro-batches, the second for that over ranks.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
        "communication_data_type": "fp32",
        # To average, ZeRO 2 divides gradients while they are in bf16: off by 1e-3 where ranks are no power of two.
        # ZeRO 3 can only average, and does so in fp32.
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "zero_optimization": {
            "stage": stage,
            # Stage 1 reduces once a step and has nothing to overlap with.
            "overlap_comm": stage > 1 and device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }


OUT_OF_MEMORY_WORDS = ("DefaultCPUAllocator", "out of memory")
COMMUNICATION_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")


def as_run_error(error: BaseException) -> RunError | None:
    """What torch or deepspeed mean by `error`, where it is a lack of memory or a broken gang; otherwise None."""
    words = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return out_of_memory(words)
    if isinstance(error, dist.DistError):
        return communication(words)
    if isinstance(error, RuntimeError):
        if any(sign in words for sign in OUT_OF_MEMORY_WORDS):
            return out_of_memory(words)
        if any(sign in words for sign in COMMUNICATION_WORDS):
            return communication(words)
    return None


def out_of_memory(words: str) -> RunError:
    ways = "lower spec.batch.maxTokensPerGPU, raise spec.trainer.zeroStage or use more GPUs"
    return RunError(ExitCode.OUT_OF_MEMORY, f"out of memory: {first_line(words)}; {ways}")


def communication(words: str) -> RunError:
    return RunError(ExitCode.COMMUNICATION, f"the ranks lost each other: {first_line(words)}")


def first_line(words: str) -> str:
    """Without the place in somebody else's source, and gloo's advice."""
    line = words.strip().partition("\n")[0].partition(" This is typically caused")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line)[:300]
