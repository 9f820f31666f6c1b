"""The notebook runs from top to bottom, and its published version has its images in it."""
from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"


def image_outputs(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the PNG images among the outputs of all cells."""
    return [output["data"]["image/png"] for cell in notebook.cells if cell.cell_type == "code"
            for output in cell.outputs if "image/png" in output.get("data", {})]


def test_the_published_notebook_has_its_images() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(image_outputs(notebook)) == 5
    assert not [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
                if output.output_type == "error"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = "TRAIN_STEPS = 2\nSEEDS = 1"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace("num_inference_steps=20", "num_inference_steps=2")
            cell.outputs = []
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert len(image_outputs(notebook)) == 5
