"""Where a solved model goes: one file per format, written as blocks finish."""
