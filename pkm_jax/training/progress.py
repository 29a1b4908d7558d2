"""What a run has done that its state does not say: kept in its checkpoints."""

import dataclasses
import math


@dataclasses.dataclass
class Progress:
    """Tokens seen, and how well it did by the metric that `Train.best` names."""
    tokens: int = 0             # padding included
    best: float | None = None   # value of that metric so far
    best_step: int = 0
    worse: int = 0              # evaluations since then
    stopped: bool = False       # before its last step, for want of better ones

    def judge(self, step: int, value: float, lower_is_better: bool, patience: int) -> bool:
        """Takes note of an evaluation by its metric; whether it is the best so far."""
        sign = -1 if lower_is_better else 1
        if self.best is None or sign * value > sign * self.best and math.isfinite(value):
            self.best, self.best_step, self.worse = value, step, 0
            return True
        self.worse += 1
        self.stopped = bool(patience) and self.worse >= patience
        return False
