"""What a run's numbers show, in sentences. A sentence is chosen by the numbers that it names, never beforehand.

Each finding stands beside a claim of arXiv 2411.13476 where there is one, and says whether these numbers support
it: "supports", "does not support" or "" (no claim). Two numbers within 10 % of each other count as the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Finding", "findings"]

Row = dict[str, Any]
_SAME = 1.1
_LARGE = 10.0  # a ratio that counts as another order of magnitude


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
    model, _, layer = name.partition("/")
    title = fixed.get(name) or results["models"].get(model, model)
    return f"layer {layer} of {title}" if layer else title


def shift_rows(results: dict[str, Any]) -> list[Row]:
    """Shift tests of vectors and of models, a model's layers taken together by their mean."""
    rows = list(results["shift"])
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results["layers"]:
        groups.setdefault((row["vectors"], row["rope"], row["arithmetic"], row["shift"]), []).append(row)
    for layers in groups.values():
        profile = np.mean([row["profile"] for row in layers], axis=0)
        mean = {key: float(np.mean([row[key] for row in layers])) for key in ("difference", "first_attention")}
        share = float(profile[0] / profile.sum()) if profile.sum() else float("nan")
        rows.append(layers[0] | mean | dict(first_share=share, profile=profile.tolist()))
    return rows


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
            f"Our embedding gives {number(by['ours'])}, {_times(by['ours'] / by['transformers'], 'transformers’')}.",
            "BF16 breaks the invariance of RoPE under a shift of all positions; FP32 does not.",
            _verdict(ratio >= _LARGE),
        )


def _growth(results: dict[str, Any]) -> Iterator[Finding]:
    rows = _pick(shift_rows(results), arithmetic="fused")
    last = max(results["settings"]["shifts"])
    for source in _sources(rows):
        parts, ratios = [], {}
        for rope in ("transformers", "ours", "fp32"):
            by = {row["shift"]: row["difference"] for row in _pick(rows, vectors=source, rope=rope)}
            ratios[rope] = by[last] / by[100]
            grows = "grows to" if ratios[rope] > _SAME else "stays at" if ratios[rope] > 1 / _SAME else "falls to"
            parts.append(f"{results['ropes'][rope]}: {grows} {_times(ratios[rope], 'that of a shift by 100')}")
        yield Finding(
            "shift",
            f"D of {source_title(results, source)} when the shift grows to {last:,}: {'; '.join(parts)}.",
            "The deviation of BF16 grows with positions.",
            _verdict(ratios["ours"] > _SAME),
        )


def _first_token(results: dict[str, Any]) -> Iterator[Finding]:
    rows = _pick(shift_rows(results), arithmetic="fused", rope="transformers", shift=10_000)
    for source in _sources(rows):
        row = _pick(rows, vectors=source)[0]
        share, attention, even = row["first_share"], row["first_attention"], 1 / row["length"]
        # widths of the profile's bins: 1, 1, 2, 4, ...
        widths = [1] + [2**i for i in range(len(row["profile"]) - 1)]
        others = max(part / width for part, width in zip(row["profile"][1:], widths[1:], strict=True))
        rank = "more than" if row["profile"][0] > others * _SAME else "no more than"
        yield Finding(
            "first",
            f"For {source_title(results, source)}, the first token carries {share:.1%} of D at a shift of 10,000 "
            f"(transformers in BF16), {rank} any other bin of keys a key. It receives {attention:.1%} of the "
            f"attention; an even share of {row['length']:,} keys would be {even:.2%}.",
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
        f"tokens; the first token receives {by['trained']['first_attention']:.1%} of the attention in the one and "
        f"{by['random_model']['first_attention']:.1%} in the other.",
        "Pretraining amplifies the deviation.",
        _verdict(ratio > _SAME),
    )


def _logit(results: dict[str, Any]) -> Iterator[Finding]:
    far, near = max(results["settings"]["distances"]), 1024
    for source in _sources(results["logit"]):
        parts, ratios = [], {}
        for rope in ("fp32", "transformers", "ours"):
            by = {row["distance"]: row for row in _pick(results["logit"], vectors=source, rope=rope)}
            ratios[rope] = by[far]["error"] / by[near]["error"]
            parts.append(
                f"{results['ropes'][rope]}: {number(by[far]['error'])}, "
                f"{_times(ratios[rope], f'that at {near:,}')}"
            )
        size = _pick(results["logit"], vectors=source, distance=far)[0]["logit"]
        yield Finding(
            "logit",
            f"The first token's score seen from {far:,} tokens away ({source_title(results, source)}; the score "
            f"itself is {number(size)}) is off from FP64 by: {'; '.join(parts)}.",
            "The first token's score deviates more the longer the sequence.",
            _verdict(ratios["transformers"] > _SAME),
        )


