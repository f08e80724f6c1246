"""The options --cluster and --working-dir, declared once for all verbs that work on data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pipelines.jobs.request import Given, check_address, command, environment


def declared(
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run this as a job of the Ray cluster at http://HOST:8265; paths must be s3:// or below --data.",
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With --cluster: upload DIR and run its code; default: the sdan that the nodes have."
        ),
    ] = None,
) -> None:
    """Declares the two options; never called."""


def options() -> list[Any]:
    """The two options as Typer makes them, for a verb's command."""
    app = typer.Typer(add_completion=False)
    app.command()(declared)
    return [one for one in typer.main.get_command(app).params if one.name in ("cluster", "working_dir")]


class ClusterCommand(TyperCommand):
    """A verb that, with --cluster, submits itself instead of running here."""

    announce: Callable[[Callable[[], str] | str], None] = staticmethod(lambda kept: None)
    """Takes what to say if the command is interrupted from now on."""

    def __init__(self, *args: Any, params: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, params=[*(params or []), *options()], **kwargs)

    def invoke(self, ctx: Any) -> Any:
        address, working_dir = ctx.params.pop("cluster"), ctx.params.pop("working_dir")
        if address is None:
            if working_dir is not None:
                from pipelines.jobs.request import ClusterRequestError

                raise ClusterRequestError("--working-dir: expected with --cluster ADDRESS, got it alone; add --cluster")
            return super().invoke(ctx)
        raise typer.Exit(self._submit(ctx, check_address(address), working_dir))

    def _submit(self, ctx: Any, address: str, working_dir: Path | None) -> int:
        """Submit the command and follow it; returns its exit code."""
        data = str(ctx.parent.params["data"]) if _was_given(ctx.parent, "data") else None
        text = command(ctx.info_name, given(self, ctx), data=data, working_dir=working_dir)
        env_vars = environment(dict(os.environ))
        type(self).announce("no job was submitted")
        from pipelines.jobs.submit import submit

        job = submit(address, text, working_dir=working_dir, env_vars=env_vars)
        type(self).announce(job.how_to_go_on)
        print(f"job {job.identifier} at {address}; Ctrl-C stops following it, not the job", file=sys.stderr, flush=True)
        return job.follow(_write)


def given(verb: TyperCommand, ctx: Any) -> list[Given]:
    """The parameters of a verb that the user gave, in the order of its help."""
    found = []
    for parameter in verb.params:
        name = parameter.name or ""
        if name not in ctx.params or not _was_given(ctx, name) or ctx.params[name] is None:
            continue
        value = ctx.params[name]
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        option = parameter.opts[0] if parameter.param_type_name == "option" else None
        flag = bool(getattr(parameter, "is_flag", False))
        if not flag or value:
            found.append(Given(name, option, values, flag))
    return found


def _was_given(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
