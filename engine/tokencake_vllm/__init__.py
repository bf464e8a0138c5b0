"""The plug-in for unmodified vLLM."""
