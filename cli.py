"""The command line: parse, call one function, print where the result is. A placeholder: the commands come with their rooms."""

from importlib.metadata import version

import click


@click.group()
@click.version_option(version("motrt"), prog_name="motrt", message="%(prog)s %(version)s")
def main() -> None:
    """Export, run and prove routed text/audio expert models."""


if __name__ == "__main__":
    main(prog_name="motrt")
