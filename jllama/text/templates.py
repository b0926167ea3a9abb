"""Chats as token ids: by the model's own template, in Llama-2's format, or as plain text.

Text of a message never becomes a control token. A template mixes its own text with that of the messages, so the two
must be told apart in its output. In a message that names a control token, the letters at the ends of the name are
replaced by private letters. They are restored once the control tokens of the whole text have been found.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jllama.errors import InputError
from jllama.formats.files import MappedFile, first_of, label
from jllama.formats.source import Source
from jllama.text.control import ControlTokens
from jllama.text.dialog import Exchange, dialog_ids
from jllama.text.nesting import MAX_DEPTH, is_unicode, nested_within
from jllama.text.sandbox import MAX_TEMPLATE, Template
from jllama.text.tokenizer import Tokenizer, special_text, tokenizer_config

Message = Mapping[str, Any]  # "role", "content", and other keys that the template uses
Tools = Sequence[Mapping[str, Any]] | None  # {"type": "function", "function": {...}}: what the model may call
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LLAMA2_CHAT = re.compile(r"llama[-_ ]?2.*chat", re.IGNORECASE)
_UNUSED = 0xF0000  # the first of the letters that no text uses


class Chat(Protocol):
    """A way to write a conversation as ids."""

    @property
    def note(self) -> str | None:
        """A line for the user about the choice of the format, if there is something to report."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer, beside the model's end-of-sequence tokens."""
        ...

    def prompt_ids(
        self, messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool, tools: Tools = None
    ) -> list[int]:
        """The ids of a conversation, up to where the model answers. It may call ``tools``."""
        ...

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end an answer, beside those of the model's config."""
        ...


def chat_prompt_ids(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: Chat,
    add_generation_prompt: bool = True,
    tools: Tools = None,
) -> list[int]:
    """The ids of a conversation of messages ``{"role": ..., "content": ...}``. Raises `InputError` for tools that the
    template does not support."""
    if not messages:
        raise InputError("messages: expected at least one, found none")
    for i, message in enumerate(messages):
        if message.get("role") not in ROLES:
            found = label(message.get("role"))
            raise InputError(f"messages: {i}: role: expected one of {', '.join(ROLES)}, found {found!r}")
    return template.prompt_ids(messages, tokenizer, add_generation_prompt, tools)


@dataclass(frozen=True)
class TemplateChat:
    """A chat template of the model, in jinja. ``special`` are the texts of its variables (``bos_token``)."""

    template: Template
    text: str
    special: Mapping[str, str] = field(default_factory=dict)
    note: str | None = None
    stop: tuple[str, ...] = ()

    def prompt_ids(
        self, messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool, tools: Tools = None
    ) -> list[int]:
        own = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        names = {name: tokenizer.control.name_of(i) for name, i in own.items()}
        special = {name: text for name, text in names.items() if text is not None} | dict(self.special)
        if tools and "tools" not in self.text:
            raise _no_tools()
        hidden, hidden_tools, letters = _hidden(with_loaded_arguments(messages), tools, tokenizer.control, self.text)
        rendered = self.template.render(
            {
                "messages": hidden,
                "tools": hidden_tools or None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **special,
            }
        )
        if not is_unicode(rendered):
            raise InputError("messages: expected Unicode text, found a lone surrogate in them or in tools")
        return tokenizer.encode_rendered(rendered, letters)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        # If the config names only the end of a text, the template shows how a turn ends.
        return tuple(t.id for t in tokenizer.control.tokens if t.text in END_OF_TURN and t.text in self.text)


@dataclass(frozen=True)
class Llama2Chat:
    """Meta's format for Llama-2. Its turns are separated by control ids, which no text can produce."""

    note: str | None = None
    stop: tuple[str, ...] = ()

    def prompt_ids(
        self, messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool, tools: Tools = None
    ) -> list[int]:
        if tools:
            raise _no_tools()
        system, exchanges = _exchanges(messages)
        return dialog_ids(tokenizer, exchanges, system)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class PlainChat:
    """For models that are not trained to chat: a text that looks like a conversation."""

    note: str | None = None
    stop: tuple[str, ...] = ("\nUser:", "\nSystem:")

    def prompt_ids(
        self, messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool, tools: Tools = None
    ) -> list[int]:
        if tools:
            raise _no_tools()
        lines = [f"{message['role'].capitalize()}: {_content(message).strip()}\n" for message in messages]
        return tokenizer.encode("".join(lines) + ("Assistant:" if add_generation_prompt else ""))

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return ()


def chat_for(source: Source, chosen: str | Path | None = None) -> Chat:
    """The chat format of a model: ``chosen`` (``llama-2``, ``plain`` or a template's file), or the model's own."""
    if chosen is not None and str(chosen) in ("llama-2", "plain"):
        return Llama2Chat() if str(chosen) == "llama-2" else PlainChat()
    if chosen is not None:
        return _compiled(_read(Path(chosen)), str(chosen), _special_texts(source))
    found = template_of(source)
    if found is not None:
        return _compiled(*found, _special_texts(source))
    if any(_LLAMA2_CHAT.search(name) for name in _names(source)):
        return Llama2Chat()
    return PlainChat(
        f"{source.path}: no chat template, perhaps a base model: this chat is plain text, User: Assistant:"
    )


