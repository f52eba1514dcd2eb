"""main.ipynb: runs top to bottom offline, holds calls only, and no outputs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).resolve().parents[1] / "main.ipynb"
DEFINES_OR_LOOPS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ClassDef,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
# The test runs the same cells on fewer scenes; each line stands in the notebook as it is here.
SHORTER = {
    "prepare": "from captune.notebook import presets\n"
    "presets.TRAIN_SCENES = 48\n"
    "presets.VAL_SCENES = 12\n"
    "presets.TEST_SCENES = 30\n",
    "describe": "CONFIG = CONFIG.replace(num_epochs=2, batch_size=16, image_size=64, "
    "num_workers=0)\nPRESET.sketch['image_size'] = 64\n",
}


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_holds_calls_only(notebook: Any) -> None:
    for cell in code_cells(notebook):
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        found = [node for node in ast.walk(tree) if isinstance(node, DEFINES_OR_LOOPS)]
        assert not found, cell.id


def test_it_is_committed_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert notebook.metadata.kernelspec.name == "python3"


def test_cells_have_names_of_their_own_and_sections_their_numbers(notebook: Any) -> None:
    assert all(re.fullmatch(r"[a-z][a-z-]+", cell.id) for cell in notebook.cells)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (\d)", text, re.MULTILINE) == list("123456789")
    assert re.findall(r"^### (7\.\d)", text, re.MULTILINE) == ["7.1", "7.2", "7.3", "7.4", "7.5"]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in; the kernel inherits the environment."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    return tmp_path


def run(notebook: Any, folder: Path) -> None:
    options = {"timeout": 600, "resources": {"metadata": {"path": str(folder)}}}
    NotebookClient(notebook, kernel_name="python3", **options).execute()


def test_it_runs_top_to_bottom_and_shows_pictures(notebook: Any, offline: Path) -> None:
    shorter = nbformat.from_dict(notebook)
    for cell in shorter.cells:
        cell.source = SHORTER.get(cell.id, "") + cell.source
    run(shorter, offline)
    outputs = [(cell.id, out) for cell in code_cells(shorter) for out in cell.outputs]
    pictures = [name for name, out in outputs if "image/png" in out.get("data", {})]
    assert pictures == [
        "samples",
        "train",
        "recall",
        "search",
        "zero-shot",
        "accuracy",
        "explain",
        "flags",
    ]
    # Red text below a cell looks like an error.
    assert [out for _, out in outputs if out.get("name") == "stderr"] == []
    assert (offline / "runs" / "demo" / "report.html").is_file()


def test_brief_shows_the_latest_words_only(offline: Path) -> None:
    cell = nbformat.v4.new_code_cell(
        "from captune.console import logger, say\n"
        "from captune import notebook as nb\n"
        "before = logger.handlers[:]\n"
        "with nb.brief():\n    say('one')\n    say('two')\n"
        "assert logger.handlers == before"
    )
    run(nbformat.v4.new_notebook(cells=[cell]), offline)
    (out,) = cell.outputs
    assert out.output_type == "display_data" and out.data["text/plain"] == ""


def test_a_users_error_is_one_line_below_its_cell(offline: Path) -> None:
    cell = nbformat.v4.new_code_cell("from captune import notebook as nb\nnb.preset('coco2014')")
    wrong = nbformat.v4.new_notebook(cells=[cell])
    with pytest.raises(CellExecutionError):
        run(wrong, offline)
    (shown,) = [out for out in cell.outputs if out.output_type == "error"]
    (line,) = shown.traceback
    assert line.startswith("captune: no preset and no file or folder is called 'coco2014'")
