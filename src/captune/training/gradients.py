"""Gradients of several processes, added up while the backward pass still makes others.

As DistributedDataParallel does (Li et al. 2020, section 3.2.3), but by captune itself: a gradient
here is a sum over processes, not a mean, a batch in chunks has several backward passes, of which
only the last one makes them whole, and what trains changes with stage and epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from torch import Tensor

from captune.errors import CaptuneError
from captune.training.sharing import Sum, add_up, zeros_where_others_have

BUCKET = 2**20  # numbers that are sent together, 4 MB: the last ones are sent when all else is done


@contextmanager
def summed_gradients(
    backbone: Sequence[Tensor], others: Sequence[Tensor], sizes: Sequence[int], *, in_chunks: bool
) -> Iterator[Callable[[], None]]:
    """Inside, a backward pass; afterwards all processes have the sums of their gradients.

    Args:
        backbone: what trains before the features are gathered, in the order of the forward pass.
        others: what trains behind it.
        sizes: of the batch's images, how many each process holds.
        in_chunks: of this process. The backbone's gradients grow in several passes, and are sent
            from where the last one begins: call what is given back then.
    """
    trained = [*backbone, *others]
    if 0 in sizes:  # a process without images has no gradient of its backbone
        yield lambda: None
        zeros_where_others_have(trained, sizes)
        add_up([p.grad for p in trained if p.grad is not None])
        return
    sums = _Sums(backbone, trained, last_pass=not in_chunks)
    try:
        yield sums.begin_last_pass
        sums.end()
    finally:
        sums.close()


class _Bucket:
    """Parameters whose gradients are sent together."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.come: set[Tensor] = set()  # those whose gradients are there
        self.sent = False
        self._sum: Sum | None = None

    @property
    def whole(self) -> bool:
        """Whether all gradients are there."""
        return len(self.come) == len(self.parameters)

    @property
    def done(self) -> bool:
        """Whether taking the sums is no wait."""
        return self._sum is None or self._sum.done

    def send(self) -> None:
        """Begin to add up those that are there; the others have none in this step."""
        self.sent = True
        grads = [p.grad for p in self.parameters if p.grad is not None]
        self._sum = Sum(grads) if grads else None

    def take(self) -> None:
        """Wait for the sums, and put them in the gradients' place; their copy goes."""
        if self._sum is not None:
            self._sum.take()
            self._sum = None


class _Sums:
    """Sends buckets, the last parameters' first, in the same order in each process.

    A bucket is sent once it and those before it are whole. Gathering the features sends something
    in the backward pass, too; so that all processes have that first, nothing is sent before a
    gradient of the backbone, which comes after it, is there. Where a parameter has no gradient in
    a step, what comes after it is sent when the pass is over, for its bucket is never whole.
    """

    def __init__(
        self, backbone: Sequence[Tensor], trained: Sequence[Tensor], *, last_pass: bool
    ) -> None:
        self._buckets = _buckets(trained)
        self._sent = self._taken = 0
        self._last_pass = last_pass
        after_gathering = set(backbone)
        bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}

        def came(parameter: Tensor) -> None:
            bucket = bucket_of[parameter]
            if bucket.sent:
                raise CaptuneError(
                    "a weight of the backbone gets its gradient in several parts, as layers do "
                    "that are used again under reentrant checkpointing: several processes need "
                    "use_reentrant=False"
                )
            late = parameter in after_gathering
            if self._last_pass or not late:
                bucket.come.add(parameter)
            if self._last_pass and late:
                self._send(lambda bucket: bucket.whole)

        self._hooks = [
            p.register_post_accumulate_grad_hook(came)  # type: ignore[no-untyped-call]
            for p in trained
        ]

    def begin_last_pass(self) -> None:
        """From here on a gradient of the backbone that comes is whole."""
        self._last_pass = True

    def _send(self, ready: Callable[[_Bucket], bool]) -> None:
        """Send buckets from the first that was not sent yet, as long as they are ``ready``; take
        what is done, whose copies of the gradients then go."""
        while self._sent < len(self._buckets) and ready(self._buckets[self._sent]):
            self._buckets[self._sent].send()
            self._sent += 1
        self._take(lambda bucket: bucket.done)

    def _take(self, ready: Callable[[_Bucket], bool]) -> None:
        while self._taken < self._sent and ready(self._buckets[self._taken]):
            self._buckets[self._taken].take()
            self._taken += 1

    def end(self) -> None:
        """Send what is left, and take all sums."""
        self._send(lambda bucket: True)
        self._take(lambda bucket: True)

    def close(self) -> None:
        """Watch no gradient any more. What an error has left on its way arrives first: a thread
        that is at work while the interpreter ends would abort the process."""
        for hook in self._hooks:
            hook.remove()
        for bucket in self._buckets[self._taken : self._sent]:
            with suppress(RuntimeError):  # the other one has ended
                bucket.take()


def _buckets(parameters: Sequence[Tensor]) -> list[_Bucket]:
    """Parameters from the last to the first, in parts of ``BUCKET`` numbers or one parameter."""
    found: list[_Bucket] = []
    size = 0
    for parameter in reversed(parameters):
        if not found or size + parameter.numel() > BUCKET:
            found.append(_Bucket())
            size = 0
        found[-1].parameters.append(parameter)
        size += parameter.numel()
    return found
