"""How runs and answers look: live progress, and what a notebook or a terminal shows.

Law: JupyterLab's sanitiser keeps tables, ``progress``, ``img`` with ``data:`` and inline
styles, and nothing else; every text is escaped.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from toolkit.errors import ImageError
from toolkit.run_record import Progress, RunRecord, RunState
from toolkit.text import fallback_text, one_line, seconds_text

if TYPE_CHECKING:
    from toolkit.hits import Hits

#: Longer side of a thumbnail in pixels: about 5 KB each as base64.
THUMBNAIL_PX = 128

#: Failures that a run shows in a notebook; the table has them all.
SHOWN_FAILURES = 10

Show = Callable[[RunRecord], None]


@contextlib.contextmanager
def progress() -> Iterator[Show]:
    """Show how far a run is: in a kernel and a terminal live, elsewhere what does the work.

    Yields:
        A function to call with the record whenever it changed.
    """
    if in_kernel():
        yield _kernel_progress()
    else:
        with _Terminal(has_bars=sys.stderr.isatty()) as terminal:
            yield terminal.show


def in_kernel() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def _kernel_progress() -> Show:
    # Deferred: there is an IPython only in a kernel. One display handle leaves one clean
    # output in a saved notebook, where a progress bar's widget would be dead.
    from IPython import display

    handle = display.display(display.HTML(""), display_id=True)  # type: ignore[no-untyped-call]  # IPython's

    def show(record: RunRecord) -> None:
        handle.update(display.HTML(run_html(record)))  # type: ignore[no-untyped-call]  # IPython's

    return show


class _Terminal:
    """One bar a stage, on stderr, under a line that says what does the work and where."""

    def __init__(self, has_bars: bool) -> None:
        self._has_bars = has_bars
        self._bar: Any = None
        self._stage = ""
        self._has_header = False
        self._n_moves = 0

    def __enter__(self) -> _Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def show(self, record: RunRecord) -> None:
        from tqdm import tqdm  # deferred: only a terminal needs it

        if record.road and not self._has_header:
            self._has_header = True
            tqdm.write(header(record), file=sys.stderr)
        for move in record.moves[self._n_moves :]:
            self._n_moves += 1
            tqdm.write(move_text(move), file=sys.stderr)
        if record.stage != self._stage:
            self._close()
            self._stage = record.stage
            if record.stage and self._has_bars:
                total = record.total or None
                self._bar = tqdm(desc=record.stage, total=total, unit=" images", leave=False)
        if self._bar is not None:
            self._bar.total = record.total or None
            self._bar.update(record.done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def header(record: RunRecord) -> str:
    """What does the work, and where it goes."""
    reason = f" ({record.fallback_reason})" if record.fallback_reason else ""
    parts = [record.encoder, f"device {record.device}", f"road {record.road}{reason}"]
    return " · ".join([*parts, f"writes to {record.folder}"])


def move_text(move: Mapping[str, Any]) -> str:
    """A change of road in one line."""
    if move["to"] == "local":
        return fallback_text(move["reason"], move["eta_s"])
    after = move["eta_s"][1]
    return "on the workers again" + (f", ETA {seconds_text(after)}" if after else "")


def progress_text(progress: Progress) -> str:
    """Stage, count, rate and time left in one line."""
    if not progress.stage:
        return str(progress.state)
    if progress.stage == "load":
        return "loading the model"
    text = f"{progress.stage} {progress.done:,}"
    if progress.total:
        text += f" of {progress.total:,}"
    if progress.rate:
        text += f", {progress.rate:.1f} images/s"
    if progress.eta_s is not None:
        text += f", {seconds_text(progress.eta_s)} left"
    return text


def books_text(record: RunRecord) -> str:
    """The accounting in one line."""
    books = record.accounting
    parts = [
        f"found {books.found:,} = indexed {books.indexed:,} + duplicates {books.duplicates:,}"
        f" + failed {books.failed:,} + excluded {books.excluded:,} + pending {books.pending:,}",
        f"embedded {books.embedded:,}, reused {books.reused:,}",
    ]
    if books.kept:
        parts.append(f"{books.kept:,} unreadable now, old vectors kept")
    if record.excluded_by:
        rules = sorted(record.excluded_by.items())
        parts.append("left out: " + ", ".join(f"{n:,} {rule}" for rule, n in rules))
    return "; ".join(parts)


def roads_text(record: RunRecord) -> str:
    """Which road did how much, how often the work moved, and why not always on workers."""
    parts = [f"batches: {record.batches['workers']} by workers, {record.batches['local']} local"]
    if record.moves:
        n = len(record.moves)
        parts.append("moved once" if n == 1 else f"moved {n} times")
    if record.fallback_reason:
        parts.append(f"not on workers at first or for a while: {record.fallback_reason}")
    return "; ".join(parts)


def run_text(record: RunRecord) -> str:
    """A run in a terminal."""
    lines = [f"run {record.run_id} · index {record.index} · {record.state}"]
    if record.state.is_live:
        lines.append(progress_text(record.progress))
    elif record.state in (RunState.DONE, RunState.HELD):
        lines.append(books_text(record))
        lines.append(f"{seconds_text(record.seconds)}{_recall_text(record)}")
    if record.fidelity:
        lines.append(record.fidelity)
    if any(record.batches.values()):
        lines.append(roads_text(record))
    if record.error:
        lines.append(record.error)
    return "\n".join(lines)


def run_html(record: RunRecord, failures: Sequence[Mapping[str, Any]] = ()) -> str:
    """A run in a notebook, live or ended."""
    parts = [f"<b>{escape(record.index)}</b> · {record.state} · run {escape(record.run_id)}"]
    if record.road:
        parts.append(escape(header(record)))
    if record.state.is_live:
        at = record.progress
        bar = f' value="{at.done}" max="{at.total}"' if at.total else ""
        parts.append(f'<progress{bar} style="width:24em"></progress> {escape(progress_text(at))}')
    else:
        parts.append(escape(books_text(record)))
        parts.append(f"{seconds_text(record.seconds)}{_recall_text(record)}")
    if record.fidelity:
        parts.append(escape(record.fidelity))
    if any(record.batches.values()) and record.moves:
        parts.append(escape(roads_text(record)))
    if record.error:
        parts.append(f'<span style="color:#b00">{escape(record.error)}</span>')
    html = "<br>".join(parts)
    if failures:
        rows = [[f["path"], f["reason"]] for f in failures[:SHOWN_FAILURES]]
        html += f"<br>{len(failures)} failed" + table_html(["path", "reason"], rows)
    return f"<div>{html}</div>"


def _recall_text(record: RunRecord) -> str:
    return "" if record.recall_at_10 is None else f", recall@10 {record.recall_at_10:.3f}"


def hits_text(hits: Hits) -> str:
    """Hits in a terminal."""
    lines = [
        f"{hit.rank:>4}  {hit.score:.4f}  {one_line(hit.path)}{_more(hit.paths)}" for hit in hits
    ]
    return "\n".join(lines) or "no hits"


def hits_html(hits: Hits) -> str:
    """Hits in a notebook: thumbnails in rows, with rank, score and name."""
    style = (
        f"display:inline-block;width:{THUMBNAIL_PX + 16}px;margin:4px;vertical-align:top;"
        "text-align:center;font-size:11px;overflow-wrap:anywhere"
    )
    cells = [
        f'<div style="{style}" title="{escape(hit.path)}">'
        f"{thumbnail_html(hit.file)}<br>{hit.rank} · {hit.score:.3f}<br>"
        f"{escape(os.path.basename(hit.path))}{_more(hit.paths)}</div>"
        for hit in hits
    ]
    return f"<div>{''.join(cells) or 'no hits'}</div>"


def index_text(summary: Mapping[str, Any]) -> str:
    """An index in one line."""
    recall = summary["recall_at_10"]
    shown = "" if recall is None else f" · recall@10 {recall:.3f}"
    return (
        f"index {summary['name']} · {summary['images']:,} images · {summary['encoder']} · "
        f"{summary['dtype']}{shown}"
    )


def table_html(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table, escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def thumbnail_html(path: bytes) -> str:
    """A picture as an inline JPEG, or a word that says why there is none."""
    from toolkit.records import show_path  # deferred, as below

    try:
        url = thumbnail_url(path)
    except ImageError as error:
        return f"<i>{escape(type(error).__name__)}</i>"
    return f'<img alt="{escape(show_path(os.path.basename(path)))}" src="{url}">'


def thumbnail_url(path: bytes, *, max_pixels: int | None = None) -> str:
    """A picture as a small JPEG in a data address.

    Args:
        path: The file.
        max_pixels: Refuse one that has more; ``None`` takes the decoder's own limit.

    Raises:
        ImageError: If it cannot be read or decoded.
    """
    # Deferred: it needs Pillow and numpy, which `toolkit --help` does not.
    from toolkit.images.decode import DEFAULT_MAX_PIXELS, decode, read_file

    picture = decode(read_file(path)[0], max_pixels=max_pixels or DEFAULT_MAX_PIXELS).rgb
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _more(paths: Sequence[str]) -> str:
    return f" (+{len(paths) - 1} copies)" if len(paths) > 1 else ""
