"""What one of several processes does in `test_processes.py`: everything that needs a group.

``python shared_job.py FOLDER KIND...`` runs the functions of these names. Each compares what the
processes do together with what one does by itself, in the same process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from captune import bank as bank_module
from captune import features as features_module
from captune import processes as processes_module
from captune import ranks as ranks_module
from captune import rowfile as rowfile_module
from captune.bank import CaptionBank
from captune.config import DEFAULT_CONFIG, Config
from captune.data.dataset import COCOClipDataset
from captune.data.stream_table import StreamTable
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.evaluation import embeddings as embeddings_module
from captune.evaluation.embeddings import embed_images
from captune.features import FeatureStore
from captune.losses import Criterion, InfoNCELoss
from captune.models import CLIPModel
from captune.processes import ProcessLostError, alone, leave, processes, watched
from captune.ranks import retrieval_ranks
from captune.rowfile import Halves, RowFile, Rows
from captune.training import gradients as gradients_module
from captune.training import loop as loop_module
from captune.training.criteria import make_criterion
from captune.training.feature_batches import FeatureBatches
from captune.training.fit import fit
from captune.training.loader import Batch, make_loader
from captune.training.run import Run
from captune.training.steps import make_accelerator, train_epoch
from captune.training.stop import TrainingStopped
from captune.training.stream_bank import StreamBank
from captune.training.stream_loader import StreamLoader
from captune.workflow import train as train_module
from captune.workflow.stream import train_on_shards
from captune.workflow.train import train

FOLDER = Path(sys.argv[1])
gradients_module.BUCKET = 500  # small towers have several, too
loop_module.SAVING = 1e9  # a state after each step, however long it takes
CLOSE = {"rtol": 2e-4, "atol": 2e-6}


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """What each process does alone, until all have done it: who went on at once would hold the lock
    of a cache and wait for one who waits for that lock."""
    with alone():
        yield
    processes().any(False)


def config_of(**changes: Any) -> Config:
    """Small towers and batches of seven images, which no number of processes here divides."""
    small: dict[str, Any] = {
        "recipe": "best",
        "image_encoder": str(FOLDER / "tiny-resnet"),
        "text_encoder": str(FOLDER / "tiny-sentence" / "model"),
        "head_epochs": 2,
        "num_epochs": 2,
        "batch_size": 7,
        "head_batch_size": 7,
        "bank_negatives": 16,
        "hidden_dim": 32,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-2,
        "duplicate_threshold": 0.0,
        "num_workers": 0,
        "precision": "fp32",
        "log_with": "none",
        "save_steps": 1,
    }
    return DEFAULT_CONFIG.replace(**{**small, **changes})


def table_of(split: str = "train", images: int | None = None) -> CaptionTable:
    """The scenes of ``make_folder``, image ``i`` with ``1 + i % 4`` captions; each third image has
    a caption of the one before it."""
    paths = sorted((FOLDER / split).glob("*.jpg"))[:images]
    captions = []
    for row, path in enumerate(paths):
        texts = [f"{path.stem.replace('_', ' ')} ({turn})" for turn in range(1 + row % 4)]
        texts[0] = paths[row - (row % 3 == 2)].stem.replace("_", " ")
        captions += [(10 * row + turn, text, row) for turn, text in enumerate(texts)]
    listed = [(row + 1, path.name, path) for row, path in enumerate(paths)]
    return CaptionTable.build(listed, captions, name="scenes", split=split)


class OwnLoss(nn.Module):
    """A loss of one's own that knows no pairs, with a weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return InfoNCELoss(temperature=1.0)(image * self.scale, text)


class Steps:
    """Gradients of every step of an epoch, and what it leaves behind."""

    def __init__(self, model: CLIPModel, loader: Any, criterion: Criterion, config: Config) -> None:
        self.gradients: list[Tensor | None] = []
        accelerator = make_accelerator(config)
        own = list(criterion.parameters()) if isinstance(criterion, nn.Module) else []
        trained = [p for p in (*model.parameters(), *own) if p.requires_grad]
        # Adam's first steps are signs of the gradient: rounding of nothing would be a whole step.
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        optimizer.register_step_pre_hook(
            lambda *_: self.gradients.extend(
                None if p.grad is None else p.grad.clone() for p in trained
            )
        )
        prepared = accelerator.prepare_optimizer(optimizer, device_placement=False)
        torch.manual_seed(1)
        self.summary = train_epoch(
            model, loader, criterion, prepared, None, 0, config, accelerator=accelerator
        )
        self.summary.pop("images_per_second")
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        if isinstance(criterion, nn.Module):
            self.state |= {f"loss.{k}": v.clone() for k, v in criterion.state_dict().items()}
        self.next_draw = torch.rand(4)


