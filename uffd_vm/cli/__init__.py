"""The command `uffd-vm`, also `python -m uffd_vm`. Each command's work is in a module of its name."""

from __future__ import annotations

import textwrap

import click

from uffd_vm.errors import UffdVmError

__all__ = ["main"]


class _Commands(click.Group):
    """Prints the library's own errors as one line, as they say what to do; others are tracebacks."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UffdVmError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="uffd_vm", prog_name="uffd-vm")
def main() -> None:
    """Lazy memory through userfaultfd: look at it, and find out what this machine allows."""


@main.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.pass_context
def doctor_command(ctx: click.Context, as_json: bool) -> None:
    """Say what works here, what is missing, and the exact cure.

    Exit status: 0 all is there, 1 something is degraded or refused, 2 userfaultfd cannot be used.
    """
    from uffd_vm.cli import doctor

    report = doctor.examine()
    if as_json:
        click.echo(doctor.as_json(report))
    else:
        doctor.show(report)
    ctx.exit(report.exit_code)


class _TableCommand(click.Command):
    """Its help lists the words that --explain takes, from the policy itself."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from uffd_vm.cli import table

        with formatter.section("Words of --explain (docs/design.md says what they mean)"):
            for what, names in table.words().items():
                lines = textwrap.wrap(" ".join(names), formatter.width - 11, break_on_hyphens=False)
                formatter.write(f"  {what:<9}" + ("\n" + 11 * " ").join(lines) + "\n")
        with formatter.section("Examples"):
            for example in (
                "uffd-vm table --explain missing read shared-file none",
                "uffd-vm table --explain wp write anon write-protected tracked",
            ):
                formatter.write_text(example)


@main.command("table", cls=_TableCommand)
@click.option(
    "--explain",
    nargs=4,
    metavar="KIND ACCESS BACKING PTE",
    help="Walk one decision: the functions of mm/memory.c, the row, the order of work.",
)
@click.argument("flags", nargs=-1)
def table_command(explain: tuple[str, str, str, str] | None, flags: tuple[str, ...]) -> None:
    """Print the fault table, or with --explain one decision of it, step by step."""
    from uffd_vm.cli import table

    if explain is None:
        if flags:
            raise click.UsageError(
                f"{flags[0]!r}: words are for --explain KIND ACCESS BACKING PTE [FLAGS]..."
            )
        click.echo(table.render_table())
        return
    try:
        click.echo(table.explain(*explain, flags=flags))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
