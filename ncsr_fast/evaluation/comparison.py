"""Two reports side by side: which differences exceed what other images would have made of them."""

from __future__ import annotations

from dataclasses import dataclass

from ncsr_fast.data.search import named
from ncsr_fast.evaluation.bootstrap import LEVEL, Interval, paired_interval
from ncsr_fast.evaluation.reports import METRICS, Report

_OF_N = ("diversity", "lr_psnr_worst")  # metrics that more samples raise or lower by themselves


@dataclass(frozen=True)
class Difference:
    """A metric of both reports: means over the images, and the second less the first."""

    metric: str
    first: float
    second: float
    interval: Interval | None  # of the difference; None where there is none: one image, or values not finite

    @property
    def exceeds_noise(self) -> bool:
        """True if the interval of the difference does not hold 0."""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high

    @property
    def verdict(self) -> str:
        """The conclusion, in words."""
        if self.interval is None:
            return "cannot be told"
        if not self.exceeds_noise:
            return "within noise"
        return "better" if (self.interval.low > 0) == METRICS[self.metric][2] else "worse"


@dataclass(frozen=True)
class Comparison:
    """The differences of two reports, and what differs in how they were made."""

    differences: list[Difference]
    warnings: list[str]
    images: int

    def table(self) -> str:
        """One metric a line, then the warnings."""
        lines = [f"{'':18}{'A':>12}{'B':>12}{'B - A':>12}   {100 * LEVEL:.0f} % of the difference, {self.images} images"]
        for found in self.differences:
            label, digits, _ = METRICS[found.metric]
            values = f"{found.first:12.{digits}f}{found.second:12.{digits}f}{found.second - found.first:+12.{digits}f}"
            interval = f"[{found.interval.low:+.{digits}f}, {found.interval.high:+.{digits}f}]" if found.interval else ""
            lines.append(f"{label:18}{values}   {interval:26}{'B ' * found.exceeds_noise}{found.verdict}")
        return "\n".join([*lines, *(f"note: {warning}" for warning in self.warnings)])


def compare(first: Report, second: Report) -> Comparison:
    """The differences of the metrics that both reports have, with intervals of the paired bootstrap over images.

    Args:
        first: A.
        second: B, of the same images by the same protocol.

    Diversity and the worst LR-PSNR depend on the number of samples: where that differs they are left out, with a warning.

    Raises:
        ValueError: The reports are of other images, or of another protocol, scale or LPIPS network.
    """
    for name in ("protocol", "scale"):
        a, b = getattr(first, name), getattr(second, name)
        if a != b:
            raise ValueError(f"the reports cannot be compared: {name} is {a} in the first and {b} in the second")
    if None not in (first.lpips, second.lpips) and first.lpips != second.lpips:
        raise ValueError("the reports cannot be compared: their LPIPS networks have other weights (lpips_weights)")
    order = {name: place for place, name in enumerate(second.names)}
    alone = sorted(set(first.names) ^ set(second.names))
    if alone:
        raise ValueError(f"the reports cannot be compared: {len(alone)} images are in one of them alone: {named(alone)}")
    differences = []
    for metric in METRICS:
        a, b = first.column(metric), second.column(metric)
        if a is None or b is None or (metric in _OF_N and first.n != second.n):
            continue
        interval = paired_interval(a, [b[order[name]] for name in first.names])
        differences.append(Difference(metric, first.means()[metric], second.means()[metric], interval))
    return Comparison(differences, _warnings(first, second), len(first.names))


def _warnings(first: Report, second: Report) -> list[str]:
    warnings = []
    if first.n != second.n:
        warnings.append(f"A has {first.n} samples of each image and B {second.n}: {' and '.join(_OF_N)} are left out")
    if first.to_8bit != second.to_8bit:
        a, b = (report.to_8bit or "not known" for report in (first, second))
        warnings.append(f"8 bits are made otherwise, {a} in A and {b} in B: that alone moves LR-PSNR by 2 dB at 50 dB")
    return warnings
