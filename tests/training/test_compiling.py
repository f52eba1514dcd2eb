"""The backbone compiled for training steps: kept where it is faster, and never in the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from captune.config import Config
from captune.data.table import CaptionTable
from captune.encoders.image import Features
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.preprocess import Preprocess
from captune.processes import Processes
from captune.training import compiling
from captune.training import loop as loop_module
from captune.training.compiling import BackboneCompiler, CardClock, backbone_compiler
from captune.training.fit import fit
from captune.training.loader import Batch
from captune.training.memory import StepAgainError
from captune.training.progress import Verdict
from captune.training.run import Run
from captune.training.stop import TrainingStopped

Tables = tuple[CaptionTable, CaptionTable]
TRIAL = 2 * (compiling.WARM_UP + compiling.TIMED)


class Graphs:
    """A backend of torch.compile that runs what it is given as it is, and counts it.

    ``fails``: in ``compiling``, in the ``backward`` pass of the second step, or not at all.
    """

    def __init__(self) -> None:
        self.made = 0
        self.passed: list[bool] = []  # for each pass of a graph, whether it had a gradient
        self.fails = ""

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        if self.fails == "compiling":
            raise RuntimeError("no room\nfor kernels")
        self.made += 1

        def run(*inputs: Any) -> Any:
            outputs = graph.forward(*inputs)
            self.passed.append(any(o.requires_grad for o in outputs))
            if self.fails == "backward" and len(self.passed) == 2:
                outputs[0].register_hook(self._fail)
            return outputs

        return run

    def _fail(self, gradient: Tensor) -> None:
        raise ValueError("a kernel cannot be launched")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """In place of what a card would be given; nothing of it stays behind."""
    found = Graphs()
    monkeypatch.setattr(compiling, "COMPILE", {"dynamic": False, "backend": found})
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


class HandClock:
    """Says what it is told: seconds of a plain step, of a compiled one, and of compiling."""

    def __init__(self, backbone: nn.Module, plain: float, fast: float, making: float = 30.0):
        self.backbone = backbone
        self.seconds = {False: plain, True: fast}
        self.making = making
        self.noted: list[float] = []

    def around(self, step: Callable[[], Any]) -> Any:
        compiled = self.backbone._compiled_call_impl is not None
        result = step()
        self.noted.append(self.seconds[compiled] + compiled * self.making)
        self.making *= not compiled
        return result

    def times(self) -> list[float]:
        noted, self.noted = self.noted, []
        return noted


class Steps:
    """Steps of a compiler that do nothing but pass the backbone."""

    def __init__(self, fast: float, left: int = 100_000) -> None:
        self.backbone = nn.Sequential(nn.Linear(4, 4))
        self.clock = HandClock(self.backbone, 0.05, fast)
        self.compiler = BackboneCompiler(self.backbone, self.clock)
        self.compiler.begin(left)

    def do(self, count: int, *, images: int = 8, side: int = 4, chunk_size: int = 0) -> list[bool]:
        """Whether each of the steps was compiled, as the backbone itself saw it."""
        batch = Batch(torch.zeros(images, side), *[torch.zeros(1)] * 3, own=1)
        seen: list[bool] = []

        def step(_: Config) -> None:
            seen.append(self.backbone._compiled_call_impl is not None)

        for _ in range(count):
            self.compiler.run(batch, step, Config(chunk_size=chunk_size))
            assert self.compiler.compiled == seen[-1]
            assert self.backbone._compiled_call_impl is None
        return seen


@pytest.mark.parametrize(
    ("fast", "kept"), [(0.04, True), (0.0485, True), (0.0495, False), (0.06, False)]
)
def test_a_trial_keeps_the_faster_way_and_says_so_once(
    fast: float, kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps(fast)
    half = TRIAL // 2
    assert steps.do(TRIAL + 10) == [False] * half + [True] * half + [kept] * 10
    verdict = "kept" if kept else "not faster, left as it was"
    # Compiling is what its first steps took above plain ones.
    took = round(30 + compiling.WARM_UP * (fast - 0.05))
    assert capsys.readouterr().err.splitlines() == [
        f"compiled backbone: 50.0 to {1000 * fast:.1f} ms a step, {verdict}; "
        f"compiling took {took} s"
    ]
    assert steps.clock.noted == []  # what comes after the trial is not timed


def test_nothing_is_compiled_for_the_few_steps_that_are_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    enough = round(compiling.WORTH / 0.05) + TRIAL // 2
    for left, tried in ((enough, False), (enough + 1, True)):
        assert any(Steps(0.01, left).do(TRIAL)) == tried, left
    assert "compiled" not in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"side": 6}, {"chunk_size": 4}, {"images": 9}])
@pytest.mark.parametrize("after", [10, TRIAL - 5, TRIAL + 5])
def test_another_shape_is_a_trial_of_its_own(change: dict[str, int], after: int) -> None:
    """In each part of the one before; of its times nothing is taken over."""
    steps = Steps(0.04)
    steps.do(after)
    steps.clock.seconds = {False: 0.03, True: 0.035}
    steps.clock.making = 0.0
    half = TRIAL // 2
    found = steps.do(TRIAL + 10, **change)
    assert found == [False] * half + [True] * half + [False] * 10


def test_other_weights_that_train_are_a_trial_of_their_own() -> None:
    steps = Steps(0.04)
    steps.do(TRIAL + 1)
    steps.backbone[0].bias.requires_grad_(False)
    steps.compiler.begin(100_000)
    assert steps.do(TRIAL + 1) == [False] * (TRIAL // 2) + [True] * (TRIAL // 2 + 1)


def test_steps_of_fewer_images_are_done_as_they_are_and_do_not_count() -> None:
    steps = Steps(0.04)
    assert steps.do(TRIAL - 3)[-1]
    steps.clock.seconds = {False: 9.0, True: 9.0}
    assert steps.do(2, images=7) == [False] * 2
    steps.clock.seconds = {False: 0.05, True: 0.04}
    assert steps.do(10) == [True] * 10


def test_an_error_that_is_not_compilings_is_not_called_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = Steps(0.04)
    steps.do(TRIAL - 1)  # the last of the trial's compiled steps is still to come
    batch = Batch(torch.zeros(8, 4), *[torch.zeros(1)] * 3, own=1)

    def broken(_: Config) -> None:
        raise ValueError("no such row")

    with pytest.raises(StepAgainError):
        steps.compiler.run(batch, broken, Config())
    with pytest.raises(ValueError, match="no such row"):
        steps.compiler.run(batch, broken, Config())
    assert "compiled" not in capsys.readouterr().err


def test_on_compiles_from_the_first_step_whatever_is_left() -> None:
    steps = Steps(0.04)
    steps.compiler = BackboneCompiler(steps.backbone)
    steps.compiler.begin(1)
    assert steps.do(2) == [True] * 2 and steps.do(1, images=7) == [False]
    assert steps.do(1, side=6) == [True] and steps.clock.noted == []


def test_a_backbone_that_its_author_compiled_stays_so() -> None:
    steps = Steps(0.04)
    own = steps.backbone._compiled_call_impl = steps.backbone._call_impl
    batch = Batch(torch.zeros(8, 4), *[torch.zeros(1)] * 3, own=1)
    seen = []
    compiler = BackboneCompiler(steps.backbone)
    compiler.run(batch, lambda _: seen.append(steps.backbone._compiled_call_impl), Config())
    assert seen != [own] and steps.backbone._compiled_call_impl == own


def test_the_cards_clock_gives_seconds_of_each_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert said[-1] == "waited"
            return 40.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("waited"))
    clock = CardClock()
    assert [clock.around(lambda: said.append("step") or 5) for _ in range(2)] == [5, 5]
    assert said == ["event", "step", "event"] * 2
    assert clock.times() == [0.04, 0.04] and clock.times() == []


def test_torch_knows_what_it_is_asked_for() -> None:
    """It refuses options that it does not know before anything is compiled."""
    steps = Steps(0.04)
    steps.backbone.compile(**compiling.COMPILE)
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        steps.backbone.compile(options={"fallback_randomly": True})


# -- who compiles at all ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wanted", "device", "count", "lacks", "made"),
    [
        ("auto", "cuda", 1, "", "by trial"),
        ("auto", "cpu", 1, "", "not"),
        ("auto", "mps", 1, "", "not"),
        ("auto", "cuda", 2, "", "not"),
        ("auto", "cuda", 1, "triton", "not"),
        ("auto", "cuda", 1, "gcc", "not"),
        ("off", "cuda", 1, "", "not"),
        ("on", "cuda", 1, "", "at once"),
        ("on", "cpu", 2, "triton", "at once"),
    ],
)
def test_who_compiles(
    wanted: str,
    device: str,
    count: int,
    lacks: str,
    made: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiling, "processes", lambda: Processes(0, count))
    found = None if lacks == "triton" else object()
    monkeypatch.setattr(compiling, "find_spec", lambda name: found)
    monkeypatch.setattr(compiling, "which", lambda name: None if lacks == "gcc" else name)
    model: Any = SimpleNamespace(image_encoder=nn.Linear(1, 1))
    config = Config(compile_backbone=wanted)
    compiler = backbone_compiler(model, config, torch.device(device))
    how = compiler and ("by trial" if isinstance(compiler._clock, CardClock) else "at once")
    assert (how or "not") == made
    words = {"triton": "Triton is not installed", "gcc": "no C compiler"}.get(lacks)
    said = capsys.readouterr().err
    assert (words in said and said.count("\n") == 1) if words and wanted == "auto" else said == ""


# -- whole trainings ----------------------------------------------------------------------------
@pytest.fixture
def short_trials(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[BackboneCompiler]]:
    """``short_trials(fast)``: trainings of a few steps decide by trial, as on a card."""
    for name in ("WARM_UP", "TIMED"):
        monkeypatch.setattr(compiling, name, 1)
    monkeypatch.setattr(compiling, "WORTH", 0.0)
    made: list[BackboneCompiler] = []

    def arm(fast: float) -> list[BackboneCompiler]:
        def make(model: CLIPModel, *_: Any) -> BackboneCompiler:
            clock = HandClock(model.image_encoder, 0.05, fast)
            made.append(BackboneCompiler(model.image_encoder, clock))
            return made[-1]

        monkeypatch.setattr(loop_module, "backbone_compiler", make)
        return made

    return arm


def state(run: Run) -> dict[str, Tensor]:
    return load_file(run.weights_path)


def timeless(run: Run) -> list[dict[str, Any]]:
    """The history without what the clock and the compiler decide."""
    own = ("images_per_second", "seconds", "compiled_steps")
    return [{k: v for k, v in row.items() if k not in own} for row in run.history()]


def check_same(found: Run, expected: Run) -> None:
    """Graphs that run as they are give the same numbers: to the last bit, names included."""
    assert state(found).keys() == state(expected).keys()
    torch.testing.assert_close(state(found), state(expected), rtol=0, atol=0)
    assert timeless(found) == timeless(expected)


def compiled_steps(run: Run) -> list[int]:
    return [row["compiled_steps"] for row in run.history()]


@pytest.mark.parametrize(("chunk_size", "ema_decay"), [(0, 0.0), (4, 0.9)])
def test_a_compiled_run_is_the_same_run_and_only_its_training_steps_are_compiled(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    graphs: Graphs,
    chunk_size: int,
    ema_decay: float,
) -> None:
    config = best.replace(chunk_size=chunk_size, ema_decay=ema_decay)
    off = fit(*tables, out=tmp_path / "off", config=config.replace(compile_backbone="off"))
    assert graphs.passed == [] and compiled_steps(off) == [0, 0, 0, 0]
    on = fit(*tables, out=tmp_path / "on", config=config.replace(compile_backbone="on"))
    check_same(on, off)
    assert compiled_steps(on) == [0, 0, 3, 3]  # stage 1 passes no backbone
    # Each step has its passes, and no validation has one: those of chunks' first turn alone are
    # without a gradient.
    chunks = 2 if chunk_size else 0
    assert graphs.passed.count(False) == 6 * chunks
    assert graphs.passed.count(True) == 6 * max(1, chunks)
    torch.compiler.reset()
    reopened = Run.open(on.folder).load_model()
    assert reopened.image_encoder._compiled_call_impl is None
    torch.testing.assert_close(reopened.state_dict(), state(off), rtol=0, atol=0)


@pytest.mark.parametrize(("fast", "steps"), [(0.04, [0, 0, 1, 3]), (0.06, [0, 0, 1, 1])])
def test_a_run_that_tries_it_trains_on_and_throws_no_step_away(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    graphs: Graphs,
    short_trials: Callable[[float], list[BackboneCompiler]],
    fast: float,
    steps: list[int],
) -> None:
    off = fit(*tables, out=tmp_path / "off", config=best)
    short_trials(fast)
    found = fit(*tables, out=tmp_path / "auto", config=best)
    check_same(found, off)
    assert compiled_steps(found) == steps


@pytest.mark.parametrize("where", ["compiling", "backward"])
def test_a_run_whose_compiling_fails_goes_on_as_if_it_had_not_been_tried(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    graphs: Graphs,
    short_trials: Callable[[float], list[BackboneCompiler]],
    where: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The step that failed is undone, gradients and draws included, and done again."""
    off = fit(*tables, out=tmp_path / "off", config=best)
    short_trials(0.04)
    graphs.fails = where
    capsys.readouterr()
    found = fit(*tables, out=tmp_path / "auto", config=best)
    check_same(found, off)
    assert compiled_steps(found) == [0, 0, 0 if where == "compiling" else 1, 0]
    said = [line for line in capsys.readouterr().err.splitlines() if "compiled" in line]
    why = "no room for kernels" if where == "compiling" else "a kernel cannot be launched"
    assert len(said) == 1 and "is left as it was" in said[0] and why in said[0]


