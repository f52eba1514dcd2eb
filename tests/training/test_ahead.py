"""Preparing a step while the one before is computed: the same steps, and no thread is left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.features import FeatureStore
from captune.losses import InfoNCELoss
from captune.matching import match_pairs, mix_pairs
from captune.models import CLIPModel
from captune.processes import Processes
from captune.training import steps as steps_module
from captune.training.ahead import ahead
from captune.training.criteria import make_criterion
from captune.training.feature_batches import FeatureBatches
from captune.training.loader import Batches, make_loader
from captune.training.mixing import step_mix
from captune.training.progress import EpochMeter, EpochProgress
from captune.training.steps import train_epoch

Tables = tuple[CaptionTable, CaptionTable]
CPU = torch.device("cpu")


def threads_ahead() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("ahead")]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads of torch, and none of ours before or after."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert threads_ahead() == []
    yield
    assert threads_ahead() == []
    torch.set_num_threads(before)


def test_items_come_in_order_from_one_other_thread_which_is_one_ahead() -> None:
    made: list[int] = []
    makers = set()

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            makers.add(threading.current_thread().name)
            yield number

    for number in ahead(items()):
        time.sleep(0.002)
        assert number <= made[-1] <= number + 1
        assert threads_ahead() == list(makers)
    assert made == list(range(20)) and number == 19
    assert list(ahead(iter(()))) == []


@pytest.mark.parametrize(("threads", "each"), [(2, 1), (3, 2), (4, 2)])
def test_maker_and_caller_have_half_of_the_threads_and_all_come_back(
    threads: int, each: int
) -> None:
    torch.set_num_threads(threads)
    steps = ahead(torch.get_num_threads() for _ in range(3))
    assert next(steps) == each == torch.get_num_threads()
    steps.close()
    assert torch.get_num_threads() == threads


def test_both_work_at_the_same_time() -> None:
    """Each waits for the other in turn: one after the other, neither would ever come."""
    mine, theirs = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        theirs.set()
        assert mine.wait(60)
        yield 2

    steps = ahead(items())
    assert next(steps) == 1
    assert theirs.wait(60)
    mine.set()
    assert list(steps) == [2]


def test_what_making_an_item_raises_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"):
        for number in ahead(items()):
            seen.append(number)
    assert seen == [1, 2] and threads_ahead() == [] and torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_closing_early_ends_the_thread_and_gives_the_threads_back(kind: type) -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 1

    with pytest.raises(kind), closing(ahead(forever())) as steps:
        for _ in steps:
            raise kind
    assert threads_ahead() == [] and torch.get_num_threads() == 2


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals one thread")
def test_an_interrupt_while_waiting_for_an_item_reaches_the_caller() -> None:
    def items() -> Iterator[int]:
        main = threading.main_thread().ident
        assert main is not None
        time.sleep(0.2)  # the caller waits by now
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)
        yield 1

    # A shell that starts the tests in the background has Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(ahead(items()))
    finally:
        signal.signal(signal.SIGINT, before)
    assert threads_ahead() == [] and torch.get_num_threads() == 2


@pytest.fixture
def settings(config: Config) -> Config:
    """As the best recipe draws, with few negatives, in batches of 7 of 24; some captions near."""
    return config.replace(
        recipe="best",
        head_batch_size=7,
        bank_negatives=12,
        captions_per_image=3,
        duplicate_threshold=0.6,
        precision="fp32",
    )


class Job:
    """A model and what trains its head; the same from the same seed."""

    def __init__(self, table: CaptionTable, config: Config) -> None:
        torch.manual_seed(0)
        self.config = config
        self.model = CLIPModel.from_config(config)
        store = FeatureStore.build(
            table, self.model, mirrored=True, precision="fp32", num_workers=0, progress=False
        )
        bank = CaptionBank.build(table.texts(), self.model.text_encoder, progress=False)
        self.loader = FeatureBatches(store, table, bank, config, shuffle=True)
        self.criterion = make_criterion(config, self.model.dimension)
        self.optimizer = torch.optim.AdamW(self.model.head.parameters(), lr=1e-2)
        self.sums: list[float] = []

    def epoch(self, number: int, stop: int = 0, progress: EpochProgress | None = None) -> None:
        def after_step(meter: EpochMeter) -> None:
            meter.settle()
            self.sums.append(meter.last_loss)
            if meter.progress.step == stop:
                raise InterruptedError

        train_epoch(
            self.model,
            self.loader,
            self.criterion,
            self.optimizer,
            epoch=number,
            config=self.config,
            progress=progress,
            on_step=after_step,
        )

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.head.parameters()])


def test_steps_are_those_made_one_by_one(tables: Tables, settings: Config) -> None:
    job = Job(tables[0], settings)
    near = 0
    for epoch in range(3):
        with closing(
            steps_module._steps(job.loader, job.criterion, settings, EpochProgress(epoch), CPU)
        ) as steps:
            prepared = list(steps)
        batches = list(job.loader.batches(epoch))
        for number, (one, batch) in enumerate(zip(prepared, batches, strict=True)):
            assert all(
                torch.equal(getattr(one.batch, key), getattr(batch, key))
                for key in ("inputs", "text", "images", "caption_images")
            )
            mix = step_mix(batch, settings, epoch, number)
            assert mix is not None and one.mix is not None and one.pairs is not None
            assert torch.equal(one.mix.partner, mix.partner)
            assert torch.equal(one.mix.weight, mix.weight)
            pairs = match_pairs(
                batch.images,
                batch.caption_images,
                batch.text,
                own=batch.own,
                duplicate_threshold=0.6,
            )
            pairs = mix_pairs(pairs, mix.partner, mix.weight)
            assert torch.equal(one.pairs.positive, pairs.positive)
            assert torch.equal(one.pairs.ignored, pairs.ignored)
            assert one.pairs.share is not None and pairs.share is not None
            assert torch.equal(one.pairs.share, pairs.share)
            near += int(pairs.ignored.sum())
    assert near > 0


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_training_ahead_gives_the_very_weights_also_from_the_middle_of_an_epoch(
    tables: Tables, settings: Config, mixup: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.replace(head_mixup=mixup)
    calls = []
    monkeypatch.setattr(
        steps_module,
        "ahead",
        lambda items: calls.append(1) or ahead(items),  # type: ignore[func-returns-value]
    )
    at_once = Job(tables[0], settings)
    at_once.epoch(0)
    progress = EpochProgress(1)
    with pytest.raises(InterruptedError):
        at_once.epoch(1, stop=2, progress=progress)
    assert threads_ahead() == [] and torch.get_num_threads() == 2
    at_once.epoch(1, progress=progress)
    assert len(calls) == 3

    torch.set_num_threads(1)
    in_turn = Job(tables[0], settings)
    in_turn.epoch(0)
    in_turn.epoch(1)
    assert len(calls) == 3
    assert at_once.sums == in_turn.sums and len(in_turn.sums) == 6
    assert torch.equal(at_once.weights(), in_turn.weights())


def test_pairs_are_found_ahead_only_where_a_core_is_free_for_it(
    tables: Tables, settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tables[0], settings)
    dataset = COCOClipDataset(table=tables[0], image_size=32)
    photos = make_loader(dataset, job.loader.bank, settings)

    def pairs(loader: Batches, criterion: Any, device: torch.device = CPU) -> tuple[bool, bool]:
        """Whether the first step's pairs are known, and whether a thread makes the next."""
        steps = steps_module._steps(loader, criterion, settings, EpochProgress(0), device)
        with closing(steps):
            found = next(steps).pairs is not None
            return found, threads_ahead() != []

    assert pairs(job.loader, job.criterion) == (True, True)
    assert pairs(job.loader, InfoNCELoss()) == (False, True)
    assert pairs(photos, job.criterion) == (False, False)
    assert pairs(job.loader, job.criterion, torch.device("cuda")) == (False, False)
    torch.set_num_threads(1)
    assert pairs(job.loader, job.criterion) == (False, False)
    torch.set_num_threads(2)
    monkeypatch.setattr(steps_module, "processes", lambda: Processes(count=2))
    assert pairs(job.loader, job.criterion) == (False, False)
