"""The LangChain / LangGraph client."""
