import sys
from pathlib import Path

# the way to launch a real command is training's, tiny models are modeling's
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("training", "modeling")]
