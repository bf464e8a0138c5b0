"""Copies of KV blocks between device and host memory."""
