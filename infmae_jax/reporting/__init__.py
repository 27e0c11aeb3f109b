"""The report of a run: what its folder says, drawn as one self-contained HTML page."""
