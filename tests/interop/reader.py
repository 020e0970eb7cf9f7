"""What transformers makes of exported directories; a script too, for an interpreter that has it.

`python tests/interop/reader.py CASE...` needs torch and transformers of any version, and not `lm`.
A case is a folder with a Hugging Face directory `model`, `tokens.npz` and `texts.json`.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

NEW_TOKENS = 6
LOGITS = ("prediction_logits", "logits", "start_logits", "end_logits", "last_hidden_state")


def read(case: Path) -> None:
    """Writes what comes out to `read.npz` and `read.json`: logits, ids of texts, a chat, tokens."""
    path = case / "model"
    kind = json.loads((path / "config.json").read_text())["architectures"][0]
    options = dict(dtype=torch.float32) if transformers.__version__[0] > "4" else {}
    module, info = getattr(transformers, kind).from_pretrained(
        path, output_loading_info=True, **options
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    arrays = {name: torch.from_numpy(a).long() for name, a in np.load(case / "tokens.npz").items()}
    with torch.no_grad():
        result = module.eval()(**arrays)
    found = [getattr(result, name) for name in LOGITS if getattr(result, name, None) is not None]
    np.savez(case / "read.npz", *(tensor.numpy() for tensor in found))

    texts = json.loads((case / "texts.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    said = {
        "inputs": sorted(tokenizer(texts[0])),
        "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
        "special": {n: t for n, t in tokenizer.special_tokens_map.items() if isinstance(t, str)},
    }
    said["back"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said["ids"]]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "hi"}]
        said["chat"] = tokenizer.apply_chat_template(messages, tokenize=False)
    if module.can_generate():
        inputs = tokenizer(texts[0], return_tensors="pt")
        new = module.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        said["generated"] = new[0].tolist()
    (case / "read.json").write_text(json.dumps(said))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        read(Path(name))
