"""Hypothesis profiles: ``pytest parity_tests/ --hypothesis-profile quick|default|thorough``."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,  # the first example pays for torch's warm-up
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("quick", max_examples=8, **COMMON)
settings.register_profile("default", max_examples=50, **COMMON)
settings.register_profile("thorough", max_examples=2000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _own_token_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the tests' token caches out of the user's, in one place for the whole run."""
    folder = Path(tmp_path_factory.getbasetemp()) / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
