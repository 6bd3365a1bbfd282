"""Measuring methods on photographs: a model over temperatures, and any method by the protocol of the NTIRE challenge."""

from ncsr_fast.evaluation.bootstrap import Interval, mean_interval, paired_interval
from ncsr_fast.evaluation.comparison import Comparison, compare
from ncsr_fast.evaluation.low_light import LowLightEvaluation
from ncsr_fast.evaluation.methods import Bicubic, Flow, Folder, Generator, Method, load_method
from ncsr_fast.evaluation.names import PROTOCOLS, Originals, Protocol, find_originals, find_samples
from ncsr_fast.evaluation.protocol import ImageMeasurement, evaluate_method
from ncsr_fast.evaluation.reports import Report, read_report
from ncsr_fast.evaluation.temperatures import Evaluation, Scores, evaluate, matching_crop, table, timed_samples

__all__ = [
    "PROTOCOLS",
    "Bicubic",
    "Comparison",
    "Evaluation",
    "Flow",
    "Folder",
    "Generator",
    "ImageMeasurement",
    "Interval",
    "LowLightEvaluation",
    "Method",
    "Originals",
    "Protocol",
    "Report",
    "Scores",
    "compare",
    "evaluate",
    "evaluate_method",
    "find_originals",
    "find_samples",
    "load_method",
    "matching_crop",
    "mean_interval",
    "paired_interval",
    "read_report",
    "table",
    "timed_samples",
]