def steps_of(config: Config, *, head: bool, table: CaptionTable, own: bool) -> Steps:
    """An epoch of stage 1 or 2."""
    torch.manual_seed(0)
    model = CLIPModel.from_config(config)
    criterion: Criterion = OwnLoss() if own else make_criterion(config, model.dimension)
    if isinstance(criterion, nn.Module) and hasattr(criterion, "queue") and criterion.queue:
        ids = torch.arange(5)  # some of them come again
        rows = nn.functional.normalize(torch.randn(5, model.dimension), dim=-1)
        criterion.queue.append(rows, ids)
    bank = CaptionBank.build(table.texts(), model.text_encoder, progress=False)
    if head:
        model.image_encoder.requires_grad_(False)
        store = FeatureStore.build(table, model, mirrored=True, num_workers=0, progress=False)
        loader: Any = FeatureBatches(store, table, bank, config, shuffle=True)
    else:
        dataset = COCOClipDataset(table=table, image_size=32, augment=True, seed=config.seed)
        loader = make_loader(dataset, bank, config)
    return Steps(model, loader, criterion, config)


KINDS: dict[str, dict[str, Any]] = {
    "best": {},
    "duplicates": {"duplicate_threshold": 0.5, "duplicates": "positive", "max_grad_norm": 0.05},
    "ignored": {"duplicate_threshold": 0.999, "text_adapter": True, "soft_targets": 0.3},
    "queue": {"image_queue": 12, "mixup": 0.0, "head_mixup": 0.0, "hard_negatives": 0.5},
    "queue-soft": {
        "image_queue": 12,
        "mixup": 0.0,
        "head_mixup": 0.0,
        "soft_targets": 0.2,
        "duplicate_threshold": 0.999,
    },
    "siglip": {"loss": "siglip", "captions_per_image": 2},
    "chunks": {"chunk_size": 2, "use_attention_pooling": True},
    "photos": {"mix_photos": True, "colour_jitter": 0.4},
    "photos-chunks": {"mix_photos": True, "chunk_size": 2},
    "batch-norm": {"use_batch_norm": True, "generalised_pooling": True},
    "one-caption": {"captions_per_image": 1, "bank_negatives": 0, "learn_temperature": False},
    "head": {"standardise_features": True, "soft_targets": 0.1},
    "own-loss": {},
    "broken": {"mix_photos": True, "colour_jitter": 0.4},
    "few": {"bank_negatives": 4},
}


def kind(name: str) -> None:
    """A kind of step: gradients of two steps, weights after them and draws are those of one."""
    config = config_of(**KINDS[name])
    table = table_of("broken" if name == "broken" else "train", 2 if name == "few" else 14)
    made = {"head": name == "head", "table": table, "own": name == "own-loss"}
    with by_itself():
        one = steps_of(config, **made)
    together = steps_of(config, **made)
    moved = sum(float(g.norm()) for g in one.gradients if g is not None)
    assert moved > 1e-3, f"{name}: nothing is learnt, {moved}"
    assert len(one.gradients) == len(together.gradients)
    for alone_has, found in zip(one.gradients, together.gradients, strict=True):
        torch.testing.assert_close(found, alone_has, **CLOSE)
    torch.testing.assert_close(together.state, one.state, **CLOSE)
    torch.testing.assert_close(together.summary, one.summary, **CLOSE)
    assert torch.equal(together.next_draw, one.next_draw)


def every_kind() -> None:
    for name in KINDS:
        try:
            kind(name)
        except BaseException:
            print(f"in {name}", file=sys.stderr)
            raise


