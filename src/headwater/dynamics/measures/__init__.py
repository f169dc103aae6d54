"""What is measured of every checkpoint, by name: each a function of a `Probe` that gives rows.

    @measures.register("my_measure")
    def my_measure(probe: Probe) -> list[Row]:
        return [row("", some_number(probe.model))]

Keywords of the function are the measure's settings. A measure may also `probe.keep` tensors, and have an `across` (see
`acrosses`) that compares what was kept over steps. Intervals are 95%, over sequences or prompts.
"""

from headwater.dynamics.measures.base import Across, Measure, Probe, Row, acrosses, measures, over, row

__all__ = ["Across", "Measure", "Probe", "Row", "acrosses", "measures", "over", "row"]
