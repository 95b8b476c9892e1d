"""One micro-step as a list of events, found without allocating or computing anything.

The real modules run, forward and backward, on tensors that have a shape and no data (torch's meta device). What a step
holds in memory and computes is thereby known by construction, not from formulas that age with the model. Tensors of
whole numbers (masks, lengths, indices) are computed for real, because the model's control flow reads them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharding.plan_kernels import flops_of, real_places, replaced, unit_of
from sharding.plan_run import Operations, tensors_in

ELSEWHERE = "the rest"  # what runs outside of every part, the loss above all


@dataclass(frozen=True, slots=True)
class Event:
    """Something that changes what is held.

    Args:
        kind: `memory`: `size` bytes more (fewer, if negative) are held for `part`. `gradient`: that of parameter
            `index` is complete. `enter`, `leave`: module `index` begins or ends. `repeat`: what follows, up to the
            next of this kind, is done `size` times. `phase`: `part` (decode, forward, backward) begins.
    """

    kind: str
    size: int = 0
    part: str = ""
    index: int = -1


@dataclass(slots=True)
class Work:
    """An operation: floating point operations, bytes it reads and writes, how often it is run, and the unit that runs
    it: `16` or `32` bits per number, or a quantised product (see sharding.hardware).
    """

    part: str
    phase: str
    flops: int
    moved: int
    times: int
    unit: str


@dataclass
class Trace:
    """What a micro-step does, in order.

    Args:
        modules: for each module with parameters of its own, the indices of the parameters it uses.
    """

    events: list[Event] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    modules: list[set[int]] = field(default_factory=list)

    def flops(self, **where: str) -> int:
        """Floating point operations, two per multiply-add; of all, or of one `part` or `phase`."""
        return sum(
            work.flops * work.times
            for work in self.work
            if all(getattr(work, key) == value for key, value in where.items())
        )

    def visits(self, decoding: float) -> float:
        """How often a module is begun, forward or backward; decoding counts so many times."""
        count, times = 0.0, 1.0
        phase = "forward"
        for event in self.events:
            if event.kind == "phase":
                phase, times = event.part, 1.0
            elif event.kind == "repeat":
                times = float(event.size)
            elif event.kind == "enter":
                count += times * (decoding if phase == "decode" else 1.0)
        return count

    def peak(self) -> int:
        """Most bytes held beside parameters, gradients and inputs."""
        held = most = 0
        for event in self.events:
            if event.kind == "memory":
                held += event.size
                most = max(most, held)
        return most


class Tracer(TorchDispatchMode):
    """Runs operations on tensors without data and records a Trace. Build the model on the meta device, then run the
    step inside :meth:`recording`.

    Args:
        cuda: attention and dropout use the kernels of CUDA; otherwise those of the CPU.
        zero3: linear layers keep what DeepSpeed's replacement for them keeps.
        operations: with what is known from other traces.
    """

    def __init__(self, *, cuda: bool, zero3: bool = False, operations: Operations | None = None) -> None:
        super().__init__()
        self.cuda, self.zero3 = cuda, zero3
        self.trace = Trace()
        self.operations = operations or Operations()
        self.on = False
        self.times = 1
        self.behind = ELSEWHERE  # part that the backward pass is in
        self.place: list[tuple[str, int]] = []  # (part, module) that run, innermost last
        self.known: dict[int, Any] = {}  # storages accounted for, by address of their C++ object
        self.owners: dict[int, int] = {}  # parameter index, by address of its storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        args = real_places(func, args)
        tensors = list(tensors_in([args, kwargs]))
        result = self.operations.run(func, args, kwargs, tensors)
        if self.on:
            self.record(func, args, kwargs, tensors, result)
        return result

    def record(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], result: Any) -> None:
        """Adds memory and work of one operation."""
        new = [output for output in tensors_in([result]) if self.hold(output)]
        self.note_foreign(tensors)
        flops = flops_of(func, args, kwargs, result)
        if not new and not func._schema.is_mutable and not flops:
            return  # a view
        moved = sum(bytes_of(tensor) for tensor in {id(tensor): tensor for tensor in [*tensors, *new]}.values())
        self.trace.work.append(Work(self.part, self.phase, flops, moved, self.times, unit_of(func, tensors)))

    @property
    def phase(self) -> str:
        """decode, forward or backward."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._phase = name
        self.trace.events.append(Event("phase", part=name))

    @property
    def part(self) -> str:
        """Which part of the model runs."""
        return self.place[-1][0] if self.place else self.behind

    def hold(self, tensor: Tensor) -> bool:
        """Whether the tensor brings memory of its own, which then counts until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return False
        size, part = storage.nbytes(), self.part

        def freed(_: Any) -> None:
            del self.known[key]
            if self.on:  # what is left at the end of the micro-step stays
                self.trace.events.append(Event("memory", -size, part))

        self.known[key] = weakref.ref(storage, freed)
        self.trace.events.append(Event("memory", size, part))
        return True

    def note_foreign(self, tensors: Iterable[Tensor]) -> None:
        """Parameters that the running module uses though they are another module's: ZeRO-3 gathers them with it."""
        if self.phase == "forward" and self.place:
            found = (self.owners.get(tensor.untyped_storage()._cdata) for tensor in tensors)
            self.trace.modules[self.place[-1][1]].update(index for index in found if index is not None)

    @contextmanager
    def recording(self, model: nn.Module, held: Iterable[Tensor]) -> Iterator[Trace]:
        """Records a forward and backward pass of the model.

        Args:
            held: inputs that exist already; they do not count.
        """
        with ExitStack() as stack:
            stack.enter_context(self)
            observer = Observer(model, self)
            stack.callback(lambda: [handle.remove() for handle in observer.handles])
            stack.enter_context(replaced(cuda=self.cuda, zero3=self.zero3))
            for tensor in [*model.parameters(), *model.buffers(), *held]:
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = storage
            self.on = True
            self.phase = "forward"
            try:
                yield self.trace
            finally:
                self.on = False

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """The work inside is done `times` times in truth."""
        self.times, before = self.times * times, self.times
        self.trace.events.append(Event("repeat", self.times))
        try:
            yield
        finally:
            self.times = before
            self.trace.events.append(Event("repeat", before))


