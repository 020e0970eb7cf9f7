"""What lies beside a tokenizer.json: special tokens by name, and the chat template."""

import json
from pathlib import Path
from typing import Any

# Special tokens that other readers of the files ask for, and nothing here does.
OTHERS = ("unk", "cls", "sep", "mask")


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """Returns the fields of a `SubwordTokenizer` that the files beside a tokenizer.json say."""
    config, template = path / "tokenizer_config.json", path / "chat_template.jinja"
    content = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    fields = _special_tokens(content)
    chat = content.get("chat_template")
    if isinstance(chat, list):  # Several by name, in older files.
        chat = {entry["name"]: entry["template"] for entry in chat}.get("default")
    fields["chat_template"] = template.read_text(encoding="utf-8") if template.exists() else chat
    fields["starts"] = content.get("add_bos_token", True)
    return fields


def _special_tokens(content: dict[str, Any]) -> dict[str, Any]:
    names = ("pad", "bos", "eos", *OTHERS)
    tokens = {name: content.get(f"{name}_token") for name in names}
    texts = {n: t["content"] if isinstance(t, dict) else t for n, t in tokens.items() if t}
    others = tuple((name, texts.pop(name)) for name in OTHERS if name in texts)
    # BERT's tokenizers name the places of their special tokens otherwise.
    fallback = {"bos": dict(others).get("cls"), "eos": dict(others).get("sep")}
    found = {name: text for name, text in fallback.items() if text} | texts
    return {**found, "others": others} if others else found
