"""Every message in the source, in messages.md beside this file, and what holds for each of them.

The list is complete by construction: a call that says something in a form of which no text can be read is an error.
"""

from __future__ import annotations

import ast
import os
import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest

import lightning_lora
from lightning_lora.command.main import VERBS
from support.messages import CannotRenderError, File, Message, Source, package_source

LIST = Path(__file__).parent / "messages.md"
MESSAGES = list(package_source().messages())

SUBJECTS = {  # a message begins with one of these and a colon: what was called
    *(*lightning_lora.__all__, "LoRACLI", *VERBS, "merge --verify", "merge --rename {pair}", "lightning-lora"),
    *("LoRAConfig.from_peft", "load_state_dict", "state_dict", "torch.jit.script"),
    *("LoRACallback(merge_after_fit=True)", "lightning-lora {verb}"),
    *("adapter", "checkpoint", 'checkpoint["lora"]', "merged weights"),  # or what it was given, or was to make
}
PLACES = {  # or with where it is
    **dict.fromkeys(["path", "target", "file", "folder / TENSOR_FILE", "folder / OLD_TENSOR_FILE"], "A file or folder"),
    **dict.fromkeys(["name", "type of self", "type of table", "type of module", "type of lora_holder"], "A layer"),
    "type of model": "A model",
    "where": "An adapter or its file",
    "verb": "The call that claims the model",
    **dict.fromkeys(["error", "message", "exception", "names"], "Around another message"),
}
INSIDE = "Inside another message, as its {error}"
PARTS = {  # what is raised here is part of another message
    "nn/exact_merge, unmerge_weight_",
    "nn/exact_merge, _write_sum_",
    "nn/starts, check_decomposable",
    "nn/adapted_weights, crop_to_shard",
    "nn/parameter, crop_to_shard",
}
# The last where ranks agree on one of these.
OWN_KINDS = ("LoRAError", "NonFiniteError", "UnknownOptionError", "kind")
PYTHONS_PROTOCOLS = ("AttributeError", "ModuleNotFoundError", "added to torch's error")
CALLED = {"verb", "where", "option", "subject", "method"}  # a name fills these in; what fills in others is a text
LOGGED = {"warning": "Warnings", "log": "Log lines", "printed": "Printed"}


def is_part(message: Message) -> bool:
    return message.place in PARTS or message.kind in ("ValueError", "TypeError", "UnpicklingError")


def subject(text: str) -> str:
    """What comes before the first colon of a message: words, calls and placeholders."""
    begin, placeholder = 0, r"\{[^}]*\}"
    found = re.compile(rf"((?:{placeholder}|\[[^\]]*\]|\([^)]*\)|[\w. -])+): ").match(text, begin)
    return found[1] if found else re.match(rf"(?:{placeholder})?", text)[0]  # type: ignore[index]


def endings(text: str, message: Message) -> list[str]:
    """What a message may end with, where its last part is a choice or a placeholder."""
    if text.endswith("]"):  # a part that is there at times, which may hold others
        begin = max(i for i in range(len(text)) if text[i] == "[" and text[i:].count("[") == text[i:].count("]"))
        return endings(text[begin + 1 : -1], message) + endings(text[:begin], message)
    if choice := re.search(r"\(([^()|]*(?:\|[^()|]*)+)\)$", text):
        return [end for part in choice[1].split("|") for end in endings(part, message)]
    last = re.search(r"\{([^{}]*)\}$", text)
    if last and last[1] in message.holes:
        return [end for each in message.holes[last[1]] for end in endings(each.rstrip(), message)]
    return [text]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: f"{message.place}: {message.text[:30]}")
def test_message_names_its_subject_first_and_ends_with_a_full_stop(message: Message):
    or_part = f"; if it is part of another message, add {message.place!r} to PARTS in tests/test_all_messages.py"
    if is_part(message):
        assert not endings(message.text, message)[0].endswith("."), "what is inside another message does not end it"
    elif message.kind in LOGGED:
        assert message.text.startswith(
            ("lightning_lora: ", "LoRACallback: ", "LoRAMonitor: ", "lightning-lora", "{the summary}", "{what ")
        )
    else:
        assert message.kind in (*OWN_KINDS, *PYTHONS_PROTOCOLS)
    if message.kind in OWN_KINDS and not is_part(message):
        first = subject(message.text)
        hole = first.strip("{}")
        callers = message.holes.get(hole, []) if hole not in PLACES or hole == "where" else []
        assert first in SUBJECTS or hole in PLACES or callers, f"{first!r} is no subject{or_part}"
        assert {caller.partition(": ")[0] for caller in callers} <= SUBJECTS
    if message.kind in (*OWN_KINDS, "warning") and not is_part(message):
        ends = endings(message.text, message)
        assert all(end.endswith((".", "?", "...")) for end in ends), f"{ends} must end with a full stop{or_part}"


