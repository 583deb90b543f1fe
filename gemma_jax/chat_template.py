"""The checkpoint's own Jinja chat template, rendered in a sandbox as `transformers` renders it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

Message = Mapping[str, Any]

# What foreign template code can end in; ArithmeticError includes the sandbox's limit on ranges.
_RENDERING_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A chat template and the special tokens it may write.

    Args:
        source: Jinja source.
        special_tokens: {"bos_token": "<bos>", ...}, visible to the template by these names.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns the prompt text for `messages`.

        Args:
            messages: [{"role": "system" | "user" | "assistant" | "tool", "content": ...}, ...].
            tools: [{"type": "function", "function": {JSON schema}}, ...].
            enable_thinking: asks the model to think first.
            add_generation_prompt: ends the text where the model is to continue.

        Raises:
            ValueError: for messages that are not such a list, for a template that is not valid
                Jinja, refuses the messages, or reaches outside the sandbox.
        """
        _check_messages(messages)
        template = self._template
        try:
            # Templates are foreign code: they see plain JSON values, no object with methods.
            messages, tools = json.loads(json.dumps([list(messages), tools or None]))
            return template.render(
                messages=messages,
                tools=tools,
                documents=None,
                enable_thinking=enable_thinking,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except _RENDERING_ERRORS as error:
            raise ValueError(f"chat template: cannot render these messages: {error}") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        # The environment of `transformers` (utils/chat_template_utils.py): templates are written
        # against its whitespace rules and helpers.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template: line {error.lineno}: {error.message}") from error


def find_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Returns the template's source: `chat_template.jinja`, else `tokenizer_config.json`'s entry.

    Raises:
        ValueError: for an entry that is neither a string nor a list of named templates.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    entry = tokenizer_config.get("chat_template")
    if entry is None or isinstance(entry, str):
        return entry
    try:
        named = {item["name"]: item["template"] for item in entry}
        return named["default"]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of "
            'named templates, one of them "default"'
        ) from error


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError("messages: a non-empty list of {'role': ..., 'content': ...} accepted")
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role is None or role == "":
            raise ValueError(
                f"messages[{index}]: {message!r} given, a mapping with a role accepted"
            )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which a prompt must not contain."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
