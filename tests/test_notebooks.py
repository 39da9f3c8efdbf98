"""Notebooks run from top to bottom, and Interrupt in a kernel is a clean end."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

import toolkit as tk
from tests.pictures import write_photos
from tests.support import build, wait_until

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_stripped(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]

    assert [cell["source"] for cell in cells if cell.get("outputs")] == []
    assert [cell["source"] for cell in cells if cell.get("execution_count")] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)

    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    errors = [o for cell in notebook.cells for o in cell.get("outputs", []) if o["output_type"] == "error"]  # fmt: skip  # noqa: E501
    assert errors == []
    html = [_html(output) for cell in notebook.cells for output in cell.get("outputs", [])]
    # Live progress leaves one clean output, and a search shows its pictures.
    assert sum("found 106 =" in text for text in html) >= 1
    assert any("data:image/jpeg;base64," in text for text in html)
    assert not any("<progress" in text for text in html)


def _html(output: dict[str, object]) -> str:
    data = output.get("data", {})
    return str(data.get("text/html", "")) if isinstance(data, dict) else ""


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
        after: list[str] = []
        client.execute_interactive(
            "import sys; print('torch' in sys.modules)",
            timeout=60,
            output_hook=lambda message: after.append(message["content"].get("text", "")),
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
    assert "".join(after).strip() == "False"
    assert 0 < embedded < 800
    assert again.accounting.embedded == 800 - embedded
