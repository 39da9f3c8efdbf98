"""Notebooks run from top to bottom, and Interrupt in a kernel is a clean end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

import toolkit as tk
from tests.pictures import write_photos
from tests.support import build, wait_until
from toolkit import config
from toolkit.cluster.local import cluster_down

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_stripped(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]

    assert [cell["source"] for cell in cells if cell.get("outputs")] == []
    assert [cell["source"] for cell in cells if cell.get("execution_count")] == []


#: What the outputs of each notebook must show, as patterns.
SHOWN = {
    "01_build_and_search.ipynb": ("found 106 =", "data:image/jpeg;base64,"),
    "02_cluster_and_health.ipynb": (
        "distributed</b> a build would use the workers",
        r"^{'workers': [1-9]\d*, 'local': 0}$",
        "found 870 = indexed 870 ",
        # One worker was killed: its batch went to the other one, and none to this machine.
        "batch .* goes out again",
        r"^\({'workers': \d+, 'local': 0}, \[\]\)$",
    ),
}


@pytest.fixture
def kernel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a notebook writes; a cluster that it left behind is ended."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    for data_dir in tmp_path.glob("toolkit-*/data"):
        cluster_down(config.resolve(data_dir=data_dir))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_from_top_to_bottom(path: Path, kernel_folder: Path) -> None:
    notebook = nbformat.read(path, as_version=4)

    resources = {"metadata": {"path": str(kernel_folder)}}
    NotebookClient(notebook, timeout=240, resources=resources).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [_shown(output) for output in outputs]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    missing = [p for p in SHOWN[path.name] if not any(re.search(p, t, re.M) for t in shown)]
    assert missing == [], shown
    # Live progress leaves one clean output, and nothing is left on the disk.
    assert not any("<progress" in text for text in shown)
    assert list(kernel_folder.glob("toolkit-*")) == []


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    return str(output.get("text") or data.get("text/html") or data.get("text/plain", ""))


@pytest.mark.slow
def test_interrupt_in_a_kernel_ends_cleanly_and_the_next_build_goes_on(tmp_path: Path) -> None:
    photos = tmp_path / "datasets" / "photos"
    write_photos(photos, 800, seed=0)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        code = "import toolkit as tk; tk.build_index('photos', model='test_vit', pretrained=False)"
        asked = client.execute(code)
        wait_until(lambda: any(r.accounting.embedded for r in tk.runs()), "an embedded image")

        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)
        # In the reply itself: what is printed may come after it.
        checked = client.execute_interactive(
            "import sys",
            timeout=60,
            user_expressions={"torch": "'torch' in sys.modules"},
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)

    (run,) = tk.runs()
    embedded = run.accounting.embedded
    again = build("photos")
    assert reply["parent_header"]["msg_id"] == asked
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert run.state == "interrupted"
    assert checked["content"]["user_expressions"]["torch"]["data"] == {"text/plain": "False"}
    assert 0 < embedded < 800
    assert again.accounting.embedded == 800 - embedded
