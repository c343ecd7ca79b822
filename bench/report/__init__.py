"""How stored figures are shown: tables, plots, docs/benchmarks.md and the README's part. Nothing there is typed by hand."""
