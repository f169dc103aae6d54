"""One chart function a kind of Result, in Altair; `Result.chart()` finds them here by the kind's name."""

from headwater.report.charts.scores import attribution, strongest_nodes
from headwater.report.charts.behaviors import behavior_report, canary, margins
from headwater.report.charts.circuits import circuit, faithfulness, null
from headwater.report.charts.claims import effect, heads, ledger
from headwater.report.charts.patches import patching

KINDS = ("behavior_report", "patching", "attribution", "circuit", "faithfulness", "null", "effect", "heads", "ledger")

__all__ = [
    "KINDS",
    "attribution",
    "behavior_report",
    "canary",
    "circuit",
    "effect",
    "faithfulness",
    "heads",
    "ledger",
    "margins",
    "null",
    "patching",
    "strongest_nodes",
]
