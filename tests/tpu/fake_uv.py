"""A uv whose environments are links to this Python, with a command `lm` of the tree installed."""

import os
import sys
from pathlib import Path

words = sys.argv[1:]
with (Path.home() / "uv-calls").open("a") as calls:
    calls.write(" ".join(words) + "\n")
if words[0] == "venv":
    (Path(words[-1]) / "bin").mkdir(parents=True)
    (Path(words[-1]) / "bin/python").symlink_to(sys.executable)
elif words[:2] == ["pip", "sync"]:
    assert Path(words[-1]).is_file()
    if "broken" in Path(words[-1]).read_text():
        sys.exit("error: No solution found: there is no package called broken")
elif words[:2] == ["pip", "install"]:
    tree, folder = words[-1], Path(words[words.index("--python") + 1]).parent
    lm = folder / "lm"
    path = os.environ.get("PYTHONPATH", tree)
    lm.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} -m lm.cli "$@"\n')
    lm.chmod(0o755)
