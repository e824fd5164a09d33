"""The report: one self-contained HTML file."""

from lightning_samrefine.reporting.report.gallery_entries import Gallery
from lightning_samrefine.reporting.report.page import ReportSection, write_report

__all__ = ["Gallery", "ReportSection", "write_report"]
