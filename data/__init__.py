"""Batches of user histories, the sources that make or read them, and the loader that feeds a rank."""
