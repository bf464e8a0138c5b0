"""Policies that can be chosen by name, and their registries."""
