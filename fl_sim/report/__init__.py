"""Reports of finished runs: `summary.json` as a value, tables over runs, and one HTML page."""

from fl_sim.report.against import against, beside
from fl_sim.report.explanation import explanation
from fl_sim.report.export import FORMATS
from fl_sim.report.groups import grouped
from fl_sim.report.page import write_page, write_report
from fl_sim.report.pruned import effect, pruned_table
from fl_sim.report.same_data import other_data
from fl_sim.report.small_models import require_small, small_models, small_table
from fl_sim.report.summary import Report, Unfinished
from fl_sim.report.summary_numbers import ModelFacts, against_dense, summarise
from fl_sim.report.table import comparison, estimates, floors, over_seeds, per_run, replayed

__all__ = [
    "FORMATS",
    "ModelFacts",
    "Report",
    "Unfinished",
    "against",
    "against_dense",
    "beside",
    "comparison",
    "effect",
    "estimates",
    "explanation",
    "floors",
    "grouped",
    "other_data",
    "over_seeds",
    "per_run",
    "pruned_table",
    "replayed",
    "require_small",
    "small_models",
    "small_table",
    "summarise",
    "write_page",
    "write_report",
]
