"""Looking at data: windows read back from what is shown, damage named with its document, figures counted."""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_show_plan import spans
from test_windows import corpus_of

from anchor_megatron.config import data_config
from anchor_megatron.data import index
from anchor_megatron.data.documents import Documents
from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.data.statistics import LONG, corpus_statistics, write_statistics
from anchor_megatron.data.tokenizer import load_tokenizer
from anchor_megatron.testing.texts import write_paragraphs
from anchor_megatron.training.batch import plan_batch
from anchor_megatron.training.loader import open_windows
from anchor_megatron.training.packing_report import packing_report
from anchor_megatron.training.window_view import Passage, Run, as_html, as_text, read_passages

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import inspect_data as tool  # noqa: E402

HEADING = re.compile(
    r"document (\d+) \((\w+)\), its tokens (\d+)-(\d+), (?:all|of (\d+)): rows (\d+)-(\d+), positions (.+)"
)


def paragraphs(prefix: Path) -> Path:
    """Paragraphs of the standard library's json package, from sources "decoder" and "other" in turn."""
    text = write_paragraphs(prefix.with_suffix(".jsonl"))
    summary, _ = preprocess(Job((text,), prefix, train_tokenizer=300))
    summary.sources[:] = ["decoder", "other"]
    summary.write(prefix.with_suffix(".json"))
    np.save(f"{prefix}_sources.npy", np.arange(summary.documents, dtype=np.uint8) % 2)
    return prefix


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paragraphs(tmp_path_factory.mktemp("data") / "set")


@pytest.mark.parametrize(
    ("mode", "interleave", "fields"),
    [
        ("anchor", 0, []),
        ("document_reset", 0, ["data.domain_tag=true"]),
        ("full", 20, ["data.end_label=eos"]),
        ("anchor", 20, ["data.domain_tag=true", "data.packing=balanced"]),
    ],
)
def test_what_is_shown_is_what_is_trained_on(
    prefix: Path, mode: str, interleave: int, fields: list[str]
) -> None:
    overrides = [f"data.mode={mode}", f"data.interleave={interleave}", "data.seq_length=700"]
    overrides += ["data.shuffle_windows=false", *fields]
    config = data_config(str(prefix), overrides)
    windows = open_windows(config)
    documents, tokenizer = windows.corpus.sets[0], load_tokenizer(f"{prefix}_tokenizer")
    window = windows[2]
    passages = read_passages(windows, window, mode=mode, tokenizer=tokenizer, most=0)
    rows: list[int] = []
    shown: dict[int, int] = {}
    for passage in passages:
        if passage.piece < 0:
            assert passage.heading.startswith("padding: rows ")
            rows += spans(passage.heading.split("rows ")[1].split(",")[0])
            continue
        found = HEADING.fullmatch(passage.heading)
        assert found, passage.heading
        document, start, stop = int(found[1]), int(found[3]), int(found[4])
        assert found[2] == ("decoder", "other")[document % 2]
        assert int(found[5] or stop - start) == documents.lengths[document]
        own = documents.tokens(document, start, stop)
        text = [run for run in passage.runs if run.kind == "text"]
        assert "".join(run.text for run in text) == tokenizer.decode(own.tolist())
        assert all(run.is_masked for run in passage.runs if run.kind == "lead")
        check_ends(passage, text, documents, document, stop, tokenizer, "eos" in str(fields))
        rows += range(int(found[6]), int(found[7]))
        place = spans(found[8])
        assert len(place) == int(found[7]) - int(found[6])
        shown.update(zip(range(int(found[6]), int(found[7])), place, strict=True))
    assert sorted(rows) == list(range(700)), "every row once"
    if interleave:
        assert rows != sorted(rows) and len(passages) > window.document_ids.size
    trained = plan_batch(
        [window], mode="anchor" if mode == "full" else mode, placement="document",
        context_parallel_size=1, context_parallel_rank=0,
    )  # fmt: skip
    if mode == "full":  # whose rows training takes in the window's order
        assert window.slots is not None and all(window.slots[row] == place for row, place in shown.items())
    else:
        at = trained.to(torch.device("cpu")).positions[0].tolist()
        assert all(at[trained.plan.token_index.tolist().index(row)] == place for row, place in shown.items())


