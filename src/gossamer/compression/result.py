"""What a run leaves."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.training import Evaluation

__all__ = ["Result"]


@dataclass(frozen=True, repr=False)
class Result:
    """What a run leaves.

    Attributes:
        out, file, report: the run directory, the packed file and the HTML page in it.
        bytes, dense_bytes: of the file, and of the network's tensors without any coding.
        before, after: test figures of the network before the first stage that compresses, and of
            the file decoded again.
        model: the compressed network, decoded from the file.
        run: all that run.json holds.
    """

    out: Path
    file: Path
    report: Path
    bytes: int
    dense_bytes: int
    before: Evaluation
    after: Evaluation
    model: nn.Module
    run: dict[str, Any]

    def __repr__(self) -> str:
        return f"<Result {self.out}: {self._told()}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: a line, and where file and page are."""
        place = html.escape(str(self.report))
        return f"<p><b>{html.escape(str(self.file))}</b>: {self._told()}. Page: {place}</p>"

    def _told(self) -> str:
        smaller = f"{self.ratio:.1f}x smaller" if self.ratio > 1 else "not smaller"
        metric = self.after.metric
        return (
            f"{self.bytes:,} bytes for {self.dense_bytes:,}, {smaller}; test {metric.name} "
            f"{metric.show(self.before.score)} before, {metric.show(self.after.score)} after"
        )

    @property
    def ratio(self) -> float:
        """Dense bytes over file bytes."""
        return self.dense_bytes / self.bytes

    @property
    def accuracy_before(self) -> float:
        """Test accuracy of the uncompressed network, a fraction, where the task counts."""
        return self.before.accuracy

    @property
    def accuracy_after(self) -> float:
        """Test accuracy of the file, a fraction, where the task counts."""
        return self.after.accuracy

    @property
    def problems(self) -> list[str]:
        """What the run did not keep or could not prove, in words; empty where all is well."""
        found: list[str] = self.run["problems"]
        return found
