"""A window as a person reads it: text in the window's order, coloured by document, for a terminal or as HTML.

A window of 8: "a b c" of document 4 (whole), "x y" of document 0 (cut), no room for more:

    document 4 (web), its tokens 0-3, all: rows 0-4, positions 0-4
    ⟨<bos>⟩ a b⟨ c⟩
    document 0 (web), its tokens 0-2 of 9: rows 4-7, positions 0, 4-6
    ⟨<bos>⟩ x y→ z
    padding: rows 7-8, positions 0
    ⟨<bos>⟩

⟨ ⟩ enclose tokens on which nothing is trained; → shows a label that does not follow in the text. Chunks of
documents that are interleaved come in the order in which the window tells them. Of long runs of text the ends
are shown, and how much lies between.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from anchor_megatron.config import Config
from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.data.window import Window
from anchor_megatron.layout.describe import spans
from anchor_megatron.layout.modes import positions

__all__ = ["Passage", "Run", "as_html", "as_text", "read_passages", "window_title"]

_HUES = (33, 208, 41, 170, 220, 45, 203, 112)  # of documents in turn: colours of a terminal of 256


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are shown alike. `kind`: lead (anchor, tag), text, gap (tokens left out) or
    padding; `label`: what the last one predicts, where that does not follow.
    """

    text: str
    kind: str
    is_masked: bool
    label: str = ""


@dataclass(frozen=True)
class Passage:
    """What stands together of a piece of a document: `piece` is its number in the window, -1 for padding."""

    piece: int
    heading: str
    runs: list[Run]


def window_title(config: Config, windows: WindowDataset, n: int, window: Window) -> str:
    """What window `n` is and what it holds, in one line."""
    epoch, index = windows.locate(n)
    step, within = divmod(n, config.train.global_batch_size)
    held = ", ".join(f"{name} {count}" for name, count in asdict(window.counts).items() if count)
    return (
        f"window {n}: step {step + 1}, its window {within}; epoch {epoch}, its window {index}; mode "
        f"{config.data.mode}, {windows.seq_length} rows: {held}"
    )


def read_passages(
    windows: WindowDataset, window: Window, *, mode: str, tokenizer: Any, most: int
) -> list[Passage]:
    """A window's passages in the order in which it tells them, at most `most` tokens (0: all) of each run."""
    size = window.tokens.size
    at = positions(mode, window.cu_seqlens, window_length=size, slots=window.slots)
    told = np.arange(size) if window.slots is None else np.argsort(window.slots)
    piece = np.repeat(np.arange(window.document_ids.size), np.diff(window.cu_seqlens))
    begins = np.flatnonzero((np.diff(piece[told], prepend=-1) != 0) | (np.diff(told, prepend=-2) != 1))
    reader = _Reader(windows, window, at, lambda ids: _decode(tokenizer, ids), most)
    return [
        reader.passage(int(piece[told[begin]]), int(told[begin]), int(told[end - 1]) + 1)
        for begin, end in zip(begins, np.append(begins[1:], size), strict=True)
    ]


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class _Reader:
    """Reads rows of a window. `positions` int64 [S]; `decode`: ids to text."""

    windows: WindowDataset
    window: Window
    positions: np.ndarray
    decode: Callable[[np.ndarray], str]
    most: int

    def passage(self, piece: int, start: int, stop: int) -> Passage:
        """Rows [start, stop) of a piece."""
        document = int(self.window.document_ids[piece])
        where = f"rows {start}-{stop}, positions {spans(self.positions[start:stop])}"
        if document < 0:
            return Passage(-1, f"padding: {where}", list(self._runs(start, stop, "padding")))
        first = int(self.window.cu_seqlens[piece])
        lead = self._lead(document, first)
        own_start, own_stop = (
            int(self.window.document_offsets[piece]) + max(row - first - lead, 0) for row in (start, stop)
        )
        length = int(self.windows.corpus.lengths[document])
        whole = "all" if (own_start, own_stop) == (0, length) else f"of {length}"
        if own_stop > length:
            whole = f"of its {length} and of those joined to it"
        source = self.windows.corpus.source_names[int(self.windows.corpus.sources[document])]
        text_begins = min(max(first + lead, start), stop)
        return Passage(
            piece,
            f"document {document} ({source}), its tokens {own_start}-{own_stop}, {whole}: {where}",
            [*self._runs(start, text_begins, "lead"), *self._runs(text_begins, stop, "text")],
        )

    def _lead(self, document: int, first: int) -> int:
        """Rows in front of the document's own tokens."""
        leads = self.windows.leads.lengths
        source = self.windows.corpus.sources[document] if leads.size > 1 else 0
        assert self.window.tokens[first] == self.windows.leads.anchor, "a piece begins with the anchor"
        return int(leads[source])

    def _runs(self, start: int, stop: int, kind: str) -> Iterator[Run]:
        """Rows [start, stop) in runs of the same mask, long ones without their middles."""
        most = 2 if kind == "padding" else self.most  # which is the same token again and again
        is_masked = ~self.window.loss_mask[start:stop]
        cuts = start + np.flatnonzero(np.diff(is_masked)) + 1
        borders = [start, *cuts.tolist(), stop] if stop > start else []
        for begin, end in zip(borders, borders[1:], strict=False):
            masked, label = bool(is_masked[begin - start]), self._label(end - 1)
            if not most or end - begin <= most:
                yield Run(self.decode(self.window.tokens[begin:end]), kind, masked, label)
                continue
            half = most // 2
            yield Run(self.decode(self.window.tokens[begin : begin + half]), kind, masked)
            yield Run(f" [... tokens left out: {end - begin - 2 * half:,} ...] ", "gap", False)
            yield Run(self.decode(self.window.tokens[end - half : end]), kind, masked, label)

    def _label(self, row: int) -> str:
        """What `row` is trained to predict, if that is not the row after it in its document."""
        window = self.window
        is_last = row + 1 in window.cu_seqlens
        if not window.loss_mask[row] or (not is_last and window.labels[row] == window.tokens[row + 1]):
            return ""
        return self.decode(window.labels[row : row + 1])


