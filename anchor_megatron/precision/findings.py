"""What a run's numbers show, in sentences. A sentence is chosen by the numbers that it names, never
beforehand.

Each finding stands beside a claim of arXiv 2411.13476 where there is one, and says whether these numbers
support it: "supports", "does not support" or "" (no claim). Two numbers within 10 % of each other count as
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from anchor_megatron.precision.tables import (
    mean_over_layers,
    number,
    pick,
    profile_per_key,
    shift_rows,
    source_title,
    sources_of,
)

__all__ = ["Finding", "findings"]

_SAME = 1.1
_GROWN = 1.5  # what bears out a claim of growth
_MOST = 0.25  # of D: half of what one key can have, as a query's weights sum to 1
_LARGE = 10.0  # what bears out a claim of another order of magnitude


@dataclass(frozen=True)
class Finding:
    """section: of the report. text: what was found. claim: the paper's, in our words; verdict: see above."""

    section: str
    text: str
    claim: str = ""
    verdict: str = ""


def findings(results: dict[str, Any]) -> list[Finding]:
    """All findings of the results that `lab.measure` gives, in the report's order."""
    made: tuple[Callable[[dict[str, Any]], Iterator[Finding]], ...] = (
        _shift, _growth, _first_token, _training, _logit, _length, _modes, _moved, _ropes, _angles, _eager,
        _kernel,
    )  # fmt: skip
    return [finding for make in made for finding in make(results)]


def _percent(share: float) -> str:
    """Two digits, as a percentage."""
    return f"{100 * float(f'{share:.2g}'):.6g} %"


def _times(ratio: float, what: str) -> str:
    """A ratio as words: "the same as", "3.1 times", "0.4 times" `what`."""
    return f"the same as {what}" if 1 / _SAME <= ratio <= _SAME else f"{number(ratio)} times {what}"


def _verdict(holds: bool) -> str:
    return "supports" if holds else "does not support"


def _shift(results: dict[str, Any]) -> Iterator[Finding]:
    rows = pick(shift_rows(results), arithmetic="fused", shift=10_000)
    start = results["settings"]["reference"]
    for source in sources_of(rows):
        title = source_title(results, source)
        by = {row["rope"]: row["difference"] for row in pick(rows, vectors=source)}
        ratio = by["transformers"] / by["fp32"]
        yield Finding(
            "shift",
            f"For {title}, moving all positions from +{start} to +10,000 changes a query's attention by "
            f"D = {number(by['transformers'])} in BF16 as transformers computes it and by "
            f"{number(by['fp32'])} in FP32: {_times(ratio, 'as much')}. Our embedding gives "
            f"{number(by['ours'])}, {_times(by['ours'] / by['transformers'], 'that of transformers')}.",
            "BF16 breaks the invariance of RoPE under a shift of all positions; FP32 does not.",
            _verdict(ratio >= _LARGE),
        )


def _growth(results: dict[str, Any]) -> Iterator[Finding]:
    rows = pick(shift_rows(results), arithmetic="fused")
    for source in sources_of(rows):
        parts, ratios = [], {}
        for rope in ("transformers", "ours", "fp32"):
            by = {row["shift"]: row["difference"] for row in pick(rows, vectors=source, rope=rope)}
            ratios[rope] = by[10_000] / by[100]
            further = by[1_000_000] / by[10_000]
            parts.append(
                f"{results['ropes'][rope]}: {_times(ratios[rope], 'D at a shift of 100')}, and at 1,000,000 "
                f"{_times(further, 'D at 10,000')}"
            )
        yield Finding(
            "shift",
            f"D of {source_title(results, source)} at a shift of 10,000 is, in {'; in '.join(parts)}.",
            "The deviation of BF16 grows with the distance moved.",
            _verdict(ratios["transformers"] >= _GROWN),
        )


