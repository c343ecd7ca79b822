"""How stored figures are shown: tables, plots, pages of figures and the README's part. Nothing there is typed by hand."""
