"""A small tokenizer that chats, and templates to give to it."""

from dataclasses import replace

from lm.data.tokenizer import SubwordTokenizer, train_bpe

TEXTS = ["What is gravity? It pulls.", "user assistant system tool", "Add 2 and 2. It is 4."] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML) -> SubwordTokenizer:
    """Returns byte pairs of a few words, with the special tokens of ChatML and a template."""
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return replace(tokenizer, chat_template=template, eos="<|im_end|>", starts=False)
