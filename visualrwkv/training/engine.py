"""DeepSpeed and the processes that train together: settings, joining, and what the ranks tell one another."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visualrwkv.files import read_json
from visualrwkv.training.recipes import Recipe


def deepspeed_config(recipe: Recipe, world: int, own: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's settings, generated so that each number lives once; a user's `own` JSON overrides them one by one."""
    zero: dict[str, Any] = {"stage": recipe.zero}
    device = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if recipe.offload != "none":
        zero["offload_optimizer"] = device
    if recipe.offload == "all":
        zero["offload_param"] = device
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # one packed row
        "gradient_accumulation_steps": recipe.accumulate,
        "train_batch_size": recipe.accumulate * world,
        "gradient_clipping": recipe.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # the bar and metrics.jsonl say it
    }
    if recipe.weights_bf16:
        settings["bf16"] = {"enabled": True}
    if own is None:
        return settings
    theirs = read_json(own)
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"):
        if theirs.get(name, settings[name]) != settings[name]:
            raise ValueError(
                f"{own} sets {name} to {theirs[name]}, the recipe to {settings[name]}; set it with --accumulate and the ranks"
            )
    stage = (theirs.get("zero_optimization") or {}).get("stage", recipe.zero)
    if stage != recipe.zero:  # what is gathered and kept follows the recipe
        raise ValueError(
            f"{own} sets the stage of zero_optimization to {stage}, the recipe to {recipe.zero}; set it with --zero"
        )
    return merge(settings, theirs)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, with those of `above` where both have one."""
    both = {
        k: merge(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v for k, v in above.items()
    }
    return below | both


def join_world() -> None:
    """Join the launcher's processes; started without a launcher, be a world of one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.prefix != sys.base_prefix:  # what DeepSpeed compiles is this environment's; another's would be compiled anew
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it says that there is no GPU
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it builds
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not torch.cuda.is_available():
            compile_once()
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    dist.barrier()
    # Now that all ranks have opened one another's shared memory its names can go: DeepSpeed would leave 69 MB a rank behind.
    mine = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{dist.get_rank()}"
    Path("/dev/shm", mine).unlink(missing_ok=True)


def compile_once() -> None:
    """Compile what DeepSpeed's ranks on one CPU tell one another by, where it is not yet, one process at a time.

    torch marks a compilation by a file, for which all others wait, for ever if its process was killed. The lock here ends
    with its process: whoever holds it knows that nobody compiles, and that such a file is a dead one's.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with open(folder / ".compiling", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def leave_world(status: int) -> NoReturn:
    """End this process. One of several ranks ends at once: threads of the engine that still live would abort it now and then."""
    if dist.get_world_size() == 1:
        raise SystemExit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class World:
    """What the ranks tell one another, over a group of their own on the CPUs: no GPU waits for it."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.chief = self.rank == 0
        self.local_chief = int(os.environ.get("LOCAL_RANK", 0)) == 0
        own = self.size > 1 and dist.get_backend() != "gloo"
        self.group = dist.new_group(backend="gloo") if own else None
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks, once all have come here."""
        if self.size == 1:
            return list(values)
        both = torch.tensor([*values, 0.0], dtype=torch.float64)
        dist.all_reduce(both, group=self.group)
        return both.tolist()[:-1]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def agree(self, error: Exception | None) -> None:
        """Go on only if no rank has an error: where one has, it is raised, and the others end quietly."""
        if self.sum(float(error is not None))[0]:
            self.end(error)

    def end(self, error: Exception | None) -> None:
        """Raise this rank's error, or leave the word to the rank that has one."""
        if error is not None:
            raise error
        raise SystemExit(1)


PARTED = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "NCCL communicator was aborted")


@contextlib.contextmanager
def other_ranks(rank: int) -> Iterator[None]:
    """Say in one sentence that another rank has ended, in whatever call that shows."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in PARTED):
            raise
        raise ConnectionError(
            f"rank {rank} stops because another rank has ended; what that one said stands above, and the same command goes on "
            "from the last checkpoint"
        ) from error


class Interrupt:
    """Ctrl-C and termination end the step that runs, not the process."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, *_: object) -> None:
        self.signal = number


def recompute_blocks(model: nn.Module, zero: int) -> None:
    """Keep only what goes into each block and make the rest again in backward: memory for a third more time.

    ZeRO 3 gathers a block's weights again only in the reentrant form, which needs an input that has a gradient.
    """
    for block in model.blocks:  # type: ignore[union-attr]
        block.forward = partial(_again, block.forward, zero == 3)


def _again(forward: Callable[..., Any], reentrant: bool, x: Tensor, *rest: Any) -> Any:
    if reentrant and torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    return checkpoint(forward, x, *rest, use_reentrant=reentrant)


def gathered(model: nn.Module, zero: int) -> Any:
    """Whole parameters on every rank while they are written (ZeRO 3 holds only parts)."""
    if zero < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def gradient_norms(model: nn.Module, zero: int) -> dict[str, float]:
    """The norm of the gradients of each part of the model, before the optimizer's step; all ranks must ask."""
    squares: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        grad = p.grad
        if zero:
            from deepspeed.utils import safe_get_full_grad

            grad = safe_get_full_grad(p)
        if grad is not None:
            part = name.removeprefix("model.").removeprefix("rwkv.").split(".")[0]
            squares[part] = squares.get(part, torch.zeros(())) + grad.float().square().sum().cpu()
    return {part: float(square.sqrt()) for part, square in squares.items()}
