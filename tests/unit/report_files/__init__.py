"""Made-up result files of a whole run, for the tests of the report and the model card."""

from tests.unit.report_files.artifact import BLOCKS, LINEARS, calibration, check, manifest, plan, served
from tests.unit.report_files.quality import around, by_token, evaluation, long_context, sensitivity, tasks
from tests.unit.report_files.speed import bench, stability
from tests.unit.report_files.whole import gates, mitigation, sweep, write_run

__all__ = [
    "BLOCKS",
    "LINEARS",
    "around",
    "bench",
    "by_token",
    "calibration",
    "check",
    "evaluation",
    "gates",
    "long_context",
    "manifest",
    "mitigation",
    "plan",
    "sensitivity",
    "served",
    "stability",
    "sweep",
    "tasks",
    "write_run",
]
