"""Who holds what: samples over tars and ranks, state over ranks. Imports nothing of the other packages."""
