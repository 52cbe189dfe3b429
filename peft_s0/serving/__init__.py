"""Many tasks on one model as a service: requests that are answered together, from Python or over HTTP."""

from .engine import BusyError, ClosedError, Completion, Engine, Request, TooLongError, UnknownTaskError

__all__ = ["BusyError", "ClosedError", "Completion", "Engine", "Request", "TooLongError", "UnknownTaskError"]
