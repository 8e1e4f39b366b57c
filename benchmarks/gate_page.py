"""Sections of a page that benchmarks write, between two marks each; what stands around them is written by hand."""

from pathlib import Path


def write_section(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks of ``name``; the page gets them at its end where it has none."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, mark, rest = (page.read_text(encoding="utf-8") if page.is_file() else "").partition(start)
    behind = rest.partition(end)[2] if mark else "\n"
    separator = "" if mark or not before else "\n"
    page.write_text(f"{before}{separator}{start}\n\n{text}\n\n{end}{behind}", encoding="utf-8")
