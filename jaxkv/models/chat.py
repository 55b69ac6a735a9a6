"""A conversation into the tokens that a model was trained to answer."""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jaxkv.errors import CheckpointError
from jaxkv.models.source import source_of
from jaxkv.serve.sampling import Sampling

Message = Mapping[str, Any]


class Chat:
    r"""The form in which a model knows conversations: its chat template, run in a sandbox.

    Args:
      template: in Jinja, as ``tokenizer_config.json`` has it.
      tokenizer: of the model.
      special_tokens: ``bos_token`` and its like, which the template may name.

    Raises:
      CheckpointError: the template is not Jinja.
      ImportError: the package ``jinja2`` is not there.

    >>> import jaxkv
    >>> template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    >>> chat = Chat(template, jaxkv.models.byte_tokenizer())
    >>> chat.render([{"role": "user", "content": "Hello"}])
    'user: Hello\n'
    """

    def __init__(self, template: str, tokenizer: Any, special_tokens: Mapping[str, str] = {}):
        self.tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._compiled = _compiled(template)

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation, up to where the model's answer begins.

        Args:
          messages: each with a ``role`` (user, assistant, system) and a ``content``.
          variables: what else the template knows, as ``tools`` or ``enable_thinking``;
            ``add_generation_prompt=False`` to end after the last message.

        Raises:
          ValueError: messages that are none, or that the template refuses.
        """
        check_messages(messages)
        given = {"add_generation_prompt": True, **self._special_tokens, **variables}
        try:
            return self._compiled.render(messages=[dict(one) for one in messages], **given)
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def encode(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Its token ids: a prompt for `jaxkv.generate` and `jaxkv.Engine.submit`; see `render`."""
        text = self.render(messages, **variables)
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def load_chat(folder: str | os.PathLike[str] | None, tokenizer: Any) -> Chat:
    """The chat template of a checkpoint.

    That of ``chat_template.jinja`` or ``tokenizer_config.json``, or of the GGUF file.

    Args:
      folder: as for `load`.
      tokenizer: which `load` gave.

    Raises:
      CheckpointError: it has no chat template, or no tokenizer.
      ImportError: the package ``jinja2`` is not there.
    """
    source = source_of(folder)
    template = source.chat_template
    if tokenizer is None or not isinstance(template, str):
        lacks = "tokenizer" if tokenizer is None else "chat template"
        raise CheckpointError(
            f"{source.path} has no {lacks}, so there is no chat with it. Take an instruct model."
        )
    return Chat(template, tokenizer, source.special_tokens)


def load_sampling(folder: str | os.PathLike[str] | None) -> Sampling | None:
    """How a checkpoint's ``generation_config.json`` or GGUF metadata says that tokens are drawn.

    Args:
      folder: as for `load`.

    Returns:
      None where it says nothing of that, and greedy where it says not to draw.

    Raises:
      CheckpointError: values out of range.

    >>> load_sampling(None) is None  # the model that comes along says nothing
    True
    """
    source = source_of(folder)
    said = source.generation
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: said[name] for name in names if said.get(name) is not None}
    if said.get("do_sample") is None and not given:
        return None
    if not said.get("do_sample"):
        return Sampling()
    if given.get("top_k") == 0:
        del given["top_k"]  # which keeps all
    try:
        return Sampling(**{"temperature": 1.0} | given)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source.path}: generation_config.json: {error}") from error


def check_messages(messages: Any) -> None:
    """Refuse what is not a list of messages.

    Raises:
      ValueError: saying what was expected.
    """
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages)
    if not is_list or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise ValueError(
            'messages must be a list such as [{"role": "user", "content": "Hello"}], got '
            f"{messages!r:.80}"
        )


def _compiled(template: str) -> Any:
    """The template as transformers runs it: with the names that templates use."""
    try:
        import jinja2
        from jinja2 import sandbox
    except ImportError as error:
        raise ImportError(
            "a chat template needs the package jinja2. Run `pip install jaxkv[chat]`."
        ) from error

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_tag()],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is not Jinja: {error}") from error


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Without Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _generation_tag() -> Any:
    """``{% generation %}``, which marks an answer for training and changes no text."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  (the name and type that jinja2 asks for)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation
