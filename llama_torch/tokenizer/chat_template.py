"""Chat templates, which encode a conversation: the checkpoint's own Jinja, or Llama 2's form."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_common.errors import InputError, has_surrogates
from llama_common.files import read_json, require_name
from llama_common.notes import note

from . import template_process
from .gpt2 import located
from .template_process import TemplateError
from .tokenizer import Tokenizer
from .tracked_text import placed

Message = Mapping[str, str]  # role (system, user, assistant) and content

ROLES = ("system", "user", "assistant", "tool")
LONGEST = 1 << 20  # bytes of a template's file; those in use have some 20,000
LLAMA2 = "llama2"
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
# Llama2Template as a Jinja template, which a model directory can hold.
LLAMA2_SOURCE = """\
{%- set told = messages[0]['content'] if messages[0]['role'] == 'system' else none %}
{%- for message in messages[(0 if told is none else 1):] %}
    {%- for tag in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'] %}
        {%- if tag in message['content'] or (told is not none and tag in told) %}
            {{- raise_exception('a message contains ' + tag + ', which the template alone may') }}
        {%- endif %}
    {%- endfor %}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- set said = message['content'] %}
    {%- if loop.first and told is not none %}
        {%- set said = '<<SYS>>\\n' + told + '\\n<</SYS>>\\n\\n' + said %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + said | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + said | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""


class ChatTemplate:
    """A checkpoint's Jinja template, rendered in a sandbox and tokenised.

    It runs in a process with limits on time, memory and text; see ``template_process``. ``day`` is
    the date that it sees (ISO 8601); empty = today.
    """

    def __init__(self, source: str, origin: str, tokenizer: Tokenizer, day: str = "") -> None:
        self.origin, self.tokenizer = origin, tokenizer
        self.source, self.day = source, day
        try:
            used = template_process.used_names(source)
        except TemplateError as error:
            raise InputError(f"{origin}: not a Jinja template ({error}); fix it") from None
        for role in sorted(used & set(tokenizer.others)):
            if tokenizer.others[role] not in tokenizer.special:
                raise InputError(
                    f"{origin}: uses {role}, which is {tokenizer.others[role]!r}, no token of the "
                    "tokenizer's; add it to the tokenizer, or name another"
                )

    def encode(self, messages: Sequence[Message], prompts: bool = True) -> list[int]:
        """Return the ids of a conversation whose next message is the assistant's.

        Without ``prompts`` it ends with its last message, and nothing opens the next one.

        Special tokens are placed by the template alone: a message that spells one is text, and
        the template sees it as it was written.
        Raises InputError where the template does, or does what its sandbox forbids.
        """
        require_messages(messages)
        names = {"bos_token": self.tokenizer.bos or "", "eos_token": self.tokenizer.eos or ""}
        try:
            names |= self.tokenizer.others
            text = template_process.render(self.source, messages, names, prompts, self.day)
            if has_surrogates(text):
                raise TemplateError("it writes half of a pair of \\ud800 to \\udfff, no character")
            parts = self._placed(text)
        except (TemplateError, InputError) as error:
            raise InputError(f"{self.origin}: the template fails: {error}") from None
        with located("the conversation"):
            return self.tokenizer.encode_parts(parts)

    def _placed(self, text: str) -> list[str | int]:
        known = self.tokenizer
        return placed(text, known.special, known.single_words, known.normalized, known.ordinary)


def require_messages(messages: Sequence[Message]) -> None:
    """Raise InputError unless every message has a known role and a text."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {i} is {message!r}; give a role and a content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str) or has_surrogates(content):
            raise InputError(
                f"message {i} has role {role!r} and content of type {type(content).__name__}; "
                f"give valid text, and one of {', '.join(ROLES)}"
            )


class Llama2Template:
    """Llama 2's form (paper, appendix A.3.3): each exchange between its own BOS and EOS.

    ``<s>[INST] <<SYS>> system <</SYS>> user [/INST] answer </s><s>[INST] user [/INST]``, each
    exchange tokenised as one text. Messages that contain the form's own tags are refused.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.bos is None or tokenizer.eos is None:
            raise InputError("--template llama2 needs a tokenizer with BOS and EOS tokens")
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.special[tokenizer.bos], tokenizer.special[tokenizer.eos]

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation whose next message is the assistant's."""
        require_messages(messages)
        for tag in LLAMA2_TAGS:
            if any(tag in message["content"] for message in messages):
                raise InputError(f"a message contains {tag}, which the template alone may")
        messages = _with_system_inside(messages)
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise InputError(
                "Llama 2's form takes user and assistant in turn, and the user last; "
                f"the roles are {', '.join(roles)}"
            )
        texts = [message["content"].strip() for message in messages]
        ids: list[int] = []
        with located("the conversation"):
            for user, answer in zip(texts[:-1:2], texts[1::2], strict=True):
                exchange = self.tokenizer.encode(f"[INST] {user} [/INST] {answer} ")
                ids += [self.bos, *exchange, self.eos]
            return [*ids, self.bos, *self.tokenizer.encode(f"[INST] {texts[-1]} [/INST]")]


def _with_system_inside(messages: Sequence[Message]) -> list[Message]:
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    system, first, *rest = messages
    content = f"<<SYS>>\n{system['content']}\n<</SYS>>\n\n{first['content']}"
    return [{**first, "content": content}, *rest]


def load_chat_template(
    ckpt: Path, tokenizer: Tokenizer, name: str = ""
) -> ChatTemplate | Llama2Template:
    """Return the named template (a Jinja file, or "llama2"), else the checkpoint's own.

    Raises InputError where there is none, and for a file that is not a template.
    """
    return Llama2Template(tokenizer) if name == LLAMA2 else load_jinja(ckpt, tokenizer, name)


def load_jinja(ckpt: Path, tokenizer: Tokenizer, name: str = "", day: str = "") -> ChatTemplate:
    """Return the named template, else the checkpoint's own, as Jinja; "llama2" too.

    ``day`` is the date that it sees (ISO 8601); empty = today. Raises InputError where there is
    none, and for a file that is not a template.
    """
    if name == LLAMA2:
        Llama2Template(tokenizer)  # refuses a tokenizer without BOS or EOS
        return ChatTemplate(LLAMA2_SOURCE, f"--template {LLAMA2}", tokenizer, day)
    if name:
        return ChatTemplate(_read(Path(name)), f"--template {name}", tokenizer, day)
    own = own_jinja(ckpt, tokenizer, day)
    if own is None:
        raise InputError(
            f"{_folder(ckpt)}: has no chat template; give one with --template (llama2, or a Jinja "
            "file)"
        )
    return own


def own_jinja(ckpt: Path, tokenizer: Tokenizer, day: str = "") -> ChatTemplate | None:
    """Return the checkpoint's own template, None if it has none; see ``load_jinja``."""
    require_name(ckpt)
    folder = _folder(ckpt)
    own, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    stored = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(stored, list):  # several, by name
        items = [item for item in stored if isinstance(item, dict)]
        stored = next((i.get("template") for i in items if i.get("name") == "default"), None)
    if own.is_file():
        source = _read(own)
        if isinstance(stored, str) and stored != source:
            note(f"{own} is taken; chat_template in {settings.name} differs and is not")
        return ChatTemplate(source, str(own), tokenizer, day)
    if not isinstance(stored, str):
        return None
    return ChatTemplate(stored, f"{settings} (chat_template)", tokenizer, day)


def _folder(ckpt: Path) -> Path:
    return ckpt if ckpt.is_dir() else ckpt.parent


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            source = file.read(LONGEST + 1)  # the file may be a device, or a link to one
        if len(source) > LONGEST:
            raise InputError(f"{path}: is longer than a template ({LONGEST:,} bytes)")
        return source.decode().replace("\r\n", "\n").replace("\r", "\n")
    except InputError:
        raise
    except (OSError, ValueError) as error:  # bytes that are no text, a name that none can have
        raise InputError(f"{path}: cannot be read ({error}); give a Jinja file") from None
