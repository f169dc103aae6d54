"""The offline page of a run, and one chart function a kind of Result."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    if name == "write_report":
        from headwater.report.page import write_report

        return write_report
    raise AttributeError(f"module 'headwater.report' has no attribute {name!r}")
