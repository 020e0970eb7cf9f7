"""Chat templates: a conversation becomes the text that a model was finetuned on."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, Any]]


def render_chat(template: str, messages: Messages, **values: Any) -> str:
    """Returns a conversation as text, by a template as Hugging Face writes them.

    Args:
      template: in Jinja. It runs in a sandbox, since it comes with a downloaded model.
      messages: dicts with 'role' and 'content', and whatever else the template reads.
      values: more that it may read: add_generation_prompt, tools, bos_token, ...

    Raises:
      ValueError: if the template is wrong, or refuses the conversation.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(messages=messages, **values)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from error


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks replies and prints them as they are."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(value: Any, **options: Any) -> str:
    """Returns JSON without the escapes of HTML that jinja's own filter makes."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