def _first_token(results: dict[str, Any]) -> Iterator[Finding]:
    rows = pick(shift_rows(results), arithmetic="fused", rope="transformers", shift=10_000)
    for source in sources_of(rows):
        row = pick(rows, vectors=source)[0]
        share, attention, even = row["first_share"], row["first_attention"], 1 / row["length"]
        others = max(profile_per_key(row)[1:])
        rank = "the most of all keys" if row["profile"][0] > others else "not the most of all keys"
        yield Finding(
            "first",
            f"For {source_title(results, source)}, the first token carries {_percent(share)} of D at a "
            "shift of "
            f"10,000 (transformers in BF16), {rank} (those behind the second taken by octaves). It receives "
            f"{_percent(attention)} of the attention; an even share of {row['length']:,} keys would be "
            f"{_percent(even)}.",
            "The first token carries most of the deviation.",
            _verdict(share >= _MOST),
        )


def _training(results: dict[str, Any]) -> Iterator[Finding]:
    rows = pick(shift_rows(results), arithmetic="fused", rope="transformers", shift=10_000)
    by = {row["vectors"]: row for row in rows}
    if "trained" not in by:
        return
    trained, drawn = by["trained"], by["random_model"]
    ratio = trained["difference"] / drawn["difference"]
    yield Finding(
        "first",
        f"D of {results['models']['trained']} is {_times(ratio, 'that of a random model of its shape')} on "
        "the "
        f"same tokens; the first token receives {_percent(trained['first_attention'])} of the attention in "
        "the "
        f"one and {_percent(drawn['first_attention'])} in the other.",
        "Pretraining amplifies the deviation.",
        _verdict(ratio >= _GROWN),
    )


def _logit(results: dict[str, Any]) -> Iterator[Finding]:
    far, near = max(results["settings"]["distances"]), 1024
    rows = mean_over_layers(results["logit"], "rope", "distance")
    for source in sources_of(rows):
        parts, ratios = [], {}
        for rope in ("fp32", "transformers", "ours"):
            by = {row["distance"]: row["error"] for row in pick(rows, vectors=source, rope=rope)}
            ratios[rope] = by[far] / by[near]
            parts.append(
                f"{results['ropes'][rope]}: {number(by[far])}, {_times(ratios[rope], f'that at {near:,}')}"
            )
        size = pick(rows, vectors=source, distance=far)[0]["logit"]
        yield Finding(
            "logit",
            f"The first token's score seen from {far:,} tokens away ({source_title(results, source)}; the "
            f"score itself is {number(size)}) is off from FP64 by: {'; '.join(parts)}.",
            "The first token's score deviates more the longer the sequence.",
            _verdict(ratios["transformers"] >= _GROWN),
        )


def _length(results: dict[str, Any]) -> Iterator[Finding]:
    for source in sources_of(results["length"]):
        by = {row["length"]: row for row in pick(results["length"], vectors=source, rope="transformers")}
        first, last = by[min(by)], by[max(by)]
        ratio = last["difference"] / first["difference"]
        before, after = (
            f"{_percent(row['first_share'])} of D and {_percent(row['first_attention'])} of the attention"
            for row in (first, last)
        )
        yield Finding(
            "length",
            f"The last queries of {last['length']:,} tokens ({source_title(results, source)}) have a D of "
            f"{number(last['difference'])} (transformers in BF16), "
            f"{_times(ratio, 'that of the last queries')} of "
            f"{first['length']:,}. The first token has {after}; at {first['length']:,} tokens {before}.",
            "The deviation accumulates as the sequence grows.",
            _verdict(ratio >= _GROWN),
        )


def _modes(results: dict[str, Any]) -> Iterator[Finding]:
    every = mean_over_layers([row for row in results["modes"] if row["offset"] > 0], "mode", "rope")
    for source in sources_of(every):
        rows = pick(every, vectors=source)
        error = {(row["mode"], row["rope"]): row["error"] for row in rows}
        ratio = error["anchor", "ours"] / error["document", "ours"]
        ours, theirs = (
            [number(error[mode, rope]) for mode in ("document_reset", "document", "anchor")]
            for rope in ("ours", "transformers")
        )
        yield Finding(
            "modes",
            f"A document deep in its window ({source_title(results, source)}) departs from FP64 at the same "
            f"positions by {ours[0]} where positions restart, {ours[1]} where they run on and {ours[2]} "
            "with an "
            f"anchor (with the embedding of transformers {', '.join(theirs)}). The anchor's, in our "
            "embedding, is "
            f"{_times(ratio, 'that of running positions')}.",
            "An anchor at a fixed position reduces the deviation.",
            _verdict(ratio < 1 / _SAME),
        )


