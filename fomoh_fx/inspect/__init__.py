"""Looking at what was compiled: the stages as Python source, figures about them, and pictures."""

from fomoh_fx.inspect.drawing import draw
from fomoh_fx.inspect.printing import code, constants, print_readable
from fomoh_fx.inspect.statistics import Report, report

__all__ = ["Report", "code", "constants", "draw", "print_readable", "report"]
