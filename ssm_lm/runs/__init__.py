"""What runs have left in their folders: which there are, how far they came, their curves."""