def _moved(results: dict[str, Any]) -> Iterator[Finding]:
    rows = mean_over_layers(results["modes"], "mode", "rope", "offset")
    far = max(results["settings"]["offsets"])
    for source in sources_of(rows):
        by = {row["mode"]: row for row in pick(rows, vectors=source, rope="ours", offset=far)}
        rounding, meant = by["document"]["moved"], by["anchor"]["moved_exact"]
        exact = by["document"]["moved_exact"]
        whose = "so it is all rounding" if exact < rounding / 1000 else "so it is not rounding alone"
        yield Finding(
            "modes",
            f"Moved {far:,} tokens into its window, a document ({source_title(results, source)}) attends "
            f"differently by D = {number(by['document_reset']['moved'])} where positions restart, "
            f"{number(rounding)} where they run on (in FP64 {number(exact)}: {whose}) "
            f"and {number(by['anchor']['moved'])} with an anchor (in FP64 {number(meant)}: the distance "
            f"to the anchor did change). What the anchor's distance changes is "
            f"{_times(meant / rounding, 'that rounding')}.",
        )


def _ropes(results: dict[str, Any]) -> Iterator[Finding]:
    for rope, title in results["ropes"].items():
        if rope in ("fp32", "bf16_angles"):
            continue
        by = {row["position"]: row for row in pick(results["rope"], rope=rope)}
        listed = ", ".join(
            f"{_multiple(by[p]['multiple'])} at {p:,}" for p in (131_072, 1_048_576, 4_194_304)
        )
        worst = max(row["multiple"] for row in by.values())
        kind = (
            "nothing is lost but the rounding of the result"
            if worst <= 1.001
            else "more than one rounding, the same at every position"
            if worst <= _SAME * min(row["multiple"] for row in by.values())
            else "more than one rounding, and more the further"
        )
        yield Finding("rope", f"{title}: error of {listed} roundings: {kind}.")


def _multiple(multiple: float) -> str:
    """A multiple of one rounding, to three decimals up to 10."""
    return f"{multiple:.3f}" if multiple < 10 else f"{multiple:.0f}"


def _angles(results: dict[str, Any]) -> Iterator[Finding]:
    by = {row["position"]: row for row in pick(results["rope"], rope="bf16_angles")}
    rows = pick(results["shift"], vectors="random", arithmetic="fused", shift=10_000)
    d = {row["rope"]: row["difference"] for row in rows}
    yield Finding(
        "rope",
        f"With BF16 angles the turned vectors are off by {by[4096]['relative_error']:.0%} at position "
        "4,096, and "
        f"D of random vectors is {number(d['bf16_angles'])}, "
        f"{_times(d['bf16_angles'] / d['transformers'], 'that')} "
        "of FP32 angles whose cosines are rounded to BF16.",
    )


def _eager(results: dict[str, Any]) -> Iterator[Finding]:
    rows = pick(shift_rows(results), rope="transformers", shift=10_000)
    for source in sources_of(rows):
        by = {row["arithmetic"]: row["difference"] for row in pick(rows, vectors=source)}
        yield Finding(
            "shift",
            f"With scores and weights rounded to BF16 too (eager attention), D of "
            f"{source_title(results, source)} is {number(by['eager'])}, "
            f"{_times(by['eager'] / by['fused'], 'that with both in FP32')}.",
        )


def _kernel(results: dict[str, Any]) -> Iterator[Finding]:
    length = max(results["settings"]["kernel_lengths"])
    for source in sources_of(results["kernel"]):
        rows = pick(results["kernel"], vectors=source, length=length)
        by = {row["rope"]: row for row in rows}
        ours, theirs = by["ours"], by["transformers"]
        yield Finding(
            "kernel",
            f"The output of the kernel {ours['kernel']} on {length:,} tokens "
            f"({source_title(results, source)}) "
            f"changes under a shift to {ours['shift']:,} by {number(ours['moved'])} of its size with our "
            "embedding, "
            f"{_times(ours['moved'] / theirs['moved'], 'that')} with the embedding of transformers "
            f"({number(theirs['moved'])}). Its last outputs are off from FP64 by {number(ours['error'])} and "
            f"{number(theirs['error'])}.",
        )
