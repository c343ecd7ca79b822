"""Whole data sets: `fastsal.evaluate`, which writes results into a folder, and `fastsal.load`, which reads them."""
