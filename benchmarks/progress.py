"""How far a run has come, on stderr."""

import math
import sys
import time


class Progress:
    """A bar over all rounds in a terminal, where there is tqdm; else a line for each case."""

    def __init__(self, rounds: int, minutes: float = math.inf):
        self.start, self.end = time.monotonic(), time.monotonic() + 60 * minutes
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=rounds, unit="round", file=sys.stderr)

    def begins(self, case: str) -> bool:
        """False where no time is left for it."""
        late = time.monotonic() > self.end
        if late:
            print(f"{case}: left out: out of time", file=sys.stderr)
        elif self.bar is not None:
            self.bar.set_description(case)
        else:
            print(f"{time.monotonic() - self.start:5.0f} s  {case}", file=sys.stderr, flush=True)
        return not late

    def round(self) -> None:
        if self.bar is not None:
            self.bar.update()
