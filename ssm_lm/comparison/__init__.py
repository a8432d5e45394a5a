"""Contenders that differ in one thing, compared: their runs made, measured alike, and put into one table."""
