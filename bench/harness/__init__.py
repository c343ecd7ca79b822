"""How a piece of work is checked, timed and kept: nothing here knows what is measured, or whose work it is."""
