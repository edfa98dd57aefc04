"""Where everything lies in an output: every path and folder name, and nothing else."""

REPORT = "report.html"
COMPARISON = "comparison.html"