def test_compiling_that_was_asked_for_and_fails_is_an_error(
    tables: Tables, config: Config, tmp_path: Path, graphs: Graphs
) -> None:
    graphs.fails = "compiling"
    with pytest.raises(CaptuneError, match=r"cannot be compiled: .*auto or off .*no room for"):
        fit(*tables, out=tmp_path / "run", config=config.replace(compile_backbone="on"))


def test_an_error_of_the_step_itself_is_told_as_it_is(
    tables: Tables, config: Config, tmp_path: Path, graphs: Graphs
) -> None:
    graphs.fails = "backward"
    with pytest.raises(ValueError, match="cannot be launched"):
        fit(*tables, out=tmp_path / "run", config=config.replace(compile_backbone="on"))


class Tower(nn.Module):
    """Above ``fits`` images it finds no memory; compiled or not, it asks at every pass."""

    name, feature_dim, preprocess = "tower", 12, Preprocess(32)

    def __init__(self, fits: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 12, 8, stride=8)
        self.fits = fits

    def forward(self, pixels: Tensor) -> Features:
        maps = self.layer(pixels).relu()
        self.ask(len(pixels))
        return Features(maps.mean((2, 3)), maps)

    @torch.compiler.disable
    def ask(self, images: int) -> None:
        if images > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def description(self) -> dict[str, Any]:
        return {"kind": "own", "name": "tower"}


