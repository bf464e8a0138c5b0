"""The LangChain / LangGraph client: swap `ChatOpenAI` for `ChatTokencake`, and vLLM knows its agents."""

try:
    from tokencake_langgraph.chat_model import ChatTokencake
    from tokencake_langgraph.handler import TokencakeHandler, install
    from tokencake_langgraph.sender import SenderStats
    from tokencake_langgraph.senders import flush, stats
    from tokencake_langgraph.tool_span import tool_span
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"tokencake_langgraph needs {error.name}; install it with: pip install 'tokencake[langgraph]'", name=error.name
    ) from error

__all__ = ["ChatTokencake", "SenderStats", "TokencakeHandler", "flush", "stats", "tool_span"]

# Here and not in the model's constructor: a run may begin before the first model is made, in one of its nodes.
install()
