"""Proofs are skipped where nothing that they depend on has changed since they passed: proof.py."""

import proof
import pytest


def pytest_collection_modifyitems(items):
    proofs = [item for item in items if item.get_closest_marker("proof")]
    if proofs and not proof.changed_files() and not proof.other_versions():
        for item in proofs:
            item.add_marker(pytest.mark.skip(reason="proven, and nothing it depends on has changed: make kernel-proof"))
