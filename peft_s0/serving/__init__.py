"""Many tasks on one model as a service: requests that are answered together, from Python or over HTTP."""

from ..bank import UnknownTaskError
from .engine import BusyError, ClosedError, Completion, Engine, Request, TooLongError

__all__ = ["BusyError", "ClosedError", "Completion", "Engine", "Request", "TooLongError", "UnknownTaskError"]
