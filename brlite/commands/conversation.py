"""The messages of a chat, and the commands that begin with a slash. Uses no terminal and no model."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

import msgspec

from brlite.errors import ConfigError
from brlite.files.cache import expand_home
from brlite.files.quoting import reason
from brlite.files.text_file import TextError, read_bounded
from brlite.sampling_params import SamplingParams

HELP = """\
/system [TEXT]      show the system message, or set it
/set [NAME VALUE]   show the sampling parameters, or set one: /set temperature 0.2
/retry              ask the last question again
/clear              forget what was said
/save FILE          write the conversation as JSON
/load FILE          continue a conversation that was saved
/exit               leave, as Ctrl-D and Ctrl-C do
Ctrl-C during an answer stops the answer. Text that is pasted is one message, whatever its lines."""
COMMANDS = ("/help", "/system", "/set", "/retry", "/clear", "/save", "/load", "/exit")
NOT_FOR_CHATS = (
    *("n", "best_of", "use_beam_search", "length_penalty", "early_stopping"),
    *("logprobs", "prompt_logprobs"),
)


class Message(msgspec.Struct, frozen=True):
    """`role` is system, user or assistant."""

    role: str
    content: str


class SavedConversation(msgspec.Struct, frozen=True):
    """The file of `/save`: the field `messages` of a request to the API."""

    messages: list[Message]


class Conversation:
    """The messages so far and the sampling parameters.

    `named` holds the names of parameters that the user has set: for the others a server has its own defaults.
    """

    def __init__(self, system: str | None, params: SamplingParams, named: Iterable[str] = ()) -> None:
        self.messages = [Message("system", system)] if system else []
        self.params = params
        self.named = set(named)
        self.is_over = False

    def asked_by(self, line: str) -> str | None:
        """The question of a line: the line itself, or for `/retry` the last question, whose answer is removed.

        None for other commands and blank lines.
        """
        if line.strip() == "/retry" and len(self.messages) >= 2 and self.messages[-1].role == "assistant":
            question = self.messages[-2].content
            del self.messages[-2:]
            return question
        return line if line.strip() and not line.startswith("/") else None

    def obey(self, line: str) -> str:
        """Carry out a command, which may read or write a file. Returns the text to show. Raises `ConfigError`."""
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        system = [message for message in self.messages if message.role == "system"]
        match name:
            case "/help":
                return HELP
            case "/system" if not argument:
                return system[0].content if system else "there is no system message"
            case "/system":
                self.messages = [Message("system", argument), *self.messages[len(system) :]]
                return "the system message is set"
            case "/set":
                return self._set(argument)
            case "/retry":
                return "there is no question yet"
            case "/clear":
                self.messages = system
                return "forgotten"
            case "/save":
                return self._save(argument)
            case "/load":
                return self._load(argument)
            case "/exit":
                self.is_over = True
                return ""
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(COMMANDS)}"
        raise ConfigError(f"{name}: {hint}")

    def add(self, question: str, answer: str) -> None:
        """Add a question and its answer."""
        self.messages += Message("user", question), Message("assistant", answer)

    def _set(self, argument: str) -> str:
        name, _, text = argument.partition(" ")
        fields = [field for field in SamplingParams.__struct_fields__ if field not in NOT_FOR_CHATS]
        if not argument:
            return "\n".join(f"{field} {json.dumps(getattr(self.params, field))}" for field in fields)
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(fields)}"
            raise ConfigError(f"/set {name}: {hint}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # also for a number of 5,000 digits
            value = text
        self.params = msgspec.structs.replace(self.params, **{name: value})
        self.named.add(name)
        return f"{name} is {json.dumps(getattr(self.params, name))}"

    def _save(self, file: str) -> str:
        if not file:
            raise ConfigError("/save: allowed is /save FILE")
        try:
            expand_home(file).write_bytes(msgspec.json.format(msgspec.json.encode(SavedConversation(self.messages))))
        except (OSError, ValueError) as error:  # a zero byte in the name, half of a character in a message
            raise ConfigError(f"{file}: cannot be written: {reason(error)}") from None
        return f"{len(self.messages)} messages are in {file}"

    def _load(self, file: str) -> str:
        if not file:
            raise ConfigError("/load: allowed is /load FILE")
        try:
            saved = msgspec.json.decode(read_bounded(expand_home(file)), type=SavedConversation)
        except (OSError, TextError) as error:
            raise ConfigError(f"{file}: cannot be read: {reason(error)}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file} holds no conversation: {error}") from None
        self.messages = saved.messages
        return f"{len(self.messages)} messages are loaded"
