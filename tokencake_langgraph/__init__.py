"""The LangChain and LangGraph client: `ChatTokencake` replaces `ChatOpenAI` and tells vLLM about its agents."""

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

# Here and not in the model's constructor: the first model may be created inside a run.
install()
