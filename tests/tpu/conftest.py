"""A cloud and a checkout for each test, and no waiting."""

import pytest

from tests.tpu.cloud import Cloud, make_tree
from tpu import follow, gcloud


@pytest.fixture(scope="session")
def copies(tmp_path_factory):
    """Where slices that are set up are kept for other tests."""
    return tmp_path_factory.mktemp("slices")


@pytest.fixture
def cloud(tmp_path, monkeypatch, copies):
    """A fake gcloud on PATH; the processes of its workers end with the test."""
    made = Cloud(tmp_path / "cloud", copies)
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CLOUDSDK_CORE_PROJECT", "p")
    monkeypatch.setenv("CLOUDSDK_COMPUTE_ZONE", "us-west4-a")
    monkeypatch.setattr(gcloud, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(gcloud, "wait", lambda seconds: None)
    monkeypatch.setattr(follow, "TICK_SECONDS", 0.02)
    monkeypatch.chdir(make_tree(tmp_path / "checkout"))
    yield made
    made.close()
