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

import numpy as np

from anchor_megatron.precision.experiments import Row, octaves

__all__ = [
    "Finding",
    "findings",
    "mean_over_layers",
    "number",
    "profile_per_key",
    "shift_rows",
    "source_title",
]

_SAME = 1.1
_GROWN = 1.5  # what bears out a claim of growth
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


def number(value: float) -> str:
    """Two digits: 0.0026, 1.6, 130, 1.2e-12."""
    if value == 0 or not np.isfinite(value):
        return "0" if value == 0 else "none"
    if 0.001 <= abs(value) < 1000:
        return f"{float(f'{value:.2g}'):g}"
    return f"{value:.1e}"


def source_title(results: dict[str, Any], name: str) -> str:
    """Vectors or a model in words."""
    fixed = {"random": "seeded random vectors", "sink": "random vectors with a planted attention sink"}
    return fixed.get(name) or str(results["models"][name])


def mean_over_layers(rows: list[Row], *by: str) -> list[Row]:
    """Rows that agree in `vectors` (a model's layers, "name/3", as "name") and in `by`, as one row of
    means.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["vectors"].split("/")[0], *(row[key] for key in by)), []).append(row)
    return [dict(zip(("vectors", *by), key, strict=True)) | _mean(group, by) for key, group in groups.items()]


def _mean(group: list[Row], by: tuple[str, ...]) -> Row:
    wanted = [key for key, value in group[0].items() if key not in by and not isinstance(value, (str, list))]
    return {key: float(np.mean([row[key] for row in group])) for key in wanted}


def shift_rows(results: dict[str, Any]) -> list[Row]:
    """Shift tests of vectors and of models; of a model's layers the mean, shares being those of the mean
    D.
    """
    rows = []
    every = results["shift"] + results["layers"]
    for row in mean_over_layers(every, "rope", "arithmetic", "shift", "length"):
        same = _pick(every, **{key: row[key] for key in ("vectors", "rope", "arithmetic", "shift")})
        profile = np.mean([one["profile"] for one in same], axis=0)
        share = float(profile[0] / profile.sum()) if profile.sum() else float("nan")
        rows.append(row | dict(first_share=share, profile=profile.tolist()))
    return rows


_MODE_WORDS = {
    "document_reset": "by, with positions that restart,",
    "document": "with running positions",
    "anchor": "with an anchor",
}


def _percent(share: float) -> str:
    """Two digits, as a percentage."""
    return f"{100 * float(f'{share:.2g}'):.6g} %"


def profile_per_key(row: Row) -> list[float]:
    """D a key in every bin of a row's profile."""
    return (np.array(row["profile"]) / np.diff(octaves(int(row["length"])))).tolist()


def _pick(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _sources(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["vectors"] for row in rows))


def _times(ratio: float, what: str) -> str:
    """A ratio as words: "the same as", "3.1 times", "0.4 times" `what`."""
    return f"the same as {what}" if 1 / _SAME <= ratio <= _SAME else f"{number(ratio)} times {what}"


def _verdict(holds: bool) -> str:
    return "supports" if holds else "does not support"


def _shift(results: dict[str, Any]) -> Iterator[Finding]:
    rows = _pick(shift_rows(results), arithmetic="fused", shift=10_000)
    for source in _sources(rows):
        by = {row["rope"]: row["difference"] for row in _pick(rows, vectors=source)}
        ratio = by["transformers"] / by["fp32"]
        yield Finding(
            "shift",
            f"For {source_title(results, source)}, moving all positions from +{results['settings']['reference']} "
            f"to +10,000 changes a query's attention by D = {number(by['transformers'])} in BF16 as transformers "
            f"computes it and by {number(by['fp32'])} in FP32: {_times(ratio, 'as much')}. "
            f"Our embedding gives {number(by['ours'])}, {_times(by['ours'] / by['transformers'], 'that of transformers')}.",
            "BF16 breaks the invariance of RoPE under a shift of all positions; FP32 does not.",
            _verdict(ratio >= _LARGE),
        )


def _growth(results: dict[str, Any]) -> Iterator[Finding]:
    rows = _pick(shift_rows(results), arithmetic="fused")
    for source in _sources(rows):
        parts, ratios = [], {}
        for rope in ("transformers", "ours", "fp32"):
            by = {row["shift"]: row["difference"] for row in _pick(rows, vectors=source, rope=rope)}
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
    rows = _pick(shift_rows(results), arithmetic="fused", rope="transformers", shift=10_000)
    for source in _sources(rows):
        row = _pick(rows, vectors=source)[0]
        share, attention, even = row["first_share"], row["first_attention"], 1 / row["length"]
        others = max(profile_per_key(row)[1:])
        rank = "the most of all keys" if row["profile"][0] > others else "not the most of all keys"
        yield Finding(
            "first",
            f"For {source_title(results, source)}, the first token carries {_percent(share)} of D at a shift of 10,000 "
            f"(transformers in BF16), {rank} (others looked at by octaves). It receives {_percent(attention)} of the "
            f"attention; an even share of {row['length']:,} keys would be {_percent(even)}.",
            "The first token carries most of the deviation.",
            _verdict(share >= 0.25),
        )


def _training(results: dict[str, Any]) -> Iterator[Finding]:
    rows = _pick(shift_rows(results), arithmetic="fused", rope="transformers", shift=10_000)
    by = {row["vectors"]: row for row in rows}
    if "trained" not in by:
        return
    ratio = by["trained"]["difference"] / by["random_model"]["difference"]
    yield Finding(
        "first",
        f"D of {results['models']['trained']} is {_times(ratio, 'that of a random model of its shape')} on the same "
        f"tokens; the first token receives {_percent(by['trained']['first_attention'])} of the attention in the one and "
        f"{_percent(by['random_model']['first_attention'])} in the other.",
        "Pretraining amplifies the deviation.",
        _verdict(ratio >= _GROWN),
    )