def section(message: Message) -> str:
    """Under which heading a message is listed."""
    if is_part(message):
        return INSIDE
    if message.kind in LOGGED:
        return LOGGED[message.kind]
    first = subject(message.text)
    if first in SUBJECTS:
        return f"`{first.partition(' ')[0] if first.startswith('merge ') else first}:`"
    return PLACES.get(first.strip("{}"), "What was called" if message.kind in OWN_KINDS else "Python's and torch's own")


def code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}" if text.strip() == text else f"{fence} {text} {fence}"


def entry(message: Message) -> str:
    """A message and what its placeholders may be, those that a reader can see."""
    shown, lines = [message.text], [f"- {code(message.text)} ({message.kind}, {message.place.partition(',')[0]})"]
    seen: set[str] = set()
    for text in shown:
        for name in re.findall(r"\{([^{}]*)\}", text):
            if name in seen:
                continue
            seen.add(name)
            texts = [text for text in message.holes.get(name, []) if " " in text.strip() or name in CALLED]
            if texts:
                lines.append(f"  - {code(f'{{{name}}}')}: {', '.join(map(code, texts))}")
                shown += texts
    return "\n".join(lines)


def test_the_list_holds_every_message():
    """WRITE_TABLE=1 writes it."""
    sections: dict[str, set[str]] = defaultdict(set)
    for message in MESSAGES:
        sections[section(message)].add(entry(message))
    about = LIST.read_text().partition("\n## ")[0]
    parts = [f"## {name}\n\n" + "\n".join(sorted(entries)) for name, entries in sorted(sections.items())]
    written = about.strip() + "\n\n" + "\n\n".join(parts) + "\n"
    if os.environ.get("WRITE_TABLE"):
        LIST.write_text(written)
    assert LIST.read_text() == written


def reads(program: str) -> list[Message]:
    """What is read in the source of a file."""
    module = ModuleType("reads")
    exec("import logging, warnings\nfrom lightning_lora import LoRAError\nlog = logging.getLogger()", vars(module))
    return list(Source([File("file", ast.parse(program), module)]).messages())


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(x): raise LoRAError(f'merge: {x.shape!r} is ' + 'wrong.')", "merge: {shape of x} is wrong."),
        ("def f(x): warnings.warn('one' if x else 'two')", "{message}"),
        ("def f(x, y): log.info('%d of %s, %.1f%%', len(x), y, 3)", "{number of x} of {y}, {3}%"),
        ("def f(x):\n text = f'{x} is'\n raise LoRAError(text)", "{x} is"),
        ("def f(x): return LoRAError(f\"{'all' if x else 'none'} of {', '.join(x)}\")", "(all|none) of {x}"),
        ("def f(x):\n if x:\n  raise\n raise NotImplementedError", None),
    ],
)
def test_reader_of_source_renders_messages(program: str, expected: str | None):
    assert [message.text for message in reads(program)] == ([expected] if expected else [])


def test_reader_of_source_follows_a_parameter_and_a_returned_text():
    program = "def f(verb): raise LoRAError(f'{verb}: {g()}')\ndef g(): return 'bad'\n"
    program += "def h(): f('merge')\ndef i(): f('unmerge')"
    (message,) = reads(program)
    assert (message.text, message.holes["verb"]) == ("{verb}: {g}", ["merge", "unmerge"])


@pytest.mark.parametrize(
    "program",
    [
        "def f(x): raise LoRAError(x)",
        "def f(x): raise LoRAError",
        "def f(x): raise LoRAError(x[0])",
        "def f(x): warnings.warn(x())",
        "def f(x): log.warning('another way to log')",
        "def f(x): warnings.warn_explicit('another way to warn')",
        "def f(error): error.add_note('more')",
        "def f(x): raise x.error",
    ],
)
def test_a_message_that_cannot_be_read_is_an_error(program: str):
    with pytest.raises(CannotRenderError):
        reads(program)
