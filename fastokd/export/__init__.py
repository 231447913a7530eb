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
from fastokd.export.prediction import Prediction, find_images, predict_files
from fastokd.export.preprocessing import preprocess
from fastokd.export.record import student_record
from fastokd.export.state_dict import write_student
from fastokd.export.weights import load_weights, strip_wrappers

__all__ = [
    "Comparison",
    "Export",
    "ExportFormat",
    "Prediction",
    "check_same_logits",
    "compare_logits",
    "export_student",
    "find_export",
    "find_images",
    "get_format",
    "list_formats",
    "load_student",
    "load_weights",
    "measure_accuracy",
    "measure_metrics",
    "open_export",
    "predict_files",
    "preprocess",
    "strip_wrappers",
    "student_record",
    "write_student",
]
