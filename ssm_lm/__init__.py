"""Language models in which a structured state space layer (S4, S4D) replaces attention."""

__version__ = "0.1.0"