def _length(results: dict[str, Any]) -> Iterator[Finding]:
    for source in _sources(results["length"]):
        by = {row["length"]: row for row in _pick(results["length"], vectors=source, rope="transformers")}
        first, last = min(by), max(by)
        ratio = by[last]["difference"] / by[first]["difference"]
        yield Finding(
            "length",
            f"The last queries of {last:,} {source_title(results, source)} have a D of "
            f"{number(by[last]['difference'])} (transformers in BF16), {_times(ratio, f'that of {first:,}')}. The "
            f"first token's share of it is {by[last]['first_share']:.2%}, of attention "
            f"{by[last]['first_attention']:.2%} (at {first:,}: {by[first]['first_share']:.2%} and "
            f"{by[first]['first_attention']:.2%}).",
            "The deviation accumulates as the sequence grows.",
            _verdict(ratio > _SAME),
        )


def _modes(results: dict[str, Any]) -> Iterator[Finding]:
    for source in _sources(results["modes"]):
        rows = [row for row in _pick(results["modes"], vectors=source) if row["offset"] > 0]
        mean = {
            (mode, rope): float(np.mean([row["error"] for row in _pick(rows, mode=mode, rope=rope)]))
            for mode in ("document_reset", "document", "anchor")
            for rope in ("transformers", "ours")
        }
        ratio = mean["anchor", "ours"] / mean["document", "ours"]
        listed = ", ".join(
            f"{mode} {number(mean[mode, 'ours'])} ({number(mean[mode, 'transformers'])})"
            for mode in ("document_reset", "document", "anchor")
        )
        yield Finding(
            "modes",
            f"A document deep in its window ({source_title(results, source)}) departs from FP64 at its own positions "
            f"by, in our embedding (in transformers’): {listed}. With the first token fixed at position 0 that is "
            f"{_times(ratio, 'what it is where the first token’s position runs on')}.",
            "An anchor at a fixed position reduces the deviation.",
            _verdict(ratio < 1 / _SAME),
        )


def _moved(results: dict[str, Any]) -> Iterator[Finding]:
    for source in _sources(results["modes"]):
        rows = _pick(results["modes"], vectors=source, rope="ours", offset=max(results["settings"]["offsets"]))
        by = {row["mode"]: row for row in rows}
        rounding = by["document"]["moved"]
        meant = by["anchor"]["moved_exact"]
        yield Finding(
            "modes",
            f"Moved {by['anchor']['offset']:,} tokens into its window, the document of {source_title(results, source)} "
            f"attends differently by {number(by['document_reset']['moved'])} where positions restart, by "
            f"{number(rounding)} where they run on (rounding alone: {number(by['document']['moved_exact'])} in FP64) "
            f"and by {number(by['anchor']['moved'])} with an anchor ({number(meant)} in FP64, since the distance to "
            f"the anchor did change). The anchor's own move is {_times(meant / rounding, 'that rounding')}.",
        )


def _ropes(results: dict[str, Any]) -> Iterator[Finding]:
    for rope, title in results["ropes"].items():
        if rope in ("fp32", "bf16_angles"):
            continue
        by = {row["position"]: row for row in _pick(results["rope"], rope=rope)}
        listed = ", ".join(f"{number_of(by[p]['multiple'])} at {p:,}" for p in (131_072, 1_048_576, 4_194_304))
        worst = max(row["multiple"] for row in by.values())
        kind = (
            "nothing is lost but the rounding of the result"
            if worst <= 1.001
            else "more than one rounding, the same at every position"
            if worst <= _SAME * min(row["multiple"] for row in by.values())
            else "more than one rounding, and more the further"
        )
        yield Finding("rope", f"{title}: error of {listed} roundings: {kind}.")


def number_of(multiple: float) -> str:
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
            f"The output of the kernel {rows[0]['kernel']} on {length:,} {source_title(results, source)} changes under "
            f"a shift to 100,000 by {number(one)} of its size with our embedding, {_times(one / two, 'what it does')} "
            f"with transformers’ ({number(two)}). Its last outputs are off from FP64 by {number(by['ours']['error'])} "
            f"and {number(by['transformers']['error'])}.",
        )