def overlap() -> None:
    """All gradients are sent before the last backward pass ends, in chunks, too, of which some
    process has more than another; where the backbone is frozen, after it."""
    sent: list[float] = []
    real = gradients_module._Sums.end

    def end(self: Any) -> None:
        sent.append(self._sent / len(self._buckets))
        real(self)

    gradients_module._Sums.end = end  # type: ignore[method-assign]
    try:
        for name in ("best", "one-caption", "head", "chunks"):
            sent.clear()
            kind(name)
            early = [0.0 if name == "head" else 1.0] * 2
            assert sent == early, f"{name}: {sent}"
    finally:
        gradients_module._Sums.end = real  # type: ignore[method-assign]


def in_the_pass() -> None:
    """What fails in a backward pass, gradients being on their way, ends each process with its own
    exit code."""
    here = processes()
    config = config_of(recipe="plain", head_epochs=0)
    real = CLIPModel.pooled_features

    def failing(self: CLIPModel, pixels: Tensor) -> Tensor:
        if self.training and here.main:
            first = next(p for p in self.image_encoder.parameters() if p.requires_grad)
            first.register_hook(fail)
        return real(self, pixels)

    def fail(_: Tensor) -> None:
        raise CaptuneError("it failed in the pass")

    CLIPModel.pooled_features = failing  # type: ignore[method-assign]
    try:
        with watched():
            steps_of(config, head=False, table=table_of("train", 14), own=False)
    except CaptuneError as error:
        print(error)
        leave()
        sys.exit(2 if here.main else 3)


def again() -> None:
    """A weight whose gradient comes in two parts is refused where the first was sent."""
    layer = nn.Linear(4, 4)
    parameters = list(layer.parameters())
    inputs = torch.randn(3, 4, requires_grad=True)

    def twice() -> None:
        sizes = [1] * processes().count
        with gradients_module.summed_gradients(parameters, [], sizes, in_chunks=False):
            layer(inputs).sum().backward()
            layer(inputs).sum().backward()

    try:
        twice()
    except CaptuneError as error:
        assert "use_reentrant=False" in str(error)
    else:
        raise AssertionError("it was not refused")


def own_statistics() -> None:
    """A BatchNorm that moves has each process's batch: another training, but one for all."""
    config = config_of(recipe="plain", freeze_batch_norm=False)
    found = steps_of(config, head=False, table=table_of("train", 14), own=False)
    norms = [key for key in found.state if "running_" in key]
    assert norms
    for key, value in found.state.items():
        for other in processes().rows_of_each(value.reshape(-1)):
            assert torch.equal(other, value.reshape(-1)), key


def fitted(name: str, config: Config, **options: Any) -> Run:
    return fit(table_of(), table_of("val"), out=FOLDER / name, config=config, **options)


@contextlib.contextmanager
def at_step(number: int, act: Callable[[], None]) -> Iterator[None]:
    """``act`` after the step of that number, from 1."""
    real, steps = loop_module.TrainingLoop._after_step, 0

    def after_step(self: Any, meter: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == number:
            act()
        real(self, meter)

    loop_module.TrainingLoop._after_step = after_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop_module.TrainingLoop._after_step = real  # type: ignore[method-assign]


def assert_same_run(one: Run, other: Run) -> None:
    """History, but for what a clock says, and the weights that are kept."""
    assert len(one.history()) == len(other.history()) == 4
    for row, found in zip(one.history(), other.history(), strict=True):
        for key in ("seconds", "images_per_second"):
            row.pop(key), found.pop(key)
        torch.testing.assert_close(found, row, rtol=1e-3, atol=1e-4)
    weights = [load_file(run.weights_path) for run in (one, other)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=2e-4)


def stores() -> None:
    """Captions, photos and any rows are computed in turns, and where one process was interrupted
    several go on: each row that was missing is computed once."""
    here = processes()
    table = table_of("broken")
    bank_module.BATCH = features_module.BATCH = 3
    model = CLIPModel.from_config(config_of())
    made = []
    for name in ("one", "together"):
        cache = FOLDER / f"stores-{here.count}-{name}-{here.rank if name == 'one' else 'all'}"
        with by_itself() if name == "one" else contextlib.nullcontext():
            bank = CaptionBank.build(table.texts(), model.text_encoder, cache=cache)
            kept = {"mirrored": True, "cache": cache, "num_workers": 0}
            made.append((bank, FeatureStore.build(table, model, **kept)))  # type: ignore[arg-type]
    (bank, store), (shared_bank, shared_store) = made
    assert torch.equal(bank.all(), shared_bank.all())
    assert store.readable.tolist() == shared_store.readable.tolist()
    for one, other in ((store.plain, shared_store.plain), (store.mirrored, shared_store.mirrored)):
        assert np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)

    computed: list[int] = []
    limit = 6

    def compute(rows: Rows) -> Halves:
        if len(computed) >= limit:
            raise KeyboardInterrupt
        computed.extend(rows.tolist())
        return np.repeat(rows[:, None], 2, 1).astype(np.float16)

    rowfile_module.SECONDS_BETWEEN_MARKS = 0.0
    file = RowFile(FOLDER / f"rows-{here.count}", "rows", (23, 2), "one")
    order = np.random.default_rng(0).permutation(23)
    words: dict[str, Any] = {"batch": 3, "words": "rows", "unit": "row", "progress": False}
    if here.main:
        file.folder.mkdir()
        with alone(), contextlib.suppress(KeyboardInterrupt):
            file.fill(order, compute, **words)
    limit = 100
    file.fill(order, compute, **words)
    here.see(file.path)
    assert np.array_equal(file.open("rows")[:, 0], np.arange(23))
    every = here.all_rows(torch.tensor(computed, dtype=torch.int64)).tolist()
    assert sorted(every) == list(range(23)) and len(computed) < 23 - 5


