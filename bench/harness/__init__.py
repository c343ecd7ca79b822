"""How a piece of work is checked, timed and stored: nothing here knows what is measured, or whose work it is."""
