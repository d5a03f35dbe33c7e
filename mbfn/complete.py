"""Shell completion: `source <(python -m mbfn.complete bash)`, then TAB after `python -m mbfn.`.

Commands, groups, options, fields and their values, read from the same classes and files that the commands use.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin

from mbfn.config.build import arms, field_hints
from mbfn.config.groups import Catalog, catalog
from mbfn.config.overrides import leaves
from mbfn.errors import MbfnError

_BASH = """\
_mbfn() {
  local line=${COMP_LINE:0:COMP_POINT}
  [[ $line == *" -m mbfn"* ]] || return 0
  mapfile -t COMPREPLY < <("${COMP_WORDS[0]}" -m mbfn.complete "$line" 2>/dev/null)
  if [[ ${COMPREPLY[0]} == *[=.] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _mbfn python python3
"""


def completions(line: str) -> list[str]:
    """What may stand for the last word of a command line, which ends at the cursor; nothing for other programs."""
    words = line.split(" ")
    if "-m" not in words[:-1]:
        return []
    before, word = words[words.index("-m") + 1 : -1], words[-1]
    if not before:
        return [name for name in commands() if name.startswith(word)]
    known = _catalog(before[0])
    if known is None:
        return []
    key, equals, _ = word.partition("=")
    return _values(known, key, word) if equals else _keys(known, word)


def commands() -> list[str]:
    """Every module of mbfn that is a program."""
    root = Path(__file__).parent
    programs = [file.parent.name for file in root.glob("*/__main__.py")]
    programs += [
        file.stem for file in root.glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    ]
    return sorted(f"mbfn.{name}" for name in programs)


def _catalog(command: str) -> Catalog | None:
    """What a command composes from, as its call of `hydra_main` says."""
    if command not in commands():
        return None
    package = Path(__file__).parent / command.removeprefix("mbfn.")
    module = importlib.import_module(f"{command}.__main__" if package.is_dir() else command)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hydra_main":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            root, config_name = given["root"], given["config_name"]
            if isinstance(root, ast.Name) and isinstance(config_name, ast.Constant):
                return catalog(getattr(module, root.id), str(config_name.value))
    return None


def _keys(known: Catalog, word: str) -> list[str]:
    """Groups, and fields one step further into their section."""
    sign = word[: len(word) - len(word.lstrip("+~"))]
    stem = word[len(sign) :]
    names = {f"{group}=" for group in known.defaults} | {f"{path}=" for path in leaves(known.root)}
    steps = {stem + _step(name[len(stem) :]) for name in names if name.startswith(stem)}
    return sorted(sign + step for step in steps)


def _step(rest: str) -> str:
    """As far as the next dot."""
    head, dot, _ = rest.partition(".")
    return head + dot


def _values(known: Catalog, key: str, word: str) -> list[str]:
    """Options of a group or values of a field, after the last comma; bash has cut the word at `=` already."""
    typed = word.partition("=")[2]
    done, comma, start = typed.rpartition(",")
    return [f"{done}{comma}{value}" for value in sorted(_choices(known, key.lstrip("+~"))) if value.startswith(start)]


def _choices(known: Catalog, key: str) -> Iterable[str]:
    return known.options[key] if key in known.options and key in known.defaults else _field_choices(known.root, key)


def _field_choices(cls: type, key: str) -> Iterator[str]:
    """The values that a field's annotation lists."""
    head, _, rest = key.partition(".")
    for arm in arms(field_hints(cls).get(head)):
        if rest and isinstance(arm, type) and hasattr(arm, "__dataclass_fields__"):
            yield from _field_choices(arm, rest)
        elif not rest and arm is bool:
            yield from ("true", "false")
        elif not rest and get_origin(arm) is Literal:
            yield from map(str, get_args(arm))


def main(arguments: Sequence[str]) -> int:
    """Print the function for a shell, or the completions of a line."""
    if list(arguments) in ([], ["--help"], ["-h"]):
        print(__doc__.strip())
        return 0
    if list(arguments) == ["bash"]:
        print(_BASH, end="")
        return 0
    try:
        found = completions(" ".join(arguments))
    except MbfnError:
        return 1  # the command itself will say what is wrong
    print("\n".join(found), end="\n" if found else "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
