"""From the result files of a run to one page that a user acts on, in HTML and in Markdown."""

from halfbyte.report.build import build_report

__all__ = ["build_report"]
