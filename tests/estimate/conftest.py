import sys
from pathlib import Path

# the way to launch a real command is training's
sys.path.append(str(Path(__file__).parents[1] / "training"))
