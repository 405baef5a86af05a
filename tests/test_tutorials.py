# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The tutorials: what is stored is a complete run without warnings, and a short run works with this code."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

import pyro_hollow

ROOT = Path(pyro_hollow.__file__).parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings("default")  # those of Jupyter; a notebook's own are in its outputs


@pytest.fixture(params=TUTORIALS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def complaints(notebook):
    """Errors, and all that was written to stderr, as warnings are."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_tutorials_are_found():
    assert len(TUTORIALS) >= 6


def test_form(notebook):
    first, *_, last = notebook.cells
    assert len(notebook.cells) <= 25
    assert first.cell_type == last.cell_type == "markdown"
    assert first.source.startswith("# ") and "You will be able to" in first.source and "Running:" in first.source
    assert "## Where to go next" in last.source
    assert 'smoke_test = "CI" in os.environ' in code_cells(notebook)[0].source


def test_stored_outputs(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert complaints(notebook) == []
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


#: Undoes what another notebook has left in the process.
AFRESH = """
%reset -f
import matplotlib.pyplot, pyro, torch
matplotlib.pyplot.close("all")
pyro.clear_param_store()
torch.set_default_dtype(torch.float32)
%reset -f
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """One process for all short runs, most of whose time imports would take."""
    # Where there is no notebook: none may need a file.
    empty, resources = nbformat.v4.new_notebook(), {"metadata": {"path": str(tmp_path_factory.mktemp("empty"))}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        # No kernel of the user's, so that it is this Python.
        patch.setenv("JUPYTER_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        client = nbclient.NotebookClient(empty, timeout=300, resources=resources)
        with client.setup_kernel():
            yield client


def test_short_run(notebook, client):
    notebook.cells.insert(0, nbformat.v4.new_code_cell(AFRESH))
    client.nb = notebook
    client.reset_execution_trackers()
    for index, cell in enumerate(notebook.cells):
        client.execute_cell(cell, index)
    assert complaints(notebook) == []
