"""Every command as a Hydra app whose task sees one frozen value."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mbfn.config.build import build
from mbfn.config.composing import ModelFromHf, readable_errors, resolve, search_path_override
from mbfn.config.groups import Catalog, catalog
from mbfn.config.help import help_text
from mbfn.config.overrides import FROM_HF, checked, combinations
from mbfn.errors import ConfigError, MbfnError

_WRITES_NOTHING = (
    "hydra.run.dir=.",
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What Hydra knows of the job, for the task: where it writes and how it was asked for."""

    output_dir: Path
    overrides: tuple[str, ...] = ()
    job_num: int = 0  # of a multirun


def hydra_main[T](
    task: Callable[[T, RunContext], object],
    *,
    root: type[T],
    config_name: str,
    model_from_hf: ModelFromHf | None = None,
    outputs: bool = True,
    positional: Sequence[str] = (),
) -> None:
    """Run `task` on the `root` that conf/<config_name>.yaml and the command line make; once a job of a multirun.

    What `task` returns is the job's result for sweepers that look for the best one.
    `model_from_hf` reads the model group from `init.hf` where the user chose no model. With `outputs=False` nothing
    is written but what the task writes: no output directory, no log file. Arguments that are no overrides fill the text
    fields named by `positional`, in order.
    An MbfnError, of the configuration or of the task, prints one line a problem on stderr and exits with its code.
    """
    try:
        flags = _parse(sys.argv[1:], positional)
        known = catalog(root, flags.config_name or config_name, [flags.config_dir] if flags.config_dir else [])
        if flags.help:
            sys.stdout.write(help_text(known))
            return
        overrides = _preflight(known, flags, model_from_hf)
        ours = [f"hydra.job.name={_job_name()}", *(() if outputs else _WRITES_NOTHING), *search_path_override(known)]
        _run_hydra(_job(task, known), known, [*_flag_arguments(flags), *ours, *overrides])
    except MbfnError as error:
        end_with(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(arguments: Sequence[str], positional: Sequence[str]) -> Namespace:
    """Hydra's own flags, wherever they stand among the overrides."""
    from hydra.main import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse
    flags = parser.parse_intermixed_args(list(arguments))
    bare = [text for text in flags.overrides if "=" not in text and not text.startswith("~")]
    named = {text: f"{name}={_quoted(text)}" for name, text in zip(positional, bare, strict=False)}
    flags.overrides = [named.get(text, text) for text in flags.overrides]
    if flags.config_path:
        raise ConfigError([("--config-path", "our groups cannot be left out; add yours with --config-dir")])
    return flags


def _quoted(text: str) -> str:
    escaped = text.replace('"', '\\"')
    return f'"{escaped}"'


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message} (--help lists what this command takes)")


def _flag_arguments(flags: Namespace) -> list[str]:
    """The flags as arguments again, without those dealt with here."""
    given = {name: value for name, value in vars(flags).items() if name not in ("overrides", "config_dir", "help")}
    return [
        part
        for name, value in given.items()
        if value
        for part in (f"--{name.replace('_', '-')}", *([value] if isinstance(value, str) else []))
    ]


def _preflight(known: Catalog, flags: Namespace, model_from_hf: ModelFromHf | None) -> list[str]:
    """Make every job's config before the first job starts; return the overrides that Hydra is to get."""
    if flags.hydra_help or flags.shell_completion:
        return list(flags.overrides)
    if not flags.multirun:
        return resolve(known, flags.overrides, model_from_hf=model_from_hf)[1]
    spelled = checked(flags.overrides, known)
    jobs = [resolve(known, job, model_from_hf=model_from_hf) for job in combinations(spelled, known)]
    from_hf = {config.init.hf for config, final in jobs if f"model={FROM_HF}" in final}
    if from_hf and (len(from_hf) > 1 or any(f"model={FROM_HF}" not in final for _, final in jobs)):
        raise ConfigError([("init.hf", "one multirun takes its model from one directory; start one run each")])
    return [*spelled, *([f"model={FROM_HF}"] if from_hf else [])]


def _job(task: Callable[[Any, RunContext], object], known: Catalog) -> Callable[[Any], object]:
    """The function that Hydra calls with each job's composed tree."""

    def job(composed: Any) -> object:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        try:
            with readable_errors():
                tree: Any = OmegaConf.to_container(composed, resolve=True)
            hydra = HydraConfig.get()
            context = RunContext(
                output_dir=Path(hydra.runtime.output_dir),
                overrides=tuple(hydra.overrides.task),
                job_num=0 if OmegaConf.is_missing(hydra.job, "num") else int(hydra.job.num),
            )
            return task(build(known.root, tree), context)
        except MbfnError as error:
            end_with(error)

    return job


def _run_hydra(job: Callable[[Any], object], known: Catalog, arguments: Sequence[str]) -> None:
    import hydra

    app = hydra.main(config_path=str(known.primary.parent), config_name=known.config_name, version_base="1.3")(job)
    with _argv(arguments):
        app()


@contextmanager
def _argv(arguments: Sequence[str]) -> Iterator[None]:
    """The command line as Hydra is to read it."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _job_name() -> str:
    """`train` for `python -m mbfn.train`."""
    program = Path(sys.argv[0])
    return program.parent.name if program.name == "__main__.py" else program.stem


def end_with(error: MbfnError) -> NoReturn:
    """Print the error's lines, what it has to show below them, and end this process with its exit code."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.stderr.write(getattr(error, "detail", ""))
    sys.exit(error.exit_code)
