"""The model that a server answers with, as the event loop knows it: no weights, no device."""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass, field

from jllama.config import LlamaConfig
from jllama.serve.text import Names
from jllama.text.grammars import Grammars
from jllama.text.lm import LM
from jllama.text.templates import Chat, TemplateChat
from jllama.text.tokenizer import Tokenizer
from jllama.text.tool_calls import Style, style_of


@dataclass(frozen=True)
class Model:
    """A tokenizer, a chat format, and the limits of the engine that runs the weights."""

    config: LlamaConfig
    tokenizer: Tokenizer
    chat: Chat
    max_len: int
    names: Names  # of single tokens
    grammars: Grammars
    ends: tuple[int, ...]  # tokens that end a text or an answer
    style: Style | None  # the form in which the chat template calls tools; None: it has none
    created: int = field(default_factory=lambda: int(time.time()))
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @classmethod
    def of(cls, lm: LM, max_len: int) -> "Model":
        """Made from a loaded model."""
        config, tokenizer, chat = lm.params.config, lm.tokenizer, lm.chat_format
        ends = tuple(dict.fromkeys((*config.eos_ids, *chat.stop_ids(tokenizer))))
        grammars = Grammars(tokenizer, config.vocab_size, ends)
        style = style_of(chat.text) if isinstance(chat, TemplateChat) else None
        return cls(config, tokenizer, chat, max_len, Names(tokenizer), grammars, ends, style)

    def salt(self, tenant: str, wish: str | None) -> str:
        """The salt for the engine. Only requests of the same tenant and ``cache_salt`` share cached prompts. No client
        can make another tenant's salt."""
        text = f"{tenant}\0{wish or ''}".encode()
        return hmac.new(self.secret, text, hashlib.sha256).hexdigest()