def bytes_of(tensor: Tensor) -> int:
    """Bytes of the tensor's elements."""
    return tensor.numel() * tensor.element_size()


class Mark(torch.autograd.Function):
    """The identity, which calls `note` when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.note()
        return gradient, None


class Observer:
    """Hooks that tell the tracer which child of the model and which module runs, and when a gradient is complete.

    Modules are marked where DeepSpeed's ZeRO-3 marks them (parameter_offload.py): a module begins its backward pass
    with the gradient of an output, and ends it with those of all its positional inputs.
    """

    def __init__(self, model: nn.Module, tracer: Tracer) -> None:
        self.tracer, self.events = tracer, tracer.trace.events
        self.numbers = {id(parameter): index for index, parameter in enumerate(model.parameters())}
        self.handles: list[Any] = []
        for name, module in model.named_modules():
            self.watch(module, name.split(".")[0] or ELSEWHERE)
        for parameter in model.parameters():
            tracer.owners[parameter.untyped_storage()._cdata] = self.numbers[id(parameter)]
            if parameter.requires_grad:
                self.handles.append(parameter.register_post_accumulate_grad_hook(self.complete))

    def complete(self, parameter: Tensor) -> None:
        """A complete gradient is dropped; how long it is really kept is for those to say who read the events."""
        parameter.grad = None
        self.events.append(Event("gradient", bytes_of(parameter), index=self.numbers[id(parameter)]))

    def watch(self, module: nn.Module, part: str) -> None:
        """Adds the hooks of one module."""
        number = len(self.tracer.trace.modules)
        own = {self.numbers[id(parameter)] for parameter in module.parameters(recurse=False)}
        self.tracer.trace.modules.append(own)

        def note(kind: str, backward: bool) -> None:
            self.events.append(Event(kind, index=number))
            if backward:
                self.tracer.behind = part

        def begin(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
            self.tracer.place.append((part, number))
            note("enter", False)
            waiting = sum(differentiable(value) for value in inputs) if own else 0

            def passed() -> None:
                nonlocal waiting
                waiting -= 1
                if waiting == 0:
                    note("leave", True)

            return marked(inputs, passed) if waiting else None

        def end(_: nn.Module, inputs: Any, output: Any) -> Any:
            self.tracer.place.pop()
            note("leave", False)
            return marked(output, partial(once, [lambda: note("enter", True)])) if own else None

        self.handles.append(module.register_forward_pre_hook(begin))
        self.handles.append(module.register_forward_hook(end))


def differentiable(value: Any) -> bool:
    """Whether a gradient can pass the value."""
    return isinstance(value, Tensor) and value.requires_grad


def marked(values: Any, note: Callable[[], None]) -> Any:
    """A tensor, or a tuple with tensors, marked where a gradient can pass."""
    if isinstance(values, tuple) and type(values) is tuple:
        return tuple(Mark.apply(value, note) if differentiable(value) else value for value in values)
    return Mark.apply(values, note) if differentiable(values) else values


def once(calls: list[Callable[[], None]]) -> None:
    """Calls what is left in the list."""
    while calls:
        calls.pop()()


def parts_of(model: nn.Module) -> Counter[str]:
    """Elements of the parameters of each child of the model."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        found[name.split(".")[0]] += parameter.numel()
    return found
