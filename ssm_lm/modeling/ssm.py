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
BUILT_IN = tuple(LAYERS)

__all__ = [
    "BUILT_IN",
    "DISCRETIZATIONS",
    "INITIALIZATIONS",
    "LAYERS",
    "MODES",
    "S4",
    "S4D",
    "S5",
    "SSD",
    "StateSpace",
    "register_layer",
]


def register_layer(name: str, layer_class: type[StateSpace]) -> None:
    """Let `name`, in S4Config.ssm and in a config, mean a layer of one's own. A name may be given anew.

    layer_class: a StateSpace whose `name` is this name; `initializations` and `discretizations` of the class say what
    ssm_init and discretization may be. Raises ValueError for a name of the package's own, TypeError for another class.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, StateSpace)):
        raise TypeError(f"a layer is a subclass of StateSpace, and {layer_class!r} is none")
    if name in BUILT_IN:
        raise ValueError(f"the name {name!r} is taken by {LAYERS[name].__name__}; choose another")
    if not name.isidentifier() or getattr(layer_class, "name", None) != name:
        raise ValueError(f"{layer_class.__name__}.name must be {name!r}, letters and digits, as it is registered")
    LAYERS[name] = layer_class
    DISCRETIZATIONS[name] = tuple(layer_class.discretizations)
    given = layer_class.initializations
    INITIALIZATIONS[name] = dict(given) if isinstance(given, dict) else dict.fromkeys(given)
