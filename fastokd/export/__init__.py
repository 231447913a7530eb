"""Export of students to files that stock libraries load, and loading them again."""

from fastokd.export.check import (
    Comparison,
    check_same_logits,
    compare_logits,
    measure_accuracy,
    measure_metrics,
)
from fastokd.export.files import Export, export_student, find_export, load_student, open_export
from fastokd.export.formats import ExportFormat, get_format, list_formats
from fastokd.export.record import student_record
from fastokd.export.state_dict import write_student
from fastokd.export.weights import load_weights, strip_wrappers

__all__ = [
    "Comparison",
    "Export",
    "ExportFormat",
    "check_same_logits",
    "compare_logits",
    "export_student",
    "find_export",
    "get_format",
    "list_formats",
    "load_student",
    "load_weights",
    "measure_accuracy",
    "measure_metrics",
    "open_export",
    "strip_wrappers",
    "student_record",
    "write_student",
]