def whole() -> None:
    """Both stages, validated, kept, measured, as one process does."""
    world = processes().count
    embeddings_module.BATCH = 3
    config = config_of(soup=2, keep_epochs=True, log_with="tensorboard")
    with by_itself():
        one = fitted(f"one-{world}-{processes().rank}-{os.environ['RANK']}", config)
    together = fitted(f"together-{world}", config)
    assert_same_run(one, together)
    assert (together.folder / "checkpoints" / "epoch-4.safetensors").is_file()
    assert not together.state_path.exists()
    assert len(list((together.folder / "logs").rglob("events.*"))) == len(
        list((one.folder / "logs").rglob("events.*"))
    )
    assert fitted(f"together-{world}", config).is_complete  # and nothing is trained again
    with by_itself():
        model = together.load_model()
        wanted = embed_images(model, table_of(), num_workers=0)
    found = embed_images(model, table_of(), num_workers=0)
    assert found.rows.tolist() == wanted.rows.tolist() == list(range(20))
    torch.testing.assert_close(found.vectors, wanted.vectors)
    broken = embed_images(model, table_of("broken"), num_workers=0)
    assert broken.unreadable == 9 and len(broken.rows) == 5


def stopped() -> None:
    """A polite kill of the last process stops all after the same step; resumed, the end is one."""
    here = processes()
    last = here.rank == here.count - 1
    config = config_of()
    with by_itself():
        one = fitted(f"undisturbed-{here.count}-{os.environ['RANK']}", config)
    for step in (1, 4, 2):  # in stage 1, then in stage 2, counted from where it went on
        act = partial(os.kill, os.getpid(), signal.SIGTERM) if last else lambda: None
        try:
            with at_step(step, act):
                fitted(f"stopped-{here.count}", config, resume=True)
        except TrainingStopped as halt:
            assert halt.run.weights_path.is_file() and halt.run.state_path.is_file()
        else:
            raise AssertionError("it was not stopped")
    assert_same_run(one, fitted(f"stopped-{here.count}", config, resume=True))


def ranks() -> None:
    """Each process counts some of the tiles, and all have the ranks that one has by itself."""
    here = processes()
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 4, (50, 6), generator=generator).float()  # many ties
    owner = torch.cat((torch.arange(50), torch.randint(0, 50, (90,), generator=generator)))
    text = torch.randint(0, 4, (140, 6), generator=generator).float()
    counted: list[tuple[int, int]] = []
    real = ranks_module._Rivals.add

    def add(self: Any, place: tuple[int, int]) -> None:
        counted.append(place)
        real(self, place)

    ranks_module._Rivals.add = add  # type: ignore[method-assign]
    try:
        how: dict[str, Any] = {"every_caption": True, "tile": (16, 32)}
        wanted = retrieval_ranks(image, text, owner, **how)
        counted.clear()
        found = retrieval_ranks(image, text, owner, **how, here=here)
    finally:
        ranks_module._Rivals.add = real  # type: ignore[method-assign]
    torch.testing.assert_close(tuple(found), tuple(wanted), rtol=0, atol=0)
    parts = here.all_rows(torch.tensor(counted)).tolist()
    assert len(set(map(tuple, parts))) == len(parts) and 0 < len(counted) < len(parts)
    assert len({len(part) for part in here.rows_of_each(torch.tensor(counted))}) == 1
    # A card that only some of them have room on is used by none: their tiles would differ.
    ranks_module.free_memory = lambda _: 2**40 if here.main else 0
    found = retrieval_ranks(image, text, owner, **how, device=torch.device("cuda"), here=here)
    torch.testing.assert_close(tuple(found), tuple(wanted), rtol=0, atol=0)