def _compiled(text: str, where: str, special: Mapping[str, str]) -> TemplateChat:
    return TemplateChat(Template(text, where), text, special)


def _names(source: Source) -> Iterator[str]:
    yield source.path.resolve().name
    yield str(source.metadata.get("general.name", ""))


def template_of(source: Source) -> tuple[str, str] | None:
    """The template in a model's files, and where it was found."""
    text = source.metadata.get("tokenizer.chat_template")
    if isinstance(text, str):
        return text, f"{source.path}: tokenizer.chat_template"
    directory = source.path if source.path.is_dir() else None
    if directory is None:
        return None
    file = first_of(directory, ("chat_template.jinja",), links=source.links)
    if file is not None:
        return _read(file), str(file)
    text = _choice(tokenizer_config(directory, links=source.links).get("chat_template"), directory)
    return None if text is None else (text, f"{directory / 'tokenizer_config.json'}: chat_template")


def _choice(value: Any, directory: Path) -> str | None:
    """The template in a config's entry: a text, or a list of named ones."""
    if value is None or isinstance(value, str):
        return value
    where = f"{directory / 'tokenizer_config.json'}: chat_template"
    if not isinstance(value, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("template"), str) for entry in value
    ):
        raise InputError(f"{where}: expected a text or a list of name and template, found {type(value).__name__}")
    by_name = {entry.get("name"): entry["template"] for entry in value}
    if "default" not in by_name:
        raise InputError(f"{where}: expected one named 'default', found {label(list(by_name))}")
    return by_name["default"]


def _special_texts(source: Source) -> dict[str, str]:
    """The texts of bos_token and other special tokens, from the files of a directory."""
    if not source.path.is_dir():
        return {}
    names = ("special_tokens_map.json", "tokenizer_config.json")
    first, second = (tokenizer_config(source.path, name, links=source.links) for name in names)
    values = first | second
    texts = {name: special_text(values.get(name)) for name in _SPECIAL}
    return {name: text for name, text in texts.items() if text is not None}


def _read(path: Path) -> str:
    """The text of a template's file."""
    file = MappedFile(path)
    if file.size > 4 * MAX_TEMPLATE:
        raise InputError(f"{path}: expected at most {MAX_TEMPLATE} characters, found {file.size} bytes")
    try:
        return file.bytes(0, file.size).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start}: expected UTF-8 text, found other bytes") from None


def _no_tools() -> InputError:
    return InputError("tools: expected none, because the chat format of this model has no place for them, found some")


def with_loaded_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of tool calls as objects, as templates expect them; the API has them as text."""

    def loaded(call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(arguments, str):
            return call
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InputError("messages: tool_calls: arguments: expected JSON, found something else") from None
        if not nested_within(value):
            expected = f"expected at most {MAX_DEPTH} nested levels, found more"
            raise InputError(f"messages: tool_calls: arguments: {expected}")
        return {**call, "function": {**function, "arguments": value}}

    return [
        {**message, "tool_calls": [loaded(call) for call in calls]}
        if isinstance(calls := message.get("tool_calls"), list | tuple)
        else message
        for message in messages
    ]


def _hidden(
    messages: Sequence[Message], tools: Tools, control: ControlTokens, template: str
) -> tuple[list[Any], list[Any], dict[int, str]]:
    """The messages and the tools, changed so that nothing in them names a control token or a part of one; and the table
    that restores their letters."""
    bodies = [{name: value for name, value in message.items() if name != "role"} for message in messages]
    texts = list(_texts([bodies, list(tools or ())]))
    if not any(control.could_name(text) for text in texts):
        return list(messages), list(tools or ()), {}
    used = set(template).union(*texts)
    free = (chr(code) for code in range(_UNUSED, 0x110000) if chr(code) not in used)
    table = {ord(letter): next(free) for letter in sorted(control.edges)}

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return value.translate(table) if control.could_name(value) else value
        if isinstance(value, Mapping):
            return {hide(k): hide(v) for k, v in value.items()}
        return [hide(v) for v in value] if isinstance(value, list | tuple) else value

    hidden = [hide(body) | {"role": message["role"]} for body, message in zip(bodies, messages, strict=True)]
    return hidden, [hide(tool) for tool in tools or ()], {ord(new): chr(old) for old, new in table.items()}


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise InputError(f"messages: content: expected a text, found {type(content).__name__}")
    return content


def _exchanges(messages: Sequence[Message]) -> tuple[str | None, list[Exchange]]:
    """The messages as Llama-2 expects them: an optional system prompt, then questions and answers in turn."""
    system = _content(messages[0]) if messages[0]["role"] == "system" else None
    rest = messages[system is not None :]
    for i, message in enumerate(rest):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise InputError("messages: expected user and assistant in turn, the first and the last a user's")
    if len(rest) % 2 == 0:
        raise InputError("messages: expected user and assistant in turn, the first and the last a user's")
    texts = [_content(message) for message in rest]
    answers = [*texts[1::2], None]
    return system, [Exchange(question, answer) for question, answer in zip(texts[::2], answers, strict=True)]
