"""The model, flat and self-contained: every file here is copied into a published model's folder, so each imports only
its neighbours (`from .name import x`), torch and transformers.
"""
