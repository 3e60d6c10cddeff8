"""Scores of a stage while it is trained: when they are due, and that none is lost."""

from collections.abc import Callable
from typing import Any

from ldm_jax.training.hosts import first_alone, gather_texts, is_first
from ldm_jax.training.log import PLOT_FILE, MetricsLog, plot_losses

ScoreRecord = dict[str, float | str]
"""Scores by name, and how they were found."""
Measure = Callable[[Any, int], ScoreRecord]
"""From averaged parameters and their step to their scores; every process calls it, and
that of the first one counts."""
HOW = "how"
SCORE = "fid"
"""What a record of scores holds, and one of losses does not."""


class ScoreCurve:
    """The scores of one stage, step by step, in the log of its run.

    Where a state is saved, that is done before it is scored, since drawing takes long.
    A run that is killed in between scores what it finds when it goes on; a score that
    is there stays.
    """

    def __init__(
        self, stage: Any, log: MetricsLog, *, every: int, measure: Measure | None
    ) -> None:
        """Measure nothing yet.

        Args:
          stage: Whose.
          log: Where scores are written.
          every: Steps between two of them.
          measure: Finds them; None never does.
        """
        self._stage, self._log = stage, log
        self._every, self._measure = every, measure

    def is_due(self, step: int) -> bool:
        """Say whether averaged parameters are scored at a step."""
        if self._measure is None or not step:
            return False
        return step % self._every == 0 or step == self._stage.num_steps

    def is_missing(self, step: int) -> bool:
        """Say whether a score is due and not in the log; every process asks."""
        if not self.is_due(step):
            return False
        found = is_first() and any(
            SCORE in record and record["step"] == step
            for record in self._log.records(self._stage.name)
        )
        return gather_texts(str(found))[0] == str(False)

    def add(self, ema: Any, step: int) -> None:
        """Score averaged parameters, whole on this process; every process calls it."""
        if self._measure is not None:
            scores = self._measure(ema, step)
            first_alone(lambda: self._tell(step, scores))

    def _tell(self, step: int, scores: ScoreRecord) -> None:
        self._log.write(self._stage.name, step, scores)
        plot_losses(self._log.path, self._log.path.with_name(PLOT_FILE))