def masks() -> None:
    """A backbone that draws: other masks in each process and in each step, the same where a step is
    done again; what follows draws as it would have."""
    config = config_of(recipe="plain", head_epochs=0)  # in which nothing else draws
    table = table_of("train", 14)
    drawn: list[Tensor] = []
    real = CLIPModel.pooled_features

    def drawing(self: CLIPModel, pixels: Tensor) -> Tensor:
        if self.training:
            drawn.append(torch.rand(8))
        return real(self, pixels)

    CLIPModel.pooled_features = drawing  # type: ignore[method-assign]
    try:
        made: dict[str, Any] = {"head": False, "table": table, "own": False}
        found = steps_of(config, **made)
        again = steps_of(config, **made)
    finally:
        CLIPModel.pooled_features = real  # type: ignore[method-assign]
    assert len(drawn) == 4 and torch.equal(found.next_draw, again.next_draw)
    assert all(map(torch.equal, drawn[:2], drawn[2:]))
    every = [part for mask in drawn[:2] for part in processes().rows_of_each(mask)]
    assert len({tuple(mask.tolist()) for mask in every}) == 2 * processes().count


def too_large() -> None:
    """What does not fit is told in every process, which none of them changes by itself."""

    def full(self: CLIPModel, pixels: Tensor) -> Tensor:
        if self.training == training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pixels)

    here = processes()
    real = CLIPModel.pooled_features
    step = f"process {here.rank} of {here.count}: go on with --resume and chunk_size=4"
    for training, words in ((True, step), (False, "go on with --resume and a smaller chunk_size")):
        CLIPModel.pooled_features = full  # type: ignore[method-assign]
        try:
            fitted(f"large-{training}-{here.count}", config_of(head_epochs=0, device="auto"))
        except CaptuneError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"no error that {words}")
        finally:
            CLIPModel.pooled_features = real  # type: ignore[method-assign]


def told() -> None:
    """One process measures and writes what a training is told by, and all know it."""
    here = processes()
    tellers: list[int] = []
    real = train_module.tell

    def tell(*given: Any) -> Any:
        tellers.append(processes_module._joined().rank)
        return real(*given)

    train_module.tell = tell
    data, options = str(FOLDER / "scenes.csv"), {"num_epochs": 1, "batch_size": 6}
    try:
        from_table = train(data, config=config_of(**options), out=FOLDER / f"told-{here.count}")
        from_shards = train_on_shards(
            str(FOLDER / "shards" / "*.tar"),
            val_data=data,
            config=config_of(**options),
            out=FOLDER / f"told-shards-{here.count}",
        )
    finally:
        train_module.tell = real
    assert tellers == ([0, 0] if here.main else []), tellers
    for outcome in (from_table, from_shards):
        written = json.loads(outcome.run.output("metrics", ".json").read_text(encoding="utf-8"))
        assert outcome.metrics == written and outcome.page.is_file()


def refused() -> None:
    """What is wrong for the main process is an error in all, and nothing waits."""
    here = processes()
    folder = FOLDER / f"occupied-{here.count}"
    if here.main:
        folder.mkdir()
        (folder / "letter.txt").touch()
    wrong: dict[str, Callable[[], object]] = {
        "is not empty": lambda: fitted(folder.name, config_of()),
        "do not see the same data": lambda: fitted("seeds", config_of(seed=here.rank)),
        "is not seen on every machine": lambda: here.see(FOLDER / "nowhere"),
    }
    shards = StreamTable.open(str(FOLDER / "shards" / "*.tar"))
    odd = config_of(head_epochs=0, batch_size=2 * here.count + 1)
    wrong["cannot be shared equally"] = lambda: fit(
        shards, table_of("val"), out=FOLDER / f"odd-{here.count}", config=odd
    )
    if here.count > 2:
        wrong["cannot be shared"] = lambda: fitted("small", config_of(batch_size=2))
    processes_module.SECONDS_TO_APPEAR = 0.1
    for words, act in wrong.items():
        try:
            act()
        except CaptuneError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"no error that {words}")
    assert not (FOLDER / f"odd-{here.count}").exists()  # what is mended starts as if new


