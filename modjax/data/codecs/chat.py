"""Rendering of chat templates: a model's Jinja templates, which write a conversation as text.

A template is code from outside. It runs in Jinja's sandbox and sees plain values only.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modjax.errors import InputError, describe


class _Generation(Extension):
    """Jinja tag {% generation %} around the answers to train on; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str], where: str
) -> str:
    """Returns a conversation as text, followed by the beginning of an answer.

    messages: each has a "role" and a "content".
    special: text of the special tokens by name, which the template may read.
    where: place of the template, for errors.
    Raises InputError if the template does not parse, or fails.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json  # jinja2's own escapes for HTML
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    values = {**special, "messages": [dict(message) for message in messages]}
    try:
        made = environment.from_string(template)
        return made.render(values, tools=None, documents=None, add_generation_prompt=True)
    except Exception as error:  # whatever the code of a template raises
        accepted = f"cannot be rendered: {describe(error)}"
        raise InputError("chat template", where, accepted) from error
