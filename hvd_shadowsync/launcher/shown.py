"""A command as people may see it: without what looks like a secret."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

SECRET = re.compile("TOKEN(?!I)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH(?!OR)|KEY(?!BOARD)", re.IGNORECASE)
"""Names whose values are shown to nobody."""
CREDENTIALS = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")
HIDDEN = "***"


def shell_line(command: Sequence[str], additions: Mapping[str, str]) -> str:
    """Return the command as one line for a shell, the added environment variables in front.

    Values of names that look like secrets are left out: the shell takes them from its own variables, or says which are
    missing.
    """
    settings = [f"{name}={_shown_value(name, value)}" for name, value in sorted(additions.items())]
    return " ".join([*settings, shlex.join(map(_shown_word, command))])


def _shown_value(name: str, value: str) -> str:
    if SECRET.search(name) or CREDENTIALS.search(value):
        return f'"${{{name}:?not shown}}"'
    return shlex.quote(value)


def _shown_word(word: str) -> str:
    """Return a word of a command without what looks like a secret in `NAME=value`, alone or among others."""
    alone = re.fullmatch(r"([\w-]+)=.*", word, re.DOTALL)
    if alone and SECRET.search(alone[1]):
        return f"{alone[1]}={HIDDEN}"
    shown = re.sub(r"([\w-]+)=[^\s'\"]+", lambda m: f"{m[1]}={HIDDEN}" if SECRET.search(m[1]) else m[0], word)
    return CREDENTIALS.sub(rf"\1{HIDDEN}@", shown)
