"""The log has one line per reason and minute, the metrics count every refusal."""

from __future__ import annotations

import logging

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"
CLOSING = HEAD + b"Connection: close\r\n"


def refusal_log(proxy, reason):
    return proxy.metric("tokencake_proxy_refusals_total", reason=reason)


# --- the log --------------------------------------------------------------------------------------


def test_many_refusals_of_one_kind_are_one_log_line_and_are_all_counted(engine, proxy, exchange_bytes, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(20):
            exchange_bytes(proxy.port, b"no HTTP at all\r\n\r\n")
            exchange_bytes(proxy.port, CLOSING.replace(b"/v1/completions", b"/secret%0apath") + b"\r\n")

    own = [record.getMessage() for record in caplog.records if record.name.startswith("tokencake_proxy")]
    # Nothing that the client sent is shown.
    assert sorted(own) == ["refused with 400 bad_request: 127.0.0.1", "refused with 404 not_forwarded: 127.0.0.1"]
    assert (refusal_log(proxy, "bad_request"), refusal_log(proxy, "not_forwarded")) == (20, 20)
