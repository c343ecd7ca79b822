"""Pages to look at: what the report of a data set and that of the study share, and the former, `fastsal.report`.

The package is not called `report`, since that is the public function, and a module of this name would hide it.
"""
