"""Measuring a model: retrieval both ways, text queries, zero-shot classification."""
