"""Selectors: which of the tokens held a query reads."""
