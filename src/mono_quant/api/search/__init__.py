"""A search for the cheapest precision of each layer that keeps to a budget."""

from mono_quant.api.search.run import search_precision
from mono_quant.report.search import SearchPoint, SearchReport

__all__ = ["SearchPoint", "SearchReport", "search_precision"]
