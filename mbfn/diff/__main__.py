"""`python -m mbfn.diff A B`: what differs between two runs, and whether they still compute the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mbfn.diff.compare import Comparison, comparisons
from mbfn.diff.render import as_json, as_markdown, as_text
from mbfn.diff.sides import opened
from mbfn.errors import ConfigError, MbfnError

NUMERICS, BROKEN = 3, 1

_ABOUT = """\
Compare two runs after everything is resolved: differing fields by what they change (numerics, memory, speed,
bookkeeping), and what follows from them (ranks, parameters, memory, operations, step time).

  python -m mbfn.diff 'model=llama31_8b' 'model=llama31_8b parallel=tp2 precision=fp8'
  python -m mbfn.diff outputs/2026-11-20/10-00-00 outputs/2026-11-20/11-30-00
  python -m mbfn.diff HEAD~1 HEAD format=md

A and B are each a git revision, a checkout of mbfn (.: the working tree), a run's output directory, a YAML file (a
resolved configuration or a recipe), or overrides in quotes. Each revision composes with its own code; between two of
them the defaults and every recipe are compared, or what further OVERRIDES make.

Exit code: 0 nothing that is computed differs, 3 numerics differ, 1 B does not compose, 2 A or B is not usable.
"""
_FORMATS = {"text": as_text, "md": as_markdown, "json": as_json}


def main(arguments: Sequence[str]) -> int:
    """Print the differences; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mbfn.diff", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="A")
    parser.add_argument("after", metavar="B")
    parser.add_argument("overrides", metavar="OVERRIDES", nargs="*", help="and format=text, md or json")
    given = parser.parse_args(arguments)
    formats = [text.removeprefix("format=") for text in given.overrides if text.startswith("format=")]
    extra = [text for text in given.overrides if not text.startswith("format=")]
    try:
        render = _FORMATS[_known(formats[-1] if formats else "text")]
        with opened(given.before, extra) as before, opened(given.after, extra) as after:
            found = comparisons(before, after, extra)
    except MbfnError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    print(render(found).strip("\n"))
    return exit_code(found)


def exit_code(found: Sequence[Comparison]) -> int:
    """What a review has to know: broken before numerics before nothing."""
    if any(comparison.errors[1] for comparison in found):
        return BROKEN
    return NUMERICS if any(comparison.difference.numerics for comparison in found) else 0


def _known(name: str) -> str:
    if name not in _FORMATS:
        raise ConfigError([("format", f"expected one of {', '.join(_FORMATS)}, got {name!r}")])
    return name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