def as_text(passages: list[Passage], *, colours: bool) -> str:
    """The passages for a terminal, with its colours or without."""
    lines = []
    for passage in passages:
        hue = 245 if passage.piece < 0 else _HUES[passage.piece % len(_HUES)]
        lines.append(_ansi(passage.heading, "1;38;5;", hue) if colours else passage.heading)
        text = "".join(_marked(run, hue if colours else None) for run in passage.runs)
        lines.append(text + "\n")
    return "\n".join(lines)


def _marked(run: Run, hue: int | None) -> str:
    text, label = (_visible(part) for part in (run.text, run.label))
    if run.is_masked:
        text = f"⟨{text}⟩"
    if label:
        text += f"→{label}"
    if hue is None:
        return text
    return _ansi(text, {"lead": "7;38;5;", "text": "38;5;"}.get(run.kind, "2;38;5;"), hue)


def _visible(text: str) -> str:
    """Without what would steer the terminal: documents may hold anything."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def _ansi(text: str, style: str, hue: int) -> str:
    return f"\x1b[{style}{hue}m{text}\x1b[0m"


_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
h2 {{ font-size: 13px; margin: 1.2em 0 .2em }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .4em .6em }}
pre {{ border-left: 4px solid }}
.lead {{ font-weight: bold; border: 1px solid; border-radius: 3px; padding: 0 2px }}
.masked {{ opacity: .55; text-decoration: underline dotted }}
.gap, .padding {{ color: #888 }}
.label {{ font-size: 80%; vertical-align: super; color: #b00 }}
</style>
<p>{title}</p>
<p>A box: what leads a document; dotted: nothing is trained on it; raised: a label that does not follow.</p>
{body}
"""


def as_html(title: str, passages: list[Passage]) -> str:
    """A page that needs nothing else."""
    body = []
    for passage in passages:
        hue = (
            "#888" if passage.piece < 0 else f"hsl({passage.piece * 137 % 360} 60% 38%)"
        )  # far from its last
        runs = "".join(_span(run) for run in passage.runs)
        body.append(f'<h2 style="color: {hue}">{html.escape(passage.heading)}</h2>')
        body.append(f'<pre style="color: {hue}">{runs}</pre>')
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


def _span(run: Run) -> str:
    names = f"{run.kind} masked" if run.is_masked else run.kind
    label = f'<span class="label">→{html.escape(run.label)}</span>' if run.label else ""
    return f'<span class="{names}">{html.escape(_visible(run.text))}</span>{label}'
