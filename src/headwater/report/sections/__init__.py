"""The sections of the page, in their order; each says what it shows or, where its stage is missing, how to run it."""

from headwater.report.sections.act import acting
from headwater.report.sections.base import Context
from headwater.report.sections.behavior import behavior
from headwater.report.sections.circuit import circuit, strength
from headwater.report.sections.heads import heads
from headwater.report.sections.history import reading, when
from headwater.report.sections.localize import attribution, patching
from headwater.report.sections.provenance import other, provenance
from headwater.report.sections.verdict import ledger, verdict

SECTIONS = (
    verdict,
    ledger,
    behavior,
    patching,
    attribution,
    circuit,
    strength,
    heads,
    when,
    reading,
    acting,
    other,
    provenance,
)

__all__ = ["SECTIONS", "Context"]