@pytest.mark.parametrize("wanted", ["on", "auto"])
def test_memory_that_runs_out_in_a_compiled_step_makes_smaller_chunks(
    tables: Tables,
    config: Config,
    tmp_path: Path,
    graphs: Graphs,
    short_trials: Callable[[float], list[BackboneCompiler]],
    wanted: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a trial, the plain steps of the whole batch are not compared with those in chunks."""
    runs, config = [], config.replace(num_epochs=2)
    if wanted == "auto":
        short_trials(0.04)
    for name, fits in (("whole", 100), ("small", 4)):
        torch.manual_seed(0)
        model = CLIPModel(config.text_encoder, image_encoder=Tower(fits), hidden_dim=32)
        own = config.replace(compile_backbone=wanted, chunk_size=4 if name == "whole" else 0)
        runs.append(fit(*tables, out=tmp_path / name, config=own, model=model))
    torch.testing.assert_close(state(runs[1]), state(runs[0]), rtol=0, atol=0)
    assert compiled_steps(runs[1]) == ([3, 3] if wanted == "on" else [1, 3])
    assert capsys.readouterr().err.count("going on with chunk_size=4") == 1


def test_a_compiled_run_that_was_stopped_goes_on(
    tables: Tables,
    config: Config,
    tmp_path: Path,
    graphs: Graphs,
    ctrl_c_in_step: Callable[[int], None],
) -> None:
    config = config.replace(compile_backbone="on")
    whole = fit(*tables, out=tmp_path / "whole", config=config)
    ctrl_c_in_step(5)
    with pytest.raises(TrainingStopped):
        fit(*tables, out=tmp_path / "run", config=config)
    run = fit(*tables, out=tmp_path / "run", config=config, resume=True)
    check_same(run, whole)
    assert compiled_steps(run) == compiled_steps(whole) == [3, 3, 3]


@pytest.mark.parametrize(("fast", "steps"), [(0.04, [0, 0, 1, 3, 3]), (0.06, [0, 0, 1, 1, 0])])
@pytest.mark.parametrize("stop_at", [11, 12])
def test_a_resumed_run_goes_on_in_the_way_that_its_trial_decided(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    graphs: Graphs,
    short_trials: Callable[[float], list[BackboneCompiler]],
    ctrl_c_in_step: Callable[[int], None],
    fast: float,
    steps: list[int],
    stop_at: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped inside an epoch and at its end; on another day, timings are the other way round."""
    best = best.replace(num_epochs=3)
    off = fit(*tables, out=tmp_path / "off", config=best)
    short_trials(fast)
    ctrl_c_in_step(stop_at)
    with pytest.raises(TrainingStopped):
        fit(*tables, out=tmp_path / "run", config=best)
    capsys.readouterr()
    short_trials(0.1 - fast)
    run = fit(*tables, out=tmp_path / "run", config=best, resume=True)
    check_same(run, off)
    assert compiled_steps(run) == steps
    assert "compiled backbone" not in capsys.readouterr().err


def test_a_verdict_is_of_its_form_alone() -> None:
    steps = Steps(0.04)
    steps.do(TRIAL + 1)
    assert steps.compiler.verdict == Verdict([8, 4, 0, 2], True)
    other = Steps(0.06)
    other.compiler.verdict = steps.compiler.verdict
    assert other.do(1, images=7) == [False]  # some photos could not be read: a trial begins
    assert other.clock.times() == [0.05]
    assert other.do(3) == [True] * 3 and other.clock.times() == []
    half = TRIAL // 2
    assert other.do(TRIAL + 5, side=6) == [False] * half + [True] * half + [False] * 5
    assert other.compiler.verdict == Verdict([8, 6, 0, 2], False)


def test_what_is_not_worth_a_trial_or_cannot_be_compiled_is_decided_too() -> None:
    short = Steps(0.04, left=TRIAL)
    short.do(TRIAL // 2 + 1)
    broken = Steps(0.04)
    broken.do(TRIAL - 1)
    with pytest.raises(StepAgainError):
        broken.compiler.run(
            Batch(torch.zeros(8, 4), *[torch.zeros(1)] * 3, own=1), lambda _: 1 // 0, Config()
        )
    for steps in (short, broken):
        assert steps.compiler.verdict == Verdict([8, 4, 0, 2], False)


@pytest.mark.parametrize(("version", "step"), [(2, 2), (3, 2), (3, 8), (5, 2)])
def test_a_state_of_before_is_read_and_one_of_later_refused(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    ctrl_c_in_step: Callable[[int], None],
    version: int,
    step: int,
) -> None:
    """2 knew no verdict on compiling; until 3 the average was written whole. Six steps a stage."""
    whole = fit(*tables, out=tmp_path / "whole", config=best)
    ctrl_c_in_step(step)
    with pytest.raises(TrainingStopped) as stopped:
        fit(*tables, out=tmp_path / "run", config=best)
    path = stopped.value.run.state_path
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["state"])
    assert header["format_version"] == 4 and header["progress"]["compiling"] is None
    if version == 2:
        del header["progress"]["compiling"]
    header["format_version"] = version
    tensors = load_file(path)
    backbone = [key for key in tensors if key.startswith("model.image_encoder.")]
    averaged = {key for key in tensors if key.startswith("average.")}
    assert len(backbone) > 20 and averaged
    assert any("image_encoder" in key for key in averaged) == (step > 6)
    model = {key.removeprefix("model."): tensors[key] for key in tensors if key[:6] == "model."}
    full = {f"average.{key}": value.clone() for key, value in model.items()}
    save_file({**full, **tensors}, path, metadata={"state": json.dumps(header)})
    if version == 5:
        with pytest.raises(CaptuneError, match="format_version 5, this captune reads 4"):
            fit(*tables, out=tmp_path / "run", config=best, resume=True)
    else:
        check_same(fit(*tables, out=tmp_path / "run", config=best, resume=True), whole)


class Small(nn.Module):
    """A module of one's own, for torch compiles none of its own by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 4, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.maps(pixels)  # type: ignore[no-any-return]


def test_no_form_is_one_too_many(graphs: Graphs) -> None:
    """Torch by itself makes eight graphs of a module and does the rest as it is."""
    backbone = Small()
    compiler = BackboneCompiler(backbone)
    for side in range(8, 20):
        batch = Batch(torch.zeros(2, 3, side, side), *[torch.zeros(1)] * 3, own=1)
        compiler.begin(100)
        compiler.run(batch, lambda _, pixels=batch.inputs: backbone(pixels), Config())
    assert graphs.made == len(graphs.passed) == 12


def test_crops_that_grow_and_layers_that_come_in_are_compiled_too(
    tables: Tables, best: Config, tmp_path: Path, graphs: Graphs
) -> None:
    config = best.replace(
        head_epochs=0, num_epochs=3, image_size=64, progressive_resizing=True, unfreeze_epochs=2
    )
    off = fit(*tables, out=tmp_path / "off", config=config)
    on = fit(*tables, out=tmp_path / "on", config=config.replace(compile_backbone="on"))
    check_same(on, off)
    assert compiled_steps(on) == [3, 3, 3] and graphs.made >= 2
