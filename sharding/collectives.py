"""Exchange between ranks: rows of a global batch, flags, and gathered results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharding.errors import UserError, UserErrors
from sharding.heartbeat import beat

T = TypeVar("T")


def gather_rows(rows: Tensor) -> Tensor:
    """rows [b, …] of each rank → [world·b, …] in rank order (collective). All ranks must pass the same shape."""
    whole = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather(list(whole.chunk(dist.get_world_size())), rows.contiguous())
    return whole


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; the same answer on all (collective)."""
    agreed = torch.tensor(int(flag), device=device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return bool(agreed)


def gather_objects(value: Any) -> list[Any]:
    """The value of each rank, in rank order, on all ranks (collective; for small results outside the step)."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], T]) -> T:
    """Runs `action` on every rank; a user error on any of them ends all, and rank 0 tells it (collective).

    Otherwise the ranks without the error would wait in the next exchange for one that has left. What the disk refuses
    is such an error, too.

    Raises:
        UserErrors: on every rank; empty on all but rank 0.
    """
    errors: list[UserError] = []
    try:
        value = action()
    except UserError as error:
        errors = [error]
    except UserErrors as error:
        errors = error.errors
    except OSError as error:
        place = str(error.filename or "disk")
        errors = [UserError(place, f"cannot be used ({error.strerror or error})", "Free or allow the place.")]
    beat("exchange", waits=True)
    if any_rank(bool(errors)):
        every = {str(error): error for part in gather_objects(errors) for error in part}
        raise UserErrors(list(every.values()) if dist.get_rank() == 0 else [])
    return value


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
