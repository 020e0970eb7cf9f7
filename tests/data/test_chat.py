"""Chat templates render as transformers renders them."""

import pytest

from lm.data.chat import render_chat
from lm.data.tokenizer import load_tokenizer, train_bpe

transformers = pytest.importorskip("transformers")

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Wie heißt du? 🙂\n"},
    {"role": "assistant", "content": "lm"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & 'ä'"}}]
TEMPLATES = [
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}\n{{ m['content'] | trim }}{% endfor %}",
    """{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- continue %}
    {%- endif %}
{{ m.role }}: {{ m.content }}{{ eos_token }}
{%- endfor %}
{% if add_generation_prompt %}
assistant:
{% endif %}
""",
    "{{ tools | tojson }}{{ messages | tojson(indent=2) }}{{ pad_token }}{{ missing }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% break %}{% endif %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }} {{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("start_reply", [False, True])
def test_equals_transformers(template, start_reply, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    train_bpe(["a b"], 260).save(tmp_path)
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(
        MESSAGES, tools=TOOLS, tokenize=False, add_generation_prompt=start_reply
    )
    assert ours.apply_chat_template(MESSAGES, start_reply, tools=TOOLS) == expected
    assert expected


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "does not take these messages"),
        ("{{ messages.append(1) }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}", "does not take these messages"),
    ],
)
def test_refusals_are_value_errors(template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, MESSAGES)


def test_without_a_template():
    with pytest.raises(ValueError, match="has no chat template"):
        train_bpe(["a b"], 260).apply_chat_template(MESSAGES)
