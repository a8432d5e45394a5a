"""The state space layers, by their names in S4Config.ssm: S4 (dplr.py), S4D (diagonal.py), S5 (s5.py), SSD (ssd.py)."""

from .checks import DISCRETIZATIONS
from .diagonal import S4D
from .dplr import S4
from .execution import MODES
from .hippo import INITIALIZATIONS
from .s5 import S5
from .ssd import SSD
from .state_space import StateSpace

LAYERS = {"s4": S4, "s4d": S4D, "s5": S5, "ssd": SSD}

__all__ = ["DISCRETIZATIONS", "INITIALIZATIONS", "LAYERS", "MODES", "S4", "S4D", "S5", "SSD", "StateSpace"]
