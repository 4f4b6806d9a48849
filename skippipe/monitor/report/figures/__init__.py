"""Figures of the reports, drawn with plotly: curves, charts over time, maps."""
