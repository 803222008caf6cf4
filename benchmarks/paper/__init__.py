"""The paper in small: pi-Flow (arXiv 2510.14974) on the handwritten digits, against baselines of the same budget.

    python -m benchmarks.paper core     # the stated core: 11 students of digits and one of the 2D checkerboard
    python -m benchmarks.paper full     # every cell with every seed: hours, goes on where it was stopped
    python -m benchmarks.paper report   # tables, plots and text from what is stored

Every cell is trained and measured once and kept under outputs/paper; benchmarks/results/paper.json collects them.
"""
