"""Adapters in the formats of other engines: one module an engine."""
