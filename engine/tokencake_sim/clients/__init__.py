"""Modelled clients: applications that call the engine, and the hints that they send."""