def check_ends(
    passage: Passage,
    text: list[Run],
    documents: Documents,
    document: int,
    stop: int,
    tokenizer: object,
    ends: bool,
) -> None:
    """The last token shown of a document predicts nothing, its end, or what this window does not show."""
    assert not any(run.is_masked for run in text[:-1])
    if not text or stop < documents.lengths[document]:
        return
    last = documents.tokens(document, stop - 1, stop)
    assert text[-1].is_masked != ends
    if not ends:
        assert text[-1].text == tokenizer.decode(last.tolist())  # type: ignore[attr-defined]
    assert text[-1].label == ("<|eos|>" if ends else "")


def test_the_label_behind_a_cut_is_shown(prefix: Path) -> None:
    windows = open_windows(data_config(str(prefix), ["data.seq_length=64"]))
    tokenizer, documents = load_tokenizer(f"{prefix}_tokenizer"), windows.corpus.sets[0]
    n = next(n for n in range(40) if windows[n].counts.cut and not windows[n].counts.padding)
    last = read_passages(windows, windows[n], mode="anchor", tokenizer=tokenizer, most=0)[-1]
    found = HEADING.fullmatch(last.heading)
    assert found and found[5]
    following = documents.tokens(int(found[1]), int(found[4]), int(found[4]) + 1)
    assert last.runs[-1].label == tokenizer.decode(following.tolist())


def test_terminal_and_page_say_the_same_and_nothing_steers_them() -> None:
    passages = [
        Passage(0, "document 0", [Run("<s>", "lead", True), Run("a\x1b[2J<script>", "text", False, " b")]),
        Passage(-1, "padding", [Run("<s>", "padding", True)]),
    ]
    plain = as_text(passages, colours=False)
    assert plain == "document 0\n⟨<s>⟩a\\x1b[2J<script>→ b\n\npadding\n⟨<s>⟩\n"
    assert re.sub(r"\x1b\[[\d;]+m", "", as_text(passages, colours=True)) == plain
    page = as_html("a <title>", passages)
    assert "<script" not in page and "a &lt;title&gt;" in page
    body = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "<s>a\\x1b[2J<script>→ b" in body


def test_long_runs_are_shown_by_their_ends(prefix: Path) -> None:
    windows = open_windows(data_config(str(prefix), ["data.seq_length=700"]))
    tokenizer = load_tokenizer(f"{prefix}_tokenizer")
    whole, short = (
        read_passages(windows, windows[0], mode="anchor", tokenizer=tokenizer, most=most) for most in (0, 10)
    )
    assert [one.heading for one in whole] == [one.heading for one in short]
    for one, other in zip(whole, short, strict=True):
        full = "".join(run.text for run in one.runs)
        parts = re.split(r" \[\.\.\. tokens left out: [\d,]+ \.\.\.\] ", "".join(r.text for r in other.runs))
        assert full.startswith(parts[0]) and full.endswith(parts[-1])
    assert any(run.kind == "gap" for one in short for run in one.runs)


