"""``python -m motrt``: the same program as ``motrt`` and ``python cli.py``."""

from motrt.cli import main

if __name__ == "__main__":
    main(prog_name="motrt")
