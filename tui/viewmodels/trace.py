"""What a run's events add up to: its curves, its figures now, and where it stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
Point = tuple[float, float]

_MOST_POINTS = 8192


@dataclass
class StageCurve:
    """Losses of one training stage by optimiser step."""

    stage: str
    steps: int = 0
    """Steps that the stage will take."""
    train: list[Point] = field(default_factory=list)
    evaluation: list[Point] = field(default_factory=list)

    @property
    def reached(self) -> float:
        """The last step with a loss."""
        return max((points[-1][0] for points in (self.train, self.evaluation) if points), default=0)

    def cut(self, step: float) -> None:
        """Forget `step` and what follows: the stage went back to a checkpoint before it."""
        for points in (self.train, self.evaluation):
            while points and points[-1][0] >= step:
                points.pop()


class RunTrace:
    """Grows by `take`; events may come in any number of portions, each once."""

    def __init__(self) -> None:
        self.seq = 0
        """Seq of the last event taken."""
        self.stage = ""
        self.curves: dict[str, StageCurve] = {}
        self.last: Event = {}
        """The last step event of the present stage."""
        self.evaluation: float | None = None
        """The last held-out loss of the present stage."""
        self.seconds: dict[str, float] = {}
        """How long each finished stage took."""
        self.gates: dict[str, bool] = {}
        self.failure: Event | None = None

    def take(self, events: Iterable[Event]) -> list[Event]:
        """Add events and return those that were new."""
        new = [event for event in events if event["seq"] > self.seq]
        for event in new:
            self.seq = event["seq"]
            self._take(event)
        return new

    @property
    def progress(self) -> tuple[int, int] | None:
        """Steps done and steps in all of the present stage, where it counts any."""
        return (self.last["step"], self.last["steps"]) if self.last.get("steps") else None

    def _take(self, event: Event) -> None:
        match event["event"]:
            case "stage_started":
                if event["stage"] != self.stage:
                    self.evaluation = None
                self.stage, self.last, self.failure = event["stage"], {}, None
                self.seconds.pop(self.stage, None)
            case "step":
                self._step(event)
            case "eval":
                self._evaluated(event)
            case "stage_finished":
                self.seconds[event["stage"]] = event["seconds"]
                self.last = {}
            case "gate":
                self.gates[event["gate"]] = event["passed"]
            case "failed":
                self.failure = event

    def _step(self, event: Event) -> None:
        curve = self._curve(event["stage"])
        curve.cut(event["step"])
        curve.steps = event.get("steps") or curve.steps
        loss = _loss(event)
        curve.train.append((event["step"], loss))
        if len(curve.train) > _MOST_POINTS:
            curve.train = _thinned(curve.train)
        self.last = {**event, "loss": loss}

    def _evaluated(self, event: Event) -> None:
        points = self._curve(event["stage"]).evaluation
        while points and points[-1][0] >= event["step"]:
            points.pop()
        self.evaluation = _loss(event)
        points.append((event["step"], self.evaluation))

    def _curve(self, stage: str) -> StageCurve:
        return self.curves.setdefault(stage, StageCurve(stage))


def _loss(event: Event) -> float:
    loss = event.get("loss")
    return float("nan") if loss is None else float(loss)


def _thinned(points: list[Point]) -> list[Point]:
    """Half as many points: of every four the lowest and the highest, so that no spike is lost."""
    kept = []
    for start in range(0, len(points), 4):
        group = sorted(points[start : start + 4], key=lambda point: point[1])
        kept += sorted({group[0], group[-1]})
    return kept
