"""The working tree: what is copied of it, and that its fingerprint is of just that."""

import os
import subprocess
import tarfile

import pytest

from tests.tpu.cloud import make_tree
from tpu.tree import pack, read_tree


@pytest.fixture
def folder(tmp_path):
    return make_tree(tmp_path / "checkout")


def test_tracked_and_untracked_but_not_ignored(folder, tmp_path):
    (folder / "ignored").mkdir()
    (folder / "ignored/big").write_text("big")
    (folder / "sub").mkdir()
    (folder / "sub/new file.py").write_text("new = 1\n")
    (folder / "run.sh").write_text("true\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("sub/new file.py")
    (folder / "hello.txt").unlink()  # Deleted, and still in git's index.
    tree = read_tree(folder / "sub")
    pack(tree, tmp_path / "out/tree.tar.gz")
    with tarfile.open(tmp_path / "out/tree.tar.gz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    found = sorted(p.relative_to(tmp_path / "there") for p in (tmp_path / "there").rglob("*"))
    assert [str(path) for path in found] == [
        ".gitignore",
        "link",
        "run.sh",
        "sub",
        "sub/new file.py",
        "tpu",
        "tpu/requirements.lock",
    ]
    assert (tmp_path / "there/link").read_text() == "new = 1\n"
    assert (tmp_path / "there/link").is_symlink()
    assert os.access(tmp_path / "there/run.sh", os.X_OK)
    assert not os.access(tmp_path / "there/sub/new file.py", os.X_OK)


def test_fingerprint(folder):
    first = read_tree(folder)
    os.utime(folder / "hello.txt", (0, 0))
    (folder / "ignored").mkdir()
    (folder / "ignored/more").write_text("more")
    assert read_tree(folder).fingerprint == first.fingerprint
    seen = {first.fingerprint}
    (folder / "hello.txt").write_text("hallo\n")
    seen.add(read_tree(folder).fingerprint)
    (folder / "hello.txt").chmod(0o755)
    seen.add(read_tree(folder).fingerprint)
    (folder / "hello.txt").rename(folder / "other.txt")
    seen.add(read_tree(folder).fingerprint)
    assert len(seen) == 4


def test_commit_says_whether_it_was_changed(folder):
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()
    assert read_tree(folder).commit == head
    (folder / "hello.txt").write_text("hallo\n")
    assert read_tree(folder).commit == f"{head}-dirty"


def test_no_checkout_and_no_lock(folder, tmp_path):
    with pytest.raises(ValueError, match="is in no git checkout"):
        read_tree(tmp_path)
    (folder / "tpu/requirements.lock").unlink()
    with pytest.raises(ValueError, match=r"has no tpu/requirements\.lock"):
        read_tree(folder)
