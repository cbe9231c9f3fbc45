"""Messages as the text that a chat model was trained on: the template of its public tokenizer.

An imported run has it in hf/: chat_template.jinja, or a field of tokenizer_config.json. A template is a
program by whoever published the model; Jinja's sandbox runs it.
"""

from pathlib import Path
from typing import Any

import tokenizers

from hybridlm import untrusted, weights
from hybridlm.data.tokenizer import FileTokenizer, whole
from hybridlm.errors import ConfigError
from hybridlm.init_from import CARRIED

Message = dict[str, str]  # role, content


class Chat:
    """tokenizer: the run's.  template: Jinja.  special: names such as bos_token and what they stand for."""

    def __init__(self, tokenizer: FileTokenizer, template: str, special: dict[str, str]):
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            problem, fix = "needs the package jinja2", "pip install jinja2, or give --raw to do without it."
            raise ConfigError("chat template", f"{CARRIED}/", problem, fix) from None
        options: Any = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
        self.environment = ImmutableSandboxedEnvironment(**options)  # as transformers sets it up
        self.environment.globals["raise_exception"] = _refuse
        self.template, self.special = template, special
        self.tokens = tokenizers.Tokenizer.from_buffer(tokenizer.content)  # reads special tokens as such
        whole(self.tokens)

    def encode(self, messages: list[Message]) -> list[int]:
        """Ids of ``messages`` up to where the answer begins; ConfigError for what the template refuses."""
        try:
            template = self.environment.from_string(self.template)
            text = template.render(messages=messages, add_generation_prompt=True, **self.special)
        except ConfigError:
            raise
        except Exception as error:  # a template can fail in any way
            said = untrusted.terminal(f"{type(error).__name__}: {error}")
            raise ConfigError("chat template", f"{CARRIED}/", f"fails with {said}", "Give --raw.") from error
        return self.tokens.encode(text, add_special_tokens=False).ids


def find(workdir: Path, tokenizer: Any) -> Chat | None:
    """The chat template of the run in ``workdir``, None where there is none."""
    folder = workdir / CARRIED
    if not isinstance(tokenizer, FileTokenizer):
        return None
    described = weights.read(folder / "tokenizer_config.json")
    template = described.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default", next(iter(named.values()), None))
    if (folder / "chat_template.jinja").is_file():
        template = untrusted.read_bytes(folder / "chat_template.jinja", "--workdir").decode(errors="replace")
    if not isinstance(template, str):
        return None
    content = lambda token: token.get("content") if isinstance(token, dict) else token
    special = {name: content(token) for name, token in described.items() if name.endswith("_token")}
    known = {name: token for name, token in special.items() if isinstance(token, str)}
    return Chat(tokenizer, template, known)


def _refuse(message: str) -> None:
    problem = f"refuses these messages: {untrusted.terminal(str(message))}"
    raise ConfigError("chat template", f"{CARRIED}/", problem)
