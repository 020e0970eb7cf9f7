"""Chat templates: a conversation becomes the text that a model was finetuned on."""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Name, Node, Output
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
GREETING = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
BEGIN, STOP = "\ufdd0", "\ufdd1"  # Around a reply; Unicode keeps them out of all text.


def render_chat(template: str, messages: Messages, **values: Any) -> str:
    """Returns a conversation as text, by a template as Hugging Face writes them.

    Args:
      template: in Jinja. It runs in a sandbox, since it comes with a downloaded model.
      messages: dicts with 'role' and 'content', and whatever else the template reads.
      values: more that it may read: add_generation_prompt, tools, bos_token, ...

    Raises:
      ValueError: if the template is wrong, or refuses the conversation.
    """
    try:
        return compile_template(template).render(messages=messages, **values)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from error


@functools.lru_cache(8)
def compile_template(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def find_replies(
    template: str, messages: Messages, specials: Iterable[str], **values: Any
) -> tuple[str, list[Span]]:
    """Returns a conversation as text, and [start, stop) of each of the assistant's replies in it.

    Where the template marks replies, `{% generation %}...{% endgeneration %}`, the marks decide.
    Else a reply begins where the prompt that asks for it ends, and stops behind the first special
    token after its content, which ends the turn; or, if there is none, where the next turn begins.

    Args:
      template: in Jinja.
      messages: with at least one of the role 'assistant'.
      specials: the special tokens that the template may write.
      values: more that the template may read.

    Raises:
      ValueError: if the template does not take the messages, hides or rewrites a reply, or leaves
        open where one is.
    """
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    marked = render_chat(template, messages, begin_reply=BEGIN, end_reply=STOP, **values)
    text, spans = unmark(marked)
    if not spans:
        spans = [find_reply(template, messages, n, text, specials, **values) for n in replies]
    if len(spans) != len(replies):
        raise ValueError(
            f"the chat template marks {len(spans)} replies of a conversation with {len(replies)}: "
            "put {% generation %} around each of them"
        )
    for (start, stop), index in zip(spans, replies):
        content_in(text[start:stop], messages[index])
    return text, spans


def find_reply(
    template: str, messages: Messages, index: int, text: str, specials: Iterable[str], **values: Any
) -> Span:
    """Returns where the reply `messages[index]` stands in a text; as `find_replies` otherwise."""
    before = render_chat(template, messages[:index], **{**values, "add_generation_prompt": True})
    after = render_chat(template, messages[: index + 1], **values)
    if not (text.startswith(after) and after.startswith(before)):
        raise ValueError(
            "the chat template writes the beginning of a conversation otherwise once it goes on, "
            "so that its replies cannot be found: put {% generation %} around them"
        )
    behind = len(before) + content_in(after[len(before) :], messages[index])
    end = re.compile("|".join(map(re.escape, specials)) or "$^").search(after, behind)
    return len(before), end.end() if end else len(after)


def content_in(text: str, message: Mapping[str, Any]) -> int:
    """Returns where the content of a reply stops in a text; ValueError where it is not there."""
    content = message["content"].strip()
    at = text.find(content)
    if at < 0:
        raise ValueError(
            f"the chat template hides or rewrites the reply {content[:50]!r}: train with one that "
            "writes replies as they are"
        )
    return at + len(content)


def overlaps(offsets: Span, span: Span) -> bool:
    """Whether a token [begin, end), which may be empty, has to do with a span of the text."""
    begin, end = offsets
    return begin < span[1] and span[0] < max(end, begin + 1)


def unmark(marked: str) -> tuple[str, list[Span]]:
    """Returns a text without the marks around its replies, and where they stood."""
    text, spans = "", []
    for piece in re.split(f"({BEGIN}[^{STOP}]*{STOP})", marked):
        if piece.startswith(BEGIN):
            piece = piece[1:-1]
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: a reply, between marks if asked for."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            Output([Name(name, "load")]).set_lineno(line) for name in ("begin_reply", "end_reply")
        )
        return [begin, *body, end]


def to_json(value: Any, **options: Any) -> str:
    """Returns JSON without the escapes of HTML that jinja's own filter makes."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