def _logit(results: dict[str, Any]) -> Iterator[Finding]:
    far, near = max(results["settings"]["distances"]), 1024
    rows = mean_over_layers(results["logit"], "rope", "distance")
    for source in _sources(rows):
        parts, ratios = [], {}
        for rope in ("fp32", "transformers", "ours"):
            by = {row["distance"]: row["error"] for row in _pick(rows, vectors=source, rope=rope)}
            ratios[rope] = by[far] / by[near]
            parts.append(
                f"{results['ropes'][rope]}: {number(by[far])}, {_times(ratios[rope], f'that at {near:,}')}"
            )
        size = _pick(rows, vectors=source, distance=far)[0]["logit"]
        yield Finding(
            "logit",
            f"The first token's score seen from {far:,} tokens away ({source_title(results, source)}; the score "
            f"itself is {number(size)}) is off from FP64 by: {'; '.join(parts)}.",
            "The first token's score deviates more the longer the sequence.",
            _verdict(ratios["transformers"] >= _GROWN),
        )


def _length(results: dict[str, Any]) -> Iterator[Finding]:
    for source in _sources(results["length"]):
        by = {row["length"]: row for row in _pick(results["length"], vectors=source, rope="transformers")}
        first, last = min(by), max(by)
        ratio = by[last]["difference"] / by[first]["difference"]
        yield Finding(
            "length",
            f"The last queries of {last:,} tokens ({source_title(results, source)}) have a D of "
            f"{number(by[last]['difference'])} (transformers in BF16), {_times(ratio, f'that of {first:,}')}. The "
            f"first token's share of it is {_percent(by[last]['first_share'])}, of attention "
            f"{_percent(by[last]['first_attention'])} (at {first:,}: {_percent(by[first]['first_share'])} and "
            f"{_percent(by[first]['first_attention'])}).",
            "The deviation accumulates as the sequence grows.",
            _verdict(ratio >= _GROWN),
        )


def _modes(results: dict[str, Any]) -> Iterator[Finding]:
    every = mean_over_layers([row for row in results["modes"] if row["offset"] > 0], "mode", "rope")
    for source in _sources(every):
        rows = _pick(every, vectors=source)
        error = {(row["mode"], row["rope"]): row["error"] for row in rows}
        ratio = error["anchor", "ours"] / error["document", "ours"]
        listed = ", ".join(
            f"{words} {number(error[mode, 'ours'])} ({number(error[mode, 'transformers'])})"
            for mode, words in _MODE_WORDS.items()
        )
        yield Finding(
            "modes",
            f"A document deep in its window ({source_title(results, source)}) departs from FP64 at the same "
            f"positions, with our embedding (in brackets: transformers), {listed}. The anchor's is "
            f"{_times(ratio, 'that of running positions')}.",
            "An anchor at a fixed position reduces the deviation.",
            _verdict(ratio < 1 / _SAME),
        )


def _moved(results: dict[str, Any]) -> Iterator[Finding]:
    rows = mean_over_layers(results["modes"], "mode", "rope", "offset")
    far = max(results["settings"]["offsets"])
    for source in _sources(rows):
        by = {row["mode"]: row for row in _pick(rows, vectors=source, rope="ours", offset=far)}
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
        by = {row["position"]: row for row in _pick(results["rope"], rope=rope)}
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
    by = {row["position"]: row for row in _pick(results["rope"], rope="bf16_angles")}
    rows = _pick(results["shift"], vectors="random", arithmetic="fused", shift=10_000)
    d = {row["rope"]: row["difference"] for row in rows}
    yield Finding(
        "rope",
        f"With BF16 angles the turned vectors are off by {by[4096]['relative_error']:.0%} at position 4,096 and D of "
        f"random vectors is {number(d['bf16_angles'])}, {_times(d['bf16_angles'] / d['transformers'], 'that')} of "
        "cosines rounded to BF16 from FP32 angles.",
    )


def _eager(results: dict[str, Any]) -> Iterator[Finding]:
    rows = _pick(shift_rows(results), rope="transformers", shift=10_000)
    for source in _sources(rows):
        by = {row["arithmetic"]: row["difference"] for row in _pick(rows, vectors=source)}
        yield Finding(
            "shift",
            f"With scores and weights rounded to BF16 too (eager attention), D of {source_title(results, source)} is "
            f"{number(by['eager'])}, {_times(by['eager'] / by['fused'], 'that with both in FP32')}.",
        )


def _kernel(results: dict[str, Any]) -> Iterator[Finding]:
    length = max(results["settings"]["kernel_lengths"])
    for source in _sources(results["kernel"]):
        rows = _pick(results["kernel"], vectors=source, length=length)
        by = {row["rope"]: row for row in rows}
        one, two = by["ours"]["moved"], by["transformers"]["moved"]
        yield Finding(
            "kernel",
            f"The output of the kernel {rows[0]['kernel']} on {length:,} tokens ({source_title(results, source)}) changes "
            f"under a shift to 100,000 by {number(one)} of its size with our embedding, {_times(one / two, 'that')} "
            f"with the embedding of transformers ({number(two)}). Its last outputs are off from FP64 by {number(by['ours']['error'])} "
            f"and {number(by['transformers']['error'])}.",
        )