def killed() -> None:
    """The last process dies in stage 2, in the middle of the first epoch; the other is told."""
    here = processes()
    act = partial(os.kill, os.getpid(), signal.SIGKILL) if not here.main else lambda: None
    try:
        with watched(), at_step(5, act):
            fitted("killed", config_of())
    except ProcessLostError as lost:
        print(lost)
        leave()
        sys.exit(3)


def resumed() -> None:
    """Three processes go on with what two began, one with what three did."""
    with by_itself():
        one = fitted(f"undisturbed-{os.environ['RANK']}", config_of())
    act = partial(os.kill, os.getpid(), signal.SIGINT) if processes().main else lambda: None
    try:
        with at_step(1, act):
            fitted("killed", config_of(), resume=True)
    except TrainingStopped:
        pass
    else:
        raise AssertionError("it was not stopped")
    if processes().main:
        with alone():
            assert_same_run(one, fitted("killed", config_of(), resume=True))


class Seen:
    """A stream's loader, and the whole of each batch that the processes had of it."""

    def __init__(self, loader: StreamLoader) -> None:
        self.loader, self.bank, self.table = loader, loader.bank, loader.table
        self.steps = loader.steps
        self.whole: list[Batch] = []

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self.loader.batches(epoch, start):
            inputs = processes().all_rows(batch.inputs)
            self.whole.append(batch._replace(inputs=inputs, sizes=None))
            yield batch


class Again(Seen):
    """The same batches, for one process."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield from self.whole[start:]


def streamed() -> None:
    """A step on shards is that of all images which the processes read, and no image comes twice; a
    run that is stopped inside an epoch ends as an undisturbed one."""
    here = processes()
    pattern = str(FOLDER / "shards" / "*.tar")
    stream = StreamTable.open(pattern, rank=here.rank, world_size=here.count)
    config = config_of(head_epochs=0, num_epochs=4, batch_size=6, shuffle_buffer=4)

    def model() -> CLIPModel:
        torch.manual_seed(0)
        return CLIPModel.from_config(config)

    bank = StreamBank.build(stream, model().text_encoder, precision="fp32")
    loader = StreamLoader(stream, bank, config, image_size=32, here=here)
    criterion = make_criterion(config, 16)
    seen = Seen(loader)
    together = Steps(model(), seen, criterion, config)
    images = torch.cat([batch.images for batch in seen.whole]).tolist()
    assert len(images) == len(set(images)) == 6 * seen.steps and len(stream) - len(images) < 6
    with by_itself():
        again = Again(loader)
        again.whole = seen.whole
        one = Steps(model(), again, make_criterion(config, 16), config)
    assert len(one.gradients) == len(together.gradients)
    for alone_has, found in zip(one.gradients, together.gradients, strict=True):
        torch.testing.assert_close(found, alone_has, **CLOSE)
    torch.testing.assert_close(together.state, one.state, **CLOSE)

    name = f"streamed-{here.count}"
    undisturbed = fit(stream, table_of("val"), out=FOLDER / f"{name}-one", config=config)
    act = partial(os.kill, os.getpid(), signal.SIGTERM) if here.main else lambda: None
    try:
        with at_step(6, act):
            fit(stream, table_of("val"), out=FOLDER / name, config=config)
    except TrainingStopped:
        resumed = fit(stream, table_of("val"), out=FOLDER / name, config=config, resume=True)
        assert_same_run(undisturbed, resumed)
    else:
        raise AssertionError("it was not stopped")


def main() -> None:
    os.environ["CAPTUNE_CACHE"] = str(FOLDER / "cache")
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(180, exit=True)  # who waits for ever says where
    for name in sys.argv[2:]:
        job = globals().get(name)
        job() if job else kind(name)
        print(f"{name}: done", flush=True)
    leave()


if __name__ == "__main__":
    main()
