"""A cloud and a checkout for each test, and no waiting."""

import pytest

from tests.tpu.cloud import Cloud, make_tree
from tpu import follow, gcloud


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A fake gcloud on PATH; the processes of its workers end with the test."""
    made = Cloud(tmp_path / "cloud")
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("CLOUDSDK_COMPUTE_ZONE", "CLOUDSDK_CORE_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gcloud, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(gcloud, "wait", lambda seconds: None)
    monkeypatch.setattr(follow, "TICK_SECONDS", 0.02)
    monkeypatch.chdir(make_tree(tmp_path / "checkout"))
    yield made
    made.close()