def test_the_tool_shows_windows_of_a_data_set_and_of_a_run(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = ["data.seq_length=700", "train.global_batch_size=2", "train.seed=5"]
    assert tool.main([str(prefix), "window", "3", *fields, "--most", "20"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("window 3: step 2, its window 1; epoch 0, its window 3; mode anchor, 700 rows:")
    run = tmp_path / "run.yaml"
    run.write_text(f"data: {{train: {prefix}, seq_length: 700}}\ntrain: {{global_batch_size: 2, seed: 5}}\n")
    assert tool.main([str(run), "window", "3", "--most", "20"]) == 0
    assert capsys.readouterr().out == printed
    assert tool.main([str(run), "window", "3", "--html", str(tmp_path / "w.html")]) == 0
    assert "document " in (tmp_path / "w.html").read_text()
    capsys.readouterr()
    for words, message in (
        (["window", "-1"], "window: got -1, expected at least 0"),
        (["window", "0", "--most=-1"], "--most: got -1, expected at least 0"),
        (["packing", "--windows", "0"], "--windows: got 0, expected at least 1"),
        (["window", "0", "data.sequence=3"], "data.sequence"),
    ):
        assert tool.main([str(prefix), *words]) == 2
        assert message in capsys.readouterr().err
    assert tool.main([str(tmp_path / "none"), "statistics"]) == 2


@given(
    lengths=st.lists(st.integers(0, 300_000), min_size=1, max_size=30).filter(any),
    choices=st.lists(st.integers(0, 2), min_size=30, max_size=30),
)
def test_statistics_are_those_of_the_lengths(lengths: list[int], choices: list[int]) -> None:
    class Given:
        def __init__(self) -> None:
            self.lengths = np.array(lengths, dtype=np.int32)
            self.sources = np.array(choices[: len(lengths)], dtype=np.uint8)
            self.source_names = ["s0", "s1", "s2"]

    corpus = Given()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_PART", 4)  # so that tables of parts are merged
        found = corpus_statistics(corpus)  # type: ignore[arg-type]
    for number, one in enumerate([*found.sources, found.all]):
        own = corpus.lengths[corpus.sources == number] if number < 3 else corpus.lengths
        assert (one.documents, one.tokens) == (own.size, own.sum())
        if not own.size:
            continue
        assert one.mean == pytest.approx(own.mean()) and one.longest == own.max()
        for got, share in ((one.median, 0.5), (one.p90, 0.9)):
            assert got == np.quantile(own, share, method="inverted_cdf")
        for long in LONG:
            assert one.share_over[long] == pytest.approx(own[own > long].sum() / max(own.sum(), 1))


def test_statistics_are_written_and_printed(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = write_statistics(prefix, tmp_path)
    written = json.loads((tmp_path / "set_statistics.json").read_text())
    documents = Documents(prefix)
    assert [one["source"] for one in written["sources"]] == ["decoder", "other"]
    assert written["all"]["tokens"] == documents.summary.tokens
    assert written["all"]["longest"] == documents.summary.longest
    assert sum(one["documents"] for one in written["sources"]) == len(documents)
    assert (tmp_path / "set_statistics.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert tool.main([str(prefix), "statistics"]) == 0
    printed = capsys.readouterr().out
    assert str(found) in printed
    rows = [line.split() for line in str(found).splitlines()]
    assert [row[0] for row in rows] == ["source", "decoder", "other", "all"]
    assert rows[3][1:3] == [f"{len(documents):,}", f"{documents.summary.tokens:,}"]


def test_packing_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = corpus_of(tmp_path, [7] * 6 + [3] * 4)
    windows = WindowDataset(corpus, seq_length=8, anchor_token=1, seed=0)
    count = windows.windows_per_epoch(0)
    found = packing_report(windows, range(count), mode="anchor", batch_windows=2)
    assert found.pieces.sum() - found.cut.sum() == 10, "every document ends once"
    assert found.padding.sum() + found.pieces.sum() + 54 == 8 * count
    for n in range(count):
        slots = np.diff(windows[n].cu_seqlens)
        assert found.area[n] == sum(length * (length + 1) // 2 for length in slots)
    full = packing_report(windows, range(count), mode="full", batch_windows=2)
    assert set(full.area.tolist()) == {36} and set(full.balance().tolist()) == {1.0}
    assert re.search("attention area, of full attention( +100.00%){6}", str(full))
    assert tool.main([str(tmp_path / "set"), "packing", "--windows", "4", "data.seq_length=8"]) == 0
    assert "4 windows of 8 rows" in capsys.readouterr().out
